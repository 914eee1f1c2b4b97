"""How many trials an hour, and how good the best one: ours beside rl_zoo3, on the same machine.

    python benchmarks/sweep.py                                   # everything, as committed; an hour
    python benchmarks/sweep.py --env CartPole-v1 --mode random   # renews one row of the results

Twelve trials of 49,152 steps each, two at a time, first by random search without early stopping, then with
each one's own early stopping.

- Ours: `orion hunt` with two workers on Orion's embedded PickledDB, the shipped space `classic-control`, 4
  epochs of 12,288 steps, 10 evaluation episodes after each (and of the untrained policy). Early stopping is
  ASHA's. With `--warm` trials, and without.
- rl_zoo3: `python -m rl_zoo3.train --optimize --n-jobs 2 --num-threads 1`, its own space for PPO, one
  evaluation of 5 episodes at the end as by its default for so few steps. Early stopping is its default
  sampler and pruner, with 4 evaluations in a trial, without which its pruner never acts.

Wall seconds are of the whole command, imports and database included (rl_zoo3's pictures are switched off).
Trials per hour count all trials, stopped early or not. The best trial by each one's own evaluation is judged
by the same rule: its saved policy, most probable actions, 100 fresh episodes of gymnasium's environment with
the same seeds. Ours runs three times (medians) with another seed of the search each time; rl_zoo3 once,
because it takes ten minutes.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import numpy as np
import peers

from ppo_hpo import PPO, TrialConfig, yamlio
from ppo_hpo.config import EnvConfig
from ppo_hpo.envs import make, probe
from ppo_hpo.experiment import open_experiment, statistics_of
from ppo_hpo.space import space_path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
BIN = Path(sys.executable).parent
ENVIRONMENTS = ("CartPole-v1", "Pendulum-v1")
MODES = ("random", "early stopping")
TRIALS, WORKERS = 12, 2
EPOCHS, STEPS = 4, 12288
EPISODES, FIRST_SEED = 100, 2**31
REPEATS = 3
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def _environment() -> dict[str, str]:
    return {**os.environ, **ONE_THREAD, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


# ------------------------------------------------------------------------------ ours


def ours(env: str, mode: str, seed: int, *, warm: bool) -> dict[str, Any]:
    """One sweep by `orion hunt`."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        text = space_path("classic-control").read_text(encoding="utf-8")
        epochs = f"orion~fidelity(1, {EPOCHS}, base=2)" if mode != "random" else str(EPOCHS)
        for key, value in (
            ("id", env),
            ("epochs", epochs),
            ("max_epochs", EPOCHS),
            ("steps_per_epoch", STEPS),
        ):
            text, changed = re.subn(rf"(?m)^  {key}: .*$", f"  {key}: {value}", text)
            assert changed == 1, key
        (directory / "space.yaml").write_text(text)
        algorithm = {"random": {"seed": seed}} if mode == "random" else {"asha": {"seed": seed}}
        configuration = {
            "experiment": {
                "max_trials": TRIALS,
                "algorithm": algorithm,
                "working_dir": str(directory / "trials"),
            },
            "storage": {
                "type": "legacy",
                "database": {"type": "pickleddb", "host": str(directory / "orion.pkl")},
            },
            "worker": {
                "n_workers": WORKERS,
                "executor": "joblib",
                "executor_configuration": {"backend": "threading"},
            },
        }
        (directory / "orion.yaml").write_text(yamlio.dump(configuration))
        command = [BIN / "orion", "hunt", "-n", "sweep", "-c", "orion.yaml", "ppo-hpo", "run"]
        command += [*(["--warm"] if warm else []), "--config", "space.yaml", "--device", "cpu"]
        started = time.monotonic()
        subprocess.run(command, cwd=directory, env=_environment(), check=True, capture_output=True)
        seconds = time.monotonic() - started
        trials = open_experiment("sweep", str(directory / "orion.yaml")).fetch_trials_by_status("completed")
        best = min(trials, key=lambda trial: trial.objective.value)
        config = TrialConfig.from_mapping(yamlio.load(Path(best.working_dir) / "config.yaml"))
        task = PPO.from_config(config, "cpu", storage=best.working_dir, uid=best.id)
        return {
            "seconds": seconds,
            "trials": len(trials),
            "steps": sum(statistics_of(trial)["env_steps_here"] for trial in trials),
            "training_seconds": sum(statistics_of(trial)["wall_seconds"] for trial in trials),
            "return": judge(task, env),
            "claimed": -best.objective.value,
        }


def judge(task: PPO, env_id: str) -> float:
    """The policy's mean return in `EPISODES` fresh episodes, as `peers/zoo_judge.py` does it."""
    config = EnvConfig(id=env_id, n_envs=1)
    info, env = probe(config), make(config)
    agent, returns = task.agent, []
    for episode in range(EPISODES):
        obs, _ = env.reset(seed=FIRST_SEED + episode)
        total, done = 0.0, False
        while not done:
            action = agent.learner.act(agent.normalizer(np.asarray(obs)[None]), None)
            obs, reward, terminated, truncated, _ = env.step(info.to_env(action)[0])
            total += float(reward)
            done = terminated or truncated
        returns.append(total)
    env.close()
    return statistics.fmean(returns)


# --------------------------------------------------------------------------- rl_zoo3


def zoo(env: str, mode: str) -> dict[str, Any]:
    """One sweep by rl_zoo3."""
    # What its tables need wants an older python-dateutil than Orion's packages do.
    python = peers.python_of("rl_zoo3", constrained=False)
    steps = EPOCHS * STEPS
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), "-m", "rl_zoo3.train", "--algo", "ppo", "--env", env, "-n", str(steps)]
        command += ["-optimize", "--n-jobs", str(WORKERS), "--num-threads", "1", "--device", "cpu"]
        command += ["--n-trials", str(TRIALS), "--no-optim-plots", "--seed", "1", "-f", f"{folder}/logs"]
        command += ["--optimization-log-path", f"{folder}/models", "--eval-episodes", "5"]
        if mode == "random":
            command += ["--sampler", "random", "--pruner", "none"]
        else:
            command += ["--n-evaluations", str(EPOCHS)]
        started = time.monotonic()
        done = subprocess.run(
            command, cwd=folder, env=_environment(), capture_output=True, text=True, check=False
        )
        seconds = time.monotonic() - started
        if done.returncode:
            raise SystemExit(f"rl_zoo3 ended with code {done.returncode}:\n{done.stderr[-3000:]}")
        (report,) = glob.glob(f"{folder}/logs/ppo/report_*.csv")
        arguments = [env, report, f"{folder}/models", str(EPISODES), str(FIRST_SEED)]
        judged = subprocess.run(
            [str(python), str(HERE / "peers" / "zoo_judge.py"), *arguments],
            capture_output=True, text=True, check=True, env=_environment(),
        )  # fmt: skip
        found = json.loads(judged.stdout.splitlines()[-1])
    # Its random trials all train to the end; with a pruner it does not say how far each one came.
    return {"seconds": seconds, "steps": TRIALS * steps if mode == "random" else None, **found}


# ------------------------------------------------------------------------------ both


def compare(env: str, mode: str) -> dict[str, Any]:
    """Both on one environment and in one mode."""
    row: dict[str, Any] = {"machine": machine.describe()}
    for name, warm in (("ours_warm", True), ("ours", False)):
        runs = [ours(env, mode, seed, warm=warm) for seed in range(1, REPEATS + 1)]
        row[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        row[name]["returns"] = [run["return"] for run in runs]
        print(f"  {env}, {mode}, {name}: {row[name]}", flush=True)
    row["rl_zoo3"] = zoo(env, mode)
    print(f"  {env}, {mode}, rl_zoo3: {row['rl_zoo3']}", flush=True)
    for contender in ("ours_warm", "ours", "rl_zoo3"):
        found = row[contender]
        found["trials_per_hour"] = 3600.0 * found["trials"] / found["seconds"]
        found["steps_per_second"] = found["steps"] / found["seconds"] if found["steps"] else None
    row["ratio"] = row["ours_warm"]["trials_per_hour"] / row["rl_zoo3"]["trials_per_hour"]
    row["ratio_plain"] = row["ours"]["trials_per_hour"] / row["rl_zoo3"]["trials_per_hour"]
    return row


LABELS = {"ours_warm": "ours, `--warm`", "ours": "ours", "rl_zoo3": "rl_zoo3"}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line for each contender."""
    lines = [
        "| environment, search | | seconds | trials | trials/hour | times rl_zoo3 | steps/s "
        "| best return, 100 episodes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        for contender, label in LABELS.items():
            found = row[contender]
            ratio = found["trials_per_hour"] / row["rl_zoo3"]["trials_per_hour"]
            speed = f"{found['steps_per_second']:,.0f}" if found["steps_per_second"] else "not told"
            lines.append(
                f"| {name} | {label} | {found['seconds']:.0f} | {found['trials']:.0f} "
                f"| {found['trials_per_hour']:,.0f} | {ratio:.1f} | {speed} | {found['return']:.1f} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    arguments = parser.parse_args()
    path = RESULTS / "sweep.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    for env in arguments.env:
        for mode in arguments.mode:
            stored[f"{env}, {mode}"] = compare(env, mode)
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(stored, indent=1) + "\n")
            (RESULTS / "sweep.md").write_text(table(stored) + "\n")
    print(table(stored))
    return 0


if __name__ == "__main__":
    sys.exit(main())

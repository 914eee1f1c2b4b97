"""How many trials an hour, and how good the best one: ours beside rl_zoo3, on the same machine.

    python benchmarks/sweep.py                                   # everything, as committed; an hour
    python benchmarks/sweep.py --env CartPole-v1 --mode random   # renews one part of the results
    python benchmarks/sweep.py --contender ours ours_warm        # renews these and keeps rl_zoo3's

Twelve trials of 49,152 steps each, two at a time, first by random search without early stopping, then with
each one's own early stopping.

- Ours: `orion hunt` with two workers on Orion's embedded PickledDB, the shipped space `classic-control`, 4
  epochs of 12,288 steps, 10 evaluation episodes after each (and of the untrained policy). Early stopping is
  ASHA's. A command for each trial, the same with `--preload` (a server starts with each sweep and ends with
  it), and from Python, by `workon` with two processes (Orion's pool executor).
- rl_zoo3: `python -m rl_zoo3.train --optimize --n-jobs 2 --num-threads 1`, its own space for PPO, one
  evaluation of 5 episodes at the end as by its default for so few steps. Early stopping is its default
  sampler and pruner, with 4 evaluations in a trial, without which its pruner never acts.

Wall seconds are of the whole command, imports and database included (rl_zoo3's pictures are switched off).
CPU seconds are those of all its processes; what else the machine does changes them little, so the ratio is
given by the clock and by CPU time, and "others" is what other processes took meanwhile. Trials per hour
count all trials, stopped early or not. Steps are those up to a trial's last evaluation: rl_zoo3 ends the
rollout in which it reaches its number of steps. The best trial by each one's own evaluation is judged by
the same rule: its saved policy, most probable actions, 100 fresh episodes of gymnasium's environment with
the same seeds. Ours runs three times (medians) with another seed of the search each time; rl_zoo3 once,
because it takes ten minutes.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np
import peers
from usage import timed

from ppo_hpo import PPO, TrialConfig
from ppo_hpo.envs.make import make, probe
from ppo_hpo.orion.experiment import open_experiment, statistics_of
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import EnvConfig
from ppo_hpo.spec.space import space_path

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


def _environment(servers: Path | None = None) -> dict[str, str]:
    """Of what is measured: one thread, and where warm servers live."""
    own = {**os.environ, **ONE_THREAD, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return own if servers is None else {**own, "XDG_RUNTIME_DIR": str(servers)}


# ------------------------------------------------------------------------------ ours


def ours(env: str, mode: str, seed: int, way: str) -> dict[str, Any]:
    """One sweep, `way` being ``ours`` or ``ours_warm`` (both `orion hunt`) or ``ours_python``."""
    directory = Path(tempfile.mkdtemp())
    try:
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
        if way == "ours_python":
            command = [sys.executable, __file__, "--inside", str(directory)]
        else:
            command = [str(BIN / "orion"), "hunt", "-n", "sweep", "-c", "orion.yaml", "ppo-hpo", "run"]
            command += [
                *(["--preload"] if way == "ours_warm" else []),
                "--config",
                "space.yaml",
                "--device",
                "cpu",
            ]
        used = timed(command, directory, _environment(directory))
        trials = open_experiment("sweep", str(directory / "orion.yaml")).fetch_trials_by_status("completed")
        best = min(trials, key=lambda trial: trial.objective.value)
        config = TrialConfig.from_mapping(yamlio.load(Path(best.working_dir) / "config.yaml"))
        task = PPO.from_config(config, "cpu", storage=best.working_dir, uid=best.id)
        return {
            **used,
            "trials": len(trials),
            "steps": sum(statistics_of(trial)["env_steps_here"] for trial in trials),
            # Of `fit`: rollouts, updates, evaluations and checkpoints; two trials at a time.
            "training_seconds": sum(statistics_of(trial)["wall_seconds"] for trial in trials),
            "return": judge(task, env),
            "claimed": -best.objective.value,
        }
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def inside(directory: Path) -> None:
    """The sweep of a folder from Python."""
    from orion.client import build_experiment

    from ppo_hpo import get_space, objective

    configuration = yamlio.load(directory / "orion.yaml")
    space = str(directory / "space.yaml")
    client = build_experiment(
        "sweep", space=get_space(space), storage=configuration["storage"], **configuration["experiment"]
    )
    with client.tmp_executor("poolexecutor", n_workers=WORKERS):
        client.workon(objective(space, device="cpu"), trial_arg="trial", n_workers=WORKERS)


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
        used = timed(command, Path(folder), _environment())
        (report,) = glob.glob(f"{folder}/logs/ppo/report_*.csv")
        arguments = [env, report, f"{folder}/models", str(EPISODES), str(FIRST_SEED)]
        judged = subprocess.run(
            [str(python), str(HERE / "peers" / "zoo_judge.py"), *arguments],
            capture_output=True, text=True, check=True, env=_environment(),
        )  # fmt: skip
        found = json.loads(judged.stdout.splitlines()[-1])
    return {**used, **found}


# ------------------------------------------------------------------------------ both


def measure(env: str, mode: str, contender: str) -> dict[str, Any]:
    """One contender on one environment and in one mode."""
    if contender == "rl_zoo3":
        found = zoo(env, mode)
    else:
        runs = [ours(env, mode, seed, contender) for seed in range(1, REPEATS + 1)]
        found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        found["runs"] = runs
    found["trials_per_hour"] = 3600.0 * found["trials"] / found["seconds"]
    found["trials_per_cpu_hour"] = 3600.0 * found["trials"] / found["cpu_seconds"]
    found["steps_per_second"] = found["steps"] / found["seconds"]
    return found


LABELS = {
    "ours_warm": "ours, `--preload`",
    "ours_python": "ours, from Python",
    "ours": "ours",
    "rl_zoo3": "rl_zoo3",
}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """One line for each contender."""
    lines = [
        "| environment, search | | seconds | CPU seconds | others' | trials | trials/hour | times rl_zoo3 "
        "| by CPU time | steps/s | best return, 100 episodes |",
        "|---" * 11 + "|",
    ]
    for name, row in rows.items():
        peer = row.get("rl_zoo3")
        for contender in (known for known in LABELS if known in row):
            found = row[contender]
            ratios = "| | "
            if peer:
                ratio = found["trials_per_hour"] / peer["trials_per_hour"]
                by_cpu = found["trials_per_cpu_hour"] / peer["trials_per_cpu_hour"]
                ratios = f"| {ratio:.1f} | {by_cpu:.1f} "
            lines.append(
                f"| {name} | {LABELS[contender]} | {found['seconds']:.0f} | {found['cpu_seconds']:.0f} "
                f"| {found['others_cpu_seconds']:.0f} | {found['trials']:.0f} "
                f"| {found['trials_per_hour']:,.0f} "
                f"{ratios}| {found['steps_per_second']:,.0f} | {found['return']:.1f} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--contender", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        inside(arguments.inside)
        return 0
    path = RESULTS / "sweep.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    for env in arguments.env:
        for mode in arguments.mode:
            row = stored.setdefault(f"{env}, {mode}", {})
            for contender in arguments.contender:
                row[contender] = measure(env, mode, contender)
                row["machine"] = machine.describe()
                print(f"  {env}, {mode}, {contender}: {row[contender]}", flush=True)
                RESULTS.mkdir(exist_ok=True)
                path.write_text(json.dumps(stored, indent=1) + "\n")
                (RESULTS / "sweep.md").write_text(table(stored) + "\n")
    print(table(stored))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How soon does tuning find a policy that is good? Ours beside rl_zoo3 and Optuna with Stable-Baselines3.

    python benchmarks/efficiency.py                                       # as committed; up to eighteen hours
    python benchmarks/efficiency.py --contender ours --env Pendulum-v1 --repetition 1    # one run more
    python benchmarks/efficiency.py --cap 60 --repetition 1 --out DIR     # a quick look at everything

Until the incumbent reaches -200 on Pendulum-v1 and 200 on LunarLander-v3, two trials at a time, three
repetitions with another seed each, an hour at most (`--cap`): a run that has not reached it by then counts as
the hour, and a ratio to it is "at least".

- Ours: `ppo-hpo sweep ENV --space SPACE --workers 2`, with its default algorithm (ASHA) and the epochs of the
  shipped space.
- rl_zoo3: `python -m rl_zoo3.train --optimize --n-jobs 2`, with its own steps for each trial, its default
  sampler (TPE), pruner (median) and number of evaluations.
- Optuna with Stable-Baselines3: `peers/optuna_sb3.py`, as Optuna's own example for reinforcement learning
  does it (TPE, median pruner, two evaluations in a trial), with the space of rl_zoo3 for PPO and two jobs.

The incumbent is the trial with the best score that the contender itself gave, among those that it has told
its study so far. Whenever it changes, the contender is stopped (SIGSTOP, all its processes), the clock too,
and the incumbent's saved policy is judged: most probable actions, 10 fresh seeds with 10 episodes each, the
same for all. So nobody pays for the judge. Steps are those of training and of the contender's own
evaluations, of the trials that have told a result by then. "Without continuing" counts for ours what the
very same trials would have taken if each promoted one had begun again: the results would be the same, to the
bit, but later.

Runs lie in `results/efficiency.json`, one for each contender, environment and repetition, written as each one
ends; a run that is there is not done again unless `--contender` asks for it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine
import numpy as np
import peers
from sweep import BIN, HERE, ONE_THREAD, RESULTS

from ppo_hpo import PPO, TrialConfig
from ppo_hpo.envs.make import make, probe
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import EnvConfig

TARGETS = {"Pendulum-v1": -200.0, "LunarLander-v3": 200.0}
SPACES = {"Pendulum-v1": "classic-control", "LunarLander-v3": "box2d"}
CONTENDERS = ("ours", "rl_zoo3", "optuna_sb3")
LABELS = {"ours": "ours", "rl_zoo3": "rl_zoo3", "optuna_sb3": "Optuna + Stable-Baselines3"}
REPETITIONS, CAP = 3, 3600.0
SEEDS, EPISODES, FIRST_SEED = 10, 10, 2**31
POLL = 0.5


@dataclass
class Found:
    """What a contender has told so far.

    Attributes:
        steps: environment steps of all trials that have told a result, with those of evaluations.
        restarting: the same if promoted trials had begun again; None for those that do not promote.
        trials: how many.
        score: the best one's, as the contender has it.
        policy: what `judge` needs of the best one.
    """

    steps: int = 0
    restarting: int | None = None
    trials: int = 0
    score: float = -np.inf
    policy: list[str] = field(default_factory=list)


@dataclass
class Run:
    """One contender on one environment, once.

    Attributes:
        reached: whether the target was.
        seconds: until then, or the cap.
        incumbents: seconds, steps, the score claimed and the return judged, of each.
    """

    contender: str
    env: str
    repetition: int
    reached: bool
    seconds: float
    steps: int
    restarting: int | None
    trials: int
    cap: float
    incumbents: list[dict[str, float]]


# --------------------------------------------------------------------- contenders


def command_of(contender: str, env: str, repetition: int, folder: Path) -> list[str]:
    """What a user would say."""
    if contender == "ours":
        return [
            str(BIN / "ppo-hpo"), "sweep", env, "--space", SPACES[env], "--workers", "2", "--device", "cpu",
            "--max-trials", "100000", "--algorithm", f"{{asha: {{seed: {repetition}}}}}", "--dir", "sweep",
        ]  # fmt: skip
    python = str(peers.python_of("rl_zoo3", constrained=False))
    if contender == "optuna_sb3":
        return [python, str(HERE / "peers" / "optuna_sb3.py"), env, str(repetition), str(folder)]
    return [
        python, "-m", "rl_zoo3.train", "--algo", "ppo", "--env", env, "-optimize", "--n-jobs", "2",
        "--n-trials", "100000", "--num-threads", "1", "--device", "cpu", "--seed", str(repetition),
        "--no-optim-plots", "-f", f"{folder}/logs", "--optimization-log-path", f"{folder}/models",
        "--storage", f"{folder}/study.log", "--study-name", "study",
    ]  # fmt: skip


def told_by_ours(folder: Path) -> Found:
    """From the trials' directories."""
    found = Found(restarting=0)
    for file in (folder / "sweep" / "trials").glob("*/results.json"):
        values = {entry["name"]: entry["value"] for entry in json.loads(file.read_text())}
        found.trials += 1
        found.steps += int(values["env_steps_here"] + values["eval_steps_here"])
        assert found.restarting is not None
        found.restarting += int(values["env_steps"] + values["eval_steps"])
        if -values["objective"] > found.score:
            found.score, found.policy = -values["objective"], [str(file.parent)]
    return found


def told_to_optuna(folder: Path) -> Found:
    """From the journal of the study: 6 sets a trial's state, of which 1 is complete and 2 pruned."""
    found = Found()
    journal = folder / "study.log"
    for line in journal.read_text().splitlines() if journal.exists() else ():
        entry = json.loads(line)
        if entry["op_code"] != 6 or entry["state"] not in (1, 2):
            continue
        trial = folder / "models" / f"trial_{entry['trial_id']}"
        found.trials += 1
        if (trial / "evaluations.npz").exists():  # not where it diverged before its first evaluation
            evaluations = np.load(trial / "evaluations.npz")
            found.steps += int(evaluations["timesteps"][-1] + evaluations["ep_lengths"].sum())
        if entry["state"] == 1 and entry["values"][0] > found.score:
            found.score, found.policy = entry["values"][0], [str(trial / "best_model.zip")]
    return found


def judge(contender: str, env: str, policy: list[str]) -> float:
    """Mean return of a saved policy in fresh episodes, by the same seeds for everybody."""
    if contender != "ours":
        python = str(peers.python_of("rl_zoo3", constrained=False))
        command = [python, str(HERE / "peers" / "zoo_play.py"), env, *policy]
        command += [str(SEEDS), str(EPISODES), str(FIRST_SEED)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, **ONE_THREAD}
        )
        return float(done.stdout.splitlines()[-1])
    (directory,) = policy
    config = TrialConfig.from_mapping(yamlio.load(Path(directory) / "config.yaml"))
    agent = PPO.from_config(config, "cpu", storage=directory, uid=Path(directory).name).agent
    one = EnvConfig(id=env, n_envs=1)
    info, playing, returns = probe(one), make(one), []
    for seed in range(SEEDS):
        for episode in range(EPISODES):
            # Each seed begins a series of episodes, as `peers/zoo_play.py` has it.
            obs, _ = playing.reset(seed=FIRST_SEED + seed if episode == 0 else None)
            total, done_ = 0.0, False
            while not done_:
                action = agent.learner.act(agent.normalizer(np.asarray(obs)[None]), None)
                obs, reward, terminated, truncated, _ = playing.step(info.to_env(action)[0])
                total += float(reward)
                done_ = terminated or truncated
            returns.append(total)
    playing.close()
    return statistics.fmean(returns)


# -------------------------------------------------------------------------- a run


def descendants(pid: int) -> list[int]:
    """A process and all that it has started (Linux)."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        parents.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """All of it, while the incumbent is judged."""
    everybody = descendants(process.pid)
    try:
        _signal(everybody, signal.SIGSTOP)
        yield
    finally:
        _signal(everybody, signal.SIGCONT)


def _signal(pids: list[int], signum: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


def run(contender: str, env: str, repetition: int, cap: float) -> Run:
    """Until the incumbent reaches the target, or the cap."""
    folder = Path(tempfile.mkdtemp())
    told = told_by_ours if contender == "ours" else told_to_optuna
    log = (folder / "log.txt").open("wb")
    process = subprocess.Popen(
        command_of(contender, env, repetition, folder),
        cwd=folder, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **ONE_THREAD},
    )  # fmt: skip
    started, paused, best, incumbents = time.monotonic(), 0.0, -np.inf, []
    try:
        while True:
            time.sleep(POLL)
            found, seconds = told(folder), time.monotonic() - started - paused
            reached = False
            if found.score > best and seconds < cap:
                best, before = found.score, time.monotonic()
                with stopped(process):
                    judged = judge(contender, env, found.policy)
                paused += time.monotonic() - before
                incumbents.append(
                    {"seconds": seconds, "steps": found.steps, "claimed": found.score, "judged": judged}
                )
                print(
                    f"  {env}, {LABELS[contender]}, {repetition}: {seconds:,.0f} s, {found.trials} trials, "
                    f"{found.steps:,} steps, incumbent {found.score:.1f}, judged {judged:.1f}",
                    flush=True,
                )
                reached = judged >= TARGETS[env]
            if reached or seconds >= cap:
                return Run(
                    contender, env, repetition, reached, min(seconds, cap), found.steps, found.restarting,
                    found.trials, cap, incumbents,
                )  # fmt: skip
            if process.poll() is not None:
                tail = (folder / "log.txt").read_text(errors="replace")[-3000:]
                raise SystemExit(f"{contender} ended with code {process.returncode}:\n{tail}")
    finally:
        _signal(descendants(process.pid), signal.SIGKILL)
        process.wait()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------- results


def table(runs: list[dict[str, Any]]) -> str:
    """Medians over the repetitions, and every run."""
    lines = [
        "| environment, target | | seconds, each | median | ours is faster | steps, each | median "
        "| ours takes fewer | trials |",
        "|---" * 9 + "|",
    ]
    for env, target in TARGETS.items():
        own = [one for one in runs if (one["env"], one["contender"]) == (env, "ours")]
        for contender in CONTENDERS:
            mine = [one for one in runs if (one["env"], one["contender"]) == (env, contender)]
            if not mine:
                continue
            mine.sort(key=lambda one: int(one["repetition"]))
            lines.append(_line(f"{env}, {target:.0f}", LABELS[contender], mine, own, "steps"))
            if contender == "ours":
                lines.append(
                    _line(f"{env}, {target:.0f}", "ours, without continuing", mine, own, "restarting")
                )
    return "\n".join(lines)


def _line(name: str, label: str, mine: list[dict[str, Any]], own: list[dict[str, Any]], steps: str) -> str:
    at_least = "" if all(one["reached"] for one in mine) else "at least "

    def each(key: str) -> str:
        return ", ".join(f"{'' if one['reached'] else '> '}{one[key]:,.0f}" for one in mine)

    def ratio(key: str, other: str) -> str:
        if not own:
            return "-"
        value = statistics.median(one[key] for one in mine) / statistics.median(one[other] for one in own)
        return f"{at_least}{value:.1f}x"

    # Steps of a run that did not end are those of the trials that had, which says nothing of the target.
    fewer = ratio(steps, "steps") if not at_least else "-"
    seconds = [each("seconds"), f"{statistics.median(one['seconds'] for one in mine):,.0f}"]
    seconds.append(ratio("seconds", "seconds"))
    if steps == "restarting":
        seconds = ["-", "-", "-"]
    median = f"{statistics.median(one[steps] for one in mine):,.0f}"
    trials = ", ".join(str(one["trials"]) for one in mine)
    cells = [name, label, *seconds, each(steps), median if not at_least else "-", fewer, trials]
    return "| " + " | ".join(cells) + " |"


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    """The incumbent's judged return against the clock, every run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TARGETS), figsize=(11, 4))
    for axis, (env, target) in zip(axes, TARGETS.items(), strict=True):
        for color, contender in zip(("tab:red", "tab:blue", "tab:green"), CONTENDERS, strict=True):
            for number, one in enumerate(
                one for one in runs if (one["env"], one["contender"]) == (env, contender)
            ):
                seconds = [item["seconds"] for item in one["incumbents"]] + [one["seconds"]]
                judged = [item["judged"] for item in one["incumbents"]]
                judged = [*judged, judged[-1]] if judged else [np.nan]
                axis.step(seconds, judged, where="post", color=color,
                          label=LABELS[contender] if number == 0 else None)  # fmt: skip
                # Where it ended: one that reached the target by its first incumbent has no line.
                axis.plot(seconds[-1], judged[-1], marker="o" if one["reached"] else "x", color=color)
        axis.axhline(target, color="black", linewidth=0.8, linestyle="--")
        axis.set(xscale="log", title=env, xlabel="seconds", ylabel="incumbent's return, 100 fresh episodes")
    named: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(list(named.values()), list(named), loc="lower center", ncols=len(CONTENDERS), frameon=False)
    figure.suptitle("o: the target is reached; x: not by then", fontsize="medium")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, help="do these anew")
    parser.add_argument("--env", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--repetition", type=int, nargs="+", default=list(range(1, REPETITIONS + 1)))
    parser.add_argument("--cap", type=float, default=CAP, help="seconds for each run (default: %(default)g)")
    parser.add_argument("--out", type=Path, help="where the files go (default: benchmarks/results with the "
                        "whole cap, else nowhere)")  # fmt: skip
    parser.add_argument("--note", help="how it was measured, kept with the results")
    arguments = parser.parse_args()
    out = arguments.out or (RESULTS if arguments.cap == CAP else None)
    path = None if out is None else out / "efficiency.json"
    stored = json.loads(path.read_text()) if path is not None and path.exists() else {}
    runs, note = stored.get("runs", []), arguments.note or stored.get("note", "")
    for repetition in arguments.repetition:
        for env in arguments.env:
            for contender in arguments.contender or CONTENDERS:
                here = [
                    one for one in runs
                    if (one["contender"], one["env"], one["repetition"]) == (contender, env, repetition)
                ]  # fmt: skip
                if here and not arguments.contender:
                    continue
                found = asdict(run(contender, env, repetition, arguments.cap))
                runs = [one for one in runs if one not in here] + [found]
                if out is not None and path is not None:
                    out.mkdir(parents=True, exist_ok=True)
                    content = {"machine": machine.describe(), "note": note, "runs": runs}
                    path.write_text(json.dumps(content, indent=1) + "\n")
                    (out / "efficiency.md").write_text("\n\n".join(filter(None, [table(runs), note])) + "\n")
                    try:
                        picture(runs, out / "efficiency.png")
                    except ImportError:
                        print("no picture: matplotlib is not installed")
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())

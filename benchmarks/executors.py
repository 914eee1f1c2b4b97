"""Tiny trials through each executor, and through `orion hunt` processes on one PickledDB: all once.

    python benchmarks/executors.py                        # 200 trials each; Dask and Ray where installed
    python benchmarks/executors.py --trials 20 workers    # a quick look; writes nothing

Each trial trains 64 steps, so that what is left is Orion's bookkeeping, the executor's, and the database's.
For each way: completed trials, trials of the same hyperparameters (there must be none), trials in any other
state, algorithm locks that nobody released, and what it took. Sweeps have two workers; of the hunts there are
eight, each with one, which may complete up to seven trials more than were asked for.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import usage

import ppo_hpo
from ppo_hpo.orion.experiment import open_experiment, params_of
from ppo_hpo.spec import yamlio

RESULTS = Path(__file__).resolve().parent / "results"
TRIALS, WORKERS, HUNTS = 200, 2, 8
WAYS = ("workers", "single", "joblib", "poolexecutor", "dask", "ray", "hunts")
SPACE = {
    "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 20},
    "task": {"epochs": 1, "max_epochs": 1, "steps_per_epoch": 64, "eval_episodes": 1},
    "model": {"width": 4, "depth": 1},
    "optimizer": {"lr": "orion~loguniform(1e-4, 1e-2)"},
    "ppo": {"n_steps": 32, "n_epochs": 1, "gamma": "orion~uniform(0.9, 0.999)"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"of {', '.join(WAYS)} (default: all)")
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--hunts", type=int, default=HUNTS, help="processes of `orion hunt` (default: 8)")
    parser.add_argument("--sweep", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sweep:
        sweep(arguments.sweep, arguments.trials)
        return
    rows: dict[str, dict[str, Any]] = {}
    for way in arguments.ways or WAYS:
        package = {"dask": "distributed", "ray": "ray"}.get(way)
        if package and importlib.util.find_spec(package) is None:
            print(f"{way:13} is not installed", flush=True)
            continue
        rows[way] = row = one(way, arguments.trials, arguments.hunts)
        print(f"{way:13} " + "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if not arguments.ways and (arguments.trials, arguments.hunts) == (TRIALS, HUNTS):
        content = {"machine": machine.describe(), "commit": machine.commit(), "trials": TRIALS, "ways": rows}
        (RESULTS / "executors.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / "executors.md").write_text(table(content))
    bad = [way for way, row in rows.items() if row["duplicates"] or row["in another state"] or row["locked"]]
    if bad:
        raise SystemExit(f"trials were lost, doubled or stuck: {', '.join(bad)}")


def table(content: dict[str, Any]) -> str:
    """The page, from what `executors.json` holds."""
    names = ("completed", "in another state", "duplicates", "locked", "seconds", "cpu_seconds")
    lines = [
        f"{content['trials']} trials of 64 steps through each way (`python benchmarks/executors.py`, commit "
        f"{content['commit']}), on {content['machine']['cores']} core(s) of {content['machine']['cpu']}:",
        "",
        "| | completed | in another state | twice | locks left | seconds | CPU seconds |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {way} | " + " | ".join(str(row[name]) for name in names) + " |"
        for way, row in content["ways"].items()
    ]
    lines += [
        "",
        f'Sweeps from Python have two workers. "hunts" are {HUNTS} processes of `orion hunt` on one '
        "PickledDB, each with a process for every trial: most of their time is importing torch.",
    ]
    return "\n".join(lines) + "\n"


def one(way: str, trials: int, hunts: int) -> dict[str, Any]:
    """All trials in one way, and what became of them."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "space.yaml").write_text(yamlio.dump(SPACE))
        path = f"{usage.BIN}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONWARNINGS": "ignore"}
        me = [sys.executable, str(Path(__file__).resolve()), "--trials"]
        if way == "hunts":
            # The first trial makes the experiment.
            subprocess.run([*me, "1", "--sweep", "single"], cwd=directory, env=environment, check=True)
            hunt = f"orion hunt -n it -c it/orion.yaml --n-workers 1 --exp-max-trials {trials}"
            # The shell waits for each of them, and ends with the worst of their codes.
            lines = [
                f'for i in $(seq {hunts}); do {hunt} > hunt-$i.log 2>&1 & pids="$pids $!"; done',
                "code=0; for p in $pids; do wait $p || code=$?; done; exit $code",
            ]
            command = ["sh", "-c", "\n".join(lines)]
        else:
            command = [*me, str(trials), "--sweep", way]
        took = usage.timed(command, directory, environment)
        return {**state(directory), **{name: round(value, 1) for name, value in took.items()}}


def sweep(way: str, trials: int) -> None:
    """One sweep, in a process of its own."""
    ppo_hpo.sweep(
        space="space.yaml", algorithm={"random": {"seed": 1}}, name="it", max_trials=trials,
        n_workers=WORKERS, executor=way, progress=False, storage="orion.pkl",
    )  # fmt: skip


def state(directory: Path) -> dict[str, Any]:
    """What the database has in the end."""
    client = open_experiment("it", str(directory / "it" / "orion.yaml"))
    trials = client.fetch_trials()
    different = {json.dumps(params_of(trial), sort_keys=True) for trial in trials}
    algorithms = client.storage._db.read("algo", {"experiment": client.id})
    completed = [trial for trial in trials if trial.status == "completed"]
    return {
        "completed": len(completed),
        "in another state": len(trials) - len(completed),
        "duplicates": len(trials) - len(different),
        "locked": sum(bool(record["locked"]) for record in algorithms),
    }


if __name__ == "__main__":
    main()

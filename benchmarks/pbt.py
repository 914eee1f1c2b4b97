"""Population-based training through `orion hunt`: is each child its parent, to the bit, when it is born?

    python benchmarks/pbt.py                    # Pendulum-v1, 8 trials and 3 generations; about two minutes
    python benchmarks/pbt.py --algorithm pb2    # Orion's PB2 in its place; needs .[pb2]

A child's training begins with its parent's checkpoint and with other hyperparameters. It writes down the
SHA-256 of all its arrays (parameters, Adam's moments, normalisers) as they are in its memory then; here that
is compared with the file that the parent left. Prints the lineage as `ppo-hpo lineage` does, and exits with 1
if any child differs, if any trial is not completed, or if nothing was forked. Writes `results/pbt.json` and
`results/pbt.txt`, or `pb2` in these names.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

from ppo_hpo.inspect.lineage import tree
from ppo_hpo.orion.experiment import open_experiment, params_of, statistics_of
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.space import space_path
from ppo_hpo.state.checkpoint import Checkpoint, Storage, arrays_digest, read

RESULTS = Path(__file__).resolve().parent / "results"
BIN = Path(sys.executable).parent
POPULATION, GENERATIONS = 8, 3
SPACE = {
    r"  id: .*": "  id: Pendulum-v1",
    r"  n_envs: .*": "  n_envs: 4",
    r"  epochs: .*": f"  epochs: orion~fidelity(1, {2**GENERATIONS}, base=2)",
    r"  max_epochs: .*": f"  max_epochs: {2**GENERATIONS}",
    r"  steps_per_epoch: .*": "  steps_per_epoch: 8192",
}


# Orion's PB2 codes choices by a function that fails with numpy 2 where there are more than two.
WITHOUT_CHOICES = {
    r"  n_steps: .*": "  n_steps: 256",
    r"  n_minibatches: .*": "  n_minibatches: 4",
    r"  n_epochs: .*": "  n_epochs: 10",
}


def hunt(directory: Path, algorithm: str) -> float:
    """Run it; return wall seconds."""
    space = space_path("classic-control-pbt").read_text(encoding="utf-8")
    for line, replacement in (SPACE | (WITHOUT_CHOICES if algorithm == "pb2" else {})).items():
        space, changed = re.subn(rf"(?m)^{line}$", replacement, space)
        assert changed == 1, line
    (directory / "space.yaml").write_text(space)
    configuration = {
        "experiment": {
            "max_trials": POPULATION * (GENERATIONS + 1),
            "algorithm": {
                algorithm: {"seed": 1, "population_size": POPULATION, "generations": GENERATIONS}
            },
            "working_dir": str(directory / "trials"),
        },
        "storage": {
            "type": "legacy",
            "database": {"type": "pickleddb", "host": str(directory / "orion.pkl")},
        },
        "worker": {
            "n_workers": 2,
            "executor": "joblib",
            "executor_configuration": {"backend": "threading"},
        },
    }  # fmt: skip
    (directory / "orion.yaml").write_text(yamlio.dump(configuration))
    command = [BIN / "orion", "hunt", "-n", "pbt", "-c", "orion.yaml"]
    command += ["ppo-hpo", "run", "--config", "space.yaml"]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    started = time.monotonic()
    subprocess.run(command, cwd=directory, env=environment, check=True)
    return time.monotonic() - started


def newest(directory: str) -> Checkpoint:
    """The checkpoint that a trial ended with."""
    return read(Storage(directory).paths()[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", choices=("pbt", "pb2"), default="pbt", help="(default: %(default)s)")
    algorithm = parser.parse_args().algorithm
    with tempfile.TemporaryDirectory() as folder:
        seconds = hunt(Path(folder), algorithm)
        trials = open_experiment("pbt", str(Path(folder) / "orion.yaml")).fetch_trials()
        by_id = {trial.id: trial for trial in trials}
        births: list[dict[str, Any]] = []
        for trial in trials:
            if trial.status != "completed" or trial.parent is None:
                continue
            parent = by_id[trial.parent]
            here, there = newest(trial.working_dir), newest(parent.working_dir)
            # A child whose hyperparameters did not change is a promotion: it has no birth of its own.
            own = [
                item
                for item in here.meta["lineage"]
                if (item["uid"], item["epoch"]) == (parent.id, there.epoch)
            ]
            births += [
                {
                    "child": trial.id,
                    "parent": parent.id,
                    "epoch": there.epoch,
                    "equal": item["state_sha256"] == arrays_digest(there.arrays),
                }
                for item in own
            ]
        lines = tree(trials)
        by_epochs: dict[int, list[float]] = {}
        for trial in trials:
            if trial.status == "completed":
                returns = by_epochs.setdefault(int(params_of(trial)["task.epochs"]), [])
                returns.append(statistics_of(trial)["return_mean"])
    # Orion may leave a trial that it made and nobody began.
    completed = sum(trial.status == "completed" for trial in trials)
    others = sorted({trial.status for trial in trials} - {"completed", "new"})
    equal = sum(birth["equal"] for birth in births)
    print(lines)
    print(f"{completed} trials completed in {seconds:.0f} s; other ends: {', '.join(others) or 'none'}")
    print(f"{equal} of {len(births)} forked children were born as their parent's checkpoint, to the bit")
    for epochs, returns in sorted(by_epochs.items()):
        mean = sum(returns) / len(returns)
        print(f"epochs {epochs}: {len(returns)} trials, mean return {mean:.0f}, best {max(returns):.0f}")
    content = {
        "machine": machine.describe(),
        "seconds": round(seconds, 1),
        "completed": completed,
        "births": births,
        "returns_by_epochs": by_epochs,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{algorithm}.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / f"{algorithm}.txt").write_text(lines + "\n")
    whole = completed >= POPULATION * (GENERATIONS + 1) and not others
    return 0 if births and equal == len(births) and whole else 1


if __name__ == "__main__":
    sys.exit(main())

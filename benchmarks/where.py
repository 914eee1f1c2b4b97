"""Where does the time of an epoch go? One trial of each preset, its parts timed from outside.

    python benchmarks/where.py                     # as committed; a minute
    python benchmarks/where.py --preset pendulum   # one of them; writes nothing

Real trials through the runner, with checkpoints, logs and evaluation, on one thread. Each part is the wall
time spent inside one function, taken by wrapping it; wrapping itself costs about 0.2 microseconds for each
call. Microseconds are for each environment step of training; indented parts belong to the part above them.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # before numpy is imported
    os.environ[variable] = "1"

import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import machine  # noqa: E402

from ppo_hpo.envs import vector  # noqa: E402
from ppo_hpo.ppo import collect, learner, numpy_engine, task, task_envs, train  # noqa: E402
from ppo_hpo.spec import yamlio  # noqa: E402
from ppo_hpo.spec.config import TrialConfig  # noqa: E402
from ppo_hpo.spec.space import space_path  # noqa: E402
from ppo_hpo.trial import runner, training  # noqa: E402
from ppo_hpo.trial.options import RunOptions  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
PRESETS = ("cartpole", "acrobot", "pendulum", "mountain-car-continuous")
# What is timed: name in the table, owner of the function, its name.
PARTS: list[tuple[str, Any, str]] = [
    ("collecting", collect.Collector, "collect"),
    ("  environments", vector.SyncEnvs, "step"),
    ("  acting", numpy_engine.NumpyEngine, "act"),
    ("  values and log-probabilities", numpy_engine.NumpyEngine, "values"),
    ("  values and log-probabilities", numpy_engine.NumpyEngine, "log_probs"),
    ("advantages", train, "gae"),
    ("update", learner.Learner, "update"),
    ("  gradients", numpy_engine.NumpyEngine, "backward"),
    ("  Adam", learner.FlatAdam, "step"),
    ("evaluation", task_envs.Environments, "_evaluation"),
    ("checkpoint", task.PPO, "_save"),
    ("curve and log", training.SeedTraining, "_end_epoch"),
]


@contextmanager
def timed(owner: Any, name: str, add: Callable[[float], None]) -> Iterator[None]:
    """Tell `add` the seconds of each call of one function."""
    plain = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return plain(*args, **options)
        finally:
            add(time.perf_counter() - started)

    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def measure(preset: str) -> dict[str, float]:
    """Microseconds of each part for one environment step, and of the whole epoch."""
    config = TrialConfig.from_mapping(yamlio.load(space_path(preset)))
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:

        def run(part: int) -> float:
            if part < len(PARTS):
                name, owner, function = PARTS[part]
                seconds.setdefault(name, 0.0)

                def add(spent: float) -> None:
                    seconds[name] += spent

                with timed(owner, function, add):
                    return run(part + 1)
            started = time.perf_counter()
            runner.run(config, Path(folder) / "trial", RunOptions("cpu"), console=False)
            return time.perf_counter() - started

        run(0)
        rows = (Path(folder) / "trial" / "timing.jsonl").read_text().splitlines()
    steps = config.task.epochs * config.task.steps_per_epoch
    # The evaluation of the untrained policy and what happens before an epoch are no part of any.
    own = ("checkpoint", "curve and log")
    whole = sum(json.loads(row)["seconds"] for row in rows) + sum(seconds[name] for name in own)
    return {name: 1e6 * value / steps for name, value in (seconds | {"epoch": whole}).items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """One row for each part, one column for each preset: microseconds, and the share of the epoch."""
    lines = ["| part | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for part in next(iter(found.values())):
        cells = [f"{us[part]:.2f} ({us[part] / us['epoch']:.1%})" for us in found.values()]
        lines.append(f"| {part.replace('  ', '&nbsp;&nbsp;')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS))
    chosen = parser.parse_args().preset
    found = {}
    for preset in chosen:
        found[preset] = measure(preset)
        print(f"{preset}: {found[preset]['epoch']:.1f} us for each step", flush=True)
    print(table(found))
    if chosen == list(PRESETS):
        RESULTS.mkdir(exist_ok=True)
        content = {"machine": machine.describe(), "microseconds_per_step": found}
        (RESULTS / "where.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / "where.md").write_text(table(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

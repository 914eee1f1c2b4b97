"""Trials that tests run: on the CPU, and with a log file only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.trial import runner
from ppo_hpo.trial.options import OrionContext, RunOptions


def run_quietly(
    config: TrialConfig, directory: Path, *, tick: Callable[[], None] = lambda: None, **fields: Any
) -> runner.Outcome:
    """`runner.run`, with the fields of its two records as keyword arguments."""
    orion = {name: fields.pop(name) for name in OrionContext.__dataclass_fields__ if name in fields}
    options = RunOptions(**{"device": "cpu", **fields})
    return runner.run(config, directory, options, OrionContext(**orion), console=False, tick=tick)

"""What became of a trial: its objective and its statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.spec import results
from ppo_hpo.trial.median_stop import Stop
from ppo_hpo.trial.work import Work

if TYPE_CHECKING:
    from ppo_hpo.ppo.task import PPO


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        objective: value to be minimised.
        statistics: numbers by name. The README explains each.
        directory: directory of the trial's files.
    """

    objective: float
    statistics: Mapping[str, float]
    directory: Path

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The outcome in the form of Orion's result file."""
        return results.entries(self.objective, self.statistics)

    def to_bytes(self) -> bytes:
        """The content of ``results.json``, which is that of Orion's result file too."""
        return results.to_bytes(self.entries)


def outcome_of(
    task: PPO, stop: Stop | None, directory: Path, resumed_from: int | None, work: Work
) -> Outcome:
    """The outcome of one seed, whose last attempt resumed from an epoch, or from nothing (None)."""
    config = task.config.task
    epochs = config.epochs if stop is None else stop.epoch
    # The objective of a poor trial is the return at which it stopped. That is at most its best return, which
    # is below the median. So a trial cannot win a rung because it stopped at a lucky moment.
    report = task.report(epochs)
    objective = report.pop("objective")
    per_epoch = config.steps_per_epoch
    seconds_here = sum(task.metrics.seconds.values())
    trained_here = (task.epoch - (resumed_from or 0)) * per_epoch
    diverged_steps = task.env_steps - task.epoch * per_epoch
    env_steps = min(task.epoch, epochs) * per_epoch + diverged_steps
    statistics = {
        **report,
        "stopped": float(stop is not None),
        "env_steps": env_steps,
        "env_steps_not_trained": config.epochs * per_epoch - env_steps,
        "env_steps_here": work.steps,
        "eval_steps": sum(row["eval_steps"] for row in task.metrics.curve if row["epoch"] <= epochs),
        "eval_steps_here": work.eval_steps,
        "wall_seconds": work.wall_seconds,
        "cpu_seconds": work.cpu_seconds,
        "steps_per_second": trained_here / seconds_here if seconds_here else 0.0,
        "continued": float(work.resumed_from is not None),
        "continued_from_epoch": float(work.resumed_from or 0),
        "retries": float(work.retries),
        "forked": float(bool(task.lineage)),
    }
    return Outcome(objective, statistics, directory)


def combined(outcomes: Sequence[Outcome], aggregate: str, directory: Path) -> Outcome:
    """The outcome of a trial of several seeds, whose objective is ``task.aggregate`` of theirs."""
    objectives = [outcome.objective for outcome in outcomes]
    statistics = [outcome.statistics for outcome in outcomes]
    return Outcome(*results.combine(objectives, statistics, aggregate), directory)

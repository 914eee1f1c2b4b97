"""What the trials of an experiment have cost. Reports and sweeps count it here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ppo_hpo.orion.experiment import asked_epochs, configuration_of, statistics_of
from ppo_hpo.state import worklog


@dataclass(frozen=True)
class Cost:
    """What trials have cost in all processes and hunts, however the trials ended.

    A process that was killed did not record the epoch that it was training. ``unended`` says how many such
    processes there may be.

    Attributes:
        env_steps: environment steps, including evaluations and steps that were done twice.
        eval_steps: environment steps of evaluations.
        wall_seconds: time of all trials, added up.
        cpu_seconds: CPU time of all trials.
        saved_steps: training steps that were not done again because promoted trials resumed.
        unkept_steps: training steps that no trial kept: done twice, or in epochs that did not end.
        unended: processes that did not record how they ended: killed, or still running.
        stopped_steps: training steps that trials were asked for but did not train, because they diverged or
            were stopped as poor. Steps that a promotion trained later do not count.
    """

    env_steps: int
    eval_steps: int
    wall_seconds: float
    cpu_seconds: float
    saved_steps: int
    unkept_steps: int = 0
    unended: int = 0
    stopped_steps: int = 0

    def __str__(self) -> str:
        lines = [
            f"cost        {self.env_steps:,} steps, of which {self.eval_steps:,} in evaluations; "
            f"{self.wall_seconds:,.0f} s in trials, {self.cpu_seconds:,.0f} s of CPU"
        ]
        if self.unkept_steps:
            lines.append(f"            {self.unkept_steps:,} were repeated, or in epochs that did not end")
        if self.unended:
            lines.append(
                f"            not counted: less than an epoch of each of {self.unended} processes that were "
                f"killed or still run"
            )
        if self.stopped_steps:
            lines.append(
                f"            {self.stopped_steps:,} steps not trained because trials diverged or were poor"
            )
        return "\n".join(lines)


def cost_of(trials: Sequence[Any]) -> Cost:
    """The cost of all these trials together."""
    each = costs_of(trials)
    return Cost(*(sum(getattr(cost, field.name) for cost in each) for field in fields(Cost)))


def costs_of(trials: Sequence[Any]) -> list[Cost]:
    """The cost of each trial of an experiment, in their order.

    It comes from the trial's directory, where every process records what it spent. If the process that
    completed the trial ran on another machine, what that process reported to Orion is added.
    """
    # The rungs of each configuration. A trial resumes from where a lower rung ended.
    rungs: dict[str, list[float]] = {}
    highest: dict[str, float] = {}
    for trial in trials:
        if (epochs := _reported(trial).get("epochs")) is not None:
            key = configuration_of(trial)
            rungs.setdefault(key, []).append(epochs)
            highest[key] = max(asked_epochs(trial) or 0.0, highest.get(key, 0.0))
    found = []
    for trial in trials:
        key, reported = configuration_of(trial), _reported(trial)
        lines = worklog.read(Path(trial.working_dir), trial.id)
        is_highest = bool(reported) and (asked_epochs(trial) or 0.0) == highest.get(key)
        cost = Cost(
            env_steps=sum(line.steps + line.eval_steps for line in lines),
            eval_steps=sum(line.eval_steps for line in lines),
            wall_seconds=sum(line.wall_seconds for line in lines),
            cpu_seconds=sum(line.cpu_seconds for line in lines),
            saved_steps=_saved_steps(reported, rungs.get(key, [])),
            unkept_steps=worklog.wasted_steps(lines),
            unended=len({line.process for line in lines if line.state in ("began", "epoch")}),
            stopped_steps=int(reported.get("env_steps_not_trained", 0.0)) if is_highest else 0,
        )
        found.append(_add_reported(cost, reported) if reported and not _is_among(reported, lines) else cost)
    return found


def _reported(trial: Any) -> Mapping[str, float]:
    return statistics_of(trial) if trial.status == "completed" else {}


def _saved_steps(reported: Mapping[str, float], rungs: Sequence[float]) -> int:
    """Steps that this trial did not train again, because it resumed from a lower rung."""
    below = [epochs for epochs in rungs if epochs < reported.get("epochs", 0.0)]
    if not below or reported.get("forked"):
        return 0
    resumed = min(reported.get("continued_from_epoch", 0.0), max(below))
    return round(resumed * reported["env_steps"] / reported["epochs"])


def _is_among(reported: Mapping[str, float], lines: Sequence[worklog.Line]) -> bool:
    """Whether the process that completed the trial recorded its work in these lines."""
    spent: dict[str, tuple[int, int]] = {}
    for line in lines:
        steps, evaluation = spent.get(line.process, (0, 0))
        spent[line.process] = steps + line.steps, evaluation + line.eval_steps
    return (reported.get("env_steps_here"), reported.get("eval_steps_here")) in spent.values()


def _add_reported(cost: Cost, reported: Mapping[str, float]) -> Cost:
    """Add what the process that completed the trial reported to Orion."""
    evaluation = int(reported.get("eval_steps_here", 0.0))
    return replace(
        cost,
        env_steps=cost.env_steps + int(reported.get("env_steps_here", 0.0)) + evaluation,
        eval_steps=cost.eval_steps + evaluation,
        wall_seconds=cost.wall_seconds + reported.get("wall_seconds", 0.0),
        cpu_seconds=cost.cpu_seconds + reported.get("cpu_seconds", 0.0),
    )

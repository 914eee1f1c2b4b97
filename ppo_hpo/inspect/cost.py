"""What the trials of an experiment have cost: the one place where it is counted, for reports and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppo_hpo.orion.experiment import configuration_of, params_of, statistics_of
from ppo_hpo.state import worklog


@dataclass(frozen=True)
class Cost:
    """What trials have cost, in all calls and hunts, whatever became of them.

    What a killed process did in the epoch under way is in nobody's books; ``unended`` says how many there
    may be of them.

    Attributes:
        env_steps: environment steps, those of evaluations and repeated ones included.
        eval_steps: those of evaluations.
        wall_seconds: of all trials, one after the other.
        cpu_seconds: of all trials.
        saved_steps: training steps that would have been done again if promotions did not continue.
        unkept_steps: training steps that are in no epoch of a trial: done twice, or in epochs that did not
            end.
        stopped_steps: training steps of the fidelities that trials were asked for, but that were not taken,
            because they diverged or were stopped as poor; those that a promotion took after all do not count.
        unended: processes that have not said how they ended: killed, or running still.
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
            f"cost        {self.env_steps:,} steps with evaluation ({self.eval_steps:,}), "
            f"{self.wall_seconds:,.0f} s in trials, {self.cpu_seconds:,.0f} s of CPU"
        ]
        if self.unkept_steps:
            lines.append(
                f"            {self.unkept_steps:,} of them were repeated, or in epochs that did not end"
            )
        if self.unended:
            lines.append(
                f"            and less than an epoch each of {self.unended} that were killed, or run still"
            )
        if self.stopped_steps:
            lines.append(
                f"            {self.stopped_steps:,} of the steps not trained are of trials that diverged or "
                f"were poor"
            )
        return "\n".join(lines)


def cost_of(trials: Sequence[Any]) -> Cost:
    """What these trials of Orion's have cost together; see `Cost`."""
    each = costs_of(trials)
    return Cost(
        env_steps=sum(cost.env_steps for cost in each),
        eval_steps=sum(cost.eval_steps for cost in each),
        wall_seconds=sum(cost.wall_seconds for cost in each),
        cpu_seconds=sum(cost.cpu_seconds for cost in each),
        saved_steps=sum(cost.saved_steps for cost in each),
        unkept_steps=sum(cost.unkept_steps for cost in each),
        unended=sum(cost.unended for cost in each),
        stopped_steps=sum(cost.stopped_steps for cost in each),
    )


def costs_of(trials: Sequence[Any]) -> list[Cost]:
    """What each of these trials of Orion's has cost, in their order.

    From its directory, where every process has written down what it spent; and from what the process that
    completed it reported, where that one wrote on another machine.
    """
    # Of one configuration each rung above the lowest went on from where one below had ended.
    rungs: dict[str, list[float]] = {}
    asked: dict[str, float] = {}
    for trial in trials:
        if (epochs := _reported(trial).get("epochs")) is not None:
            rungs.setdefault(configuration_of(trial), []).append(epochs)
            asked[configuration_of(trial)] = max(_fidelity(trial), asked.get(configuration_of(trial), 0.0))
    found = []
    for trial in trials:
        values = _reported(trial)
        below = [e for e in rungs.get(configuration_of(trial), []) if e < values.get("epochs", 0.0)]
        saved = 0.0
        if below and not values.get("forked"):
            again = min(values.get("continued_from_epoch", 0.0), max(below))
            saved = again * values["env_steps"] / values["epochs"]
        highest = bool(values) and _fidelity(trial) == asked.get(configuration_of(trial))
        lines = worklog.read(Path(trial.working_dir), trial.id)
        cost = Cost(
            env_steps=sum(line.steps + line.eval_steps for line in lines),
            eval_steps=sum(line.eval_steps for line in lines),
            wall_seconds=sum(line.wall_seconds for line in lines),
            cpu_seconds=sum(line.cpu_seconds for line in lines),
            saved_steps=round(saved),
            unkept_steps=worklog.wasted_steps(lines),
            unended=len({line.process for line in lines if line.state in ("began", "epoch")}),
            stopped_steps=int(values.get("env_steps_not_trained", 0.0)) if highest else 0,
        )
        found.append(cost if _is_among(values, lines) else _with(cost, values))
    return found


def _is_among(values: Mapping[str, float], lines: Sequence[worklog.Line]) -> bool:
    """Whether the process that completed the trial, if one did, wrote its lines here and not elsewhere."""
    if not values:
        return True
    spent: dict[str, tuple[int, int]] = {}
    for line in lines:
        steps, evaluation = spent.get(line.process, (0, 0))
        spent[line.process] = steps + line.steps, evaluation + line.eval_steps
    return (values.get("env_steps_here"), values.get("eval_steps_here")) in spent.values()


def _with(cost: Cost, values: Mapping[str, float]) -> Cost:
    """What is known from here, and what the process that completed the trial reported to Orion."""
    evaluation = int(values.get("eval_steps_here", 0.0))
    return replace(
        cost,
        env_steps=cost.env_steps + int(values.get("env_steps_here", 0.0)) + evaluation,
        eval_steps=cost.eval_steps + evaluation,
        wall_seconds=cost.wall_seconds + values.get("wall_seconds", 0.0),
        cpu_seconds=cost.cpu_seconds + values.get("cpu_seconds", 0.0),
    )


def _reported(trial: Any) -> Mapping[str, float]:
    return statistics_of(trial) if trial.status == "completed" else {}


def _fidelity(trial: Any) -> float:
    """The epochs that Orion asked for; 0 where all trials have the same."""
    return float(params_of(trial).get("task.epochs", 0.0))

"""What a sweep found."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.inspect.cost import Cost, cost_of, costs_of
from ppo_hpo.orion.experiment import completed_trials, params_of, ranking_key, statistics_of
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.printing import encodable

if TYPE_CHECKING:
    import pandas
    from orion.client import ExperimentClient


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has found so far. `print` shows a summary.

    Attributes:
        name: name of the experiment.
        directory: directory of the sweep's files.
        best: Orion's record of the best trial. None if no trial is completed.
        trials: pandas DataFrame with a row for each trial. Its columns are id, status, objective, parent,
            working_dir, the hyperparameters, the statistics, and what the trial cost, failed processes
            included: ``cost_env_steps``, ``cost_eval_steps``, ``cost_wall_seconds``, ``cost_cpu_seconds``.
        cost: cost of all trials, including those that failed.
        commands: shell commands that resume or report the sweep.
        client: Orion's client of the experiment.
    """

    name: str
    directory: Path
    best: Any
    trials: pandas.DataFrame
    cost: Cost
    commands: Sequence[str]
    client: ExperimentClient

    @property
    def best_params(self) -> dict[str, Any]:
        """Searched hyperparameters of the best trial by dotted name; empty if no trial is completed."""
        return {} if self.best is None else params_of(self.best)

    @property
    def best_config(self) -> Path | None:
        """The best trial's configuration file, for `ppo-hpo run --config`."""
        return None if self.best is None else Path(self.best.working_dir) / "config.yaml"

    def __str__(self) -> str:
        from ppo_hpo.inspect.report import summarise, to_text

        try:
            lines = [to_text(summarise(self.client, self.client.fetch_trials()))]
        except UserError as error:
            lines = [str(error), str(self.cost)]
        label, (sweep, hunt, report) = "resume", self.commands
        if self.client.is_done:  # Without more trials the commands would do nothing.
            label, sweep, hunt = "more trials", f"{sweep} --max-trials N", f"{hunt} --exp-max-trials N"
        lines += [f"{label:12}{sweep}", f"            or {hunt}", f"report      {report}"]
        return encodable("\n".join(lines))


def result_of(client: ExperimentClient, place: Path) -> SweepResult:
    """Read what a sweep has found."""
    import pandas

    trials = client.fetch_trials()
    rows = [
        {
            "id": trial.id, "status": trial.status, "parent": trial.parent,
            "objective": trial.objective.value if trial.objective else None,
            **params_of(trial), **statistics_of(trial), "working_dir": trial.working_dir,
            "cost_env_steps": cost.env_steps, "cost_eval_steps": cost.eval_steps,
            "cost_wall_seconds": cost.wall_seconds, "cost_cpu_seconds": cost.cpu_seconds,
        }
        for trial, cost in zip(trials, costs_of(trials), strict=True)
    ]  # fmt: skip
    best = min(completed_trials(trials), key=ranking_key, default=None)
    frame = pandas.DataFrame(rows, columns=None if rows else ["id", "status", "parent", "objective"])
    return SweepResult(
        client.name, place, best, frame, cost_of(trials), _commands(client.name, place), client
    )


def orion_yaml(place: Path) -> Path:
    """The path of a sweep's `orion.yaml`, relative to the current directory if it is below it."""
    file = place / "orion.yaml"
    with contextlib.suppress(ValueError):
        return file.relative_to(Path.cwd())
    return file


def _commands(name: str, place: Path) -> tuple[str, ...]:
    prefix = ""
    if shutil.which("ppo-hpo") is None:
        prefix = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH "
    file = orion_yaml(place)
    elsewhere = "" if file.parent == Path(name) else f" --dir {shlex.quote(str(file.parent))}"
    name, path = shlex.quote(name), shlex.quote(str(file))
    return (
        f"{prefix}ppo-hpo sweep --name {name}{elsewhere}",
        f"{prefix}orion hunt -n {name} -c {path}",
        f"{prefix}ppo-hpo report {name} -c {path} --html report.html",
    )

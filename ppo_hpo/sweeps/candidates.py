"""The best configurations of an experiment, and one of them as a preset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_hpo.orion.experiment import completed_trials, configuration_of, ranking_key, statistics_of
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig, without_effectless
from ppo_hpo.spec.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """A configuration that tuning has scored, or a baseline, which tuning did not see."""

    label: str
    config: TrialConfig  # of the trial that was scored, with the epochs that it had
    # None for a baseline: the score that tuning saw, Orion's id of the trial, and its directory.
    claimed: float | None = None
    trial: str | None = None
    directory: Path | None = None
    forked: bool = False  # whether hyperparameters changed during the trial's life, as PBT does
    # How long the trial took for one environment step, and steps of its episodes. 0 means unknown.
    seconds_per_step: float = 0.0
    episode_length: float = 0.0

    @property
    def steps(self) -> int:
        """Environment steps of one training."""
        return self.config.task.epochs * self.config.task.steps_per_epoch


def candidates(trials: Sequence[Any], top: int, name: str) -> list[Candidate]:
    """The best configurations of the experiment ``name``, best first.

    Each is represented by its trial of the lowest objective, and by the longest trained one among equals.
    """
    completed = sorted(completed_trials(trials), key=ranking_key)
    if not completed:
        raise UserError(f"No trial of {name!r} is completed yet.")
    found: dict[str, Any] = {}
    for trial in completed:
        found.setdefault(configuration_of(trial), trial)
    return [_candidate(trial, number) for number, trial in enumerate(list(found.values())[:top], 1)]


def _candidate(trial: Any, number: int) -> Candidate:
    path = Path(trial.working_dir) / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: the files of trial {trial.id} are on another machine, or were removed. Run "
            f"this command where the files are."
        )
    config, statistics = TrialConfig.from_mapping(without_effectless(yamlio.load(path))), statistics_of(trial)
    if statistics.get("stopped"):
        # It was scored and saved before the last epoch that was asked for.
        config = config.replace(task={"epochs": int(statistics["epochs"]), "max_epochs": config.max_epochs})
    label, claimed = f"{number}. {trial.id[:8]}", -float(trial.objective.value)
    steps = statistics.get("env_steps_here", 0.0)
    return Candidate(
        label, config, claimed, trial.id, path.parent, bool(statistics.get("forked")),
        statistics.get("wall_seconds", 0.0) / steps if steps else 0.0, statistics.get("episode_length", 0.0),
    )  # fmt: skip


def changed_values(config: TrialConfig) -> dict[str, Any]:
    """The environment and all hyperparameters that differ from their default, by dotted name."""
    default = TrialConfig().to_mapping()
    return {
        f"{group}.{key}": value
        for group, values in config.to_mapping().items()
        for key, value in values.items()
        if value != default[group][key] or (group, key) == ("env", "id")
    }


def as_preset(candidate: Candidate, title: str) -> str:
    """The content of a preset's file. ``title`` is the experiment's name and version."""
    config, task = candidate.config, candidate.config.task
    mapping = config.to_mapping()
    mapping["task"]["max_epochs"] = config.max_epochs
    # A line break in the experiment's name would end the comment.
    title = title if title.isprintable() else ascii(title)
    lines = [
        f"# Preset: {config.env.id} in {candidate.steps:,} steps. Nothing is searched.",
        "#",
        f"# Found by the experiment {title}, trial {candidate.trial}, which claimed {candidate.claimed:.1f}.",
    ]
    if task.epochs < config.max_epochs:
        lines.append(
            f"# The trial was scored after {task.epochs} of {config.max_epochs} epochs; "
            f"--epochs {config.max_epochs} trains it to the end."
        )
    if candidate.forked:
        lines.append("# Its hyperparameters changed during training, as PBT does. These are the last ones.")
    return "\n".join(lines) + "\n" + yamlio.dump(mapping)

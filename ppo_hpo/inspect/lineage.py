"""The promotions and forks of an experiment as a tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppo_hpo.orion.experiment import asked_epochs, open_experiment, params_of, statistics_of


def lineage(name: str, config: str | None = None) -> str:
    """The trials of an experiment, or of a sweep's directory, as a tree, each one below its parent.

    A parent is what Orion calls so: the trial whose directory Orion copied (ASHA, population-based training).
    """
    return tree(open_experiment(name, config).fetch_trials())


def tree(trials: Sequence[Any]) -> str:
    """One line for each trial: its id, epochs and return, and the hyperparameters that a fork changed."""
    by_id = {trial.id: trial for trial in trials}
    children: dict[str | None, list[Any]] = {}
    for trial in sorted(trials, key=lambda trial: (str(trial.submit_time), trial.id)):
        children.setdefault(trial.parent if trial.parent in by_id else None, []).append(trial)
    lines: list[str] = []

    def add(trial: Any, indent: str, branch: str) -> None:
        lines.append(f"{indent}{branch}{_line(trial, by_id.get(trial.parent))}")
        below = children.get(trial.id, [])
        deeper = indent + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for child in below:
            add(child, deeper, "└─ " if child is below[-1] else "├─ ")

    for root in children.get(None, []):
        add(root, "", "")
    forks = sum(bool(_changes(t, by_id.get(t.parent))) for t in trials)
    promotions = sum(t.parent in by_id for t in trials) - forks
    lines.append(f"{len(trials)} trials: {promotions} promoted, {forks} forked")
    return "\n".join(lines)


def _line(trial: Any, parent: Any) -> str:
    words = [trial.id[:8]]
    if (epochs := asked_epochs(trial)) is not None:
        words.append(f"epochs {epochs:g}")
    statistics = statistics_of(trial)
    if trial.status == "completed" and "return_mean" in statistics:
        words.append(f"return {statistics['return_mean']:.1f}")
    else:
        words.append(trial.status)
    if changes := _changes(trial, parent):
        words.append("forked: " + ", ".join(changes))
    elif parent is not None:
        words.append("promoted")
    return "  ".join(words)


def _changes(trial: Any, parent: Any) -> list[str]:
    """Hyperparameters that differ from the parent's, as text. The number of epochs does not count."""
    if parent is None:
        return []
    new, old = params_of(trial), params_of(parent)
    return [
        f"{name} {_value(old.get(name))} -> {_value(new.get(name))}"
        for name in sorted({*new, *old} - {"task.epochs"})
        if new.get(name) != old.get(name)
    ]


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Who came from whom: the promotions and forks of an experiment as a tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ppo_hpo.orion.experiment import open_experiment, params_of, statistics_of


def lineage(name: str, config: str | None = None) -> str:
    """The trials of an experiment, each below its parent, to be read.

    A parent is what Orion calls so: the trial whose directory it copied (ASHA, population-based training).

    Args:
        name: the experiment's name.
        config: Orion's configuration file of the hunt, for its storage.

    Raises:
        UserError: there is no such experiment.
    """
    return tree(open_experiment(name, config).fetch_trials())


def tree(trials: Sequence[Any]) -> str:
    """One line for each trial: id, epochs, return, and what its hyperparameters changed to at its birth."""
    by_id = {trial.id: trial for trial in trials}
    children: dict[str | None, list[Any]] = {}
    for trial in trials:
        parent = trial.parent if trial.parent in by_id else None
        children.setdefault(parent, []).append(trial)
    lines: list[str] = []

    def add(trial: Any, indent: str, branch: str) -> None:
        lines.append(f"{indent}{branch}{_line(trial, by_id.get(trial.parent))}")
        below = sorted(children.get(trial.id, []), key=_order)
        further = indent + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for index, child in enumerate(below):
            add(child, further, "└─ " if index == len(below) - 1 else "├─ ")

    for root in sorted(children.get(None, []), key=_order):
        add(root, "", "")
    forks = sum(bool(_changes(t, by_id.get(t.parent))) for t in trials)
    promotions = sum(t.parent in by_id for t in trials) - forks
    lines.append(f"{len(trials)} trials: {promotions} promoted, {forks} forked")
    return "\n".join(lines)


def _order(trial: Any) -> tuple[Any, str]:
    return (str(trial.submit_time), trial.id)


def _line(trial: Any, parent: Any) -> str:
    params = params_of(trial)
    words = [trial.id[:8]]
    if "task.epochs" in params:
        words.append(f"epochs {float(params['task.epochs']):g}")
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
    """Hyperparameters that differ from the parent's, in words; how far it is to go is none of them."""
    if parent is None:
        return []
    here, there = _own(trial), _own(parent)
    return [
        f"{name} {_value(there.get(name))} -> {_value(here.get(name))}"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]


def _own(trial: Any) -> Mapping[str, Any]:
    return {name: value for name, value in params_of(trial).items() if name != "task.epochs"}


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

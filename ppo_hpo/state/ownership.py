"""Deciding whether a checkpoint belongs to a trial: it may be its own, its parent's, or a stranger's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppo_hpo.spec.canonical import as_read_from_json
from ppo_hpo.spec.config import CHANGEABLE_BY_FORK
from ppo_hpo.spec.errors import CheckpointError

Nested = Mapping[str, Mapping[str, Any]]


def describe_differences(there: Nested, here: Nested) -> str:
    """In words, which hyperparameters of a checkpoint and a trial differ; empty if none does."""
    return ", ".join(
        f"{name} is {_at(there, name)!r} there and {_at(here, name)!r} here"
        for name in differing_names(there, here)
    )


def differing_names(there: Nested, here: Nested) -> list[str]:
    """Dotted names of the hyperparameters that differ."""
    # One side was read from a file, so the other must look as if it had been.
    there, here = (as_read_from_json(side) for side in (there, here))
    names = {f"{group}.{key}" for side in (there, here) for group, values in side.items() for key in values}
    return [name for name in sorted(names) if _at(there, name) != _at(here, name)]


def check_owner(meta: Mapping[str, Any], epoch: int, here: Nested, uid: str | None, where: str) -> None:
    """Refuse the checkpoint of another trial, unless this trial is a fork of that one.

    Population-based training proposes a child with other hyperparameters and copies its parent's directory
    for it. So a checkpoint that another trial wrote is the parent's. It may differ in hyperparameters that a
    fork may change. If this trial wrote it, or if this trial has no id, all hyperparameters must be equal.

    Args:
        meta: the checkpoint's plain data.
        epoch: the checkpoint's epoch, for messages.
        here: this trial's hyperparameters.
        uid: this trial's id; None outside of Orion.
        where: where the checkpoint is, for messages.
    """
    try:
        there, owner, lineage = meta["hyperparameters"], meta["uid"], meta["lineage"]
        if not all(isinstance(text, str) for text in (owner or "", meta["identity"])):
            raise TypeError
        if not (isinstance(lineage, list) and all(isinstance(item, dict) for item in lineage)):
            raise TypeError
        text = describe_differences(there, here)
    except (KeyError, AttributeError, TypeError):
        raise CheckpointError(
            f"The checkpoint of epoch {epoch} in {where} does not say whose it is."
        ) from None
    if not text:
        return
    advice = "Use another directory, or the hyperparameters it was trained with."
    if uid is not None and owner is not None and uid != owner:
        fixed = [name for name in differing_names(there, here) if not _changeable(name)]
        if not fixed:
            return
        advice = f"A fork cannot change {', '.join(fixed)}."
    raise CheckpointError(
        f"The checkpoint of epoch {epoch} in {where} belongs to other hyperparameters: {text}. {advice}"
    )


def _changeable(name: str) -> bool:
    group, _, key = name.partition(".")
    return key in CHANGEABLE_BY_FORK.get(group, ())


def _at(mapping: Nested, name: str) -> Any:
    group, _, key = name.partition(".")
    return mapping.get(group, {}).get(key)

"""What a checkpoint of a task holds, and the checks before anything of it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_hpo.ppo.agent import Agent
from ppo_hpo.spec import results
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import CheckpointError
from ppo_hpo.state import ownership
from ppo_hpo.state.checkpoint import MAX_HEADER, Checkpoint, Storage, arrays_digest


@dataclass(frozen=True)
class Progress:
    """How far a task has come: what a checkpoint holds beside the tensors of the agent."""

    epoch: int  # epochs done
    curve: list[dict[str, Any]]  # rows in the order of their `epoch`
    hyperparameters: Mapping[str, Any]  # by group and key
    identity: str  # hash of the hyperparameters
    lineage: list[dict[str, Any]]  # one entry for each fork that led to this task, oldest first
    seconds: float  # wall seconds of all epochs
    uid: str | None

    def to_plain(self) -> dict[str, Any]:
        """A copy as a dictionary of what JSON can hold."""
        copies = {name: [dict(item) for item in getattr(self, name)] for name in ("curve", "lineage")}
        return vars(self) | copies

    @classmethod
    def from_plain(cls, plain: Any) -> Progress:
        """Read and check what `to_plain` returned; it may come from anybody."""
        if not isinstance(plain, Mapping):
            raise CheckpointError("The state has no `progress`, so it is not the state dict of a task.")
        epoch, curve = int(plain["epoch"]), [dict(row) for row in plain["curve"]]
        if [row["epoch"] for row in curve] not in ([], list(range(epoch + 1))) or (epoch and not curve):
            raise CheckpointError(f"The state's learning curve does not lead to its epoch, {epoch}.")
        if not all(results.is_row(row) for row in curve):
            raise CheckpointError("The state's learning curve contains an invalid row.")
        lineage = [dict(item) for item in plain["lineage"]]
        return cls(
            epoch, curve, plain["hyperparameters"], plain["identity"], lineage,
            float(plain["seconds"]), plain["uid"],
        )  # fmt: skip


def to_checkpoint(agent: Agent, progress: Progress) -> Checkpoint:
    """The checkpoint of an agent after its last epoch."""
    meta = progress.to_plain()
    return Checkpoint(meta.pop("epoch"), agent.arrays(), meta)


def load_newest(
    storage: Storage | None, agent: Agent, config: TrialConfig, uid: str | None, log: logging.Logger
) -> Progress | None:
    """Load the newest whole checkpoint of a trial into an agent, and return its progress, if there is one."""
    if storage is None:
        return None

    def check(checkpoint: Checkpoint) -> None:
        where = str(storage.directory)
        ownership.check_owner(checkpoint.meta, checkpoint.epoch, config.identity_mapping(), uid, where)

    largest = MAX_HEADER + 8 + sum(array.nbytes for array in agent.arrays().values())
    checkpoint = storage.load(check, lambda error: log.warning("refused: %s", error), largest)
    return None if checkpoint is None else load_checkpoint(checkpoint, agent, config, log)


def load_checkpoint(
    checkpoint: Checkpoint, agent: Agent, config: TrialConfig, log: logging.Logger
) -> Progress:
    """Load a checkpoint that `ownership.check_owner` accepted. Other hyperparameters make a fork."""
    own, epoch, meta = config.identity_mapping(), checkpoint.epoch, checkpoint.meta
    changed = ownership.describe_differences(meta["hyperparameters"], own)
    fork = {"uid": meta["uid"], "identity": meta["identity"], "epoch": epoch, "changed": changed}
    plain = {"epoch": epoch, **meta, "hyperparameters": own}
    progress, _ = load_state({**checkpoint.arrays, "progress": plain}, agent, config, strict=True)
    if not changed:
        return progress
    log.info("forked at epoch %d from %s: %s", epoch, fork["uid"], changed)
    # A digest of what was loaded, not of what the file said: it shows that nothing was lost on the way.
    fork["state_sha256"] = arrays_digest(agent.arrays())
    return replace(progress, lineage=[*progress.lineage, fork])


def load_state(
    state: Mapping[str, Any], agent: Agent, config: TrialConfig, *, strict: bool
) -> tuple[Progress, list[str]]:
    """Check a state and load it; return its progress and the skipped entries (see `PPO.load_state_dict`)."""
    try:
        return _load_state(state, agent, config, strict=strict)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(f"The state does not fit this task ({reason}).") from None


def _load_state(
    state: Mapping[str, Any], agent: Agent, config: TrialConfig, *, strict: bool
) -> tuple[Progress, list[str]]:
    progress = Progress.from_plain(state.get("progress") if isinstance(state, Mapping) else None)
    entries = {k: v for k, v in state.items() if k != "progress"}
    tensors = {k: v if isinstance(v, Tensor) else torch.from_numpy(np.asarray(v)) for k, v in entries.items()}
    if bad := [name for name, value in tensors.items() if not torch.isfinite(value).all()]:
        raise CheckpointError(f"The state has numbers that are not finite: {', '.join(bad)}.")
    own = agent.state()
    skipped: list[str] = []
    if strict:
        if other := ownership.describe_differences(progress.hyperparameters, config.identity_mapping()):
            raise CheckpointError(f"The state belongs to other hyperparameters: {other}.")
        if unknown := set(tensors) - set(own):
            raise CheckpointError(f"The state has unknown entries: {', '.join(sorted(unknown))}.")
    else:
        fit = {k: v for k, v in tensors.items() if k in own and v.shape == own[k].shape}
        skipped = sorted((set(own) | set(tensors)) - set(fit))
        tensors = {**own, **fit}
    agent.load(tensors)
    return progress, skipped

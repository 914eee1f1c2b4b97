"""Checkpoints: data only, written atomically, checked on load, the one before kept.

A checkpoint is one safetensors file: a JSON header and raw arrays, which no reader can execute.
Its metadata holds a version, whose it is and how far it is, and the SHA-256 of the whole file (taken
with the digest's own digits set to zero), so that no flipped bit goes unnoticed.

A checkpoint may come from anybody, digest and all. Nothing in it names a file, and every size is bounded
before memory is taken for it: the file's, the header's, and how many values the header's text may have.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.spec.errors import CheckpointError, TornCheckpoint, UserError
from ppo_hpo.state.files import explain_write_errors, read_bytes, write_atomically

VERSION = 1
_ZERO_DIGEST = b"0" * 64
_NAME = re.compile(r"checkpoint-(\d{6})\.safetensors", re.ASCII)
# Far above any network that this package builds, far below what would hurt a machine.
MAX_BYTES = 4 << 30
# Twice the header of 10,000 epochs, which is `config.MAX_EPOCHS`.
MAX_HEADER = 16 << 20
_MAX_VALUES = 600_000
_MAX_DEPTH = 40


@dataclass(frozen=True)
class Checkpoint:
    """A task's state at the end of an epoch.

    Attributes:
        epoch: epochs done.
        arrays: name to array.
        meta: plain data: whose it is, its hyperparameters, its learning curve.
    """

    epoch: int
    arrays: dict[str, NDArray[Any]]
    meta: dict[str, Any]


def to_bytes(checkpoint: Checkpoint) -> bytes:
    """Serialise a checkpoint, digest included.

    Raises:
        CheckpointError: it holds a number that is not finite, or more than a reader takes.
    """
    from safetensors.numpy import save

    meta = {"version": VERSION, "epoch": checkpoint.epoch, **checkpoint.meta}
    text = json.dumps(meta, allow_nan=False)
    if (reason := _beyond(text.encode())) or (reason := _not_plain(json.loads(text))):
        raise CheckpointError(f"What no reader takes is not saved: {reason}.")
    header = {
        "ppo_hpo": text,
        "sha256": _ZERO_DIGEST.decode(),
    }
    arrays = {name: np.asarray(array, order="C") for name, array in checkpoint.arrays.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"What is not finite is not saved: {name} holds NaN or infinity.")
    content = save(arrays, metadata=header)
    digest = hashlib.sha256(content).hexdigest().encode()
    return _set_digest(content, digest)


def epoch_of(name: str) -> int | None:
    """The epoch in a checkpoint's file name, or None where it is no such name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def from_bytes(content: bytes, name: str, named: int | None = None) -> Checkpoint:
    """Read a checkpoint.

    Args:
        content: the whole file.
        name: what to call it in an error.
        named: the epoch in its file's name, which has to be its own; None where it has no such name.

    Raises:
        TornCheckpoint: it is not what was written.
        CheckpointError: it is of another version, or holds a number that is not finite.
    """
    from safetensors.numpy import load

    header = _header(content, name)
    digest = str(header.get("sha256", "")).encode(errors="replace")
    if len(digest) != 64 or hashlib.sha256(_set_digest(content, _ZERO_DIGEST)).hexdigest().encode() != digest:
        raise TornCheckpoint(f"{name} is torn or was changed: its checksum does not match.")
    try:
        meta = json.loads(header["ppo_hpo"])
        if _not_plain(meta):
            raise ValueError
        version, epoch = meta.pop("version"), int(meta.pop("epoch"))
    except (KeyError, ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        raise CheckpointError(f"{name} is no checkpoint of ppo_hpo.") from None
    if version != VERSION:
        raise CheckpointError(
            f"{name} has version {version}, but this ppo_hpo reads version {VERSION}. "
            f"Continue it with the release that wrote it."
        )
    if named not in (None, epoch):
        raise CheckpointError(f"{name} is the checkpoint of another epoch, {epoch}: it was renamed.")
    try:
        arrays = load(content)
    except Exception as error:  # what there is depends on the release of safetensors and of numpy
        raise CheckpointError(f"{name} cannot be read: {error}.") from None
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise CheckpointError(f"{name} is not finite: {key} holds NaN or infinity.")
    return Checkpoint(epoch, arrays, meta)


def arrays_digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of names, types, shapes and bytes: equal for two states that are equal to the bit."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        total.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        total.update(array.tobytes())
    return total.hexdigest()


class Storage:
    """Checkpoints of one trial in one directory: the newest, and the one before it."""

    def __init__(
        self, directory: str | os.PathLike[str], write: Callable[[Path, bytes], None] | None = None
    ) -> None:
        """Checkpoints in ``directory``, written by ``write``, which is `write_atomically` or as good."""
        if "://" in str(directory):
            raise UserError(
                f"A storage must be a directory, but got {str(directory)!r}. For a remote store give "
                f"a MirroredStorage (ppo_hpo.trial.restore)."
            )
        self.directory = Path(directory)
        self._write = write or write_atomically

    def __repr__(self) -> str:
        return f"Storage({str(self.directory)!r})"

    def paths(self) -> list[Path]:
        """The checkpoints that are there, newest first.

        Raises:
            UserError: the directory cannot be read. That is not the same as an empty one, from which a
                trial would start again.
        """
        try:
            found = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise UserError(
                f"{self.directory} cannot be read: {error.strerror}. Mend its permissions or its file "
                f"system, and run the trial again."
            ) from None
        return sorted(found, key=lambda path: path.name, reverse=True)

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint whole, or not at all, and then drop those before the previous one.

        Raises:
            UserError: it cannot be written, as on a full disk; the checkpoints before it are whole.
        """
        return self.put(checkpoint.epoch, to_bytes(checkpoint))

    def path_of(self, epoch: int) -> Path:
        """The file of one epoch's checkpoint."""
        return self.directory / f"checkpoint-{epoch:06d}.safetensors"

    def put(self, epoch: int, content: bytes) -> Path:
        """The same as `save`, of a checkpoint that is serialised already."""
        path = self.path_of(epoch)
        with explain_write_errors(path):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._write(path, content)
        older = [other for other in self.paths() if other.name < path.name]
        for other in older[1:]:
            other.unlink(missing_ok=True)
        return path

    def load(
        self,
        check: Callable[[Checkpoint], None] = lambda checkpoint: None,
        on_refused: Callable[[CheckpointError], None] = lambda error: None,
        max_bytes: int = MAX_BYTES,
    ) -> Checkpoint | None:
        """The newest checkpoint that is whole.

        Args:
            check: raises `CheckpointError` for one that does not belong here.
            on_refused: told of each that is passed over for an older one, and why.
            max_bytes: bytes that one can have; what is larger is refused unread.

        Returns:
            The checkpoint, or None where there is none at all.

        Raises:
            CheckpointError: there are checkpoints, but none that can be used.
        """
        refused: list[CheckpointError] = []
        for path in self.paths():
            try:
                checkpoint = read(path, max_bytes)
                check(checkpoint)
            except CheckpointError as error:
                refused.append(error)
                continue
            for reason in refused:
                on_refused(reason)
            return checkpoint
        if refused:
            raise refused[0]
        return None


def read(path: Path, max_bytes: int = MAX_BYTES) -> Checkpoint:
    """Read one checkpoint file.

    Args:
        path: of the file; it must be a file, and no link to one.
        max_bytes: bytes that it can have.

    Raises:
        CheckpointError: it cannot be read or used.
    """
    return from_bytes(read_bytes(path, max_bytes), str(path), epoch_of(path.name))


def _header(content: bytes, name: str) -> dict[str, Any]:
    """The metadata of a safetensors file, without looking at its arrays."""
    length = int.from_bytes(content[:8], "little")
    try:
        if len(content) < 8 or length > len(content) - 8:
            raise ValueError
        if reason := _beyond(content[8 : 8 + min(length, MAX_HEADER + 1)]):
            raise CheckpointError(f"{name} is no checkpoint of ppo_hpo: {reason}.")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        if not isinstance(metadata, dict):
            raise ValueError
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise TornCheckpoint(f"{name} is torn, or no checkpoint of ppo_hpo.") from None
    return metadata


def _beyond(text: bytes) -> str:
    """In words, why JSON text is not even parsed; empty where it is."""
    if len(text) > MAX_HEADER:
        return f"its header is larger than {MAX_HEADER} bytes"
    # Of three bytes of text can become hundreds of memory: each value costs one of these signs.
    if text.count(b",") + text.count(b"[") + text.count(b"{") > _MAX_VALUES:
        return f"its header has more than {_MAX_VALUES} values"
    return ""


def _not_plain(value: Any) -> str:
    """In words, why parsed JSON is no data that every reader can take; empty where it is."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            return f"it is nested more than {_MAX_DEPTH} deep"
        if isinstance(item, dict):
            waiting += [(part, depth + 1) for part in item.values()]
        elif isinstance(item, list):
            waiting += [(part, depth + 1) for part in item]
        elif isinstance(item, int | float):
            try:
                finite = math.isfinite(item)
            except OverflowError:
                finite = False
            if not finite:
                return "it holds a number that is not finite"
    return ""


def _set_digest(content: bytes, digest: bytes) -> bytes:
    """The file with other digits in the place of its digest."""
    mark = b'"sha256":"'
    # The last one in the header is ours: quotes inside the JSON text before it are escaped.
    end = 8 + int.from_bytes(content[:8], "little")
    at = content.rfind(mark, 8, end)
    if at < 0:
        return content
    at += len(mark)
    return content[:at] + digest + content[at + 64 :]

"""Checkpoints: plain data, written atomically and checked when they are read.

A checkpoint is one safetensors file: a JSON header and raw arrays. Reading it never runs code. Its metadata
holds the format's version, the hyperparameters and the epoch it belongs to, and the SHA-256 of the whole
file. That digest is computed with its own 64 digits set to zero, and reveals every changed bit.

A checkpoint may come from anybody, with a correct digest. So nothing in it is used as a file name, and its
size, the size of its header and the number of values in the header are limited before memory is used for
them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.spec.errors import CheckpointError, TornCheckpoint, UserError
from ppo_hpo.spec.rules import is_number
from ppo_hpo.state.files import explain_write_errors, read_bytes, write_atomically

VERSION = 1
_ZERO_DIGEST = b"0" * 64
_NAME = re.compile(r"checkpoint-(\d{6})\.safetensors", re.ASCII)
# In bytes: far more than any network of this package needs, and far less than would harm a machine.
MAX_BYTES = 4 << 30
# In bytes: twice the header of a trial of 10,000 epochs, which is `config.MAX_EPOCHS`.
MAX_HEADER = 16 << 20
_MAX_VALUES = 600_000
_MAX_DEPTH = 40


@dataclass(frozen=True)
class Checkpoint:
    """The state of a task at the end of an epoch."""

    epoch: int  # number of epochs trained
    arrays: dict[str, NDArray[Any]]
    meta: dict[str, Any]  # plain data, such as hyperparameters, the trial's id and the learning curve


def to_bytes(checkpoint: Checkpoint) -> bytes:
    """Serialise a checkpoint, digest included; refuses numbers that are not finite, and too large headers."""
    from safetensors.numpy import save

    meta = {"version": VERSION, "epoch": checkpoint.epoch, **checkpoint.meta}
    text = json.dumps(meta, allow_nan=False)
    if reason := _over_limit(text.encode()) or _not_plain(json.loads(text)):
        raise CheckpointError(f"The checkpoint is not saved: {reason}.")
    arrays = {name: np.asarray(array, order="C") for name, array in checkpoint.arrays.items()}
    if bad := _not_finite(arrays):
        raise CheckpointError(f"The checkpoint is not saved: {bad} holds NaN or infinity.")
    content = save(arrays, metadata={"ppo_hpo": text, "sha256": _ZERO_DIGEST.decode()})
    return _set_digest(content, hashlib.sha256(content).hexdigest().encode())


def from_bytes(content: bytes, name: str, expected_epoch: int | None = None) -> Checkpoint:
    """Read a checkpoint from its file's content; ``name`` is the file's name for messages.

    `TornCheckpoint` says that the file is not what was written. `CheckpointError` says that it has another
    version, another epoch than expected, or a number that is not finite, or is no checkpoint of ppo_hpo.
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
        raise CheckpointError(f"{name} is not a checkpoint of ppo_hpo.") from None
    if version != VERSION:
        raise CheckpointError(
            f"{name} has version {version}, but this ppo_hpo reads version {VERSION}. "
            "Resume it with the release that wrote it."
        )
    if expected_epoch not in (None, epoch):
        raise CheckpointError(f"{name} is the checkpoint of another epoch, {epoch}: the file was renamed.")
    try:
        arrays = load(content)
    except Exception as error:  # The error types depend on the releases of safetensors and numpy.
        raise CheckpointError(f"{name} cannot be read: {error}.") from None
    if bad := _not_finite(arrays):
        raise CheckpointError(f"{name} is not finite: {bad} holds NaN or infinity.")
    return Checkpoint(epoch, arrays, meta)


def read(path: Path, max_bytes: int = MAX_BYTES) -> Checkpoint:
    """Read one checkpoint file, not through a link, and not if it is larger than ``max_bytes``."""
    return from_bytes(read_bytes(path, max_bytes), str(path), epoch_of(path.name))


def epoch_of(name: str) -> int | None:
    """The epoch in the file name of a checkpoint; None if it is another file's name."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def arrays_digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of names, types, shapes and bytes. It is equal for two states that are equal to the bit."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        total.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        total.update(array.tobytes())
    return total.hexdigest()


# A checkpoint, and the bytes of its file.
Found = tuple[Checkpoint, bytes]


class Acceptance(NamedTuple):
    """Which checkpoints may be used: the arguments of `Storage.load`."""

    check: Callable[[Checkpoint], None]
    on_refused: Callable[[CheckpointError], None]
    max_bytes: int


_Name = TypeVar("_Name")


class Storage:
    """The checkpoints of one trial in one directory: the latest one and the one before it."""

    def __init__(
        self, directory: str | os.PathLike[str], write: Callable[[Path, bytes], None] | None = None
    ) -> None:
        """Keep checkpoints in a directory, created when the first one is saved.

        Args:
            directory: path of the directory; a URL is a `UserError`.
            write: writes a file atomically; default: `write_atomically`.
        """
        if "://" in str(directory):
            raise UserError(
                f"A storage must be a directory, but got {str(directory)!r}. For a remote store give a "
                "MirroredStorage (ppo_hpo.state.mirror)."
            )
        self.directory = Path(directory)
        self._write = write or write_atomically

    def __repr__(self) -> str:
        return f"Storage({str(self.directory)!r})"

    def path_of(self, epoch: int) -> Path:
        """The file of one epoch's checkpoint."""
        return self.directory / f"checkpoint-{epoch:06d}.safetensors"

    def paths(self) -> list[Path]:
        """The files of all checkpoints, the latest first."""
        try:
            found = [path for path in self.directory.iterdir() if _NAME.fullmatch(path.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            # It must not look like an empty directory: a trial without checkpoints starts from scratch.
            raise UserError(
                f"{self.directory} cannot be read: {error.strerror}. Fix its permissions or its file system, "
                "and run the trial again."
            ) from None
        return sorted(found, key=lambda path: path.name, reverse=True)

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint atomically, and then remove all but the one before it; returns its file.

        If it cannot be written, for example on a full disk, earlier checkpoints are kept.
        """
        return self.put(checkpoint.epoch, to_bytes(checkpoint))

    def put(self, epoch: int, content: bytes) -> Path:
        """Like `save`, for a checkpoint that is already serialised."""
        path = self.path_of(epoch)
        with explain_write_errors(path):
            self.directory.mkdir(parents=True, exist_ok=True)
        self._write(path, content)
        for older in [other for other in self.paths() if other.name < path.name][1:]:
            older.unlink(missing_ok=True)
        return path

    def load(
        self,
        check: Callable[[Checkpoint], None] = lambda checkpoint: None,
        on_refused: Callable[[CheckpointError], None] = lambda error: None,
        max_bytes: int = MAX_BYTES,
    ) -> Checkpoint | None:
        """Read the latest usable checkpoint; None if there is no checkpoint at all.

        If there are checkpoints, but none is usable, the latest one's `CheckpointError` is raised.

        Args:
            check: raises `CheckpointError` for a checkpoint that must not be used; default: all may be used.
            on_refused: called with the reason for each refused checkpoint, if an older one is used instead.
            max_bytes: size in bytes above which a file is refused unread.
        """
        accept = Acceptance(check, on_refused, max_bytes)
        # Nobody needs the bytes of a file that is here already.
        found = newest_whole(self.paths(), lambda path: (read(path, max_bytes), b""), accept)
        return None if found is None else found[0]


def newest_whole(names: Sequence[_Name], fetch: Callable[[_Name], Found], accept: Acceptance) -> Found | None:
    """The first checkpoint that can be used. It is an error if there are some, but none can be used."""
    refused: list[CheckpointError] = []
    for name in names:
        try:
            checkpoint, content = fetch(name)
            accept.check(checkpoint)
        except CheckpointError as error:
            refused.append(error)
            continue
        for reason in refused:
            accept.on_refused(reason)
        return checkpoint, content
    if refused:
        raise refused[0]
    return None


def _header(content: bytes, name: str) -> dict[str, Any]:
    """The metadata of a safetensors file, read without looking at its arrays."""
    length = int.from_bytes(content[:8], "little")
    whole = len(content) >= 8 and length <= len(content) - 8
    if whole and (reason := _over_limit(content[8 : 8 + min(length, MAX_HEADER + 1)])):
        raise CheckpointError(f"{name} is not a checkpoint of ppo_hpo: {reason}.")
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        metadata = json.loads(content[8 : 8 + length])["__metadata__"] if whole else None
        if isinstance(metadata, dict):
            return metadata
    raise TornCheckpoint(f"{name} is torn, or not a checkpoint of ppo_hpo.")


def _over_limit(text: bytes) -> str:
    """Why JSON text is refused before it is parsed; empty if it is accepted."""
    if len(text) > MAX_HEADER:
        return f"its header is larger than {MAX_HEADER} bytes"
    # Three bytes of text can become hundreds of bytes of memory. Each value costs one of these characters.
    if text.count(b",") + text.count(b"[") + text.count(b"{") > _MAX_VALUES:
        return f"its header has more than {_MAX_VALUES} values"
    return ""


def _not_plain(value: Any) -> str:
    """Why parsed JSON is refused; empty if it is accepted."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            return f"it is nested more than {_MAX_DEPTH} deep"
        if isinstance(item, dict | list):
            parts = item.values() if isinstance(item, dict) else item
            waiting += [(part, depth + 1) for part in parts]
        elif isinstance(item, int | float) and not isinstance(item, bool) and not is_number(item):
            return "it holds a number that is not finite"
    return ""


def _not_finite(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Name of the first array with NaN or infinity; empty if there is none."""
    return next((name for name, array in arrays.items() if not np.isfinite(array).all()), "")


def _set_digest(content: bytes, digest: bytes) -> bytes:
    """A copy of the file with other digits in the place of its digest."""
    mark = b'"sha256":"'
    # The last such text in the header is the digest: quotes in the JSON text before it are escaped.
    at = content.rfind(mark, 8, 8 + int.from_bytes(content[:8], "little"))
    if at < 0:
        return content
    return content[: at + len(mark)] + digest + content[at + len(mark) + 64 :]

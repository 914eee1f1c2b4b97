"""Reading and writing the files of a trial: whole files only, bounded sizes, no links.

This module imports no numpy, so a report or a result can use it without loading numpy.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppo_hpo.spec.errors import CheckpointError, UserError

# Temporary files have names of their own, so that removing those of a killed writer removes nothing else.
_TEMPORARY = ".ppo-hpo-"


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read one regular file, not a link to one; `CheckpointError` if it is larger than ``max_bytes``."""
    try:
        # A link can point out of the trial's directory. Opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "it is not a regular file")
            if status.st_size > max_bytes:
                raise CheckpointError(f"{path} is larger than {max_bytes} bytes: it is not read.")
            return file.read(status.st_size)
    except OSError as error:
        reason = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise CheckpointError(f"{path} cannot be read: {reason}.") from None


def write_atomically(path: Path, content: bytes, stage: Path | None = None, *, private: bool = False) -> None:
    """Write a file so that at any instant either the old or the new content is there, complete.

    The content goes into a temporary file, which is flushed to disk and renamed. Then the directory is
    flushed, so that the rename also survives a loss of power.

    Args:
        path: the file to write.
        content: its complete content.
        stage: directory of the temporary file, on the same file system; default: the directory of ``path``.
        private: whether only the user may read the file, because it holds a secret.
    """
    with explain_write_errors(path):
        temporary = (stage or path.parent) / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}.tmp"
        # The file is created inside the `try`, because a signal may raise as soon as the file exists.
        try:
            # Files of mkstemp are readable by their owner only. These follow the umask.
            mode = 0o600 if private else 0o666
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def remove_temporary_files(directory: Path) -> None:
    """Remove the temporary files of killed writers. The caller must hold the trial's lock."""
    for path in directory.glob(f"{_TEMPORARY}*.tmp"):
        path.unlink(missing_ok=True)


def append_line(path: Path, line: str, log: logging.Logger) -> None:
    """Append a line to one of a trial's logs.

    No result depends on these logs, so a line that cannot be written is left out, with a warning. If a full
    disk has cut the last line short, this one still begins on a line of its own.
    """
    try:
        with open(path, "ab+") as file:
            whole = not file.tell() or (file.seek(-1, os.SEEK_END) >= 0 and file.read(1) == b"\n")
            file.write((line if whole else f"\n{line}").encode() + b"\n")
    except OSError as error:
        log.warning(
            "%s cannot be written: %s. It lacks a line, and nothing else is lost", path, error.strerror
        )


@contextlib.contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` while writing ``path``, such as a full disk, into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}. What was saved before is whole. Free some space or "
            f"fix the permissions, and run the trial again: it resumes."
        ) from error


def read_json_lines(path: Path, max_bytes: int, max_line: int) -> Iterator[Any]:
    """Parse each line of a file; None stands for an invalid line. Nothing comes from an unreadable file.

    Sizes are in bytes of the file and in characters of a line, which is cut there.
    """
    try:
        content = read_bytes(path, max_bytes)
    except CheckpointError:
        return
    for line in content.decode(errors="replace").splitlines():
        try:
            value = json.loads(line[:max_line])
        except (ValueError, RecursionError):
            value = None
        yield value

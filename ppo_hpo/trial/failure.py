"""What a failure means: for the trial, whether retrying may help; for Orion, whether the hunt should stop.

`kind` says what sort of failure it is. `ppo_hpo.trial.retries` acts on it within the trial's process.

For Orion, `stops_the_hunt` separates what would fail other trials too from what is wrong with this one:

- What the machine lacks (a package, a device, a directory that can be written) stops the hunt.
- A checkpoint that is torn or belongs to another trial, lack of memory, and errors that occurred once do not.
- Everything else that a user can fix, such as the configuration or an error that occurred again, stops it if
  no trial of the experiment ever finished an epoch, and if this trial has not stopped it before.

"Stops" means the exit code that Orion takes for an interruption. The hunt then ends with a code that is
not 0, although it ends with 0 after three broken trials. The trial is left interrupted, and resumes once the
mistake is fixed. The last condition is for a trial that is the only one with its mistake: it must not stop
every hunt.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ppo_hpo.spec.errors import (
    CheckpointError,
    DeterministicFailure,
    MachineError,
    OutOfMemory,
    UserError,
    hide_secrets,
)
from ppo_hpo.state.files import read_bytes, write_atomically

#: ``transient`` may pass. ``machine`` is what this machine lacks. ``permanent`` is a mistake in the input.
Kind = Literal["transient", "machine", "permanent", "unknown"]

RECORD, TRACEBACK = "failure.json", "traceback.txt"
_MAX_RECORD = 1 << 16
_TRANSIENT = {
    errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOMEM,
    errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EPIPE, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH,
}  # fmt: skip
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def kind(error: BaseException) -> Kind:
    """What sort of failure an error is."""
    if lacks_memory(error) or is_transient(error):
        return "transient"
    if isinstance(error, MachineError) or (isinstance(error, UserError) and _is_about_files(error)):
        return "machine"
    return "permanent" if isinstance(error, UserError) else "unknown"


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, on the machine or on its GPU."""
    return any(
        isinstance(e, MemoryError | OutOfMemory)
        or (isinstance(e, RuntimeError) and any(words in str(e) for words in _MEMORY_WORDS))
        for e in _chain(error)
    )


def is_transient(error: BaseException) -> bool:
    """Whether an error comes from a file system or a connection that failed for a reason that may pass."""
    return any(
        e.errno in _TRANSIENT
        if isinstance(e, OSError) and e.errno is not None
        # A process at the other end of a pipe went away, or did not answer.
        else isinstance(e, EOFError | ConnectionError | TimeoutError)
        for e in _chain(error)
    )


def _is_about_files(error: BaseException) -> bool:
    return any(isinstance(e, OSError) for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, what caused that, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # `from None` hides the cause of a message from people, but not from us.
        error = error.__cause__ or error.__context__


def one_line(error: BaseException) -> str:
    """An error in one line. The type of the error is left out if its text is written for users."""
    text = hide_secrets(" ".join("".join(c if c.isprintable() else " " for c in str(error)).split()))
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")


@dataclass(frozen=True)
class Record:
    """Why a trial failed last, as its directory tells."""

    error: str  # in one line
    place: str | None  # where it failed, see `retries.place_of`
    stopped: bool  # whether it stopped the hunt
    at: str  # when it failed
    host: str  # on which machine


def read_record(directory: Path) -> Record | None:
    """Why a trial failed last, or None if it did not fail or the record is not valid."""
    try:
        content: Any = json.loads(read_bytes(directory / RECORD, _MAX_RECORD))
        texts = [content["error"], content["at"], content["host"], content["place"] or ""]
        if not all(type(text) is str and text.isprintable() for text in texts):
            return None
        stopped = content["stopped"] is True
        return Record(content["error"], content["place"], stopped, content["at"], content["host"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # A UserError is a ValueError.
        return None


def record_failure(directory: Path, error: Exception, *, stopped: bool = False) -> None:
    """Write down why a trial failed, with the traceback of a crash, and whether that stopped the hunt."""
    place = getattr(error, "place", None) or getattr(error.__cause__, "place", None)
    content = {
        "error": one_line(error)[:4096],
        "place": place if isinstance(place, str) else None,
        "stopped": stopped,
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    # The failure may be that the disk is full.
    with contextlib.suppress(UserError):
        write_atomically(directory / RECORD, (json.dumps(content) + "\n").encode())
        if not isinstance(error, UserError) or error.__cause__ is not None:
            text = hide_secrets("".join(traceback.format_exception(error)))
            write_atomically(directory / TRACEBACK, text[-_MAX_RECORD:].encode("utf-8", "replace"))


def remove_record(directory: Path) -> None:
    """Remove the record of a trial that has succeeded."""
    for name in (RECORD, TRACEBACK):
        with contextlib.suppress(OSError):
            (directory / name).unlink(missing_ok=True)


def stops_the_hunt(error: Exception, directory: Path, siblings: Path) -> bool:
    """Decide whether a failure stops the hunt or the trial is broken, and write it down in its directory.

    ``siblings`` is the directory that holds the directories of the experiment's trials.
    """
    if not isinstance(error, UserError) or isinstance(error, CheckpointError | OutOfMemory):
        stop = False
    elif isinstance(error, MachineError) or (
        _is_about_files(error) and not isinstance(error, DeterministicFailure)
    ):
        stop = True
    else:
        # The trial may be the only one with its mistake. So the second time it is broken.
        before = read_record(directory)
        again = before is not None and before.stopped and before.error == one_line(error)
        stop = not again and not any(siblings.glob("*/timing.jsonl"))
    record_failure(directory, error, stopped=stop)
    return stop

"""What becomes of a trial that fails: it goes on here, is left to Orion as broken, or stops the hunt.

Here, `persist` goes on from the last checkpoint, a few times:

- after a fault that may pass: memory, a hiccup of a file system or of a connection;
- after any other error that is no sentence for people, unless it comes again at the very same step.

A file that cannot be written for the moment needs less: `patiently` writes it again, and nothing is
computed twice.

For Orion, `stops_the_hunt` tells what would end other trials too from what is wrong with this one:

- what the machine lacks (a package, a device, a directory that can be written) stops the hunt;
- a checkpoint that belongs to another trial or is torn, memory, and errors that did not come again do not;
- everything else that a user can mend, as the configuration or an error that came again, stops it if no
  trial of the experiment ever finished an epoch, and this one has not stopped it before.

"Stops" means the exit code that Orion takes for an interruption. The hunt then ends with a code that is not
0, which it is after three broken trials, and the trial is left interrupted: it goes on when the mistake is
mended. The last condition is for a trial that is alone with its mistake: it must not stop all hunts.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ppo_hpo.spec.errors import CheckpointError, DeterministicFailure, MachineError, OutOfMemory, UserError

Kind = Literal["transient", "here", "permanent", "unknown"]
T = TypeVar("T")

RECORD = "failure.json"

# Seconds before the first retry, twice as many before each further one, and at most:
_PAUSE, _LONGEST = 1.0, 30.0
_MAX_RECORD = 1 << 16
_HICCUPS = {
    errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOMEM,
    errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EPIPE, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH,
}  # fmt: skip
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def kind(error: BaseException) -> Kind:
    """What sort of failure it is: see the table above, whose first four rows are these."""
    chain = list(_chain(error))
    if any(_of_memory(e) for e in chain) or any(_is_hiccup(e) for e in chain):
        return "transient"
    if isinstance(error, MachineError) or (isinstance(error, UserError) and _of_files(error)):
        return "here"
    return "permanent" if isinstance(error, UserError) else "unknown"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # `from None` hides from people what led to a sentence for them, and not from us.
        error = error.__cause__ or error.__context__


def _of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_WORDS)


def _is_hiccup(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _HICCUPS
    # A process at the other end of a pipe went away, or did not answer.
    return isinstance(error, EOFError | ConnectionError | TimeoutError)


def _of_files(error: BaseException) -> bool:
    return any(isinstance(e, OSError) for e in _chain(error))


def one_line(error: BaseException) -> str:
    """An error in one line: its type, unless it is a sentence for people already, and what it says."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    if isinstance(error, UserError):
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")


# ------------------------------------------------------------------------- going on


@dataclass
class Work:
    """What this process has done for a trial, in all its attempts.

    Attributes:
        steps: environment steps, those included that were lost by a failure and done again.
        retries: attempts after the first.
        attempted: whether there was an attempt.
        began: epochs that were done when the process came to the trial; None where it began with nothing.
        epoch: done in the attempt under way.
        step: environment steps of the epoch under way.
        part: what of the trial it is, where it has several seeds.
        eval_steps: environment steps of evaluations, repeated ones included.
        wall_seconds: of what it did before it lost the trial's lock.
        cpu_seconds: likewise.
    """

    steps: int = 0
    retries: int = 0
    attempted: bool = False
    began: int | None = None
    epoch: int = 0
    step: int = 0
    part: str = ""
    eval_steps: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0

    def count(self, steps: int) -> None:
        """Take in environment steps that are about to be taken."""
        self.steps += steps
        self.step += steps

    def enter(self, epoch: int) -> None:
        """Say that an epoch begins after so many done."""
        self.epoch, self.step = epoch, 0


def persist(
    attempt: Callable[[], T],
    work: Work,
    retries: int,
    known: str | None = None,
    log: logging.Logger | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Attempt until it succeeds, or it is of no use.

    Args:
        attempt: goes on from the last checkpoint each time, and keeps ``work`` up to date.
        work: of all attempts.
        retries: further attempts, counted anew whenever an epoch was finished since the failure before.
        known: the `place` where an earlier process failed, if one did.
        log: is told of each failure that is followed by another attempt.
        sleep: waits.

    Raises:
        DeterministicFailure: an error that nobody knows came twice at the very same step.
        OutOfMemory: in the place of any other error that says so.
    """
    log = log or logging.getLogger("ppo_hpo")
    left, reached, last = retries, -1, known
    while True:
        try:
            return attempt()
        except Exception as error:
            found, what, where = kind(error), one_line(error), place(error, work)
            error.__dict__["place"] = where
            if work.epoch > reached:
                left, reached = retries, work.epoch
            if found == "unknown" and retries and where == last:
                raise DeterministicFailure(
                    f"{what}: came again at the very same step ({where}), and would come each time. "
                    f"Mend what raises it."
                ) from error
            if found in ("here", "permanent") or getattr(error, "waited_for", False) or not left:
                if not isinstance(error, UserError) and any(_of_memory(e) for e in _chain(error)):
                    raise OutOfMemory(
                        f"There is not enough memory ({what}). What was saved is whole; run fewer trials "
                        f"at a time, or make the network, its batches or env.n_envs smaller, and run the "
                        f"trial again: it goes on from there."
                    ) from error
                raise
            last = where
        # Out here the error is gone, and with it the frames that held the attempt's memory.
        pause = _pause(retries - left)
        left -= 1
        work.retries += 1
        log.warning(
            "%s (%s): goes on from the last checkpoint in %g s, and %s",
            what.rstrip("."), where, pause,
            f"{left} more time{'s' if left > 1 else ''} if need be" if left else "gives up after that",
        )  # fmt: skip
        _free_memory()
        sleep(pause)


def patiently(
    write: Callable[[Path, bytes], None],
    retries: int,
    log: logging.Logger,
    sleep: Callable[[float], None] = time.sleep,
) -> Callable[[Path, bytes], None]:
    """``write``, again after a pause where it fails by what may pass, as on a disk that is full.

    Args:
        write: writes a file whole, or not at all.
        retries: how often again.
        log: is told of each failure that is followed by another try.
        sleep: waits.

    Returns:
        The same function; what it raises in the end is not tried again by `persist`.
    """

    def again(path: Path, content: bytes) -> None:
        for number in range(retries + 1):
            try:
                write(path, content)
                return
            except UserError as error:
                if not any(_is_hiccup(e) for e in _chain(error)):
                    raise
                if number == retries:
                    error.__dict__["waited_for"] = retries > 0
                    raise
                log.warning("%s: tries again in %g s", one_line(error).rstrip("."), _pause(number))
            sleep(_pause(number))

    return again


def _pause(number: int) -> float:
    """Seconds before a retry, the first of which is number 0."""
    return min(_LONGEST, _PAUSE * 2.0**number)


def place(error: BaseException, work: Work) -> str:
    """Where a trial was: a trial repeats itself, so that its own errors come again at the very same place."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    line = "" if traceback is None else f", {traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
    part = f"{work.part}, " if work.part else ""
    return f"{part}epoch {work.epoch + 1}, step {work.step}, {type(error).__name__}{line}"


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------- telling Orion


@dataclass(frozen=True)
class Record:
    """Why a trial failed last, as its directory tells.

    Attributes:
        error: in one line.
        place: see `place`.
        stopped: whether it stopped the hunt.
        at: when.
        host: where.
    """

    error: str
    place: str | None
    stopped: bool
    at: str
    host: str


def read_record(directory: Path) -> Record | None:
    """Why a trial failed last; None where it did not, or nobody knows."""
    try:
        from ppo_hpo.state.files import read_bytes

        content: Any = json.loads(read_bytes(directory / RECORD, _MAX_RECORD))
        texts = [content["error"], content["at"], content["host"], content["place"] or ""]
        if not all(type(text) is str and text.isprintable() for text in texts):
            return None
        return Record(
            content["error"], content["place"], content["stopped"] is True, content["at"], content["host"]
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # UserError is a ValueError
        return None


def note(directory: Path, error: Exception) -> None:
    """Write down why a trial failed that nobody but its user looks after; see `stops_the_hunt`."""
    _write_record(directory, Record(one_line(error), _place_of(error), False, "", ""))


def forget(directory: Path) -> None:
    """Remove the record of a trial that ended well."""
    with contextlib.suppress(OSError):
        (directory / RECORD).unlink(missing_ok=True)


def stops_the_hunt(error: Exception, directory: Path, siblings: Path | None) -> bool:
    """Decide what Orion is to do about a failure, and write it down in the trial's directory.

    Args:
        error: that ended the trial.
        directory: of the trial.
        siblings: directory of the directories of the experiment's trials.

    Returns:
        Whether the hunt should stop, and leave the trial interrupted; else it is broken.
    """
    text = one_line(error)
    before = read_record(directory)
    if not isinstance(error, UserError) or isinstance(error, CheckpointError | OutOfMemory):
        stop = False
    elif isinstance(error, MachineError) or _of_files(error):
        stop = True
    else:
        # Alone with it, a trial is broken; and so it is the second time, because it may be alone after all.
        again = before is not None and before.stopped and before.error == text
        stop = not again and not _somebody_finished_an_epoch(siblings)
    _write_record(directory, Record(text, _place_of(error), stop, "", ""))
    return stop


def _place_of(error: BaseException) -> str | None:
    found = getattr(error, "place", None) or getattr(error.__cause__, "place", None)
    return found if isinstance(found, str) else None


def _somebody_finished_an_epoch(siblings: Path | None) -> bool:
    if siblings is None:
        return False
    try:
        return any(siblings.glob("*/timing.jsonl"))
    except OSError:
        return False


def _write_record(directory: Path, record: Record) -> None:
    from ppo_hpo.state.files import write_atomically

    content = {
        "error": record.error[:4096],
        "place": record.place,
        "stopped": record.stopped,
        "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    # A full disk is what it may be about.
    with contextlib.suppress(UserError):
        write_atomically(directory / RECORD, (json.dumps(content) + "\n").encode())

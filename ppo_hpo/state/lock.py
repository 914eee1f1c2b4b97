"""The lock of a trial: one process writes it, the others wait.

Two mechanisms work together:

- ``lock`` in the trial's directory is held by flock while a process trains. The kernel releases it when the
  process ends. Some file systems do not have flock, or hold it per machine only.
- A claim (`ppo_hpo.state.claim`) keeps a writer that lost the lock from writing. It works without flock.

A process waits until it knows that the latest writer has ended, or until that writer gave no sign of life for
a minute.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ppo_hpo.spec.errors import LostLock, UserError
from ppo_hpo.state.claim import Claim, Writer, ask_to_stop, latest_writer, take_claim

# All in seconds. A writer whose process cannot be seen from here counts as dead after this time without a
# sign of life, measured by our own clock.
_SILENCE_LIMIT = 60.0
# Child processes of a dead writer may hold its flock. After this time without a sign of life it is ignored.
_CHILDREN_LIMIT = 5.0
# A process that gave way to `--takeover` waits this long for the other process to take the claim.
_YIELD = 5.0
# Seconds that a writer has to stop after `--takeover` asked it, and then after SIGTERM, before it is killed.
_AFTER_ASKING, _AFTER_SIGTERM = 20.0, 10.0
# First and longest pause between two looks at the lock, and time between two reminders in the log.
_POLL_FIRST, _POLL_LAST, _REMIND = 0.02, 0.5, 60.0

_log = logging.getLogger("ppo_hpo")
_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextlib.contextmanager
def hold(directory: Path, *, takeover: bool = False, lost: LostLock | None = None) -> Iterator[Claim]:
    """Become the only writer of a trial, after waiting for the current one.

    Args:
        directory: the trial's directory; it is created if it does not exist.
        takeover: end the current writer instead of waiting for it.
        lost: how this process lost the trial before. The process that asked for it then goes first.
    """
    path = directory / "lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Stays open whether flock works or not: a takeover recognises the trial's writer by this open file.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{path} cannot be locked: {error.strerror}.") from None
    flock = _Flock(path)
    try:
        claim = _wait(directory, flock, _Takeover(directory) if takeover else None, lost)
        try:
            claim.start()
            yield claim
        finally:
            claim.release()
    finally:
        flock.release()
        os.close(descriptor)


@contextlib.contextmanager
def exclude_writers(directory: Path) -> Iterator[bool]:
    """Keep writers out of a trial for a moment; yields False if there is one already."""
    if not (directory / "lock").is_file() or (directory / "lock").is_symlink():
        yield latest_writer(directory) is None
        return
    flock = _Flock(directory / "lock")
    try:
        seen = _look(directory, flock)
        yield seen.has_flock is not False and seen.ended is True
    finally:
        flock.release()


def active_writer(directory: Path) -> Writer | None:
    """The process that trains the trial in ``directory``; None if there is none.

    A writer whose process cannot be seen from here is watched until it gives a sign of life, or until it has
    given none for a minute.
    """
    return active_writers([directory])[0]


def active_writers(
    directories: Sequence[Path], waiting: Callable[[int], None] = lambda count: None, *,
    limit: float | None = None,
) -> list[Writer | None]:  # fmt: skip
    """Do what `active_writer` does for several trials, which are watched at the same time.

    Args:
        directories: of the trials.
        waiting: called each half second with the number of trials that are still watched.
        limit: seconds without a sign of life after which a writer that cannot be seen counts as dead; None
            means a minute.
    """
    seconds = _SILENCE_LIMIT if limit is None else limit
    watches = [_Watch(directory, seconds) for directory in directories]
    left = watches
    while left := [watch for watch in left if not watch.is_decided()]:
        waiting(len(left))
        time.sleep(_POLL_LAST)
    return [watch.writer for watch in watches]


class _Watch:
    """Looks at one trial until it is known whether a process trains it."""

    def __init__(self, directory: Path, limit: float) -> None:
        self.writer: Writer | None = None  # the result
        self._directory, self._limit = directory, limit
        self._silence = _Silence()
        self._first: Writer | None = None

    def is_decided(self) -> bool:
        path = self._directory / "lock"
        # Without a lock file nobody ever came here, and this look must not create one.
        flock = _Flock(path) if path.exists() else None
        seen = _look(self._directory, flock)
        if flock is not None:
            flock.release()
        self.writer = writer = seen.writer
        if writer is None or seen.ended:
            self.writer = None
            return True
        self._first = first = self._first or writer
        silent = self._silence.seconds(writer)
        gave_sign = (writer.number, writer.last_sign) != (first.number, first.last_sign)
        if seen.ended is False or seen.has_flock is False or gave_sign:
            return True
        if silent >= self._limit:
            self.writer = None
            return True
        return False


def _wait(directory: Path, flock: _Flock, takeover: _Takeover | None, lost: LostLock | None) -> Claim:
    began, silence, pause = time.monotonic(), _Silence(), _POLL_FIRST
    # A process that lost the trial has just logged that, and by whom.
    next_reminder = 0.0 if lost is None else _REMIND
    while True:
        seen = _look(directory, flock)
        if lost is not None and not lost.asked and seen.writer is not None and seen.writer.stage is not None:
            # Another process took this one for dead. So one of the two sees the other one wrongly, and only
            # signs of life count. Otherwise the two would take the trial from each other for ever.
            seen = seen._replace(ended=None)
        silent, waited = silence.seconds(seen.writer), time.monotonic() - began
        number = seen.writer.number if seen.writer else 0
        yields = lost is not None and lost.number == number and waited < _YIELD
        if not yields and _is_free(seen, silent, takeover is not None):
            claim = take_claim(directory, number + 1, seen.has_flock is True)
            if claim is not None:
                return claim
        flock.release()
        if seen.writer is not None and not seen.ended:
            if waited >= next_reminder:
                _log.warning("%s is in use by %s: waiting", directory, seen.writer)
                next_reminder = waited + _REMIND
            if takeover is not None:
                takeover.push(seen.writer)
        time.sleep(pause)
        pause = min(1.5 * pause, _POLL_LAST)


class _Seen(NamedTuple):
    """One look at a trial."""

    has_flock: bool | None  # whether we hold flock now; None if the file system has no flock
    writer: Writer | None  # the latest one; None if there never was one
    ended: bool | None  # whether it has ended; None if that cannot be seen. True without a writer.


def _look(directory: Path, flock: _Flock | None) -> _Seen:
    # The order matters: once we hold flock, we read what its last holder left, or something newer.
    has_flock = flock.attempt() if flock is not None else None
    writer = latest_writer(directory)
    return _Seen(has_flock, writer, writer is None or writer.has_ended(has_flock is True))


def _is_free(seen: _Seen, silent: float, takeover: bool) -> bool:
    """Whether the trial may be claimed, given for how many seconds its writer gave no sign of life."""
    others_flock = seen.has_flock is False
    if seen.ended is None:
        return silent >= _SILENCE_LIMIT and (takeover or not others_flock)
    if not seen.ended:
        return False
    return not others_flock or (seen.writer is not None and silent >= _CHILDREN_LIMIT)


class _Silence:
    """For how long a writer gave no sign of life, by our own clock. Clocks of other machines may be wrong."""

    def __init__(self) -> None:
        self._sign: tuple[int, str | None, int] | None = None
        self._since = time.monotonic()

    def seconds(self, writer: Writer | None) -> float:
        """Seconds since what is seen of the writer last changed."""
        now = time.monotonic()
        sign = (writer.number, writer.stage, writer.last_sign) if writer else None
        if sign != self._sign:
            self._sign, self._since = sign, now
        return now - self._since


class _Flock:
    """flock on one file, if the file system supports it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def attempt(self) -> bool | None:
        """Take the lock if it is free; whether we have it. None if the file system has no flock."""
        descriptor = None
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody may have removed the file since we opened it. Others then lock a new one.
            if os.fstat(descriptor).st_nlink:
                self._descriptor, descriptor = descriptor, None
            return self._descriptor is not None
        except OSError as error:
            if error.errno in _NO_FLOCK:
                return None
            if descriptor is not None and error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise UserError(f"{self._path} cannot be locked: {error.strerror}.") from None
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def release(self) -> None:
        """Release the lock if we have it."""
        if self._descriptor is not None:
            # Closing would not be enough if a forked child has the file open, too.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None


class _Step(NamedTuple):
    after: float
    what: str
    signals: tuple[signal.Signals, ...]


class _Takeover:
    """Ends one writer in three steps: ask it to stop, send SIGTERM, send SIGKILL."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._target: int | None = None
        self._began = 0.0
        self._steps: list[_Step] = []

    def push(self, writer: Writer) -> None:
        """Do the next step, if its time has come. The first call chooses the writer to end."""
        if self._target is None:
            self._target, self._began = writer.number, time.monotonic()
            # A stopped process cannot react, so SIGCONT wakes it. It does nothing to a running process.
            self._steps = [
                _Step(0.0, "asked to give way", (signal.SIGCONT,)),
                _Step(_AFTER_ASKING, "sent SIGTERM", (signal.SIGTERM, signal.SIGCONT)),
                _Step(_AFTER_ASKING + _AFTER_SIGTERM, "killed", (signal.SIGKILL,)),
            ]
            ask_to_stop(self._directory, writer)
        # A later writer came before us, by a takeover of its own. We wait for it like for any other.
        waited = time.monotonic() - self._began
        if writer.number != self._target or not self._steps or waited < self._steps[0].after:
            return
        step = self._steps.pop(0)
        # Asking needs no signal: it also reaches a writer on another machine.
        if _send(writer, self._directory / "lock", step.signals) or step.after == 0.0:
            _log.warning("takeover: %s is %s", writer, step.what)
        else:
            self._steps = []
            _log.warning(
                "takeover: %s cannot be ended from here: waiting until it is done, or gives no sign of life "
                "for %g seconds", writer, _SILENCE_LIMIT,
            )  # fmt: skip


def _send(writer: Writer, lock: Path, signals: tuple[signal.Signals, ...]) -> bool:
    """Send signals to a writer, and never to a process that reuses its pid; whether that was possible."""
    process = writer.process
    if process is None or process.pid == os.getpid():
        return False
    try:
        with process.handle() as handle:
            if handle is None or not _has_open(process.pid, lock):
                return False
            for number in signals:
                signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    return True


def _has_open(pid: int, path: Path) -> bool:
    wanted = path.stat()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/{pid}/fd/{descriptor}")
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False

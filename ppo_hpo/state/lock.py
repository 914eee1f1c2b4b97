"""One writer for one trial: a lock that dies with its process, and a number that fences out who lost it.

Two things lie in a trial's directory:

- ``lock``, held by flock (`filelock`) while a process trains. The kernel drops it with its process.
- ``writer/NNNNNN/``, the claim of the writer of that number. It holds ``record.json``, which says who that
  is, and while it writes a directory ``stage-*``, in which every file of the trial is put together before it
  gets its name. That directory's time is the writer's sign of life. Who is done removes it.

Claims are taken by renaming a whole directory to the next number. That succeeds for one of several
processes, on any file system that renames atomically, so that nothing rests on flock alone: it may be
missing on a shared file system, or hold on each machine for itself. The highest number is the writer.

The fence: a new writer removes the claims below its own before it reads anything. Who lost its claim
without knowing, because it was stopped or cut off, then finds nothing under the name that it wants to
rename: it cannot replace a file of the trial, not even when it was stopped just before the rename.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ppo_hpo.spec.errors import LostLock, UserError
from ppo_hpo.state.files import write_atomically

#: Names this machine where host names do not tell machines apart, as in containers with equal ones.
HOST_VARIABLE = "PPO_HPO_HOST"

# Seconds. Between two looks of a writer at its claim, which are its signs of life:
_BEAT = 1.0
# without one, watched on our own clock, after which a writer that nobody can look at counts as dead:
_QUIET = 60.0
# for which flock may be held although its writer is gone, by children of it that live on:
_SETTLE = 5.0
# that a writer has to give way to `--takeover`, and then to end by SIGTERM before it is killed:
_GIVE_WAY, _GRACE = 20.0, 10.0
# that who gave way waits for the other to claim:
_MANNERS = 5.0
# between two looks at a lock, first and at last, and between two lines that say so.
_POLL_FIRST, _POLL_LAST, _REMIND = 0.02, 0.5, 60.0

_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
_NUMBER = re.compile(r"\d{6,12}", re.ASCII)
_HIGHEST = 999_999_999_999
_HOST = re.compile(r"[\w.:-]{1,255}", re.ASCII)
_MAX_RECORD = 4096


# ----------------------------------------------------------------------- who it is


@dataclass(frozen=True)
class Process:
    """A process, so that no other can be taken for it: numbers of processes are used again.

    Attributes:
        host: name of its machine.
        boot: the kernel's name of this start of the machine.
        namespace: in which its number counts; containers have their own.
        pid: its number.
        started: when, in the kernel's ticks since the boot.
        uid: of its user.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: int
    uid: int

    @classmethod
    def current(cls) -> Process:
        """This process.

        Raises:
            UserError: `HOST_VARIABLE` is no name.
        """
        host = os.environ.get(HOST_VARIABLE) or socket.gethostname()
        if not _HOST.fullmatch(host):
            raise UserError(
                f"`{HOST_VARIABLE}` must be letters, digits and any of . : _ -, at most 255 of them, but got "
                f"{host!r}. Name this machine so."
            )
        return cls(host, _boot(), _namespace(), os.getpid(), _started(os.getpid()) or 0, os.getuid())

    def runs(self) -> bool | None:
        """Whether it still runs; None where that cannot be seen from here."""
        here = Process.current()
        if self.host != here.host:
            return None
        if self.boot != here.boot:
            return False
        if self.namespace != here.namespace or not here.started:
            return None
        started = _started(self.pid)
        if started is None:
            # Where others' processes are hidden, only this tells that there is one.
            try:
                os.kill(self.pid, 0)
            except (ProcessLookupError, OverflowError):
                return False
            except PermissionError:
                return None
            return _started(self.pid) == self.started
        return started == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process started, or None where it is not seen, or is dead and only waits for its parent."""
    try:
        # The name in the second field may hold anything, parentheses too.
        rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if rest[0] in "ZX" else int(rest[19])


# ----------------------------------------------------------------- what is claimed


@dataclass(frozen=True)
class Writer:
    """The newest claim, as another process sees it.

    Attributes:
        number: of the writer.
        process: who it is; None where the record cannot be read.
        taken: when it claimed, in seconds since 1970, by its own clock.
        flock: whether it holds flock, so that whoever gets that knows it gone.
        stage: where it puts its files together; None once it is done.
        sign: its last sign of life, by the file system's clock; only good to compare with another of its own.
    """

    number: int
    process: Process | None
    taken: float
    flock: bool
    stage: str | None
    sign: int

    def has_ended(self, have_flock: bool) -> bool | None:
        """Whether it will not write again; None where only time can tell."""
        if self.stage is None:
            return True
        if self.process is None:
            return None
        runs = self.process.runs()
        if runs is not False and have_flock and self.flock and self._same_kernel():
            return True
        return None if runs is None else not runs

    def _same_kernel(self) -> bool:
        here = Process.current()
        return self.process is not None and (self.process.host, self.process.boot) == (here.host, here.boot)

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.taken))
        return f"writer {self.number}, {self.process or 'an unknown process'}, since {since}"


def latest_writer(directory: Path) -> Writer | None:
    """The newest claim on a trial, or None where nobody ever wrote here."""
    while True:
        numbers = _numbers(directory)
        if not numbers:
            return None
        number = numbers[-1]
        place = _place(directory, number)
        try:
            stage = next((name for name in sorted(os.listdir(place)) if name.startswith("stage-")), None)
            sign = (place / stage if stage else place).stat().st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            continue  # it ended, or a newer one removed it: look again
        return Writer(number, *_read_record(place / "record.json"), stage, sign)


def active_writer(directory: Path) -> Writer | None:
    """Who trains in a directory; None where nobody does.

    Whoever cannot be seen from here is watched until it gives a sign of life, or has given none for long.
    """
    path = directory / "lock"
    watch: _Watch | None = None
    while True:
        # In the order of `_wait`. Where there is no file nobody ever came, and none is made.
        have = None
        if path.exists():
            flock = _Flock(path)
            have = flock.attempt()
            flock.release()
        holder = latest_writer(directory)
        if holder is None:
            return None
        gone = holder.has_ended(bool(have))
        if gone is not None:
            return None if gone else holder
        if watch is None:
            watch, first = _Watch(), holder
        quiet = watch(holder)
        if have is False or (holder.number, holder.sign) != (first.number, first.sign):
            return holder
        if quiet >= _QUIET:
            return None
        time.sleep(_POLL_LAST)


def _place(directory: Path, number: int) -> Path:
    return directory / "writer" / f"{number:06d}"


def _numbers(directory: Path) -> list[int]:
    try:
        with os.scandir(directory / "writer") as entries:
            return sorted(int(e.name) for e in entries if _NUMBER.fullmatch(e.name) and e.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_record(path: Path) -> tuple[Process | None, float, bool]:
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(_MAX_RECORD))
        process = Process(**{field.name: record[field.name] for field in fields(Process)})
        texts, numbers = (
            (process.host, process.boot, process.namespace),
            (process.pid, process.started, process.uid),
        )
        if not all(type(text) is str for text in texts) or not _HOST.fullmatch(process.host):
            raise ValueError
        # Zero and negative numbers mean groups of processes to the kernel.
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers) or not 0 < process.pid < 1 << 31:
            raise ValueError
        taken, flock = float(record["taken"]), record["flock"] is True
        time.localtime(taken)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None, 0.0, False
    return process, taken, flock


class Claim:
    """The right to write a trial's files, as long as nobody took it away.

    Attributes:
        number: of this writer; higher than those of all before it.
        stage: where files are put together.
    """

    def __init__(self, directory: Path, number: int, stage: str) -> None:
        self.number = number
        self.stage = _place(directory, number) / stage
        self._asked = self.stage.parent / "asked"
        self._lost: LostLock | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="ppo_hpo.state.lock", daemon=True)

    def start(self) -> None:
        """Begin to give signs of life, from a thread: an update may take longer than anybody's patience."""
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            try:
                os.utime(self.stage)
                asked = self._asked.exists()
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                    self._lost = LostLock(self.number, "another process took it over")
                    return
                continue  # a file system that stumbles takes nothing away
            if asked:
                self._lost = LostLock(self.number, "another process was started with --takeover")

    def raise_if_lost(self) -> None:
        """Stop the training of who lost its claim, or was asked to give it up; costs next to nothing.

        Raises:
            LostLock: that happened.
        """
        if self._lost is not None:
            raise self._lost

    def check_still_held(self) -> None:
        """Look at the claim now.

        Raises:
            LostLock: another writer took it away.
        """
        if not self.stage.is_dir():
            raise LostLock(self.number, "another process took it over")

    def write(self, path: Path, content: bytes) -> None:
        """`write_atomically`, by the writer alone.

        Raises:
            LostLock: another writer took the claim away; nothing was written.
            UserError: the file cannot be written.
        """
        try:
            write_atomically(path, content, self.stage)
        except UserError:
            self.check_still_held()
            raise

    def release(self) -> None:
        """Say that nothing more will be written."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        shutil.rmtree(self.stage, ignore_errors=True)


def _claim(directory: Path, number: int, flock: bool) -> Claim | None:
    """Take a number, and away what those below it hold; None where another process was faster."""
    if number > _HIGHEST:
        raise UserError(f"{directory / 'writer'} has no numbers left. Remove it while no process trains.")
    token = secrets.token_hex(8)
    stage, place = f"stage-{token}", _place(directory, number)
    new = place.parent / f".new-{token}"
    record = {"number": number, **asdict(Process.current()), "taken": time.time(), "flock": flock}
    try:
        (new / stage).mkdir(parents=True)
        (new / "record.json").write_text(json.dumps(record) + "\n")
        # Replaces nothing: claims are never empty.
        os.rename(new, place)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        # Claimed by another, which also swept away what others prepared.
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            return None
        raise UserError(f"{place.parent} cannot be written: {error.strerror}.") from None
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if _numbers(directory)[-1:] != [number]:
        # We were so slow that this number was claimed, given back and removed in the meantime.
        _remove(place)
        return None
    for other in os.listdir(place.parent):
        if not _NUMBER.fullmatch(other) or int(other) < number:
            _remove(place.parent / other)
    return Claim(directory, number, stage)


def _remove(place: Path) -> None:
    """Take a claim away at one instant, and then tidy up."""
    aside = place.parent / f".old-{secrets.token_hex(8)}"
    try:
        os.rename(place, aside)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{place} cannot be removed: {error.strerror}.") from None
    # What is left over because somebody still writes into it goes with the next writer's tidying up.
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        aside.unlink()


# ------------------------------------------------------------------ waiting for it


@contextlib.contextmanager
def hold(directory: Path, *, takeover: bool = False, lost: LostLock | None = None) -> Iterator[Claim]:
    """Be the one writer of a trial; wait for the one that is.

    Args:
        directory: of the trial; made where it is missing.
        takeover: end the one that is, instead of waiting for it.
        lost: how this process lost the trial before: whoever asked for it comes first.

    Raises:
        UserError: the directory cannot be written.
    """
    log = logging.getLogger("ppo_hpo")
    path = directory / "lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Kept open whether flock works or not: it shows others that this process is of this trial.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{path} cannot be locked: {error.strerror}.") from None
    flock = _Flock(path)
    try:
        claim = _wait(directory, flock, _Takeover(directory, log) if takeover else None, lost, log)
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
    """Keep writers out of a trial for a moment, where none is at it; yields whether that is so."""
    if not (directory / "lock").is_file() or (directory / "lock").is_symlink():
        yield latest_writer(directory) is None
        return
    flock = _Flock(directory / "lock")
    try:
        have = flock.attempt()
        holder = latest_writer(directory)
        yield have is not False and (holder is None or holder.has_ended(bool(have)) is True)
    finally:
        flock.release()


def _wait(
    directory: Path, flock: _Flock, takeover: _Takeover | None, lost: LostLock | None, log: logging.Logger
) -> Claim:
    began, watch, pause = time.monotonic(), _Watch(), _POLL_FIRST
    # Who lost the trial has said so already.
    said = -_REMIND if lost is None else 0.0
    while True:
        # In this order: what is read after flock is had is at least as new as what its holder left.
        have = flock.attempt()
        holder = latest_writer(directory)
        quiet, waited = watch(holder), time.monotonic() - began
        gone = holder is None or holder.has_ended(bool(have))
        number = holder.number if holder else 0
        if lost is not None and lost.number == number and waited < _MANNERS:
            free = False
        elif gone is None:
            free = quiet >= _QUIET and (have is not False or takeover is not None)
        else:
            free = gone and (have is not False or (holder is not None and quiet >= _SETTLE))
        if free and (claim := _claim(directory, number + 1, bool(have))) is not None:
            return claim
        flock.release()
        if holder is not None and not gone:
            if waited >= said + _REMIND:
                log.warning("%s is in use by %s: waiting", directory, holder)
                said = waited
            if takeover is not None:
                takeover.press(holder)
        time.sleep(pause)
        pause = min(1.5 * pause, _POLL_LAST)


class _Watch:
    """For how long a claim has shown no sign of life, on this process's own clock: no other is trusted."""

    def __init__(self) -> None:
        self._seen: tuple[Any, ...] = ()
        self._since = 0.0

    def __call__(self, holder: Writer | None) -> float:
        now = time.monotonic()
        seen = (holder and (holder.number, holder.stage, holder.sign),)
        if seen != self._seen:
            self._seen, self._since = seen, now
        return now - self._since


class _Flock:
    """flock on one file by `filelock`, where the file system has it."""

    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        self._path = path
        self._there = True
        try:
            # Newer releases would put another kind of lock in its place.
            self._lock = FileLock(path, fallback_to_soft=False)
        except TypeError:
            self._lock = FileLock(path)

    def attempt(self) -> bool | None:
        """Take it if it is free; None where the file system has no flock."""
        from filelock import FileLock, Timeout

        if not self._there:
            return None
        try:
            self._lock.acquire(timeout=0)
            held = True
        except Timeout:
            held = False
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_FLOCK:
                raise UserError(f"{self._path} cannot be locked: {error.strerror}.") from None
            self._there = False
        if type(self._lock) is not FileLock:
            self._there = False
        if self._there:
            return held
        self.release()
        return None

    def release(self) -> None:
        """Give it back, if it was taken."""
        if self._lock.is_locked:
            self._lock.release()


# ----------------------------------------------------------------------- takeover


class _Takeover:
    """Ends the writer that was there first: asks it to give way, then by SIGTERM, then by SIGKILL."""

    def __init__(self, directory: Path, log: logging.Logger) -> None:
        self._directory, self._log = directory, log
        self._target: int | None = None
        self._began = 0.0
        self._steps: list[tuple[float, str, tuple[signal.Signals, ...]]] = []

    def press(self, holder: Writer) -> None:
        """Do what is due."""
        if self._target is None:
            self._target, self._began = holder.number, time.monotonic()
            # A stopped process cannot read; SIGCONT does nothing to others.
            self._steps = [
                (0.0, "asked to give way", (signal.SIGCONT,)),
                (_GIVE_WAY, "sent SIGTERM", (signal.SIGTERM, signal.SIGCONT)),
                (_GIVE_WAY + _GRACE, "killed", (signal.SIGKILL,)),
            ]
        # One that came later was let in before us: it is waited for.
        if holder.number != self._target:
            return
        if not self._steps or time.monotonic() - self._began < self._steps[0][0]:
            return
        first = len(self._steps) == 3
        _, what, signals = self._steps.pop(0)
        if first:
            with contextlib.suppress(OSError):
                (_place(self._directory, holder.number) / "asked").touch()
        if _signal(holder, self._directory / "lock", signals) or first:
            self._log.warning("takeover: %s is %s", holder, what)
        else:
            self._steps = []
            self._log.warning(
                "takeover: %s cannot be ended from here: waiting until it is done, or gives no sign of life "
                "for %g seconds", holder, _QUIET,
            )  # fmt: skip


def _signal(holder: Writer, lock: Path, signals: tuple[signal.Signals, ...]) -> bool:
    """Signal a writer, and never a process that merely has its number now; whether that was possible."""
    process = holder.process
    if process is None or process.pid == os.getpid():
        return False
    try:
        # Stands for this process, also when it ends now and its number is used again.
        handle = os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        return False
    try:
        if process.runs() is not True or not _has_open(process.pid, lock):
            return False
        for number in signals:
            signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open."""
    wanted = path.stat()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/{pid}/fd/{descriptor}")
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False

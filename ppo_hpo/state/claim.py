"""Claims: numbered rights to write a trial's files, which a newer claim takes away.

The claim of writer N is the directory ``writer/NNNNNN/`` in the trial's directory. It holds:

- ``record.json``: which process the writer is.
- ``stage-*/``: exists while the writer writes. Every file of the trial is written here first and then renamed
  into place. The writer renews the modification time of this directory as its sign of life.
- ``asked``: exists if a process with ``--takeover`` asked the writer to stop.

A process takes a claim by renaming a prepared directory to the next number. On any file system with atomic
renames this succeeds for one process only. So claims do not depend on flock, which a shared file system may
not have, or may only hold per machine. The highest number is the writer.

A new writer removes all lower claims before it reads anything. A writer that lost its claim without noticing,
because it was stopped or cut off, then has no file left to rename. It cannot replace a file of the trial, not
even if it was stopped just before the rename.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ppo_hpo.spec.errors import LostLock, UserError
from ppo_hpo.state.files import write_atomically
from ppo_hpo.state.process_identity import Process

# Seconds between two signs of life of a writer. At each it also checks whether it still has its claim.
_HEARTBEAT = 1.0
_NUMBER = re.compile(r"\d{6,12}", re.ASCII)
_HIGHEST = 999_999_999_999
_MAX_RECORD = 4096


@dataclass(frozen=True)
class Writer:
    """The newest claim on a trial, as another process sees it."""

    number: int
    process: Process | None  # None if the record cannot be read
    taken: float  # in seconds since 1970 by that process's clock
    flock: bool  # whether the writer also holds flock, so that whoever gets flock knows that it has ended
    stage: str | None  # name of its stage directory; None once the writer is done
    # In nanoseconds by the file system's clock: it can only be compared with another one of the same writer.
    last_sign: int

    def has_ended(self, have_flock: bool) -> bool | None:
        """Whether it can write no more, if we hold flock or not; None if only waiting for a sign can tell."""
        if self.stage is None:
            return True
        if self.process is None:
            return None
        running = self.process.is_running()
        if running is not False and have_flock and self.flock and self.process.shares_kernel():
            return True
        return None if running is None else not running

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.taken))
        return f"writer {self.number}, {self.process or 'an unknown process'}, since {since}"


def latest_writer(directory: Path) -> Writer | None:
    """The newest claim on the trial in ``directory``; None if nobody ever wrote there."""
    while True:
        numbers = _numbers(directory)
        if not numbers:
            return None
        number = numbers[-1]
        place = _place(directory, number)
        try:
            stage = next((name for name in sorted(os.listdir(place)) if name.startswith("stage-")), None)
            last_sign = (place / stage if stage else place).stat().st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            continue  # The writer ended, or a newer one removed its claim: look again.
        return Writer(number, *_read_record(place / "record.json"), stage, last_sign)


class Claim:
    """The right to write a trial's files until another process takes it away."""

    def __init__(self, directory: Path, number: int, stage: str) -> None:
        self.number = number  # higher than those of all writers before
        self.stage = _place(directory, number) / stage  # files are written here, then renamed into place
        self._asked = self.stage.parent / "asked"
        self._lost: LostLock | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="ppo_hpo.state.claim", daemon=True)

    def start(self) -> None:
        """Start giving signs of life. A thread gives them, because one PPO update may take minutes."""
        self._thread.start()

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT):
            try:
                os.utime(self.stage)
                asked = self._asked.exists()
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                    self._lost = self._taken_over()
                    return
                continue  # A temporary error of the file system does not end the claim.
            if asked:
                reason = "another process was started with --takeover"
                self._lost = LostLock(self.number, reason, asked=True)

    def _taken_over(self) -> LostLock:
        return LostLock(self.number, "another process took it over")

    def raise_if_lost(self) -> None:
        """Raise `LostLock` if the last sign of life found the claim taken or asked for. This is cheap."""
        if self._lost is not None:
            raise self._lost

    def check_still_held(self) -> None:
        """Look at the claim on disk now, and raise `LostLock` if another process took it."""
        if not self.stage.is_dir():
            raise self._taken_over()

    def write(self, path: Path, content: bytes) -> None:
        """Write a file of the trial atomically; `LostLock` if another process took the claim before."""
        try:
            write_atomically(path, content, self.stage)
        except UserError:
            self.check_still_held()
            raise

    def release(self) -> None:
        """Give the claim back. Nothing may be written afterwards."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        shutil.rmtree(self.stage, ignore_errors=True)


def take_claim(directory: Path, number: int, flock: bool) -> Claim | None:
    """Take the claim of a number and remove all lower claims; None if another process was faster.

    The number must be one above that of the latest writer; ``flock`` says whether we hold flock.
    """
    if number > _HIGHEST:
        raise UserError(f"{directory / 'writer'} has no numbers left. Remove it while no process trains.")
    token = secrets.token_hex(8)
    stage, place = f"stage-{token}", _place(directory, number)
    new = place.parent / f".new-{token}"
    record = {"number": number, **asdict(Process.current()), "taken": time.time(), "flock": flock}
    try:
        (new / stage).mkdir(parents=True)
        (new / "record.json").write_text(json.dumps(record) + "\n")
        # This rename replaces no other claim: it fails on a directory that is not empty, and no claim is.
        os.rename(new, place)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        # Another process took this number, and may have removed what we prepared.
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            return None
        raise UserError(f"{place.parent} cannot be written: {error.strerror}.") from None
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if _numbers(directory)[-1:] != [number]:
        # We were slow: meanwhile this number was claimed, released and removed by others.
        _remove(place)
        return None
    for other in os.listdir(place.parent):
        if not _NUMBER.fullmatch(other) or int(other) < number:
            _remove(place.parent / other)
    return Claim(directory, number, stage)


def ask_to_stop(directory: Path, writer: Writer) -> None:
    """Ask a writer to give up its claim. It notices at its next sign of life."""
    with contextlib.suppress(OSError):
        (_place(directory, writer.number) / "asked").touch()


def _place(directory: Path, number: int) -> Path:
    return directory / "writer" / f"{number:06d}"


def _numbers(directory: Path) -> list[int]:
    try:
        with os.scandir(directory / "writer") as entries:
            return sorted(int(e.name) for e in entries if _NUMBER.fullmatch(e.name) and e.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_record(path: Path) -> tuple[Process | None, float, bool]:
    """Process, time and flock of a claim; the process is None if the record is invalid."""
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(_MAX_RECORD))
        process = Process.from_record(record)
        taken = float(record["taken"])
        time.localtime(taken)
        return process, taken, record["flock"] is True
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None, 0.0, False


def _remove(place: Path) -> None:
    """Remove a claim. The rename takes it away at one instant; deleting its files may take longer."""
    aside = place.parent / f".old-{secrets.token_hex(8)}"
    try:
        os.rename(place, aside)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{place} cannot be removed: {error.strerror}.") from None
    # If the old writer still writes into it, some files stay. The next writer removes them.
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):
        aside.unlink()

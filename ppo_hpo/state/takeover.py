"""Ending the process that trains a trial (``--takeover``)."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

from ppo_hpo.state.claim import Writer, ask_to_stop

# Seconds that a writer has to stop after being asked, and then after SIGTERM, before it is killed.
_AFTER_ASKING, _AFTER_SIGTERM = 20.0, 10.0


class _Step(NamedTuple):
    after: float
    what: str
    signals: tuple[signal.Signals, ...]


class Takeover:
    """Ends one writer in three steps: ask it to stop, send SIGTERM, send SIGKILL."""

    def __init__(self, directory: Path, log: logging.Logger, silence_limit: float) -> None:
        """Prepare to end the writer of a trial.

        Args:
            directory: the trial's directory.
            log: where each step is logged.
            silence_limit: seconds without a sign of life after which a writer counts as dead, for messages.
        """
        self._directory, self._log, self._silence_limit = directory, log, silence_limit
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
        if writer.number != self._target:
            return
        if not self._steps or time.monotonic() - self._began < self._steps[0].after:
            return
        step = self._steps.pop(0)
        # Asking needs no signal: it also reaches a writer on another machine.
        if _send(writer, self._directory / "lock", step.signals) or step.after == 0.0:
            self._log.warning("takeover: %s is %s", writer, step.what)
        else:
            self._steps = []
            self._log.warning(
                "takeover: %s cannot be ended from here: waiting until it is done, or gives no sign of life "
                "for %g seconds", writer, self._silence_limit,
            )  # fmt: skip


def _send(writer: Writer, lock: Path, signals: tuple[signal.Signals, ...]) -> bool:
    """Send signals to a writer, and never to a process that reuses its pid; whether that was possible."""
    process = writer.process
    if process is None or process.pid == os.getpid():
        return False
    try:
        # This handle stands for this process, even if it ends now and its pid is used again.
        handle = os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        return False
    try:
        if process.is_running() is not True or not _has_open(process.pid, lock):
            return False
        for number in signals:
            signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _has_open(pid: int, path: Path) -> bool:
    wanted = path.stat()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/{pid}/fd/{descriptor}")
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False

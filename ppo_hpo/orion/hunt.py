"""How an `orion hunt` of `ppo-hpo run` stops: by a signal, or because a file cannot be written.

Orion raises `KeyboardInterrupt` at the second Ctrl-C, wherever it is. By then a result may be stored, but not
told to the algorithm, or the lock of the algorithm stays locked. SIGTERM waits until the trial is trained. An
error of a file ends in tracebacks, and breaks trials that have no fault. The thread that renews a reservation
keeps the process alive for ever.

Here a signal stops the running trials, which save their state, and takes effect where nothing is half done.
Only the third one interrupts at once. An error of a file is one sentence (see also
`ppo_hpo.orion.full_disk`). Trials are left interrupted, so the same command resumes them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from ppo_hpo.spec.errors import hide_secrets

_OUR_COMMANDS = ("ppo-hpo", "ppo_hpo")
_log = logging.getLogger("ppo_hpo")


def is_ours(experiment: Any) -> bool:
    """Whether the experiment's script is `ppo-hpo`."""
    return runs_our_command(experiment.metadata or {})


def runs_our_command(metadata: Mapping[str, Any]) -> bool:
    """Whether the command in an experiment's metadata is `ppo-hpo`."""
    command = metadata.get("user_args") or []
    return any(os.path.basename(str(word)) in _OUR_COMMANDS for word in command[:3])


class _Stop:
    """The signals that asked the hunt in this process to stop, and the processes that train its trials."""

    def __init__(self) -> None:
        self.leader: int | None = None  # process id of a hunt of ours; its pools' processes are forks of it
        self._signals = 0  # how many came
        self._running: set[subprocess.Popen[bytes]] = set()

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM for a hunt of ours."""
        self.leader, self._signals = os.getpid(), 0
        # Signals arrive in the main thread only.
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            self.leader = None
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self._signals += 1
        for process in tuple(self._running):
            process.terminate()
        if os.getpid() != self.leader:
            return
        if self._signals > 2:
            raise KeyboardInterrupt
        for worker in multiprocessing.active_children():
            worker.terminate()  # A fork handles the signal as this process does.
        what = ("stops as soon as its trials have saved their state", "is stopping")[self._signals - 1]
        more = ("twice", "once")[self._signals - 1]
        # `print` refuses to be called in a handler that has interrupted it.
        with contextlib.suppress(OSError):
            os.write(2, f"ppo-hpo: the hunt {what}. Interrupt {more} more to end at once.\n".encode())

    def raise_if_asked(self) -> None:
        """Stop the hunt here, where nothing is half done."""
        if self._signals and self.leader is not None:
            raise KeyboardInterrupt

    def wait(self, process: subprocess.Popen[bytes], interrupted: int) -> int:
        """Wait for the process of a trial; its exit code, or ``interrupted`` if a signal stopped it."""
        self._running.add(process)
        try:
            if self._signals:
                process.terminate()
            code = process.wait()
        finally:
            self._running.discard(process)
        return interrupted if code and self._signals else code


_stop = _Stop()


def apply() -> None:
    """Patch Orion. `ppo_hpo.orion.fixes` decides whether it may be patched."""
    from orion.client.experiment import ExperimentClient
    from orion.client.runner import Protected, Runner
    from orion.core.cli import hunt
    from orion.core.worker.consumer import Consumer
    from orion.core.worker.trial_pacemaker import TrialPacemaker

    for name in ("observe", "release"):
        setattr(ExperimentClient, name, _report(getattr(ExperimentClient, name)))
    hunt.workon = _workon(hunt.workon)
    Runner.sample = _sample(Runner.sample)
    Protected.__enter__ = _enter(Protected.__enter__)
    Protected.__exit__ = _exit(Protected.__exit__)
    Consumer.__call__ = _call(Consumer.__call__)
    Consumer.execute_process = _execute_process(Consumer.execute_process)
    TrialPacemaker.start = _start(TrialPacemaker.start)
    TrialPacemaker._monitor_trial = _monitor_trial(TrialPacemaker._monitor_trial)


def _workon(original: Callable[..., None]) -> Callable[..., None]:
    """Handle signals, and turn an error of a file or of the database into one sentence."""

    @functools.wraps(original)
    def workon(experiment: Any, *args: Any, **kwargs: Any) -> None:
        if not is_ours(experiment):
            original(experiment, *args, **kwargs)
            return
        try:
            with _stop.in_charge():
                original(experiment, *args, **kwargs)
        except Exception as error:
            if not (reason := _file_error(error)):
                raise
            print(
                f"ppo-hpo: error: The hunt stops: {reason}. Everything saved is whole. Fix the cause and "
                f"rerun the command to resume. `ppo-hpo retry` requeues trials that are still reserved.",
                file=sys.stderr,
            )
            raise SystemExit(1) from None

    return workon


def _file_error(error: BaseException | None) -> str:
    """What an error says of a file or the database; empty if it is about something else."""
    from orion.core.io.database import DatabaseError

    while error is not None:
        if isinstance(error, DatabaseError):
            return hide_secrets(str(error)).rstrip(".")
        if isinstance(error, OSError) and error.strerror:
            return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        error = error.__cause__ or error.__context__
    return ""


def _report(original: Callable[..., None]) -> Callable[..., None]:
    """Let a hunt continue after one of its trials was given to another worker.

    That worker's result is the same, because a trial repeats itself. Orion ends with a traceback.
    """

    @functools.wraps(original)
    def report_to_orion(self: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(self, trial, *args, **kwargs)
        except RuntimeError as error:
            if _stop.leader is None or not str(error).startswith("Reservation for trial"):
                raise
            _log.warning("trial %s was given to another worker, which reports its result", trial.id)

    return report_to_orion


def _sample(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample(self: Any) -> Any:
        _stop.raise_if_asked()
        return original(self)

    return sample


def _enter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def enter(self: Any) -> Any:
        return self if _stop.leader is not None else original(self)

    return enter


def _exit(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def leave(self: Any, kind: Any, error: Any, traceback: Any) -> Any:
        if _stop.leader is None:
            return original(self, kind, error, traceback)
        if error is None:
            _stop.raise_if_asked()
        return None

    return leave


def _call(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stop the hunt if Orion's own files of a trial cannot be written. The trial has no fault."""

    @functools.wraps(original)
    def call(self: Any, trial: Any, **kwargs: Any) -> Any:
        from orion.core.worker.consumer import ExecutionError

        try:
            return original(self, trial, **kwargs)
        except OSError as error:
            if not is_ours(self.experiment):
                raise
            report(f"{_file_error(error) or error}")
            raise ExecutionError(self.interrupt_signal_code) from error

    return call


def report(reason: str) -> None:
    """Say in one line why the hunt stops."""
    text = "The hunt stops: %s. Everything saved is whole. Fix the cause and rerun the command to resume"
    _log.error(text, reason)


def _execute_process(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def execute_process(self: Any, cmd_args: Any, environ: Any) -> None:
        from orion.core.utils.exceptions import InexecutableUserScript
        from orion.core.worker.consumer import ExecutionError

        if _stop.leader is None:
            original(self, cmd_args, environ)
            return
        try:
            process = subprocess.Popen(cmd_args, env=environ)
        except PermissionError as error:
            raise InexecutableUserScript(" ".join(cmd_args)) from error
        if code := _stop.wait(process, self.interrupt_signal_code):
            raise ExecutionError(code)

    return execute_process


def _start(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def start(self: Any) -> None:
        import orion.core

        self.daemon = True  # It must not keep a process alive that has failed.
        # Others take the trial after five heartbeats. Orion gives a sign of life each minute in any case.
        self.wait_time = min(self.wait_time, orion.core.config.worker.heartbeat)
        original(self)

    return start


def _monitor_trial(original: Callable[..., None]) -> Callable[..., None]:
    """Renew the reservation at the next beat if the database cannot be written now."""

    @functools.wraps(original)
    def monitor_trial(self: Any) -> None:
        try:
            original(self)
        except Exception as error:
            text = _file_error(error) or f"{type(error).__name__}: {error}"
            _log.warning("the reservation of trial %s is not renewed now: %s", self.trial.id, text)

    return monitor_trial

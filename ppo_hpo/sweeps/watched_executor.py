"""An executor that notices signals and dead workers, and reports how trials progress."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ppo_hpo.orion.objective import STOPPING
from ppo_hpo.spec.errors import Interrupted, UserError
from ppo_hpo.sweeps.progress import SweepProgress

# Seconds to wait for a result before signals and dead workers are looked at.
_POLL = 0.2


class StopSignal:
    """Notes the first SIGINT or SIGTERM; a second one interrupts at once.

    Orion loses a trial if it is interrupted while it hands the trial out: the trial stays reserved, and its
    heartbeat keeps the process alive. So the first signal takes effect where nothing is half done.

    Attributes:
        signum: the signal that came, or 0.
        at_once: whether the first signal raises `Interrupted`, because the trial runs in this very thread.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum = 0
        self.at_once = False

    def __enter__(self) -> StopSignal:
        # Signals arrive in the main thread only.
        self._main = threading.current_thread() is threading.main_thread()
        self._before = [signal.signal(n, self.handle) for n in self._SIGNALS] if self._main else []
        return self

    def __exit__(self, *args: object) -> None:
        for number, before in zip(self._SIGNALS, self._before, strict=False):
            signal.signal(number, before)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        again, self.signum = bool(self.signum), signum
        if self.at_once and not again:
            raise Interrupted(signum)
        if again:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def in_charge(self, *, at_once: bool) -> Iterator[None]:
        """Take the signals back from Orion, which installs its own handlers while it gathers results."""
        if not self._main:
            yield
            return
        before = [signal.signal(number, self.handle) for number in self._SIGNALS]
        self.at_once = at_once
        try:
            yield
        finally:
            self.at_once = False
            for number, handler in zip(self._SIGNALS, before, strict=True):
                signal.signal(number, handler)


class WatchedExecutor:
    """Wraps an Orion executor, and offers Orion the same methods.

    Args:
        inner: the executor.
        stop: asked at the one moment when Orion has nothing half done.
        progress: is told of trials that start and end.

    Attributes:
        reason: why a hunt should stop, if a trial's error says so.
    """

    def __init__(self, inner: Any, stop: StopSignal, progress: SweepProgress) -> None:
        self.inner, self.stop, self.progress = inner, stop, progress
        self.n_workers = inner.n_workers
        self.reason: str | None = None
        self._trials: dict[Any, Any] = {}
        self._single = type(inner).__name__ == "SingleExecutor"
        self._pool = getattr(inner, "pool", None)
        self._pids = self._pool_pids()

    def submit(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Start a call, as the executor does."""
        future = self.inner.submit(function, *args, **kwargs)
        if args and hasattr(args[0], "working_dir"):
            self._trials[future] = args[0]
            self.progress.started(args[0])
        return future

    def async_get(self, futures: list[Any], timeout: float | None = None) -> list[Any]:
        """Return results, as the executor does, unless the sweep should stop.

        Raises:
            KeyboardInterrupt: a signal came. Orion then marks running trials as interrupted.
            UserError: a worker of Orion's pool died.
        """
        self._raise_if_stopped()
        with self.stop.in_charge(at_once=self._single):
            results: list[Any] = self.inner.async_get(futures, timeout=_POLL)
        for result in results:
            error = getattr(result, "exception", None)
            self.reason = getattr(error, "reason", None) or self.reason
            trial = self._trials.pop(result.future, None)
            if trial is not None:
                text = getattr(result, "traceback", "")
                self.progress.ended(trial, None if error else result.value, error, text)
        self.progress.tick()
        if not results:
            self._raise_if_stopped()
            self._raise_if_pool_worker_died()
        return results

    def wait(self, futures: list[Any]) -> Any:
        """Wait for results, as the executor does."""
        return self.inner.wait(futures)

    def _raise_if_stopped(self) -> None:
        if self.stop.signum:
            raise KeyboardInterrupt

    def _pool_pids(self) -> set[int]:
        return {process.pid for process in getattr(self._pool, "_pool", ())}

    def _raise_if_pool_worker_died(self) -> None:
        # A pool replaces a dead process, but forgets its trial. Orion would wait for that trial forever.
        if self._pids != self._pool_pids():
            raise UserError(
                "A worker process of Orion's pool died, and its trial with it. Rerun to resume the sweep. "
                "The default executor gives the trial of a dead worker to another one."
            )

    def __enter__(self) -> WatchedExecutor:
        self.inner.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None:
            if hasattr(self._pool, "terminate"):
                self._pool.terminate()  # type: ignore[union-attr]
            STOPPING.set()
        try:
            self.inner.__exit__(kind, error, traceback)
        finally:
            STOPPING.clear()

"""Executors for sweeps: Orion's by their names, their traps shut, and watched while they run.

- `workers`: processes of their own (`workers`), the default.
- `single`: this process.
- `joblib`, `poolexecutor`: forks of this process. They are no daemons, so that environments may have
  processes. A worker that dies is noticed, and the sweep ends instead of waiting for ever. More than one
  thread for each trial is refused once torch is imported here: what its threads held in the fork stays held.
- the same with ``backend: threading``: threads of this process, which `client.STOPPING` tells to stop.
- `dask`: a cluster of Dask's, by its address, or a local one, whose workers are no daemons either.
- `ray`: a cluster of Ray's, by its address, or a local one.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

from ppo_hpo.orion.objective import STOPPING
from ppo_hpo.spec.errors import Interrupted, UserError

_NAMES = {"single": "singleexecutor", "pool": "poolexecutor"}
_KNOWN = "workers, single, joblib, poolexecutor, dask or ray"
_SCHEMES = {"tcp": "dask", "tls": "dask", "ucx": "dask", "ray": "ray"}
# How long one look at the workers takes at most, seconds: what ends it early is an answer of theirs.
_POLL = 0.2


def make(
    executor: Any,
    n_workers: int | None,
    *,
    retries: int = 0,
    threads: int = 1,
    device: str = "auto",
    trials_per_device: int | None = None,
) -> Any:
    """An executor of Orion's.

    Args:
        executor: None for our own; a name of the list above; the address of a cluster (``tcp://...``,
            ``ray://...``); a mapping of one of the two to options; or an executor.
        n_workers: trials at a time; None: one here, and as many as there are on a cluster.
        retries: how often a trial whose worker died is given to another one, where the executor can.
        threads: of each trial.
        device: of each trial. Ray gives out GPUs itself, and shows none to a trial that does not ask for one.
        trials_per_device: that a GPU trains at a time.

    Raises:
        UserError: there is no such executor, it is not installed, or the options are not its own.
    """
    if executor is not None and not isinstance(executor, str | Mapping):
        return executor
    options: dict[str, Any] = {}
    if isinstance(executor, Mapping):
        if len(executor) != 1:
            raise UserError(f"An executor is given as {{name: options}}, but got {dict(executor)!r}.")
        ((executor, given),) = executor.items()
        options = dict(given or {})
    name = str(executor or "workers")
    scheme = name.partition("://")[0]
    if scheme != name:
        if scheme not in _SCHEMES:
            raise UserError(f"A cluster's address begins with tcp://, tls:// or ray://, but got {name!r}.")
        name, options = _SCHEMES[scheme], {"address": name, **options}
    name = _NAMES.get(name.lower(), name.lower())
    from orion.executor.base import executor_factory

    try:
        if name == "dask":
            return _dask(n_workers, options)
        if name in ("workers", "ray"):
            # Found without the entry point too, which an old `*.egg-info` in the current directory hides.
            importlib.import_module("ppo_hpo.orion.workers" if name == "workers" else "ppo_hpo.orion.ray")
            options.setdefault("retries", retries)
            if name == "ray" and device.startswith("cuda"):
                if device != "cuda":
                    raise UserError(f"Ray chooses GPUs itself: `device` must be cuda, but got {device!r}.")
                options.setdefault("num_gpus", 1 / (trials_per_device or 1))
        if n_workers is None:
            n_workers = -1 if "address" in options else 1
        if name in ("joblib", "poolexecutor"):
            _refuse_bad_forks(name, options, threads)
        return executor_factory.create(name, n_workers=n_workers, **options)
    except NotImplementedError:
        raise UserError(
            f"An executor must be {_KNOWN}, or a cluster's address, but got {executor!r}."
        ) from None
    except ImportError as error:
        raise UserError(f"The executor {name!r} cannot be used: {error}") from None
    except (TypeError, ConnectionError, OSError) as error:
        raise UserError(f"The executor {name!r} cannot be started with {options!r}: {error}.") from None


def _dask(n_workers: int | None, options: dict[str, Any]) -> Any:
    try:
        import dask
        from dask.distributed import Client
    except ImportError:
        raise ImportError("Dask is not installed. pip install 'ppo-hpo[dask]' brings it.") from None
    from orion.executor.dask_backend import Dask

    if "address" not in options:
        # Its worker processes are daemons by default, which may have no children: environments' processes.
        dask.config.set({"distributed.worker.daemon": False})
        local = {"n_workers": n_workers or 1, "threads_per_worker": 1, "dashboard_address": None}
        options = {**local, **options}
    client = Client(**options)
    if n_workers is None:
        n_workers = max(1, sum(client.nthreads().values()))
    return Dask(n_workers=n_workers, client=client)


def _refuse_bad_forks(name: str, options: Mapping[str, Any], threads: int) -> None:
    if options.get("backend", "loky") not in ("loky", "multiprocess"):
        return
    from orion.executor import multiprocess_backend

    multiprocess_backend.Pool.ALLOW_DAEMON = False
    if threads > 1 and "torch" in sys.modules:
        raise UserError(
            f"`executor: {name}` forks this process, and with torch imported here a fork that trains with "
            f"task.threads = {threads} can hang. Leave `executor` out, or set task.threads to 1."
        )


class Stop:
    """The first SIGINT or SIGTERM is noted and acted upon where nothing is half done; the second at once.

    Orion loses a trial that it is just handing out when it is interrupted: the trial stays reserved, and its
    heartbeat keeps the process alive.

    Attributes:
        signum: the signal that came, or 0.
        at_once: raise `Interrupted` from the first, because the trial runs in this very thread.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum = 0
        self.at_once = False

    def __enter__(self) -> Stop:
        # Elsewhere signals never arrive.
        self._main = threading.current_thread() is threading.main_thread()
        self._before = [signal.signal(n, self.handle) for n in self._SIGNALS] if self._main else []
        return self

    def __exit__(self, *args: object) -> None:
        for number, before in zip(self._SIGNALS, self._before, strict=False):
            signal.signal(number, before)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """What a signal does."""
        again, self.signum = bool(self.signum), signum
        if self.at_once and not again:
            raise Interrupted(signum)
        if again:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def in_charge(self, *, at_once: bool) -> Iterator[None]:
        """Take the signals back from Orion, which takes them while it gathers results."""
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


class Watched:
    """An executor with somebody who looks on: what runs, what ends, whether to stop.

    Args:
        inner: the executor.
        stop: asked at the one moment when Orion has nothing half done.
        progress: is told; see `progress.Progress`.
    """

    def __init__(self, inner: Any, stop: Stop, progress: Any) -> None:
        self.inner, self.stop, self.progress = inner, stop, progress
        self.n_workers = inner.n_workers
        self.reason: str | None = None
        self._trials: dict[Any, Any] = {}
        self._single = type(inner).__name__ == "SingleExecutor"
        self._pool = getattr(inner, "pool", None)
        self._pids = self._pool_pids()

    def submit(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """As the executor does."""
        future = self.inner.submit(function, *args, **kwargs)
        if args and hasattr(args[0], "working_dir"):
            self._trials[future] = args[0]
            self.progress.started(args[0])
        return future

    def async_get(self, futures: list[Any], timeout: float | None = None) -> list[Any]:
        """As the executor does, but it stops here if that was asked for.

        Raises:
            KeyboardInterrupt: it was; Orion then marks what runs as interrupted.
            UserError: a worker of a pool died, whose trial Orion's pool would wait for for ever.
        """
        self._stop_if_asked()
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
            self._stop_if_asked()
            self._look_for_the_dead()
        return results

    def wait(self, futures: list[Any]) -> Any:
        """As the executor does."""
        return self.inner.wait(futures)

    def _stop_if_asked(self) -> None:
        if self.stop.signum:
            raise KeyboardInterrupt

    def _pool_pids(self) -> set[int]:
        return {process.pid for process in getattr(self._pool, "_pool", ())}

    def _look_for_the_dead(self) -> None:
        # A pool puts a new process into a dead one's place, and forgets what that one did.
        if self._pids != self._pool_pids():
            raise UserError(
                "A worker process of Orion's pool died, and with it its trial: Orion would wait for it for "
                "ever. The same call goes on; without `executor` a dead worker's trial is given to another."
            )

    def __enter__(self) -> Watched:
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

"""Makes the executor of a sweep, which runs its trials, and watches it.

| name | what runs the trials |
|---|---|
| `workers` | worker processes of this machine (`ppo_hpo.orion.workers`); the default |
| `single` | this process, one trial after the other |
| `joblib`, `poolexecutor` | Orion's pools: forks of this process (its threads with ``backend: threading``) |
| `dask` | a Dask cluster, by its address, or a local one |
| `ray` | a Ray cluster, by its address, or a local one |

A worker process that dies is replaced. Orion's pools cannot replace one: there the sweep ends with an error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from types import FrameType
from typing import Any

from ppo_hpo.orion.objective import STOPPING
from ppo_hpo.spec.errors import Interrupted, UserError
from ppo_hpo.sweeps import pools
from ppo_hpo.sweeps.progress import SweepProgress
from ppo_hpo.trial.options import RunOptions

_POLL = 0.2  # seconds to wait for a result before signals and dead workers are looked at
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NAMES = "workers, single, joblib, poolexecutor, dask or ray"
_ALIASES = {"single": "singleexecutor", "pool": "poolexecutor"}
_SCHEMES = {"tcp": "dask", "tls": "dask", "ucx": "dask", "ray": "ray"}


def make(executor: Any, n_workers: int | None, options: RunOptions | None = None, *, threads: int = 1) -> Any:
    """Make an Orion executor.

    Args:
        executor: a name of the table above, a cluster's address (``tcp://...``, ``ray://...``), a mapping of
            one of these to its settings, or an executor, which is returned. None means ``workers``.
        n_workers: how many trials run at a time. None means the usable cores, 1 for ``single``, and all
            workers of a cluster.
        options: of each trial.
        threads: of each trial.
    """
    if executor is not None and not isinstance(executor, str | Mapping):
        return executor
    options = options or RunOptions()
    from ppo_hpo.orion.workers import Workers, usable_cores

    name, settings = _name_and_settings(executor)
    if n_workers is None and "address" not in settings:
        n_workers = 1 if name == "singleexecutor" else usable_cores()
    try:
        if name == "dask":
            return _dask(n_workers, settings)
        if name == "ray":
            return _ray(n_workers, settings, options)
        if name == "workers":
            return Workers(n_workers or usable_cores(), **{"retries": options.retries, **settings})
        from orion.executor.base import executor_factory

        if name in ("joblib", "poolexecutor"):
            _prepare_pool(name, settings, threads)
        return executor_factory.create(name, n_workers=n_workers, **settings)
    except NotImplementedError:
        raise UserError(
            f"An executor must be {_NAMES}, or a cluster's address, but got {executor!r}."
        ) from None
    except ImportError as error:
        raise UserError(f"The executor {name!r} cannot be used: {error}") from None
    except (TypeError, ConnectionError, OSError) as error:
        raise UserError(f"The executor {name!r} cannot be started with {settings!r}: {error}.") from None


def _name_and_settings(executor: str | Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    settings: dict[str, Any] = {}
    if isinstance(executor, Mapping):
        if len(executor) != 1:
            raise UserError(f"An executor is given as {{name: options}}, but got {dict(executor)!r}.")
        ((executor, given),) = executor.items()
        settings = dict(given or {})
    name = str(executor or "workers")
    scheme, separator, _ = name.partition("://")
    if not separator:
        return _ALIASES.get(name.lower(), name.lower()), settings
    if scheme not in _SCHEMES:
        raise UserError(f"A cluster's address begins with tcp://, tls:// or ray://, but got {name!r}.")
    return _SCHEMES[scheme], {"address": name, **settings}


def _dask(n_workers: int | None, settings: dict[str, Any]) -> Any:
    try:
        import dask
        from dask.distributed import Client, wait
    except ImportError:
        raise ImportError("Dask is not installed. Install it: pip install 'ppo-hpo[dask]'") from None
    from orion.executor.dask_backend import Dask

    class PatientDask(Dask):  # type: ignore[misc]
        # Orion waits by `future.result(timeout)`. If that time ends while Dask fetches the result, each later
        # fetch fails: https://github.com/dask/distributed/issues/8514. `wait` fetches nothing.
        def async_get(self, futures: list[Any], timeout: float | None = 0.01) -> Any:
            with contextlib.suppress(TimeoutError, CancelledError):
                wait([future.future for future in futures], timeout, "FIRST_COMPLETED")
            return super().async_get(futures, timeout=None)

    if "address" not in settings:
        # Dask's worker processes are daemons by default. Daemons cannot start processes for environments.
        dask.config.set({"distributed.worker.daemon": False})
        settings = {"n_workers": n_workers, "threads_per_worker": 1, "dashboard_address": None, **settings}
    client = Client(**settings)
    return PatientDask(n_workers=n_workers or max(1, sum(client.nthreads().values())), client=client)


def _ray(n_workers: int | None, settings: dict[str, Any], options: RunOptions) -> Any:
    from ppo_hpo.orion.ray import Ray

    settings = {"retries": options.retries, **settings}
    if options.device.startswith("cuda"):
        # Ray hands out the GPUs itself, and hides them from a trial that does not ask for one.
        if options.device != "cuda":
            raise UserError(f"Ray chooses GPUs itself: the device must be cuda, but got {options.device!r}.")
        settings.setdefault("num_gpus", 1 / (options.trials_per_device or 1))
    return Ray(-1 if n_workers is None else n_workers, **settings)


def _prepare_pool(name: str, settings: Mapping[str, Any], threads: int) -> None:
    if settings.get("backend", "loky") not in ("loky", "multiprocess"):
        return
    pools.prepare_pools()
    if threads > 1 and "torch" in sys.modules:
        # A fork copies locks that torch's threads hold, but not the threads that would release them.
        raise UserError(
            f"The executor {name!r} forks this process, and with torch imported here a fork that trains with "
            f"task.threads = {threads} can hang. Leave out the executor, or set task.threads to 1."
        )


class StopSignal:
    """Notes the first SIGINT or SIGTERM; a second one interrupts at once.

    Orion loses a trial if it is interrupted while it hands the trial out: the trial stays reserved, and its
    heartbeat keeps the process alive. So the first signal takes effect where nothing is half done.
    """

    def __init__(self) -> None:
        self.signum, self._process = 0, os.getpid()  # the signal that came, and the process that watches
        self._at_once = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if os.getpid() != self._process:
            # A process that was forked meanwhile has inherited this handler. Whoever sends it a SIGTERM waits
            # for its end, so it must not only note it.
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        again, self.signum = bool(self.signum), signum
        if again:
            raise KeyboardInterrupt
        if self._at_once:
            raise Interrupted(signum)

    @contextlib.contextmanager
    def in_charge(self, *, at_once: bool = False) -> Iterator[StopSignal]:
        """Handle the signals, which Orion handles by itself while it gathers results.

        With ``at_once`` the first signal raises `Interrupted`, because a trial runs in this very thread.
        """
        # Signals arrive in the main thread only.
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self.handle) for number in _SIGNALS} if main else {}
        self._at_once = at_once
        try:
            yield self
        finally:
            self._at_once = False
            for number, handler in before.items():
                signal.signal(number, handler)


class WatchedExecutor:
    """Wraps an Orion executor, and offers Orion the same methods."""

    def __init__(self, inner: Any, stop: StopSignal, progress: SweepProgress) -> None:
        self.inner, self.stop, self.progress = inner, stop, progress
        self.n_workers = inner.n_workers
        self.reason: str | None = None  # why the sweep should stop, if a trial's error says so
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
        """Return results. A signal raises KeyboardInterrupt, so that Orion interrupts running trials."""
        if self.stop.signum:
            raise KeyboardInterrupt
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
        if not results and self.stop.signum:
            raise KeyboardInterrupt
        if not results:
            self._raise_if_pool_worker_died()
        return results

    def _pool_pids(self) -> set[int]:
        return {process.pid for process in getattr(self._pool, "_pool", ())}

    def _raise_if_pool_worker_died(self) -> None:
        # A pool replaces a dead process, but forgets its trial. Orion would wait for that trial forever. The
        # pool itself notices the death only once what the process forked has ended, too.
        processes = getattr(self._pool, "_pool", ())
        if self._pids != self._pool_pids() or any(process.exitcode is not None for process in processes):
            raise UserError(
                "A worker process of Orion's pool died, and its trial with it. Rerun to resume the sweep. "
                "The default executor gives the trial of a dead worker to another one."
            )

    def __enter__(self) -> WatchedExecutor:
        self.inner.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if pools.is_process_pool(self._pool):
            pools.end_pool(self.inner)
            return
        if error is not None:
            STOPPING.set()
        try:
            self.inner.__exit__(kind, error, traceback)
        finally:
            STOPPING.clear()

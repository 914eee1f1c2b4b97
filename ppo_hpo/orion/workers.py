"""An executor of Orion's whose workers are processes of their own, and may die.

Orion's own pools fork: a worker that has torch's threads half copied hangs, it is a daemon and may have no
children, and when it dies `workon` waits for ever. Here each worker is a new interpreter that runs one
function at a time:

- started by a command of its own, so that scripts need no ``if __name__ == "__main__"``;
- in a session of its own: Ctrl-C reaches only the process that leads, which then ends its workers;
- on a line to the leader: when that is gone, however it went, the worker stops as by SIGTERM;
- seen by the leader when it dies: what it ran is given to a new one, ``retries`` times, and fails then.

`concurrent.futures` and loky would do for all but the last: there the death of one ends what all others run.

Orion knows it as ``workers``. What this module imports, every user of Orion imports with it.
"""

from __future__ import annotations

import collections
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from orion.executor.base import AsyncException, AsyncResult, BaseExecutor, ExecutorClosed, Future

from ppo_hpo.orion.worker_process import GRACE

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from ppo_hpo.orion.worker_process import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)


class WorkerDied(RuntimeError):
    """A worker process ended in the middle of what it ran."""


class _Task(Future):  # type: ignore[misc]
    """One call, and what became of it."""

    def __init__(self, executor: Workers, payload: bytes, retries: int) -> None:
        self.executor, self.payload, self.retries = executor, payload, retries
        self.done = False
        self.value: Any = None
        self.error: Exception | None = None
        self.traceback = ""

    def get(self, timeout: float | None = None) -> Any:
        """The result; what the call raised is raised here."""
        self.wait(timeout)
        if not self.done:
            raise TimeoutError
        if self.error is not None:
            raise self.error
        return self.value

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it is done, at most ``timeout`` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self.done and (end is None or time.monotonic() < end):
            self.executor.pump(1.0 if end is None else max(0.0, min(1.0, end - time.monotonic())))

    def ready(self) -> bool:
        """Whether it is done."""
        return self.done

    def successful(self) -> bool:
        """Whether it was done without an exception."""
        if not self.done:
            raise ValueError("the call is not done yet")
        return self.error is None

    def end(self, value: Any = None, error: Exception | None = None, text: str = "") -> None:
        self.value, self.error, self.traceback, self.done = value, error, text, True


class _Worker:
    """One process."""

    def __init__(self) -> None:
        self.task: _Task | None = None
        self.connection, theirs = multiprocessing.connection.Pipe()
        lifeline, self._lifeline = os.pipe()
        path = [os.path.abspath(entry) for entry in sys.path]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(path), str(theirs.fileno()), str(lifeline)],
                pass_fds=(theirs.fileno(), lifeline),
                stdin=subprocess.DEVNULL,
                # Trials side by side: what is never started does not have to be limited.
                env={**dict.fromkeys(_THREADS, "1"), **os.environ},
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(lifeline)

    def give(self, task: _Task) -> None:
        self.task = task
        # A worker that is gone is noticed where its answer is awaited.
        with contextlib.suppress(OSError):
            self.connection.send_bytes(task.payload)

    def ask_to_end(self) -> None:
        self.connection.close()
        with contextlib.suppress(OSError):
            os.close(self._lifeline)
        if self.process.poll() is None:
            self.process.terminate()

    def end(self, until: float) -> int:
        """Wait for it until a moment of `time.monotonic`, then kill it; return its exit code."""
        try:
            return self.process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()


class Workers(BaseExecutor):  # type: ignore[misc]
    """Worker processes for ``workon``; see the module's text.

    Args:
        n_workers: how many at most, each started when it is needed; 0 and less: as many as there are cores.
        retries: how often a call whose worker died is given to another one. 0 is right for what must not run
            twice; a trial goes on from its checkpoint.
        **config: nothing else is known.
    """

    def __init__(self, n_workers: int = -1, retries: int = 0, **config: Any) -> None:
        if config:
            raise TypeError(f"`workers` takes n_workers and retries, but got {', '.join(config)}")
        super().__init__(n_workers if n_workers > 0 else usable_cores())
        self.retries = retries
        self._workers: list[_Worker] = []
        self._queue: collections.deque[_Task] = collections.deque()
        self._closed = False

    def __getstate__(self) -> dict[str, Any]:
        return {"n_workers": self.n_workers, "retries": self.retries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers that were started."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> _Task:
        """Let a worker call ``function``, as soon as one is free.

        Raises:
            ExecutorClosed: it was closed.
        """
        import cloudpickle

        if self._closed:
            raise ExecutorClosed
        task = _Task(self, cloudpickle.dumps((function, args, kwargs)), self.retries)
        self._queue.append(task)
        self._assign()
        return task

    def wait(self, futures: list[_Task]) -> list[Any]:
        """The results of all of them."""
        return [future.get() for future in futures]

    def async_get(self, futures: list[_Task], timeout: float | None = 0.01) -> list[Any]:
        """Take out of ``futures`` those that are done; wait for the first at most ``timeout`` seconds."""
        if not any(future.done for future in futures):
            self.pump(timeout or 0.0)
        done = [future for future in futures if future.done]
        for future in done:
            futures.remove(future)
        return [
            AsyncResult(future, future.value)
            if future.error is None
            else AsyncException(future, future.error, future.traceback)
            for future in done
        ]

    def pump(self, timeout: float) -> None:
        """Wait for a worker's answer or end, at most ``timeout`` seconds, and give the idle ones work."""
        by_connection = {worker.connection: worker for worker in self._workers}
        if not by_connection:
            time.sleep(timeout)
        ready = multiprocessing.connection.wait(list(by_connection), timeout)
        for worker in self._workers[:]:
            if worker.connection in ready or worker.process.poll() is not None:
                self._hear(worker)
        self._assign()

    def _hear(self, worker: _Worker) -> None:
        try:
            # One that ended may have answered before.
            answer = worker.connection.recv_bytes() if worker.connection.poll() else None
        except (EOFError, OSError):
            answer = None
        task = worker.task
        if answer is None:
            self._bury(worker)
            return
        worker.task = None
        assert task is not None
        try:
            value, error, text = pickle.loads(answer)
        except Exception as problem:
            value, error, text = None, problem, traceback.format_exc()
        task.end(value, error, text)

    def _bury(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.ask_to_end()
        code, task = worker.end(time.monotonic() + GRACE), worker.task
        if task is None:
            return
        if task.retries > 0:
            task.retries -= 1
            self._queue.appendleft(task)
            return
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        task.end(error=WorkerDied(f"the worker process {worker.process.pid} ended in mid-trial, by {how}"))

    def _assign(self) -> None:
        if self._closed:
            return
        while self._queue:
            worker = next((one for one in self._workers if one.task is None), None)
            if worker is None:
                if len(self._workers) >= self.n_workers:
                    return
                worker = _Worker()
                self._workers.append(worker)
            worker.give(self._queue.popleft())

    def close(self) -> None:
        """End all workers, and what they run; wait for them."""
        if getattr(self, "_closed", True):
            return
        self._closed = True
        for worker in self._workers:
            worker.ask_to_end()
        until = time.monotonic() + GRACE
        for worker in self._workers:
            worker.end(until)
            if worker.task is not None:
                worker.task.end(error=ExecutorClosed())
        self._workers.clear()
        for task in self._queue:
            task.end(error=ExecutorClosed())
        self._queue.clear()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def usable_cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""An executor for Orion that runs trials in separate processes, and survives when one of them dies.

Orion's own pools fork. A forked worker that has copied half of torch's threads hangs. It is also a daemon, so
it cannot start processes, and when it dies `workon` waits for ever. Here each worker is a new Python process:

- It is started by a command, so scripts need no ``if __name__ == "__main__"``.
- It has a session of its own, so Ctrl-C reaches only this process, which then stops its workers.
- It holds one end of a pipe, the lifeline. When this process ends, for whatever reason, the lifeline closes,
  and the worker stops as if by SIGTERM.
- If it dies, its call is given to a new worker, up to ``retries`` times. After that the call fails.
- When it ends, for whatever reason, the processes that it started end with it: its process group is killed.

`concurrent.futures` and loky can do all of this but the last: there, one dead worker ends all calls.

Orion finds this executor by the name ``workers``. Every user of Orion imports this module with Orion, so it
must stay cheap to import.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
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

from ppo_hpo.orion.worker_process import STOP_SECONDS
from ppo_hpo.trial.process import THREAD_VARIABLES

_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from ppo_hpo.orion.worker_process import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)


class WorkerDied(RuntimeError):
    """A worker process ended in the middle of a call."""


class _Task(Future):  # type: ignore[misc]
    def __init__(self, executor: Workers, pickled_call: bytes, retries: int) -> None:
        self.executor, self.pickled_call, self.retries = executor, pickled_call, retries
        self.done = False
        self.value: Any = None
        self.error: Exception | None = None
        self.traceback = ""

    def get(self, timeout: float | None = None) -> Any:
        self.wait(timeout)
        if not self.done:
            raise TimeoutError
        if self.error is not None:
            raise self.error
        return self.value

    def wait(self, timeout: float | None = None) -> None:
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not self.done and (left := end - time.monotonic()) > 0:
            self.executor.poll_workers(min(1.0, left))

    def ready(self) -> bool:
        return self.done

    def successful(self) -> bool:
        if not self.done:
            raise ValueError("the call is not done yet")
        return self.error is None

    def finish(self, value: Any = None, error: Exception | None = None, text: str = "") -> None:
        self.value, self.error, self.traceback, self.done = value, error, text, True


class _Worker:
    def __init__(self) -> None:
        self.task: _Task | None = None
        self.connection, theirs = multiprocessing.connection.Pipe()
        lifeline, self._lifeline = os.pipe()
        path = [os.path.abspath(entry) for entry in sys.path]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(path), str(theirs.fileno()), str(lifeline)],
                pass_fds=(theirs.fileno(), lifeline),
                stdin=subprocess.DEVNULL,
                # Trials run side by side, so each starts with one thread for numerical libraries.
                env={**dict.fromkeys(THREAD_VARIABLES, "1"), **os.environ},
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(lifeline)

    def start(self, task: _Task) -> None:
        self.task = task
        # If the worker has just died, `Workers.poll_workers` notices.
        with contextlib.suppress(OSError):
            self.connection.send_bytes(task.pickled_call)

    def ask_to_stop(self) -> None:
        self.connection.close()
        with contextlib.suppress(OSError):
            os.close(self._lifeline)
        if not self.has_ended():
            with contextlib.suppress(OSError):
                os.kill(self.process.pid, signal.SIGTERM)

    def has_ended(self, seconds: float = 0.0) -> bool:
        """Whether the process ends within some seconds. It is not waited for, so its number stays its own."""
        end, pause = time.monotonic() + seconds, 0.001
        while self.process.returncode is None:
            try:
                if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    return True
            except ChildProcessError:  # Somebody else has waited for it.
                return True
            if (left := end - time.monotonic()) <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, 0.05)
        return True

    def wait_or_kill(self, deadline: float) -> int:
        """Wait for the process until a time of `time.monotonic`, then kill it; return its exit code.

        What it started is killed in any case. A worker that was killed could not end it.
        """
        self.has_ended(max(0.1, deadline - time.monotonic()))
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


class Workers(BaseExecutor):  # type: ignore[misc]
    """Worker processes for Orion's ``workon``; see this module's docstring.

    Args:
        n_workers: the most workers at a time. Each is started when it is needed. 0 or less means the number
            of usable CPU cores.
        retries: how many times a call is repeated whose worker died. Use 0 for calls that must not run twice.
            A trial resumes from its checkpoint.
    """

    def __init__(self, n_workers: int = -1, retries: int = 0) -> None:
        super().__init__(n_workers if n_workers > 0 else usable_cores())
        self.retries = retries
        self._workers: list[_Worker] = []
        self._queue: collections.deque[_Task] = collections.deque()
        self._closed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Workers, (self.n_workers, self.retries)

    @property
    def processes(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> _Task:
        """Let a worker call ``function(*args, **kwargs)`` as soon as one is free."""
        import cloudpickle

        if self._closed:
            raise ExecutorClosed
        task = _Task(self, cloudpickle.dumps((function, args, kwargs)), self.retries)
        self._queue.append(task)
        self._start_tasks()
        return task

    def wait(self, futures: list[_Task]) -> list[Any]:
        """Wait for all results and return them; raise the first error."""
        return [future.get() for future in futures]

    def async_get(self, futures: list[_Task], timeout: float | None = 0.01) -> list[Any]:
        """Remove the calls that are done from ``futures``, and return their results.

        If none is done yet, this waits at most ``timeout`` seconds.
        """
        if not any(future.done for future in futures):
            self.poll_workers(timeout or 0.0)
        done = [future for future in futures if future.done]
        for future in done:
            futures.remove(future)
        return [
            AsyncResult(future, future.value)
            if future.error is None
            else AsyncException(future, future.error, future.traceback)
            for future in done
        ]

    def poll_workers(self, timeout: float) -> None:
        """Wait until a worker answers or dies, at most ``timeout`` seconds, and start queued tasks."""
        connections = [worker.connection for worker in self._workers]
        if not connections:
            time.sleep(timeout)
        ready = multiprocessing.connection.wait(connections, timeout)
        for worker in self._workers[:]:
            if worker.connection in ready or worker.has_ended():
                self._receive(worker)
        self._start_tasks()

    def _receive(self, worker: _Worker) -> None:
        """Take a worker's answer. A worker that is dead may have answered before."""
        try:
            answer = worker.connection.recv_bytes() if worker.connection.poll() else None
        except (EOFError, OSError):
            answer = None
        if answer is None:
            self._remove_dead(worker)
            return
        task, worker.task = worker.task, None
        assert task is not None
        try:
            value, error, text = pickle.loads(answer)
        except Exception as problem:
            value, error, text = None, problem, traceback.format_exc()
        task.finish(value, error, text)

    def _remove_dead(self, worker: _Worker) -> None:
        """Remove a worker that died. Queue its task again, or let the task fail."""
        self._workers.remove(worker)
        worker.ask_to_stop()
        code, task = worker.wait_or_kill(time.monotonic() + STOP_SECONDS), worker.task
        if task is None:
            return
        if task.retries > 0:
            task.retries -= 1
            self._queue.appendleft(task)
            return
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        task.finish(error=WorkerDied(f"the worker process {worker.process.pid} ended in mid-trial, by {how}"))

    def _start_tasks(self) -> None:
        """Give queued tasks to idle workers, and start workers up to the limit."""
        while self._queue and not self._closed:
            worker = next((one for one in self._workers if one.task is None), None)
            if worker is None:
                if len(self._workers) >= self.n_workers:
                    return
                worker = _Worker()
                self._workers.append(worker)
            worker.start(self._queue.popleft())

    def close(self) -> None:
        """Stop all workers and what they run, and wait for them. Calls that are not done fail."""
        if getattr(self, "_closed", True):
            return
        self._closed = True
        for worker in self._workers:
            worker.ask_to_stop()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self._workers:
            worker.wait_or_kill(deadline)
            if worker.task is not None:
                worker.task.finish(error=ExecutorClosed())
        self._workers.clear()
        for task in self._queue:
            task.finish(error=ExecutorClosed())
        self._queue.clear()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def usable_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""Orion's pools of forked workers, made safe: they end, and so does what their workers started.

`multiprocessing.Pool` waits for ever in three cases, and Orion waits with it. A worker that was killed may
have held a lock that the others need. A worker that is busy is waited for. And a worker that was forked while
a sweep notes signals would note its SIGTERM, too. So `end_pool` waits for nobody: it stops the threads of the
pool, and then its workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.popen_fork
import os
import signal
import threading
import time
from multiprocessing.pool import TERMINATE, Pool
from typing import Any

from ppo_hpo.orion.worker_process import STOP_SECONDS

# The worker's end of a pipe that closes when this process ends, and our own end.
_lifeline: tuple[int, int] | None = None


class _Popen(multiprocessing.popen_fork.Popen):
    """A forked process that takes the processes that it started with it when it ends."""

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                # As long as the dead process is not waited for, no other one can get its number.
                if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | flag) is not None:
                    end_group(self.pid)
        return super().poll(flag)


def _popen(process: multiprocessing.process.BaseProcess) -> Any:
    is_fork = multiprocessing.get_start_method() == "fork"
    return _Popen(process) if is_fork else multiprocessing.Process._Popen(process)


class PoolWorker(multiprocessing.Process):
    """A worker of a pool. It leads a process group, and ends by SIGTERM or with the process that made it."""

    @property
    def daemon(self) -> bool:
        """Never, because daemons cannot start processes for environments."""
        return False

    @daemon.setter
    def daemon(self, value: bool) -> None:
        pass

    _Popen = staticmethod(_popen)  # type: ignore[assignment]

    def run(self) -> None:
        """Serve the pool, in the forked process."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # Ctrl-C in a terminal goes to the process that leads the sweep, which ends the workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.setpgid(0, 0)
        if _lifeline is not None:
            os.close(_lifeline[1])
            threading.Thread(target=_end_with_leader, args=(_lifeline[0],), daemon=True).start()
        super().run()


def prepare_pools() -> None:
    """Let Orion's pools of this process have such workers."""
    global _lifeline
    from orion.executor import multiprocess_backend

    multiprocess_backend.Pool.ALLOW_DAEMON = False
    multiprocess_backend._Process = PoolWorker
    _lifeline = _lifeline or os.pipe()


def end_pool(executor: Any) -> None:
    """End an Orion executor with a pool of processes, whatever its workers do."""
    pool: Any = executor.pool
    del executor.pool  # Orion's `close` would wait. It is also called when the executor is deleted.
    pool._terminate.cancel()  # So would the function that `multiprocessing` calls at exit.
    pool._state = TERMINATE
    for handler in (pool._worker_handler, pool._task_handler, pool._result_handler):
        handler._state = TERMINATE
    pool._change_notifier.put(None)
    pool._worker_handler.join()  # After this, no worker is started.
    for worker in pool._pool:
        worker.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for worker in pool._pool:
        worker.join(max(0.1, deadline - time.monotonic()))
        if worker.exitcode is None:
            worker.kill()
            worker.join()


def end_group(leader: int) -> None:
    """Kill what is left of the process group of a process that has ended."""
    with contextlib.suppress(OSError):
        os.killpg(leader, signal.SIGKILL)


def is_process_pool(pool: Any) -> bool:
    """Whether an executor's pool has processes; Orion also has one of threads."""
    return isinstance(pool, Pool)


def _end_with_leader(lifeline: int) -> None:
    """End this worker and what it started when the process that forked it has ended."""
    while os.read(lifeline, 1):
        pass
    os.killpg(0, signal.SIGKILL)

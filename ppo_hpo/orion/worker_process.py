"""The process of a worker of `ppo_hpo.orion.workers`: it answers one call after the other."""

from __future__ import annotations

import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
import traceback
import warnings
from typing import Any, NoReturn

from ppo_hpo.spec.errors import Interrupted

#: Seconds that a worker has to stop its call, before it is killed.
STOP_SECONDS = 10.0


def serve(connection_fd: int, lifeline: int) -> NoReturn:
    """Answer calls until the executor is gone, then end this process.

    The lifeline is the file descriptor of a pipe that closes when the executor's process ends.
    """
    from ppo_hpo.trial import gpu_slots
    from ppo_hpo.trial.process import leave

    gpu_slots.own_process()

    def stop(signum: int, frame: object) -> None:
        # A second signal must not interrupt the cleanup that the first one started.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted(signum)

    code = 0
    try:
        try:
            signal.signal(signal.SIGTERM, stop)
            for descriptor in (connection_fd, lifeline):
                os.set_inheritable(descriptor, False)
            threading.Thread(target=_stop_with_executor, args=(lifeline,), daemon=True).start()
            connection = multiprocessing.connection.Connection(connection_fd)
            while True:
                connection.send_bytes(_answer(connection.recv_bytes()))
        except (EOFError, OSError):
            pass  # The executor is gone.
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        # The executor closes the connection first and then sends SIGTERM, which may arrive here as well.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except (Interrupted, KeyboardInterrupt):
        code = 128 + signal.SIGTERM
    _end_children()
    leave(code)


def _end_children() -> None:
    """Send SIGTERM to what this worker started. The executor kills what is left, if it still exists."""
    if os.getpgrp() == os.getpid():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)


def _answer(pickled_call: bytes) -> bytes:
    """Make a call; its result, its error and the error's traceback, pickled."""
    import cloudpickle

    try:
        with warnings.catch_warnings():
            # Orion imports pkg_resources, which warns that it is deprecated.
            warnings.simplefilter("ignore")
            function, args, kwargs = pickle.loads(pickled_call)
        answer: tuple[Any, Exception | None, str] = function(*args, **kwargs), None, ""
    except Exception as error:
        answer = None, error, traceback.format_exc()
    try:
        return bytes(cloudpickle.dumps(answer))
    except Exception:
        value, call_error, _ = answer
        text = f"the worker's answer cannot be pickled: {(value if call_error is None else call_error)!r}"
        return pickle.dumps((None, TypeError(text[:2000]), traceback.format_exc()))


def _stop_with_executor(lifeline: int) -> None:
    """Stop this process, and what it started, when the executor's process is gone."""
    while os.read(lifeline, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    # This reaches the processes of the environment, too.
    os.killpg(os.getpid(), signal.SIGKILL)

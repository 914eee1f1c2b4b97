"""What a process of `workers` does: it answers one call after the other."""

from __future__ import annotations

import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
import traceback
from typing import Any, NoReturn

from ppo_hpo.spec.errors import Interrupted

#: Seconds that a worker gets to end what it does, before it is killed.
GRACE = 10.0


def serve(connection_fd: int, lifeline: int) -> NoReturn:
    """What a worker does: answer one call after the other, until nobody is at the other end."""
    from ppo_hpo.trial import gpu_slots
    from ppo_hpo.trial.process import leave

    gpu_slots.own_process()

    def stop(signum: int, frame: object) -> None:
        # One is enough: a second must not disturb the tidying up after the first.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted(signum)

    code = 0
    try:
        try:
            signal.signal(signal.SIGTERM, stop)
            for descriptor in (connection_fd, lifeline):
                os.set_inheritable(descriptor, False)
            threading.Thread(target=_watch, args=(lifeline,), daemon=True).start()
            connection = multiprocessing.connection.Connection(connection_fd)
            while True:
                connection.send_bytes(_answer(connection.recv_bytes()))
        except (EOFError, OSError):
            pass  # nobody is there any more
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        # The leader closes the connection first and sends SIGTERM then: it may come here, too.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except (Interrupted, KeyboardInterrupt):
        code = 128 + signal.SIGTERM
    leave(code)


def _answer(payload: bytes) -> bytes:
    import warnings

    import cloudpickle

    try:
        with warnings.catch_warnings():
            # pkg_resources announces its end when Orion is imported.
            warnings.simplefilter("ignore")
            function, args, kwargs = pickle.loads(payload)
        answer: tuple[Any, Exception | None, str] = function(*args, **kwargs), None, ""
    except Exception as error:
        answer = None, error, traceback.format_exc()
    try:
        return bytes(cloudpickle.dumps(answer))
    except Exception:
        text = (
            f"what the worker has to say cannot be pickled: {answer[0] if answer[1] is None else answer[1]!r}"
        )
        return pickle.dumps((None, TypeError(text[:2000]), traceback.format_exc()))


def _watch(lifeline: int) -> None:
    """Stop this process when the one that leads is gone."""
    while os.read(lifeline, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    # The environment's processes, too.
    os.killpg(os.getpid(), signal.SIGKILL)

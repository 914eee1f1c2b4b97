"""The lock of an experiment's algorithm, and which process holds it.

Orion stores that an algorithm is locked, and since when, but not by whom. So nobody can tell whether a lock
was left by a process that was killed. Here the process that takes the lock also stores who it is, in a field
that Orion ignores. It releases only its own lock: if somebody released it by hand and another process took
it, that process's lock and state stay.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from ppo_hpo.state.process_identity import Process

_FIELD = "holder"
_SAY = 5.0  # seconds after which a process that waits for the lock says who holds it


class AlgorithmLock(NamedTuple):
    """A lock that is held."""

    since: datetime.datetime  # In UTC without a time zone, as Orion stores it.
    holder: Process | None  # None if the process did not store who it is.

    @property
    def seconds(self) -> float:
        """For how long it has been held, by the clock of this machine."""
        return (utc_now() - self.since).total_seconds()

    @property
    def holder_runs(self) -> bool | None:
        """Whether its holder still runs; None if that cannot be seen from here."""
        return None if self.holder is None else self.holder.is_running()

    def __str__(self) -> str:
        by = "" if self.holder is None else f" by {self.holder}"
        return f"locked since {self.since:%Y-%m-%d %H:%M:%S} UTC{by}"


def utc_now() -> datetime.datetime:
    """The time as Orion stores it, to the millisecond, because MongoDB keeps no more."""
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def read(database: Any, experiment: Any) -> AlgorithmLock | None:
    """The lock of an experiment's algorithm; None if it is free.

    Args:
        database: Orion's database.
        experiment: the experiment's id in the database.
    """
    found = database.read("algo", {"experiment": experiment, "locked": 1})
    if not found:
        return None
    since, holder = found[0]["heartbeat"], None
    with contextlib.suppress(ValueError, TypeError, KeyError):
        record = json.loads(found[0][_FIELD])
        # A process that stores no name may have taken the lock after one that did.
        if record["since"] == since.isoformat():
            holder = Process.from_record(record)
    return AlgorithmLock(since, holder)


def release(database: Any, experiment: Any, lock: AlgorithmLock) -> bool:
    """Release a lock, unless another process has taken or released it meanwhile; whether it was released."""
    query = {"experiment": experiment, "locked": 1, "heartbeat": lock.since}
    data = {"locked": 0, "heartbeat": utc_now(), _FIELD: None}
    return database.read_and_write("algo", query=query, data=data) is not None


def make_acquire() -> Callable[..., Any]:
    """Make the replacement of `Legacy.acquire_algorithm_lock`, which stores who takes the lock."""
    from orion.storage import legacy
    from orion.storage.base import LockAcquisitionTimeout, LockedAlgorithmState, get_uid

    @contextlib.contextmanager
    def acquire_algorithm_lock(
        self: Any, experiment: Any = None, uid: Any = None, timeout: float = 60, retry_interval: float = 1
    ) -> Iterator[Any]:
        uid, began = get_uid(experiment, uid), time.perf_counter()
        end, reminder = began + timeout, began + _SAY
        while True:
            now = utc_now()
            name = json.dumps({"since": now.isoformat(), **asdict(Process.current())})
            data = {"locked": 1, "heartbeat": now, _FIELD: name}
            found = self._db.read_and_write("algo", query={"experiment": uid, "locked": 0}, data=data)
            if found is not None:
                break
            if time.perf_counter() >= end:
                raise LockAcquisitionTimeout
            if time.perf_counter() >= reminder:
                reminder += timeout
                logging.getLogger("ppo_hpo").warning(
                    "waits for the algorithm: %s", read(self._db, uid) or "free"
                )
            time.sleep(retry_interval)
        # `speedups` replaces the name `pickle` in Orion's module.
        content = None if found["state"] is None else legacy.pickle.loads(found["state"])
        state = LockedAlgorithmState(state=content, configuration=found["configuration"], locked=True)
        try:
            yield state
        except Exception:
            state.reset()
            raise
        finally:
            data = {"experiment": uid, "locked": 0, "heartbeat": utc_now(), _FIELD: None}
            if state.state is not None:
                data["state"] = legacy.pickle.dumps(state.state)
            query = {"experiment": uid, "locked": 1, _FIELD: name}
            if self._db.read_and_write("algo", query=query, data=data) is None:
                logging.getLogger("ppo_hpo").warning(
                    "the lock of the algorithm was taken away from this process: its last step does not count"
                )

    return acquire_algorithm_lock

"""Workers that wait for others leave room for those that have a result, and say for what they wait.

If the algorithm has no trial to suggest, Orion's worker asks it again at once. So it holds the lock of the
algorithm most of the time. A worker that has a result polls for this lock once in a second, and finds it
taken again and again. With four workers a sweep stood still for up to half a minute, while nothing was
trained. Here a worker that waits asks twice in a second, and one that has a result polls ten times in a
second.

Orion frees a trial whose worker has given no sign of life for five heartbeats. If the clock was set back
after the last sign, it would wait until the clock is there again. Here a sign of life that lies as far in the
future counts as old.
"""

from __future__ import annotations

import datetime
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

_PAUSE, _POLL = 0.5, 0.1  # seconds
_SAY, _SAY_AGAIN = 5.0, 60.0  # seconds after which a worker says for what it waits, and says it again
_log = logging.getLogger("ppo_hpo")


def apply() -> None:
    """Patch Orion. `ppo_hpo.orion.fixes` decides whether it may be patched."""
    from orion.client.runner import Runner
    from orion.core.worker.producer import Producer
    from orion.storage.legacy import Legacy

    Runner._suggest_trials = _suggest_trials(Runner._suggest_trials)
    Producer.observe = _observe
    Legacy.fetch_lost_trials = _fetch_lost_trials(Legacy.fetch_lost_trials)


def _suggest_trials(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def suggest_trials(self: Any, count: int) -> Any:
        began = time.monotonic()
        trials = original(self, count)
        # While its own trials run, the worker waits for their results this long before it asks again.
        self.gather_timeout = 0.01 if trials else _PAUSE
        if trials or not self.is_idle:
            self.waits_since, self.says_next = None, 0.0
            return trials
        if getattr(self, "waits_since", None) is None:
            self.waits_since, self.says_next = began, _SAY
        if time.monotonic() - self.waits_since >= self.says_next:
            _log.warning("waits for a trial: %s", _reason(self.client))
            self.says_next += _SAY_AGAIN
        if not self.is_done:
            time.sleep(_PAUSE)
        return trials

    return suggest_trials


def _reason(client: Any) -> str:
    if client.storage.get_algorithm_lock_info(uid=client.id).locked:
        return "another worker has locked the algorithm"
    reserved = client.fetch_trials_by_status("reserved")
    if not reserved:
        return "the algorithm suggests none, and no trial is running"
    signs = [f"{one.id[:8]} {_seconds_since(one.heartbeat):.0f} s ago" for one in reserved if one.heartbeat]
    return f"the algorithm suggests none before others end; their last signs of life: {', '.join(signs[:8])}"


def _observe(self: Any, trial: Any) -> None:
    with self.experiment.acquire_algorithm_lock(retry_interval=_POLL) as algorithm:
        algorithm.observe([trial])


def _fetch_lost_trials(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def fetch_lost_trials(self: Any, experiment: Any) -> Any:
        import orion.core

        patience = 5 * orion.core.config.worker.heartbeat
        reserved = self._fetch_trials({"experiment": experiment._id, "status": "reserved"})
        return [one for one in reserved if one.heartbeat and abs(_seconds_since(one.heartbeat)) >= patience]

    return fetch_lost_trials


def _seconds_since(moment: datetime.datetime) -> float:
    """Seconds since a moment in UTC without a time zone, as Orion stores it; less than 0 in the future."""
    return (datetime.datetime.now(datetime.UTC).replace(tzinfo=None) - moment).total_seconds()

"""Workers that wait for other workers' trials leave room for those that have something to say.

If the algorithm has no trial to suggest, Orion's worker asks it again at once. So it holds the lock of the
algorithm most of the time. A worker that has a result polls for this lock once in a second, and finds it
taken again and again. With four workers a sweep stood still for up to half a minute, while nothing was
trained. Here a worker that waits asks twice in a second, and one that has a result polls ten times in a
second.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

_PAUSE, _POLL = 0.5, 0.1  # seconds


def apply() -> None:
    """Patch Orion. `ppo_hpo.orion.fixes` decides whether it may be patched."""
    from orion.client.runner import Runner
    from orion.core.worker.producer import Producer

    Runner._suggest_trials = _suggest_trials(Runner._suggest_trials)
    Producer.observe = _observe


def _suggest_trials(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def suggest_trials(self: Any, count: int) -> Any:
        trials = original(self, count)
        if not trials and self.is_idle:
            time.sleep(_PAUSE)
        # While its own trials run, the worker waits for their results this long before it asks again.
        self.gather_timeout = 0.01 if trials else _PAUSE
        return trials

    return suggest_trials


def _observe(self: Any, trial: Any) -> None:
    with self.experiment.acquire_algorithm_lock(retry_interval=_POLL) as algorithm:
        algorithm.observe([trial])

"""Workers that wait: how often they ask, what they say, and which trials they take for lost."""

from __future__ import annotations

import datetime
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ppo_hpo.inspect import retry
from ppo_hpo.orion import algorithm_lock, waiting
from tests.orion.test_fixes import run

# Trials that were reserved by a clock that was ahead, and what Orion makes of them.
FUTURE = """
import datetime, warnings
warnings.simplefilter("ignore")
from orion.client import build_experiment

client = build_experiment("e", space={"x": "uniform(0, 1)"}, algorithm="random", max_trials=9,
                          storage={"type": "legacy", "database": {"type": "ephemeraldb"}})
trials = [client.suggest() for _ in range(3)]
for trial, hours in zip(trials, (-2, 0, 2)):
    moment = datetime.datetime.utcnow() + datetime.timedelta(hours=hours)
    client.storage.update_trial(trial, heartbeat=moment)
client._experiment.fix_lost_trials()
print(*(client.get_trial(trial).status for trial in trials))
for trial in trials:
    client._pacemakers.pop(trial.id).stop()
"""


def test_a_sign_of_life_from_the_future_counts_as_old(tmp_path: Path) -> None:
    """The clock was set back after a trial was reserved, and its worker was killed."""
    without, fixed = (run(on, FUTURE, cwd=tmp_path).stdout.split() for on in (False, True))
    assert without == ["interrupted", "reserved", "reserved"]
    assert fixed == ["interrupted", "reserved", "interrupted"]


def test_a_worker_without_a_trial_asks_less_often_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from orion.client import build_experiment

    client = build_experiment(
        "e", space={"x": "uniform(0, 1)"}, algorithm="random", max_trials=9,
        storage={"type": "legacy", "database": {"type": "ephemeraldb"}},
    )  # fmt: skip
    trial = client.suggest()
    clock = [1000.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    answers: list[Any] = []
    suggest = waiting._suggest_trials(lambda self, count: answers)
    runner = SimpleNamespace(client=client, is_idle=True, is_done=False)
    with caplog.at_level(logging.WARNING, "ppo_hpo"):
        for _ in range(200):
            assert suggest(runner, 1) == []
        # In 100 seconds, after 5 and 65 seconds.
        assert slept == [0.5] * 200
        assert caplog.text.count("waits for a trial: the algorithm suggests none before others end") == 2
        assert f"{trial.id[:8]} 0 s ago" in caplog.text
        # Its own trials run: it waits for them, and asks as seldom.
        runner.is_idle, before = False, len(slept)
        suggest(runner, 1)
        assert (len(slept), runner.gather_timeout) == (before, 0.5)
        answers.append(trial)
        assert suggest(runner, 1) == [trial]
        assert runner.gather_timeout == 0.01
    client.release(trial)


def test_signs_of_life_come_as_often_as_the_heartbeat_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take a trial after five heartbeats, and Orion gives a sign of life each minute."""
    from orion.client import build_experiment

    client = build_experiment(
        "e", space={"x": "uniform(0, 1)"}, algorithm="random", max_trials=9,
        storage={"type": "legacy", "database": {"type": "ephemeraldb"}},
    )  # fmt: skip
    monkeypatch.setenv("ORION_HEARTBEAT", "7")
    trial = client.suggest()
    pacemaker = client._pacemakers[trial.id]
    assert (pacemaker.wait_time, pacemaker.daemon) == (7, True)
    client.release(trial)


def test_retry_takes_no_sign_of_life_from_the_future() -> None:
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    seen = {
        hours: retry._was_seen(
            SimpleNamespace(status="reserved", heartbeat=now + datetime.timedelta(hours=hours))
        )
        for hours in (-2, 0, 2)
    }
    assert seen == {-2: False, 0: True, 2: False}


def test_who_waits_for_the_algorithm_says_who_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from orion.client import build_experiment
    from orion.storage.base import LockAcquisitionTimeout

    client = build_experiment(
        "e", space={"x": "uniform(0, 1)"}, algorithm="random", max_trials=9,
        storage={"type": "legacy", "database": {"type": "ephemeraldb"}},
    )  # fmt: skip
    monkeypatch.setattr(algorithm_lock, "_SAY", 0.0)
    lock = client._experiment.acquire_algorithm_lock
    with lock(), caplog.at_level(logging.WARNING, "ppo_hpo"):
        with pytest.raises(LockAcquisitionTimeout), lock(timeout=0.05, retry_interval=0.01):
            pass
        assert caplog.text.count("waits for the algorithm: locked since") == 1
        assert f"by process {os.getpid()} on " in caplog.text

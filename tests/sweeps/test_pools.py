"""Executors that must end although a worker was killed, is busy, or would not listen; with real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo.orion.workers import Workers
from ppo_hpo.spec.errors import UserError
from ppo_hpo.sweeps.executors import StopSignal, WatchedExecutor, make
from ppo_hpo.sweeps.progress import SweepProgress
from tests.orion.test_workers import alive
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 60


def stay(path: str) -> None:
    """Start a process that outlives everybody, note both numbers, and be busy for long."""
    child = subprocess.Popen(["sleep", "600"])
    Path(path + ".new").write_text(f"{os.getpid()} {child.pid}")
    os.replace(path + ".new", path)
    time.sleep(600)


def run_for_long(running: Any) -> None:
    running.set()
    time.sleep(600)


def busy(path: Path) -> tuple[int, int]:
    """The numbers of a busy worker and of the process that it started."""
    wait_for(path.exists, PATIENCE)
    worker, child = path.read_text().split()
    return int(worker), int(child)


def watched(executor: Any, stop: StopSignal | None = None) -> WatchedExecutor:
    return WatchedExecutor(executor, stop or StopSignal(), SweepProgress(2, 0, None, 1))


def gone(*processes: int) -> None:
    wait_for(lambda: not any(map(alive, processes)), PATIENCE)


@pytest.mark.parametrize("name", ["poolexecutor", "joblib"])
def test_a_pool_ends_when_one_worker_is_killed_and_its_peer_is_busy(tmp_path: Path, name: str) -> None:
    with StopSignal().in_charge() as stop:
        executor = watched(make(name, 2), stop)
        futures = [executor.submit(stay, str(tmp_path / letter)) for letter in "ab"]
        (first, child), (second, other) = busy(tmp_path / "a"), busy(tmp_path / "b")
        os.kill(first, signal.SIGKILL)
        with pytest.raises(UserError, match="A worker process of Orion's pool died"), executor:
            wait_for(lambda: executor.async_get(futures), PATIENCE)
    gone(first, child, second, other)
    assert not hasattr(executor.inner, "pool")  # so that nothing waits for it later


def test_a_pool_ends_although_an_idle_worker_was_killed(tmp_path: Path) -> None:
    """An idle worker waits for a call and holds the lock on the queue, which nobody else gets then."""
    executor = make("poolexecutor", 2)
    with watched(executor):
        idle = [process.pid for process in executor.pool._pool]
        os.kill(idle[0], signal.SIGKILL)
        os.kill(idle[1], signal.SIGKILL)
    gone(*idle)


def test_the_call_of_a_killed_worker_is_repeated_while_its_peer_is_busy(tmp_path: Path) -> None:
    with Workers(2, retries=1) as workers:
        futures = [workers.submit(stay, str(tmp_path / letter)) for letter in "ab"]
        (first, child), (second, other) = busy(tmp_path / "a"), busy(tmp_path / "b")
        (tmp_path / "a").unlink()
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: workers.async_get(futures, timeout=0.1) or (tmp_path / "a").exists(), PATIENCE)
        again, child_again = busy(tmp_path / "a")
        gone(first, child)
        assert alive(second)
        assert again not in (first, second)
    gone(again, child_again, second, other)


LEADER = """
import sys
from ppo_hpo.sweeps.executors import StopSignal, make
from tests.sweeps.test_pools import stay, watched
with StopSignal().in_charge() as stop:
    executor = watched(make(sys.argv[1], 2 if sys.argv[1] != "single" else 1), stop)
    with executor:
        futures = [executor.submit(stay, sys.argv[2] + letter) for letter in "ab"]
        while True:
            executor.async_get(futures)
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_leader(tmp_path: Path, how: signal.Signals) -> None:
    """By SIGTERM it ends them, busy as they are. Killed, it can not, and they end by themselves."""
    names = ["workers", "poolexecutor", "dask"] if how == signal.SIGTERM else ["workers", "poolexecutor"]
    own = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    leaders, processes = {}, {}
    for name in names:
        command = [sys.executable, "-c", LEADER, name, str(tmp_path / name)]
        with open(tmp_path / f"{name}.log", "wb") as log:
            leaders[name] = subprocess.Popen(command, env=own, stderr=log)
    try:
        processes = {name: [*busy(tmp_path / f"{name}a"), *busy(tmp_path / f"{name}b")] for name in names}
        for leader in leaders.values():
            leader.send_signal(how)
        for name, leader in leaders.items():
            leader.wait(PATIENCE)
            errors = (tmp_path / f"{name}.log").read_text()
            assert how == signal.SIGKILL or errors.rstrip().endswith("KeyboardInterrupt"), errors
            # What a worker of Dask's started is nobody's.
            gone(*(processes[name][::2] if name == "dask" else processes[name]))
    finally:
        for leader in leaders.values():
            leader.kill()
        for child in (number for numbers in processes.values() for number in numbers if alive(number)):
            os.kill(child, signal.SIGKILL)


def test_a_process_that_is_forked_during_a_sweep_ends_by_the_first_sigterm() -> None:
    """The handler of the sweep only notes it. Whoever waits for the fork would wait for ever."""
    fork = multiprocessing.get_context("fork")
    running = fork.Event()
    with StopSignal().in_charge(), StopSignal().in_charge(at_once=True):
        child = fork.Process(target=run_for_long, args=(running,), daemon=True)
        child.start()
        running.wait(PATIENCE)
    child.terminate()
    child.join(PATIENCE)
    assert child.exitcode == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

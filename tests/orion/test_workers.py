"""Worker processes: their answers, and that a worker that dies or loses its executor does no harm."""

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
from orion.executor.base import AsyncException, AsyncResult, ExecutorClosed, executor_factory

from ppo_hpo.orion.workers import WorkerDied, Workers
from tests.waiting import wait_for

PATIENCE = 120


def alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def gather(workers: Workers, futures: list[Any]) -> list[Any]:
    found = []
    while futures:
        found += workers.async_get(futures, timeout=1.0)
    return found


def pid_and(value: int) -> tuple[int, int]:
    return os.getpid(), value


def fail() -> None:
    raise LookupError("no such luck")


def unpicklable() -> Any:
    return sys.stdin.buffer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    raise SystemExit(3)


def die_once(path: str) -> str:
    if not os.path.exists(path):
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def child_of_mine() -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(abs, (-7,))


def stay(path: str) -> None:
    try:
        Path(path).write_text(str(os.getpid()))
        time.sleep(600)
    finally:
        Path(path + ".tidy").touch()


def test_orion_knows_them_by_name() -> None:
    made = executor_factory.create("workers", n_workers=3)
    assert type(made) is Workers
    assert made.n_workers == 3
    made.close()
    assert "ray" in executor_factory.get_classes()
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        executor_factory.create("workers", colour="red")


def test_answers_errors_and_order() -> None:
    with Workers(2) as workers:
        futures = [workers.submit(pid_and, number) for number in range(6)]
        assert [value for _, value in workers.wait(futures)] == list(range(6))
        assert {pid for pid, _ in workers.wait(futures)} <= set(workers.processes)
        assert len(workers.processes) <= 2
        assert os.getpid() not in workers.processes
        bad, odd = workers.submit(fail), workers.submit(unpicklable)
        bad.wait()
        assert bad.ready()
        assert not bad.successful()
        with pytest.raises(LookupError, match="no such luck"):
            bad.get()
        with pytest.raises(TypeError, match="cannot be pickled"):
            odd.get()
        slow = workers.submit(time.sleep, 600)
        with pytest.raises(TimeoutError):
            slow.get(timeout=0.2)
        with pytest.raises(ValueError, match="not done"):
            slow.successful()
        # Those that are done are taken out, with their traceback, and the others stay.
        futures = [slow, bad, workers.submit(pid_and, 9)]
        futures[2].wait()
        results = workers.async_get(futures, timeout=0.1)
        assert futures == [slow]
        assert [type(result) for result in results] == [AsyncException, AsyncResult]
        assert "in fail" in results[0].traceback
    with pytest.raises(ExecutorClosed):
        workers.submit(fail)
    with pytest.raises(ExecutorClosed):
        slow.get()


def test_a_worker_that_dies_is_noticed_and_the_others_continue(tmp_path: Path) -> None:
    with Workers(2) as workers:
        results = gather(workers, [workers.submit(f) for f in (die, leave)] + [workers.submit(pid_and, 1)])
        errors = sorted(str(r.exception) for r in results if isinstance(r, AsyncException))
        assert len(errors) == 2
        assert errors[0].endswith(("by signal SIGKILL", "by exit code 3"))
        assert {error.rpartition(" by ")[2] for error in errors} == {"signal SIGKILL", "exit code 3"}
        assert all(isinstance(r.exception, WorkerDied) for r in results if isinstance(r, AsyncException))
        assert [r.value[1] for r in results if isinstance(r, AsyncResult)] == [1]


def test_the_call_of_a_dead_worker_is_repeated_up_to_retries_times(tmp_path: Path) -> None:
    with Workers(1, retries=1) as workers:
        assert workers.submit(die_once, str(tmp_path / "once")).get() == "alive"
        with pytest.raises(WorkerDied):
            workers.submit(die).get()


def test_workers_may_start_processes() -> None:
    with Workers(1) as workers:
        assert workers.submit(child_of_mine).get() == 7


def test_closing_stops_what_runs(tmp_path: Path) -> None:
    workers = Workers(1)
    workers.submit(stay, str(tmp_path / "pid"))
    waiting = workers.submit(pid_and, 1)
    pid = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), PATIENCE))
    workers.close()
    assert not alive(pid)
    assert (tmp_path / "pid.tidy").exists()  # it was stopped, not killed
    with pytest.raises(ExecutorClosed):
        waiting.get()


def test_workers_end_when_their_executor_is_killed_and_its_script_needs_no_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, tests.orion.test_workers as t\n"
        "from ppo_hpo.orion.workers import Workers\n"
        "def here(): return 'by value'\n"
        "workers = Workers(1)\n"
        "assert workers.submit(here).get() == 'by value'\n"
        "workers.submit(t.stay, sys.argv[1]).get()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "ignore"}
    leader = subprocess.Popen([sys.executable, str(script), str(tmp_path / "pid")], env=environment)
    try:
        pid = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), PATIENCE))
        assert alive(pid)
    finally:
        leader.kill()
        leader.wait()
    wait_for(lambda: not alive(pid), PATIENCE)
    assert (tmp_path / "pid.tidy").exists()


def test_a_worker_that_ends_ignores_a_signal_to_end() -> None:
    """The executor closes the connection and then sends SIGTERM, which arrives while the worker ends."""
    code = """
import multiprocessing, os, signal
from ppo_hpo.orion import worker_process
set_handler, told = signal.signal, []
def signal_comes_first(signum, handler):
    if handler is signal.SIG_IGN and not told:
        told.append(signum)
        os.kill(os.getpid(), signal.SIGTERM)
    return set_handler(signum, handler)
signal.signal = signal_comes_first
ours, theirs = multiprocessing.Pipe()
lifeline, _ = os.pipe()
ours.close()
worker_process.serve(theirs.fileno(), lifeline)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")

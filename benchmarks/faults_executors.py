"""The second part of `faults.py`: a sweep on each executor, and faults of the executor's processes.

For each of `EXECUTORS`, `ppo-hpo sweep` trains four trials, two at a time. Twice it is disturbed while all
its workers are busy, in an order that the seed draws:

- a worker process is killed (SIGKILL) while its peer is busy. Where trials run in the sweep's own process,
  that process is killed;
- the sweep itself, the leader, is told to stop (SIGTERM).

After the second one it must end within `PATIENCE` seconds, and leave no process behind. After the first one
it may end or continue. Where it ended, the same command is started again. At the end every trial is
completed, and equal to an undisturbed run.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
#: Names, and whether a trial has a process of its own.
EXECUTORS = {"single": False, "workers": True, "joblib": True, "{poolexecutor: {backend: threading}}": False}
KINDS = {"executor: worker killed while its peer is busy": 1, "executor: SIGTERM to the leader": 1}
TRIALS, EPOCHS, PATIENCE, LIMIT = 4, 8, 30.0, 240.0
MARK = "FAULTS_SWEEP"  # environment variable by which the processes of a sweep are found


@dataclass
class Disturbed:
    """One sweep on one executor."""

    executor: str
    folder: Path
    random: random.Random
    space: Path
    note: Callable[[str, list[str], int], None]  # writes a fault down
    complaints: list[str] = field(default_factory=list)
    slowest_end: float = 0.0  # seconds from a SIGTERM to the leader's end

    def __post_init__(self) -> None:
        self.name = "".join(c for c in self.executor if c.isalpha())
        self.place = self.folder / self.name
        self.leader: subprocess.Popen[bytes] | None = None
        self.max_trials = TRIALS

    def start(self) -> None:
        own = {k: v for k, v in os.environ.items() if not k.startswith("ORION_")}
        command = [str(BIN / "ppo-hpo"), "sweep", str(self.space), "--name", self.name, "--algorithm"]
        command += ["{random: {seed: 1}}", "--executor", self.executor, "--workers", "2", "--device", "cpu"]
        command += ["--epochs", str(EPOCHS), "--max-trials", str(self.max_trials), "--quiet"]
        with open(self.folder / f"{self.name}.txt", "ab") as output:
            self.leader = subprocess.Popen(
                command, cwd=self.folder, env={**own, "OMP_NUM_THREADS": "1", MARK: str(self.place)},
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def run(self) -> None:
        faults = list(KINDS)
        self.random.shuffle(faults)
        end = time.monotonic() + LIMIT
        self.start()
        while time.monotonic() < end:
            assert self.leader is not None
            if self.leader.poll() is not None:
                if self.leader.returncode == 0 and not self.requeue():
                    return
                self.start()
            if faults and self.is_busy():
                # A little later, so that it is not always the beginning of a trial.
                time.sleep(self.random.uniform(0.0, 1.0))
                if (self.terminate if "SIGTERM" in faults[0] else self.kill)(faults[0]):
                    faults.pop(0)
            time.sleep(0.05)
        self.complaints.append(f"{self.executor}: the sweep was not done after {LIMIT:g} s")
        self.end()

    def is_busy(self) -> bool:
        return len(self.training()) >= (1 if self.executor == "single" else 2)

    def training(self) -> dict[str, int]:
        """Which process trains, by the trial's directory."""
        from ppo_hpo.state.claim import latest_writer

        found = {}
        for directory in self.place.glob("trials/*/"):
            writer = latest_writer(directory)
            process = None if writer is None or writer.stage is None else writer.process
            if process is not None and process.is_running() and (directory / "curve.jsonl").exists():
                found[directory.name] = process.pid
        return found

    def requeue(self) -> bool:
        """Requeue the trials that a killed process has left, as a user does; whether there were some."""
        trials = trials_of(self)
        left = [trial for trial in trials if trial.status != "completed"]
        for trial in left:
            command = [BIN / "ppo-hpo", "retry", self.place, "--trial", trial.id]
            subprocess.run(command, cwd=self.folder, stdout=subprocess.DEVNULL, check=True)
        self.max_trials = len(trials)
        return bool(left)

    def kill(self, kind: str) -> bool:
        """Kill one of the processes that train; whether there was one."""
        victims = self.training()
        if not victims:
            return False
        pid = self.random.choice(sorted(victims.values()))
        self.note(f"{kind} ({self.executor})", sorted(n for n, p in victims.items() if p == pid), pid)
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)  # until it is dead, and trains no more
        return True

    def terminate(self, kind: str) -> bool:
        """Tell the leader to stop, and wait for its end; whether it still ran."""
        assert self.leader is not None
        if self.leader.poll() is not None:
            return False
        self.note(f"{kind} ({self.executor})", sorted(self.training()), self.leader.pid)
        began = time.monotonic()
        self.leader.terminate()
        try:
            self.leader.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.complaints.append(f"{self.executor}: the leader had not ended {PATIENCE:g} s after SIGTERM")
            self.end()
            return True
        self.slowest_end = max(self.slowest_end, time.monotonic() - began)
        while (left := self.processes()) and time.monotonic() - began < PATIENCE:
            time.sleep(0.1)
        if left:
            self.complaints.append(f"{self.executor}: SIGTERM to the leader left the processes {left}")
        return True

    def processes(self) -> list[int]:
        """All processes of the sweep that still run."""
        found, mark = [], f"{MARK}={self.place}".encode()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def end(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.leader is not None:
            self.leader.wait()


def sweeps(folder: Path, space: Path, seed: int, note: Callable[[str, list[str], int], None]) -> list[Any]:
    """Run the sweeps of all executors, one after the other; what became of them."""
    found = []
    for executor in EXECUTORS:
        one = Disturbed(executor, folder, random.Random(f"{seed} {executor}"), space, note)
        try:
            one.run()
        finally:
            one.end()
        found.append(one)
    return found


def trials_of(one: Disturbed) -> list[Any]:
    """Orion's records of the trials of a sweep."""
    from ppo_hpo.orion.experiment import open_experiment

    return list(open_experiment(str(one.place), None).fetch_trials())

"""What one process has done for one seed of a trial: steps, retries, time, and where it is now."""

from __future__ import annotations

import resource
import threading
import time
from dataclasses import dataclass


@dataclass
class Work:
    """What this process has done for one seed of a trial, in all its attempts.

    Attributes:
        part: the seed's folder in the trial's directory. It is empty for a trial of one seed.
        steps: environment steps. Steps that a failure lost are counted again when they are repeated.
        eval_steps: environment steps of evaluations, repeated ones included.
        retries: attempts after the first.
        attempted: whether there was an attempt.
        resumed_from: epoch at which the process found the trial, or None if it started the trial.
        epoch: epochs that the current attempt has finished, those it resumed from included.
        step: environment steps of the current epoch.
        wall_seconds: wall time until `read_clock` was last called.
        cpu_seconds: likewise the CPU time of the process and its children. In a thread, that of the thread.
    """

    part: str = ""
    steps: int = 0
    eval_steps: int = 0
    retries: int = 0
    attempted: bool = False
    resumed_from: int | None = None
    epoch: int = 0
    step: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0

    def start_clock(self) -> None:
        """Measure time from now on, in addition to the time measured before."""
        self._wall_start = time.perf_counter() - self.wall_seconds
        self._cpu_start = _cpu_seconds() - self.cpu_seconds

    def read_clock(self) -> None:
        """Update `wall_seconds` and `cpu_seconds`."""
        self.wall_seconds = time.perf_counter() - self._wall_start
        self.cpu_seconds = _cpu_seconds() - self._cpu_start

    def start_attempt(self, epoch: int, resumed_from: int | None) -> None:
        """Say that an attempt begins after ``epoch`` finished epochs."""
        if not self.attempted:
            self.attempted, self.resumed_from = True, resumed_from
        self.start_epoch(epoch)

    def start_epoch(self, epoch: int) -> None:
        """Say that an epoch begins after ``epoch`` finished ones."""
        self.epoch, self.step = epoch, 0

    def add_steps(self, steps: int) -> None:
        """Count environment steps that are about to be taken."""
        self.steps += steps
        self.step += steps


def _cpu_seconds() -> float:
    if threading.current_thread() is not threading.main_thread():
        return time.thread_time()
    # Children are counted once this process has seen them end.
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime

"""Retries inside a trial's process, of whole attempts and of files that could not be written.

`with_retries` resumes from the last checkpoint after a fault that may pass, and after any error that is not
one of ours, unless it occurs again at the very same step. `retrying_write` writes a file again that could not
be written for a moment, so that nothing is computed twice.
"""

from __future__ import annotations

import gc
import logging
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ppo_hpo.spec.errors import (
    DeterministicFailure,
    ExitOfEnvironment,
    Interrupted,
    LostLock,
    OutOfMemory,
    UserError,
)
from ppo_hpo.trial import process
from ppo_hpo.trial.failure import is_transient, kind, lacks_memory, one_line

T = TypeVar("T")

# Functions that look at an environment before anything is trained in it.
_FIRST_LOOKS = (("ppo_hpo.envs.make", "probe"), ("ppo_hpo.envs.repeat", "first_difference"))

# Seconds before the first retry, and at most. Each pause is twice as long as the one before.
_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


@dataclass
class Work:
    """What this process has done for one seed of a trial, in all its attempts."""

    part: str = ""  # the seed's folder in the trial's directory; empty for a trial of one seed
    steps: int = 0  # environment steps; those that a failure lost count again when they are repeated
    eval_steps: int = 0  # environment steps of evaluations, repeated ones included
    retries: int = 0  # attempts after the first
    attempted: bool = False
    resumed_from: int | None = None  # epoch at which the process found the trial; None if it started it
    epoch: int = 0  # epochs that the current attempt has finished, those it resumed from included
    step: int = 0  # environment steps of the current epoch
    curve_rows: int = 0  # rows of the learning curve whose evaluations are counted
    wall_seconds: float = 0.0  # until `read_clock` was last called
    cpu_seconds: float = 0.0  # likewise, of the process and its children; in a thread, of the thread

    def start_clock(self) -> None:
        """Measure time from now on, in addition to the time measured before."""
        self._wall_start = time.perf_counter() - self.wall_seconds
        self._cpu_start = _cpu_seconds() - self.cpu_seconds

    def read_clock(self) -> None:
        """Update `wall_seconds` and `cpu_seconds`."""
        self.wall_seconds = time.perf_counter() - self._wall_start
        self.cpu_seconds = _cpu_seconds() - self._cpu_start

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


def with_retries(
    attempt: Callable[[], T], work: Work, retries: int, earlier: str | None = None,
    log: logging.Logger | None = None, sleep: Callable[[float], None] = time.sleep,
) -> T:  # fmt: skip
    """Attempt something until it succeeds, or until another attempt cannot help.

    Each attempt resumes from the last checkpoint, and keeps ``work`` up to date. ``retries`` further ones are
    made, counted anew once an epoch was finished. ``earlier`` is the place where another process failed.

    Raises:
        DeterministicFailure: an unknown error occurred twice at the very same step, or no retry is left.
        OutOfMemory: replaces any other error that says so.
    """
    log = log or logging.getLogger("ppo_hpo")
    left, reached, last_place = retries, -1, earlier
    while True:
        try:
            return _without_exits(attempt)
        except Exception as error:
            what, place = one_line(error), place_of(error, work)
            error.__dict__["place"] = place
            if work.epoch > reached:
                left, reached = retries, work.epoch
            if kind(error) == "unknown" and retries and place == last_place:
                raise DeterministicFailure(
                    f"{what}: failed again at the same step ({place}), so retrying cannot help. Fix the "
                    f"cause."
                ) from error
            # The write of a file has been retried already, so waiting again would not help.
            may_pass = kind(error) in ("transient", "unknown") and not getattr(error, "waited_for", False)
            if not left or not may_pass:
                if lacks_memory(error) and not isinstance(error, UserError):
                    raise OutOfMemory(
                        f"There is not enough memory ({what}). Everything saved is whole. Run fewer trials "
                        f"at a time, or make the network, its batches or env.n_envs smaller. Then rerun the "
                        f"trial: it resumes."
                    ) from error
                if retries and not isinstance(error, UserError):
                    raise DeterministicFailure(
                        f"{what}: failed again after {retries - left} retries ({place}). Fix the cause."
                    ) from error
                raise
            last_place = place
        # Out here the error is gone, and with it the frames that held the attempt's memory.
        pause = _pause(retries - left)
        left -= 1
        work.retries += 1
        log.warning(
            "%s (%s): resumes from the last checkpoint in %g s (retries left after that: %d)",
            what.rstrip("."), place, pause, left,
        )  # fmt: skip
        _free_memory()
        sleep(pause)


def _without_exits(attempt: Callable[[], T]) -> T:
    """Attempt something. An exit in the midst of it is a failure, although it looks like a good end."""
    try:
        return attempt()
    except (Exception, Interrupted, LostLock):
        raise
    except BaseException as error:  # SystemExit, and what libraries derive from BaseException
        if isinstance(error, KeyboardInterrupt) and process.may_be_interrupted_by_keyboard():
            raise
        raise ExitOfEnvironment(
            f"the environment, or other code of yours, raised {error!r}, which would end the process as if "
            f"all were well"
        ) from error


def retrying_write(
    write: Callable[[Path, bytes], None], retries: int, log: logging.Logger,
    sleep: Callable[[float], None] = time.sleep,
) -> Callable[[Path, bytes], None]:  # fmt: skip
    """Make ``write`` try again, after a pause, if it fails for a reason that may pass, such as a full disk.

    `with_retries` makes no further attempt after an error that the returned function raises.
    """

    def write_with_retries(path: Path, content: bytes) -> None:
        for number in range(retries + 1):
            try:
                write(path, content)
                return
            except UserError as error:
                if not is_transient(error):
                    raise
                if number == retries:
                    error.__dict__["waited_for"] = retries > 0
                    raise
                log.warning("%s: tries again in %g s", one_line(error).rstrip("."), _pause(number))
            sleep(_pause(number))

    return write_with_retries


def _pause(number: int) -> float:
    """Seconds before a retry, the first of which is number 0."""
    return min(_LONGEST_PAUSE, _PAUSE * 2.0**number)


def place_of(error: BaseException, work: Work) -> str:
    """Where a trial failed: seed, epoch, step, type of the error and line of code.

    A trial repeats itself to the bit, so an error of its own occurs again at the very same place.
    """
    if isinstance(error, ExitOfEnvironment) and error.__cause__ is not None:
        error = error.__cause__
    when, line, traceback = f"epoch {work.epoch + 1}, step {work.step}", "", error.__traceback__
    while traceback is not None:
        module, code = traceback.tb_frame.f_globals.get("__name__"), traceback.tb_frame.f_code
        if module == "ppo_hpo.ppo.evaluate":
            done = work.epoch + (work.step > 0)
            when = f"evaluation after epoch {done}" if done else "evaluation before epoch 1"
        elif (module, code.co_name) in _FIRST_LOOKS:
            when = "first look at the environment"
        line = f", {code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    part = f"{work.part}, " if work.part else ""
    return f"{part}{when}, {type(error).__name__}{line}"


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()

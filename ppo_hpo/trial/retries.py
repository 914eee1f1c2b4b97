"""Retries inside a trial's process, of whole attempts and of files that could not be written.

`with_retries` resumes from the last checkpoint, a few times:

- after a fault that may pass: lack of memory, or a short failure of a file system or a connection;
- after any error that is not one of ours, unless it occurs again at the very same step.

A file that cannot be written for a moment needs less. `retrying_write` writes it again, and nothing is
computed twice.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ppo_hpo.spec.errors import DeterministicFailure, OutOfMemory, UserError
from ppo_hpo.trial.failure import is_transient, kind, lacks_memory, one_line
from ppo_hpo.trial.work import Work

T = TypeVar("T")

# Seconds before the first retry, and at most. Each pause is twice as long as the one before.
_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


def with_retries(
    attempt: Callable[[], T],
    work: Work,
    retries: int,
    earlier: str | None = None,
    log: logging.Logger | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Attempt something until it succeeds, or until another attempt cannot help.

    Args:
        attempt: resumes from the last checkpoint each time, and keeps ``work`` up to date.
        work: what was done in all attempts.
        retries: number of further attempts. It starts anew after each failure before which an epoch was
            finished.
        earlier: where an earlier process failed (see `place_of`), if one did.
        log: gets a line for each failure that is followed by another attempt.
        sleep: waits for a number of seconds.

    Returns:
        What ``attempt`` returned.

    Raises:
        DeterministicFailure: an unknown error occurred twice at the very same step.
        OutOfMemory: replaces any other error that says so.
    """
    log = log or logging.getLogger("ppo_hpo")
    left, reached, last_place = retries, -1, earlier
    while True:
        try:
            return attempt()
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
            if not left or not _may_pass(error):
                if lacks_memory(error) and not isinstance(error, UserError):
                    raise OutOfMemory(
                        f"There is not enough memory ({what}). Everything saved is whole. Run fewer trials "
                        f"at a time, or make the network, its batches or env.n_envs smaller. Then rerun the "
                        f"trial: it resumes."
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


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may succeed. A file that was rewritten in vain was waited for already."""
    return kind(error) in ("transient", "unknown") and not getattr(error, "waited_for", False)


def retrying_write(
    write: Callable[[Path, bytes], None],
    retries: int,
    log: logging.Logger,
    sleep: Callable[[float], None] = time.sleep,
) -> Callable[[Path, bytes], None]:
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
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    line = "" if traceback is None else f", {traceback.tb_frame.f_code.co_filename}:{traceback.tb_lineno}"
    part = f"{work.part}, " if work.part else ""
    return f"{part}epoch {work.epoch + 1}, step {work.step}, {type(error).__name__}{line}"


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()

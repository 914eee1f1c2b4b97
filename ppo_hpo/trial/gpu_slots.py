"""One GPU for each trial, shared out among all processes of a user on a machine.

No process leads. A trial that begins takes the GPU that has the most memory for one more trial (`choose`). It
notes that in a directory of the user's, as a locked file. The lock ends with the process, however that ends.
So a sweep's workers, several `orion hunt`s and trials by hand share a machine's GPUs without knowing of each
other. What other users do there shows in the free memory.

A process that runs nothing but trials (`own_process`) makes only its GPU visible to itself, by
CUDA_VISIBLE_DEVICES, before CUDA begins. So nothing can take memory on another GPU. It is also the only way
to use one of several MIG instances. In any other process, such as one with threads or a notebook, a trial is
told the GPU's number.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence

from ppo_hpo.spec.errors import MachineError
from ppo_hpo.spec.user_dir import open_user_dir
from ppo_hpo.trial.gpu_detection import VISIBLE, Gpu, gpu_numbers, visible_now

# Seconds between two looks for a free slot, and between two lines of the log that say so.
_PAUSE, _REMIND = 2.0, 60.0

_runs_only_trials = False
# In a process that runs only trials: what torch is told. What CUDA sees there cannot change any more.
_kept: str | None = None


def own_process() -> None:
    """Say that this process runs nothing but trials, one after the other."""
    global _runs_only_trials
    _runs_only_trials = True


@contextlib.contextmanager
def taken(
    device: str, limit: int | None = None, *, count: Callable[[], int], log: logging.Logger,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[str]:  # fmt: skip
    """Take one GPU for one trial. Wait while every GPU has as many trials as it may have, ``limit``.

    ``device`` is as in `RunOptions`, and ``count`` is torch's number of GPUs. ``tick`` is called while it
    waits, and what it raises ends the wait.

    Yields:
        What torch is told: ``cpu``, ``cuda:N``, or ``cuda`` in a process that runs only trials. ``auto``
        remains if torch has to say whether it can use a GPU.
    """
    global _kept
    if device == "cpu":
        yield device
        return
    if _kept is not None:
        yield _kept
        return
    if device == "auto" and not _runs_only_trials and not count():
        yield "cpu"
        return
    numbers = gpu_numbers(device)
    gpus, named = visible_now(count)
    if not gpus:  # torch says so in a message.
        yield device if numbers is None else f"cuda:{numbers[0]}"
        return
    _check_numbers(numbers or (), len(gpus))
    with contextlib.ExitStack() as stack:
        directory = None
        try:
            directory = open_user_dir(["TMPDIR"])
            stack.callback(os.close, directory)
        except OSError as error:
            log.warning("other trials on the GPUs here are not seen, except by their memory: %s", error)
        number, gpu = _wait_for_slot(stack, directory, numbers, limit, count, log, tick)
        if _runs_only_trials and named:
            os.environ[VISIBLE] = gpu.token
            _kept = "auto" if device == "auto" else "cuda"
            stack.pop_all()  # The slot is taken until the process ends.
            yield _kept
            return
        yield f"cuda:{number}"


def choose(free: Sequence[int | None], trials: Sequence[int], limit: int | None = None) -> int | None:
    """Choose a GPU for the next trial: the one with the most free memory per trial, this one included.

    That is D'Hondt's method of giving out seats: equal GPUs get equally many trials, and a GPU with twice the
    memory gets twice as many. If the memory of one is unknown, all count as equal. Among equal GPUs the one
    with fewer trials is taken, then the first.

    Returns:
        Its index, or None if every GPU already has ``limit`` trials.
    """
    known = [memory or 0 for memory in free] if None not in free else [1] * len(free)
    open_ones = [index for index, count in enumerate(trials) if limit is None or count < limit]

    def preference(index: int) -> tuple[float, int, int]:
        return known[index] / (trials[index] + 1), -trials[index], -index

    return max(open_ones, key=preference, default=None)


def _check_numbers(numbers: Sequence[int], n_gpus: int) -> None:
    for number in numbers:
        if number >= n_gpus:
            among = f", by {VISIBLE}={os.environ[VISIBLE]}" if VISIBLE in os.environ else ""
            raise MachineError(
                f"Device 'cuda:{number}' was asked for, but {n_gpus} can be seen here{among}. Choose a "
                f"number below {n_gpus}."
            )


def _wait_for_slot(
    slots: contextlib.ExitStack, directory: int | None, numbers: Sequence[int] | None, limit: int | None,
    count: Callable[[], int], log: logging.Logger, tick: Callable[[], None],
) -> tuple[int, Gpu]:  # fmt: skip
    """Wait for a GPU that has room, and take a slot on it; return torch's number of it, and the GPU."""
    reminded = -_REMIND
    while True:
        gpus = visible_now(count)[0]
        allowed = [(number, gpus[number]) for number in numbers or range(len(gpus)) if number < len(gpus)]
        if not allowed:
            raise MachineError("The GPUs that were here a moment ago cannot be seen any more.")
        with _alone(directory):
            trials = _count_trials(directory, [gpu.key for _, gpu in allowed])
            index = choose([gpu.free for _, gpu in allowed], trials, limit)
            if index is not None:
                number, gpu = allowed[index]
                free = "" if gpu.free is None else f", {gpu.free:,} MiB free"
                log.info(
                    "takes GPU %d of %d (%s%s); other trials of yours on it: %d",
                    number, len(gpus), gpu.key, free, trials[index],
                )  # fmt: skip
                if directory is not None:
                    _take_slot(slots, directory, gpu.key)
                return number, gpu
        if time.monotonic() - reminded >= _REMIND:
            reminded = time.monotonic()
            log.info("waits for a GPU: each of %d is at the limit of trials (%d)", len(allowed), limit)
        tick()
        time.sleep(_PAUSE)


def _take_slot(slots: contextlib.ExitStack, directory: int, key: str) -> None:
    """Make a file with the GPU's name, and lock it while the slot is taken. The caller holds `_alone`."""
    name = f"{_prefix(key)}{os.getpid()}-{secrets.token_hex(4)}"
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    slots.callback(os.close, file)
    fcntl.flock(file, fcntl.LOCK_EX)
    slots.callback(_unlink, name, directory)


def _unlink(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _prefix(key: str) -> str:
    return f"gpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}-"


@contextlib.contextmanager
def _alone(directory: int | None) -> Iterator[None]:
    """Keep other processes from counting or taking slots meanwhile."""
    with contextlib.ExitStack() as stack:
        if directory is not None:
            file = os.open("gpus.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _count_trials(directory: int | None, keys: Sequence[str]) -> list[int]:
    """How many slots are taken on each GPU. Files that dead processes left are removed."""
    if directory is None:
        return [0] * len(keys)
    names = os.listdir(directory)
    of_each = [[name for name in names if name.startswith(_prefix(key))] for key in keys]
    return [sum(_is_locked(directory, name) for name in own) for own in of_each]


def _is_locked(directory: int, name: str) -> bool:
    try:
        file = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    os.unlink(name, dir_fd=directory)
    return False

"""GPUs: which ones a process may use, and one of them for each trial.

Nobody leads. A trial that begins takes the GPU that has the most memory for one more trial (`choose`), and
notes that in a directory of the user's, as a locked file: the lock ends with its process, however that ends.
So workers of a sweep, several `orion hunt`s and trials by hand share a machine's GPUs without knowing of each
other. What others do there shows in the memory that is free.

The driver is asked through ``nvidia-smi``, which comes with it. `torch.cuda.mem_get_info` would take some
hundred megabytes of each GPU that it looks at, and fix what the process can see; NVML's bindings would be one
more dependency for the same numbers.

A process that runs nothing but trials (`own_process`) shows itself the one GPU alone, by CUDA_VISIBLE_DEVICES
before CUDA begins: nothing can take memory on another one, and it is the only way to one of several MIG
instances. In any other process, as with threads or in a notebook, a trial is told the GPU's number.

The order of this module: what is asked for, what is there, which one is taken. Only the last part does
anything; the rest are functions of what they are given.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ppo_hpo.spec.errors import MachineError, UserError
from ppo_hpo.spec.user_dir import open_user_dir

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
_DEVICE = re.compile(r"auto|cpu|cuda(?::(\d{1,4}(?:,\d{1,4})*))?", re.ASCII)
_RULE = "`device` must be auto, cpu, cuda, cuda:N or cuda:N,M"
# Seconds that the driver may take to answer; without its persistence mode it takes some.
_PATIENCE = 30.0
# Seconds between two looks for a free place, and between two lines that say so.
_PAUSE, _TELL = 2.0, 60.0

# ------------------------------------------------------------------ what is asked for


def device_name(device: Any) -> str:
    """A device as one word: ``cuda:0,1`` for a list of numbers or of names.

    Raises:
        UserError: it is none.
    """
    text = device
    if isinstance(device, list | tuple):
        parts = [str(part).removeprefix("cuda:") for part in device]
        text = "cuda:" + ",".join(parts)
    found = _DEVICE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise UserError(f"{_RULE}, but got {device!r}.")
    numbers = _numbers(text) or ()
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{_RULE}, each GPU once, but got {device!r}.")
    return str(text)


def check_limit(limit: Any) -> None:
    """See that a number of trials for each GPU is one.

    Raises:
        UserError: it is none.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UserError(f"`trials_per_device` must be a whole number of at least 1, but got {limit!r}.")


def _numbers(device: str) -> tuple[int, ...] | None:
    """The GPUs that a device's name names; None where it leaves that open."""
    found = _DEVICE.fullmatch(device)
    return tuple(map(int, found[1].split(","))) if found and found[1] else None


# ---------------------------------------------------------------------- what is there


@dataclass(frozen=True)
class Card:
    """What the driver says of one GPU.

    Attributes:
        name: the product's.
        uuid: the driver's name of it, ``GPU-...``.
        free: MiB that are free; None where it does not say.
        instances: of a GPU in MIG mode: the names of its instances, ``MIG-...``.
    """

    name: str
    uuid: str
    free: int | None
    instances: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """One that this process can use, a whole one or a MIG instance; torch numbers them in their order.

    Attributes:
        token: what CUDA_VISIBLE_DEVICES calls it here.
        key: the same for every process on the machine, as far as the driver tells.
        free: MiB that are free; None where nobody knows.
    """

    token: str
    key: str
    free: int | None


def cards(listing: str, memory: str) -> tuple[Card, ...]:
    """Read what ``nvidia-smi`` prints.

    Args:
        listing: of ``nvidia-smi -L``.
        memory: of ``nvidia-smi --query-gpu=uuid,memory.free --format=csv,noheader,nounits``.

    Returns:
        The GPUs in the driver's order; lines that are none are passed over.
    """
    free: dict[str, int] = {}
    for line in memory.splitlines():
        uuid, _, amount = line.partition(",")
        if amount.strip().isdigit():  # else it is [N/A] or the like
            free[uuid.strip()] = int(amount)
    found: list[Card] = []
    for line in listing.splitlines():
        if card := re.fullmatch(r"\s*GPU \d+: (.*) \(UUID: (GPU-[^)\s]+)\)\s*", line):
            found.append(Card(card[1], card[2], free.get(card[2])))
        elif found and (part := re.fullmatch(r"\s*MIG .*\(UUID: (MIG-[^)\s]+)\)\s*", line)):
            last = found[-1]
            found[-1] = Card(last.name, last.uuid, last.free, (*last.instances, part[1]))
    return tuple(found)


def visible(
    value: str | None, order: str | None, found: Sequence[Card], count: Callable[[], int] = lambda: 0
) -> tuple[Gpu, ...]:
    """The GPUs that CUDA shows to a process, in its order.

    The rules are CUDA's (Programming Guide, "CUDA Environment Variables") and `torch.cuda.device_count`'s: a
    list of numbers, or of names that begin with ``GPU-`` and may be shortened, or of names of MIG instances;
    what stands behind the first that is none does not count, and nothing does where one comes twice.

    Args:
        value: CUDA_VISIBLE_DEVICES; None where it is not set.
        order: CUDA_DEVICE_ORDER. Unless it is PCI_BUS_ID, CUDA's numbers are those of the driver only where
            all GPUs are equal; elsewhere nobody knows which one a number is, and how much of it is free.
        found: what the driver says; empty where it says nothing.
        count: how many there are, where neither says.
    """
    if value is None:
        instances = [instance for card in found for instance in card.instances]
        # Where there are instances CUDA shows no whole GPU, and one instance to each process.
        if instances:
            return tuple(Gpu(instance, instance, None) for instance in instances)
        value = ",".join(map(str, range(len(found) or count())))
    ordered = order == "PCI_BUS_ID" or len({card.name for card in found}) == 1
    gpus: list[Gpu] = []
    kind = value[:4] if value.startswith(("GPU-", "MIG-")) else ""
    for part in value.split(","):
        gpu = _gpu(part, kind, found, ordered=ordered)
        if gpu is None:
            break
        if gpu.key in {other.key for other in gpus}:
            return ()
        gpus.append(gpu)
    return tuple(gpus)


def _gpu(part: str, kind: str, found: Sequence[Card], *, ordered: bool) -> Gpu | None:
    if not part.startswith(kind):
        return None
    if kind == "MIG-":
        return Gpu(part, part, None)
    if kind == "GPU-":
        matches = [card for card in found if card.uuid.startswith(part)]
        if not found:
            return Gpu(part, part, None)
        return Gpu(part, matches[0].uuid, matches[0].free) if len(matches) == 1 else None
    # CUDA reads numbers as C does: white space, a sign, digits, and what follows is not looked at.
    digits = re.match(r"\s*\+?(\d+)", part, re.ASCII)
    if digits is None or (found and int(digits[1]) >= len(found)):
        return None
    number = int(digits[1])
    if found and ordered:
        return Gpu(str(number), found[number].uuid, found[number].free)
    return Gpu(str(number), f"{number} {'by driver' if ordered else 'by CUDA'}", None)


def choose(free: Sequence[int | None], trials: Sequence[int], limit: int | None = None) -> int | None:
    """Which GPU the next trial takes: the one with the most free memory for each trial that it would have.

    That is D'Hondt's method of giving out seats: equal GPUs get equally many trials, and one with twice
    the memory twice as many. Where the memory of one is not known, all count as equal. Of equal ones that
    with fewer trials is taken, then the first.

    Args:
        free: of each GPU; MiB, or any other unit.
        trials: that each has already.
        limit: trials that each may have; None for as many as come.

    Returns:
        Its place in the list; None where all have as many as they may.
    """
    known = [1 if memory is None else memory for memory in ([None] * len(free) if None in free else free)]
    places = [place for place, count in enumerate(trials) if limit is None or count < limit]
    return max(
        places,
        key=lambda place: (Fraction(known[place], trials[place] + 1), -trials[place], -place),
        default=None,
    )


# ---------------------------------------------------------------- which one is taken

_own = False
# Of a process of its own: what it has taken, until it ends. What CUDA sees cannot change any more.
_kept: tuple[_Hold, str] | None = None


def own_process() -> None:
    """Say that this process runs nothing but trials, one after the other."""
    global _own
    _own = True


def read_driver() -> tuple[Card, ...]:
    """What the driver says of the machine's GPUs; nothing where there is no driver, or no ``nvidia-smi``."""
    asked = ["-L"], ["--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]
    with contextlib.ExitStack() as stack:
        processes = []
        try:
            for arguments in asked:
                process = subprocess.Popen(
                    ["nvidia-smi", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    errors="replace",
                )
                stack.callback(_end, process)
                processes.append(process)
            answers = [process.communicate(timeout=_PATIENCE)[0] for process in processes]
        except (OSError, subprocess.TimeoutExpired):
            return ()
    return cards(*answers)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    assert process.stdout is not None
    process.stdout.close()
    process.wait()


def _look(count: Callable[[], int]) -> tuple[tuple[Gpu, ...], bool]:
    """The GPUs that can be seen, and whether environment or driver have said so, and not torch."""
    value, found = os.environ.get(VISIBLE), read_driver()
    return visible(value, os.environ.get(ORDER), found, count), value is not None or bool(found)


@contextlib.contextmanager
def taken(
    device: str,
    limit: int | None = None,
    *,
    count: Callable[[], int],
    log: logging.Logger,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """One GPU for one trial; waits where all have as many trials as they may.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` (any of those that can be seen), ``cuda:N`` or ``cuda:N,M`` (any
            of these, by torch's numbers).
        limit: trials that each GPU may have; None for as many as come.
        count: torch's number of GPUs.
        log: is told which one it is.
        tick: called while it waits; what it raises ends that.

    Yields:
        What torch is told: ``cpu``, ``cuda:N``, or in a process of its own ``cuda``. ``auto`` stays that
        where torch has to say whether it can use a GPU.

    Raises:
        MachineError: a GPU was named that is not there.
    """
    global _kept
    if device == "cpu":
        yield device
        return
    if _kept is not None:
        yield _kept[1]
        return
    if device == "auto" and not _own and not count():
        yield "cpu"
        return
    numbers = _numbers(device)
    gpus, sure = _look(count)
    if not gpus:  # torch says so, in words
        yield device if numbers is None else f"cuda:{numbers[0]}"
        return
    for number in numbers or ():
        if number >= len(gpus):
            among = f", by {VISIBLE}={os.environ[VISIBLE]}" if VISIBLE in os.environ else ""
            raise MachineError(
                f"Device 'cuda:{number}' was asked for, but {len(gpus)} can be seen here{among}. Choose a "
                f"number below {len(gpus)}."
            )
    with contextlib.ExitStack() as stack:
        index, token, hold = _take(numbers, limit, count, log, tick)
        if _own and sure:
            os.environ[VISIBLE] = token
            _kept = hold, "auto" if device == "auto" else "cuda"
            yield _kept[1]
            return
        stack.callback(hold.give_back)
        yield f"cuda:{index}"


def _take(
    numbers: Sequence[int] | None,
    limit: int | None,
    count: Callable[[], int],
    log: logging.Logger,
    tick: Callable[[], None],
) -> tuple[int, str, _Hold]:
    """The number of a GPU, its token, and the place on it."""
    try:
        directory = open_user_dir(["TMPDIR"])
    except OSError as error:
        log.warning("other trials on the GPUs here are not seen, but for their memory: %s", error)
        directory = None
    with contextlib.ExitStack() as stack:
        if directory is not None:
            stack.callback(os.close, directory)
        found = _wait(directory, numbers, limit, count, log, tick)
        stack.pop_all()
    return found


def _wait(
    directory: int | None,
    numbers: Sequence[int] | None,
    limit: int | None,
    count: Callable[[], int],
    log: logging.Logger,
    tick: Callable[[], None],
) -> tuple[int, str, _Hold]:
    told = -_TELL
    while True:
        gpus = _look(count)[0]
        chosen = [(number, gpus[number]) for number in numbers or range(len(gpus)) if number < len(gpus)]
        if not chosen:
            raise MachineError("The GPUs that were here a moment ago cannot be seen any more.")
        with _alone(directory):
            trials = _count(directory, [gpu.key for _, gpu in chosen])
            place = choose([gpu.free for _, gpu in chosen], trials, limit)
            if place is not None:
                number, gpu = chosen[place]
                hold = _Hold(directory, gpu.key)
                free = "" if gpu.free is None else f", {gpu.free:,} MiB free"
                log.info(
                    "takes GPU %d of %d (%s%s); trials of ours there already: %d",
                    number, len(gpus), gpu.key, free, trials[place],
                )  # fmt: skip
                return number, gpu.token, hold
        if time.monotonic() - told >= _TELL:
            told = time.monotonic()
            log.info("waits for a GPU: each of %d has as many trials as it may (%d)", len(chosen), limit)
        tick()
        time.sleep(_PAUSE)


class _Hold:
    """A place on a GPU: a file of that GPU's name, locked while the place is taken."""

    def __init__(self, directory: int | None, key: str) -> None:
        """Take it; the caller is alone."""
        self._directory = directory
        self._file: int | None = None
        if directory is None:
            return
        self._name = f"{_prefix(key)}{os.getpid()}-{secrets.token_hex(4)}"
        self._file = os.open(
            self._name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory
        )
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def give_back(self) -> None:
        """Leave the place to others."""
        if self._file is None or self._directory is None:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._directory)
        os.close(self._file)
        os.close(self._directory)
        self._file = None


def _prefix(key: str) -> str:
    return f"gpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}-"


@contextlib.contextmanager
def _alone(directory: int | None) -> Iterator[None]:
    """While nobody else counts or takes places."""
    if directory is None:
        yield
        return
    file = os.open("gpus.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _count(directory: int | None, keys: Sequence[str]) -> list[int]:
    """How many places are taken on each GPU; what dead processes left is removed."""
    counts = [0] * len(keys)
    if directory is None:
        return counts
    prefixes = [_prefix(key) for key in keys]
    for name in os.listdir(directory):
        for number, prefix in enumerate(prefixes):
            if name.startswith(prefix) and _held(directory, name):
                counts[number] += 1
    return counts


def _held(directory: int, name: str) -> bool:
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

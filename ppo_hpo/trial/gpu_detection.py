"""The GPUs of this machine: names of devices, what the driver says, and what CUDA shows to a process.

The driver is asked through ``nvidia-smi``, which comes with it. `torch.cuda.mem_get_info` would take some
hundred megabytes of each GPU that it looks at, and fix what the process can see. NVML's bindings
(``nvidia-ml-py``) would be one more dependency for the same numbers, and do not know the rules in `visible`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ppo_hpo.spec.errors import UserError

VISIBLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
_DEVICE = re.compile(r"auto|cpu|cuda(?::(\d{1,4}(?:,\d{1,4})*))?", re.ASCII)
_RULE = "`device` must be auto, cpu, cuda, cuda:N or cuda:N,M"
# Seconds that the driver may take to answer. Without its persistence mode it takes a while.
_DRIVER_TIMEOUT = 30.0


def device_name(device: Any) -> str:
    """A device as one word, such as ``cuda:0,1`` for a list of numbers or of names."""
    text = device
    if isinstance(device, list | tuple):
        text = "cuda:" + ",".join(str(part).removeprefix("cuda:") for part in device)
    if not isinstance(text, str) or not _DEVICE.fullmatch(text):
        raise UserError(f"{_RULE}, but got {device!r}.")
    numbers = gpu_numbers(text) or ()
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{_RULE}, each GPU once, but got {device!r}.")
    return text


def gpu_numbers(device: str) -> tuple[int, ...] | None:
    """The numbers in a device's name, or None if it has none, such as ``cuda``."""
    found = _DEVICE.fullmatch(device)
    return tuple(map(int, found[1].split(","))) if found and found[1] else None


class Card(NamedTuple):
    """What the driver says of one GPU."""

    name: str  # of the product
    uuid: str  # the driver's name for this one, GPU-...
    free: int | None  # free memory in MiB, or None if the driver does not say
    instances: tuple[str, ...] = ()  # names of its MIG instances, MIG-..., if it is in MIG mode


class Gpu(NamedTuple):
    """A GPU or a MIG instance that this process can use. torch numbers them in their order."""

    token: str  # what CUDA_VISIBLE_DEVICES calls it here
    key: str  # the same name for every process on the machine, as far as the driver tells
    free: int | None  # free memory in MiB, or None if it is unknown


def read_driver() -> tuple[Card, ...]:
    """What the driver says of the machine's GPUs. It is empty without a driver or ``nvidia-smi``."""
    import subprocess  # not at the top, because the light client of the preloaded process imports this module

    questions = ["-L"], ["--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]
    with contextlib.ExitStack() as stack:
        processes = []
        try:
            for arguments in questions:  # at the same time, because the driver may take seconds for each
                process = subprocess.Popen(
                    ["nvidia-smi", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL, text=True, errors="replace",
                )  # fmt: skip
                stack.enter_context(process)
                stack.callback(process.kill)
                processes.append(process)
            return cards(*(process.communicate(timeout=_DRIVER_TIMEOUT)[0] for process in processes))
        except (OSError, subprocess.TimeoutExpired):
            return ()


def cards(listing: str, memory: str) -> tuple[Card, ...]:
    """The GPUs in the driver's order, from what ``nvidia-smi`` prints. Other lines are ignored."""
    free: dict[str, int] = {}
    for line in memory.splitlines():
        uuid, _, amount = line.partition(",")
        if amount.strip().isdigit():  # It can also be [N/A] or the like.
            free[uuid.strip()] = int(amount)
    found: list[Card] = []
    for line in listing.splitlines():
        if card := re.fullmatch(r"\s*GPU \d+: (.*) \(UUID: (GPU-[^)\s]+)\)\s*", line):
            found.append(Card(card[1], card[2], free.get(card[2])))
        elif found and (part := re.fullmatch(r"\s*MIG .*\(UUID: (MIG-[^)\s]+)\)\s*", line)):
            found[-1] = found[-1]._replace(instances=(*found[-1].instances, part[1]))
    return tuple(found)


def visible_now(count: Callable[[], int]) -> tuple[tuple[Gpu, ...], bool]:
    """The GPUs that this process can use, and whether the environment or the driver named them.

    Otherwise torch's number of GPUs, ``count``, is all that is known.
    """
    value, found = os.environ.get(VISIBLE), read_driver()
    return visible(value, os.environ.get(ORDER), found, count), value is not None or bool(found)


def visible(
    value: str | None, order: str | None, found: Sequence[Card], count: Callable[[], int] = lambda: 0
) -> tuple[Gpu, ...]:
    """The GPUs that CUDA shows to a process, in its order.

    The rules are CUDA's (Programming Guide, "CUDA Environment Variables") and `torch.cuda.device_count`'s.
    The variable is a list of numbers, or of names that begin with ``GPU-`` and may be shortened, or of names
    of MIG instances. The list ends before the first invalid entry, and is empty if a GPU is in it twice.

    Args:
        value: CUDA_VISIBLE_DEVICES, or None if it is not set.
        order: CUDA_DEVICE_ORDER. Unless it is PCI_BUS_ID, CUDA's numbers are the driver's only if all GPUs
            are of one kind. Otherwise it is unknown which GPU a number means.
        found: what the driver says, if anything.
        count: the number of GPUs, if neither the variable nor the driver tells.
    """
    if value is None:
        instances = [instance for card in found for instance in card.instances]
        # If there are instances, CUDA shows no whole GPU, and one instance to each process.
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
    """One entry of CUDA_VISIBLE_DEVICES, or None if it is invalid."""
    if not part.startswith(kind):
        return None
    if kind == "MIG-" or (kind == "GPU-" and not found):
        return Gpu(part, part, None)
    if kind == "GPU-":
        matches = [card for card in found if card.uuid.startswith(part)]
        return Gpu(part, matches[0].uuid, matches[0].free) if len(matches) == 1 else None
    # CUDA reads numbers as C does: white space, a sign and digits. It ignores what follows.
    digits = re.match(r"\s*\+?(\d+)", part, re.ASCII)
    if digits is None or (found and int(digits[1]) >= len(found)):
        return None
    number = int(digits[1])
    if found and ordered:
        return Gpu(str(number), found[number].uuid, found[number].free)
    return Gpu(str(number), f"{number} {'by driver' if ordered else 'by CUDA'}", None)

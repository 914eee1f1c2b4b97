"""Devices and threads."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ppo_hpo.spec.errors import MachineError, UserError


def count_gpus() -> int:
    """Number of GPUs that torch can use here. CUDA is not initialised for it where the driver answers."""
    return torch.cuda.device_count()


def resolve_device(name: str | torch.device) -> torch.device:
    """The device of a name; ``auto`` is the first GPU where there is one, and the CPU elsewhere.

    Nothing falls back to another device. A trial that was to run on a GPU, and silently ran on a CPU, would
    be noticed after hours.

    Raises:
        UserError: the name is not that of a device.
        MachineError: this machine has no such device.
    """
    text = str(name)
    if text == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if text == "cpu":
        return torch.device("cpu")
    index = int(text.partition(":")[2] or 0) if re.fullmatch(r"cuda(:\d+)?", text) else None
    if index is None:
        raise UserError(f"`device` must be auto, cpu, cuda or cuda:N, but got {text!r}.")
    count = torch.cuda.device_count()
    if index >= count:
        have = f"{count} of them" if count else "none"
        raise MachineError(f"Device {text!r} was asked for, but torch finds {have} here. Choose cpu or auto.")
    return torch.device("cuda", index)


# The limit of a BLAS holds for the process: its first trial sets the limit, its last one lifts it.
_lock = threading.Lock()
_limit: tuple[int, Any] | None = None
_users = 0


@contextlib.contextmanager
def limited_threads(n: int) -> Iterator[None]:
    """Let torch and every loaded BLAS use ``n`` threads, and restore their limits afterwards.

    Trials run side by side. With two threads each on two cores, Stable-Baselines3's PPO was up to 24 times
    slower than with one, and a network of two layers of 128 here was 40 times slower.
    """
    global _limit, _users
    from threadpoolctl import threadpool_limits

    with torch_threads(n):
        with _lock:
            if _limit is None:
                _limit = n, threadpool_limits(n)
            elif _limit[0] != n:
                raise UserError(
                    f"Trials that train in threads of one process share a BLAS. So `task.threads` must be "
                    f"{_limit[0]}, as in the other trial of this process, but got {n}."
                )
            _users += 1
        try:
            yield
        finally:
            with _lock:
                _users -= 1
                if not _users:
                    _limit[1].restore_original_limits()
                    _limit = None


@contextlib.contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Let torch use ``n`` threads for what the calling thread computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_rng_lock = threading.RLock()


@contextlib.contextmanager
def seeded_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Let torch's global rng start from a seed, and restore it afterwards.

    Layers such as dropout know no other rng. It is that of the process, so one thread uses it at a time.
    """
    with _rng_lock, torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def own_settings(threads: int) -> Iterator[None]:
    """Compute under a trial's own settings, whatever its caller has set; restore the caller's afterwards.

    They are the number of threads, torch's modes, and how numpy reacts to overflows, which the loop looks for
    itself. Tensors name their dtype and device, since the defaults for these hold for the whole process.
    """
    with contextlib.ExitStack() as settings:
        settings.enter_context(limited_threads(threads))
        settings.enter_context(np.errstate(all="ignore"))
        settings.enter_context(torch.inference_mode(False))
        settings.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            settings.enter_context(torch.autocast(device, enabled=False))
        yield

"""Devices and threads."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ppo_hpo.spec.errors import MachineError, UserError


def count_gpus() -> int:
    """How many GPUs torch can use here; CUDA is not begun for it where the driver answers."""
    return torch.cuda.device_count()


def resolve_device(name: str | torch.device) -> torch.device:
    """The device of a name; ``auto`` is the first GPU where there is one, and the CPU elsewhere.

    Raises:
        UserError: no such device here. There is no falling back: a trial that was asked to run on
            a GPU and quietly ran on a CPU would take hours to be noticed.
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


@contextlib.contextmanager
def limited_threads(n: int) -> Iterator[None]:
    """Let torch and every BLAS that is loaded use ``n`` threads, and put back what was before.

    Trials run side by side. Two threads each on two cores made Stable-Baselines3's PPO up to 24 times slower
    than one, and a network of two layers of 128 here 40 times.
    """
    before = torch.get_num_threads()
    with _shared_limit(n):
        torch.set_num_threads(n)  # holds for the calling thread only
        try:
            yield
        finally:
            torch.set_num_threads(before)


_lock = threading.Lock()
_limit: tuple[int, Any] | None = None
_users = 0


@contextlib.contextmanager
def _shared_limit(n: int) -> Iterator[None]:
    """A BLAS's limit is the process's: the first trial in it sets the limit and the last one lifts it."""
    global _limit, _users
    from threadpoolctl import threadpool_limits

    with _lock:
        if _limit is None:
            _limit = n, threadpool_limits(n)
        elif _limit[0] != n:
            raise UserError(
                f"Trials that train in threads of one process share a BLAS: `task.threads` must be "
                f"{_limit[0]} while another trial trains with it, but got {n}."
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

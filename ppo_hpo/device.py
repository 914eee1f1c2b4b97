"""Devices and threads."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from ppo_hpo.errors import UserError


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
        raise UserError(f"Device {text!r} was asked for, but torch finds {have} here. Choose cpu, or auto.")
    return torch.device("cuda", index)


@contextlib.contextmanager
def limited_threads(n: int) -> Iterator[None]:
    """Let torch and every BLAS that is loaded use ``n`` threads, and put back what was before.

    Trials run side by side. Two threads each on two cores made Stable-Baselines3's PPO up to 24 times slower
    than one, and a network of two layers of 128 here 40 times.
    """
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        with threadpool_limits(n):
            yield
    finally:
        torch.set_num_threads(before)

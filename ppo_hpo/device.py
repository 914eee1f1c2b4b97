"""Devices and threads."""

from __future__ import annotations

import os
import re

import torch

from ppo_hpo.errors import UserError

# What numerical libraries read when they are first imported.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


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
        raise UserError(
            f"Device {text!r} was asked for, but torch finds {have} here. Choose cpu, or auto."
        )
    return torch.device("cuda", index)

"""A core for a measurement on a machine that does other things too (Linux; elsewhere nothing is done)."""

from __future__ import annotations

import os
import time
from pathlib import Path

IDLE = 0.97
LOOK = 0.5


def take_core(allowed: set[int], patience: float) -> None:
    """Bind this process, and so what it starts, to the idlest core, once one has been idle for a moment.

    Waits for `patience` seconds at most; after them the idlest is taken as it is.
    """
    if not allowed or not Path("/proc/stat").exists():
        return
    ends = time.monotonic() + patience
    while True:
        before = _ticks()
        time.sleep(LOOK)
        after = _ticks()
        idle = {core: _share_idle(before[core], after[core]) for core in allowed}
        core = max(idle, key=idle.__getitem__)
        if idle[core] >= IDLE or time.monotonic() > ends:
            os.sched_setaffinity(0, {core})
            return


def allowed_cores() -> set[int]:
    """Those that this process may run on; none where that cannot be said."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()


def _ticks() -> dict[int, list[int]]:
    lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if line.startswith("cpu") and line[3].isdigit()]
    return {int(row[0][3:]): [int(value) for value in row[1:9]] for row in rows}


def _share_idle(before: list[int], after: list[int]) -> float:
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return (spent[3] + spent[4]) / max(sum(spent), 1)  # idle, and waiting for the disk

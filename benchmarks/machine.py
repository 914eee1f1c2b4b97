"""The machine and the versions that a benchmark ran with, for its results. Names no host and no path."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "gymnasium", "numpy")


def describe() -> dict[str, str | int]:
    """CPU model, usable cores, system, and the versions of Python and of `PACKAGES`."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def sentence(machine: dict[str, str | int]) -> str:
    """What `describe` gave, in one line of prose."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", *PACKAGES))
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; {versions}"


def commit() -> str:
    """The commit of this source tree, ``-dirty`` where it has changes, or ``unknown``."""
    here = str(Path(__file__).resolve().parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"

"""What a command takes: by the clock, in CPU time, and what everything else takes meanwhile (Linux).

CPU seconds are user and system time of all processes of a command, as the kernel counts them. What else the
machine does changes them less than it changes the clock.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
TICKS = os.sysconf("SC_CLK_TCK")


def timed(command: list[str], directory: Path, environment: dict[str, str]) -> dict[str, float]:
    """Run a command and say what it took.

    Args:
        command: with ``--preload`` in it, the warm servers of this environment are counted in and stopped.
        directory: to run it in.
        environment: whose ``XDG_RUNTIME_DIR`` nothing else uses, where the command has ``--preload``.

    Returns:
        ``seconds``, ``cpu_seconds`` with those of its children, ``others_cpu_seconds`` of all else meanwhile.
    """
    before, machine_before, started = _children_cpu(), _machine_cpu(), time.monotonic()
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"{command} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    cpu = _children_cpu() - before
    machine_cpu = _machine_cpu() - machine_before
    if "--preload" in command:
        cpu += _stop_servers(environment)
    return {"seconds": seconds, "cpu_seconds": cpu, "others_cpu_seconds": max(machine_cpu - cpu, 0.0)}


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _machine_cpu() -> float:
    """CPU seconds of all processes since the machine started."""
    fields = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()
    user, nice, system, _, _, irq, softirq = (int(field) for field in fields[1:8])
    return (user + nice + system + irq + softirq) / TICKS


def _stop_servers(environment: dict[str, str]) -> float:
    """Stop the warm servers of this environment; CPU seconds that they and their trials took."""
    command = [str(BIN / "ppo-hpo"), "warm"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    ticks = 0
    for line in listed.splitlines():
        pid = line.split()[1].rstrip(":")
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += sum(int(field) for field in fields[11:15])
    subprocess.run([*command, "--stop"], env=environment, capture_output=True, check=True)
    return ticks / TICKS

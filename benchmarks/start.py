"""What a trial costs before it trains: CPU seconds from the start of a process to the first environment step.

    python benchmarks/start.py            # medians of 11 runs, as committed; about a minute
    python benchmarks/start.py --runs 3   # a quick look; writes nothing

Every command is a new process; all of them take turns, so that whatever else the machine does falls on all
alike. CPU seconds are user and system time of the process and its children, as the kernel counts them.
The trial is a real `ppo-hpo run` whose environment ends the process in its first step; imports alone are
ended in the same way (`os._exit`), because tearing torch down costs as well. Prints a table and writes
`results/start.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import machine

RESULTS = Path(__file__).resolve().parent / "results"
RUNS = 11
ENVIRONMENT = '''
"""CartPole whose first step is the end."""
import os

import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv


class FirstStep(CartPoleEnv):
    def step(self, action):
        os._exit(0)


gymnasium.register("FirstStep-v0", FirstStep, max_episode_steps=500)
'''
CONFIG = "env: {id: 'first_step:FirstStep-v0', n_envs: 8}\n"


def commands() -> dict[str, list[str]]:
    """Name of a row to command, in the order of the table."""
    python = [sys.executable, "-c"]
    tool = [sys.executable, "-m", "ppo_hpo"]
    return {
        "python": [*python, "import os; os._exit(0)"],
        "ppo-hpo --help": [*tool, "--help"],
        "import gymnasium": [*python, "import os, gymnasium; os._exit(0)"],
        "import torch": [*python, "import os, torch; os._exit(0)"],
        "import gymnasium, torch": [*python, "import os, gymnasium, torch; os._exit(0)"],
        "ppo-hpo run, to its first step": [*tool, "run", "--config", "first_step.yaml", "--device", "cpu"],
        "import orion.client (not in a trial)": [*python, "import os, orion.client; os._exit(0)"],
    }


def measure(command: list[str], directory: Path) -> tuple[float, float]:
    """CPU and wall seconds of one process."""
    # Compiled modules are part of any installation, whatever this shell says of writing them.
    own = {k: v for k, v in os.environ.items() if not k.startswith(("ORION_", "PYTHON"))}
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=directory, env={**own, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with code {process.returncode}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--runs", type=int, default=RUNS, metavar="N", help=f"of each command (default: {RUNS})"
    )
    runs = parser.parse_args().runs
    cpu: dict[str, list[float]] = {name: [] for name in commands()}
    wall: dict[str, list[float]] = {name: [] for name in commands()}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "first_step.py").write_text(ENVIRONMENT)
        (directory / "first_step.yaml").write_text(CONFIG)
        for name in commands():
            measure(commands()[name], directory)  # fills the system's caches
        for _ in range(runs):
            for name, command in commands().items():
                seconds = measure(command, directory)
                cpu[name].append(seconds[0])
                wall[name].append(seconds[1])
    rows = {
        name: {
            "cpu_seconds": round(statistics.median(cpu[name]), 4),
            "cpu_seconds_least": round(min(cpu[name]), 4),
            "cpu_seconds_most": round(max(cpu[name]), 4),
            "wall_seconds": round(statistics.median(wall[name]), 4),
        }
        for name in commands()
    }
    print(f"{'median of ' + str(runs) + ' runs':38} {'CPU s':>7} {'least':>7} {'most':>7} {'wall s':>7}")
    for name, row in rows.items():
        print(f"{name:38} " + " ".join(f"{value:7.3f}" for value in row.values()))
    own = (
        rows["ppo-hpo run, to its first step"]["cpu_seconds"] - rows["import gymnasium, torch"]["cpu_seconds"]
    )
    print(f"{'a trial, without importing these two':38} {own:7.3f}")
    if runs != RUNS:
        return
    RESULTS.mkdir(exist_ok=True)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "runs": runs,
        "machine": machine.describe(),
        "rows": rows,
        "trial_without_imports_cpu_seconds": round(own, 4),
    }
    (RESULTS / "start.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

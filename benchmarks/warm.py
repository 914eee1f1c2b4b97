"""What `ppo-hpo run --preload` saves: CPU and wall seconds of tiny trials, alone and in hunts; memory.

    python benchmarks/warm.py            # medians of 11 trials and 5 hunts, as committed; about five minutes
    python benchmarks/warm.py --runs 3   # a quick look; writes nothing

Plain and warm take turns. CPU seconds are user and system time, as the kernel counts them, of a command with
all its children; for a warm one those of its server and the server's children besides. The trial is real and
tiny (CartPole-v1, 1,024 steps), so that what is around the training shows. Memory is read in the middle of
two long trials: resident, proportional (a page that n processes share counts as 1/n), private. Prints
tables and writes `results/warm.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine

RESULTS = Path(__file__).resolve().parent / "results"
BIN = Path(sys.executable).parent
RUNS = 11
TRIALS = 12
SPACE = """
env: {id: CartPole-v1, n_envs: 8, max_episode_steps: 25}
task: {epochs: 1, max_epochs: 1, steps_per_epoch: 1024, eval_episodes: 4}
optimizer: {lr: 'orion~loguniform(1e-4, 1e-2)'}
ppo: {n_steps: 32, batch_size: 256, n_epochs: 4}
"""
TRIAL = SPACE.replace("'orion~loguniform(1e-4, 1e-2)'", "1e-3")
LONG = ["--set", "task.epochs=100000", "--set", "task.max_epochs=100000"]
ORION = """
experiment: {max_trials: %d, algorithm: {random: {seed: 1}}}
storage: {type: legacy, database: {type: pickleddb, host: %s}}
worker: {n_workers: 2, executor: joblib, executor_configuration: {backend: threading}}
"""
TICKS = os.sysconf("SC_CLK_TCK")


class Place:
    """A folder with a directory of servers of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        own = {k: v for k, v in os.environ.items() if not k.startswith(("ORION_", "PYTHON", "PPO_HPO_"))}
        self.environment = {
            **own,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "XDG_RUNTIME_DIR": str(folder),
        }
        if "PYTHONPATH" in os.environ:
            self.environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
        (folder / "space.yaml").write_text(SPACE)
        (folder / "trial.yaml").write_text(TRIAL)

    def trial(self, *options: str) -> list[str]:
        self.count += 1
        command = [str(BIN / "ppo-hpo"), "run", "--config", "trial.yaml", "--device", "cpu"]
        return [*command, "--dir", f"trial{self.count}", *options]

    def hunt(self, *options: str) -> list[str]:
        self.count += 1
        name = f"hunt{self.count}"
        (self.folder / f"{name}.yaml").write_text(ORION % (TRIALS, self.folder / f"{name}.pkl"))
        command = [str(BIN / "orion"), "hunt", "-n", name, "-c", f"{name}.yaml"]
        command += ["--working-dir", str(self.folder / name)]
        return [*command, "ppo-hpo", "run", "--config", "space.yaml", "--device", "cpu", *options]

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def measure(self, *commands: list[str]) -> tuple[float, float]:
        """CPU seconds of commands that run at once, their servers included, and wall seconds."""
        before = self.servers_cpu()
        started = time.perf_counter()
        processes = [self.start(command) for command in commands]
        cpu = 0.0
        for process in processes:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{process.args} ended with code {process.returncode}")
            cpu += usage.ru_utime + usage.ru_stime
        wall = time.perf_counter() - started
        return cpu + self.servers_cpu() - before, wall

    def servers(self, *options: str) -> list[int]:
        done = subprocess.run(
            [BIN / "ppo-hpo", "warm", *options], env=self.environment, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        return [int(line.split()[1].rstrip(":")) for line in done.stdout.splitlines()]

    def servers_cpu(self) -> float:
        """Of all servers and of their children that have ended."""
        ticks = 0
        for server in self.servers():
            fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])
        return ticks / TICKS

    def stop_servers(self) -> None:
        self.servers("--stop")
        while self.servers():
            time.sleep(0.05)
        shutil.rmtree(self.folder / f"ppo-hpo-{os.geteuid()}", ignore_errors=True)


def memory(pid: int) -> dict[str, float]:
    """Megabytes: resident, proportional, private."""
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, _, value = line.partition(":")
        sizes[key] = int(value.split()[0])
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    kilobytes = {"resident": sizes["Rss"], "proportional": sizes["Pss"], "private": private}
    return {name: round(value / 1024, 1) for name, value in kilobytes.items()}


def memories(place: Place) -> dict[str, dict[str, float]]:
    """Two plain trials; then two warm ones, a client and the server."""
    found = {}
    place.stop_servers()
    for name in ("plain", "warm"):
        options = [*LONG, "--preload"] if name == "warm" else LONG
        processes = [place.start(place.trial(*options)) for _ in range(2)]
        timings = [place.folder / f"trial{place.count - other}" / "timing.jsonl" for other in (0, 1)]
        try:
            while not all(path.exists() and len(path.read_text().splitlines()) > 50 for path in timings):
                time.sleep(0.05)
            pid = json.loads(timings[0].read_text().splitlines()[0])["pid"]
            found[f"a {name} trial"] = memory(pid)
            if name == "warm":
                found["its client"] = memory(processes[-1].pid)
                (server,) = place.servers()
                found["the server"] = memory(server)
        finally:
            for process in processes:
                process.terminate()
                process.wait()
    return found


def medians(runs: list[tuple[float, float]]) -> dict[str, float]:
    cpu, wall = zip(*runs, strict=True)
    return {
        "cpu_seconds": round(statistics.median(cpu), 3),
        "cpu_seconds_least": round(min(cpu), 3),
        "cpu_seconds_most": round(max(cpu), 3),
        "wall_seconds": round(statistics.median(wall), 3),
        "wall_seconds_least": round(min(wall), 3),
        "wall_seconds_most": round(max(wall), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help=f"default: {RUNS}")
    runs = parser.parse_args().runs
    hunts = (runs + 1) // 2 if runs < RUNS else 5
    times: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, measured: tuple[float, float]) -> None:
        times.setdefault(name, []).append(measured)

    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        place.measure(place.trial())  # fills the system's caches
        place.measure(place.trial("--preload"))
        for _ in range(runs):
            note("a plain trial", place.measure(place.trial()))
            note("a warm trial", place.measure(place.trial("--preload")))
        for _ in range(hunts):
            note("two plain trials at once", place.measure(place.trial(), place.trial()))
            place.stop_servers()
            note(
                "two warm ones, no server yet",
                place.measure(place.trial("--preload"), place.trial("--preload")),
            )
            place.stop_servers()
            note("one warm one, no server yet", place.measure(place.trial("--preload")))
        for _ in range(hunts):
            note(f"a hunt of {TRIALS} plain trials", place.measure(place.hunt()))
            place.stop_servers()
            note(f"a hunt of {TRIALS} warm ones, no server yet", place.measure(place.hunt("--preload")))
        resident = memories(place)
        place.stop_servers()

    rows = {name: medians(measured) for name, measured in times.items()}
    print(f"{'':42} {'CPU s':>7} {'least':>7} {'most':>7} {'wall s':>7} {'least':>7} {'most':>7}")
    for name, row in rows.items():
        print(f"{name:42} " + " ".join(f"{value:7.3f}" for value in row.values()))
    print(f"\n{'MB, two trials at once':42} {'resident':>12} {'proportional':>12} {'private':>12}")
    for name, sizes in resident.items():
        print(f"{name:42} " + " ".join(f"{value:12.1f}" for value in sizes.values()))
    if runs != RUNS:
        return
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "runs": runs,
        "hunts": hunts,
        "machine": machine.describe(),
        "rows": rows,
        "megabytes": resident,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "warm.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

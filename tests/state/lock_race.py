"""Two processes on one trial, which come, are stopped and killed at random moments, again and again.

    python -m tests.state.lock_race CONFIG DIRECTORY ROUNDS SEED

Children are forked after torch was imported once. Each round is one trial. Half of the processes come with
``--takeover``; every third round has no flock. Each environment step, and each end of a process's training,
is traced with its time and with the writer's number. After each round:

- the times of a writer all come before those of the next one: never did two train at the same instant;
- the trial's end equals, to the bit, that of an undisturbed run, and nothing temporary is left.

Prints as JSON how many processes were started, stopped and ended, and how often one gave way to another.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ppo_hpo import TrialConfig
from ppo_hpo.spec import yamlio
from ppo_hpo.state import claim as claims
from ppo_hpo.state.checkpoint import read
from ppo_hpo.trial import process, runner
from ppo_hpo.trial.options import RunOptions
from tests.state.without_flock import without_flock


def fork(run: Callable[[], Any]) -> int:
    """Run something in a child, which ends with it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            process.raise_on_signals()
            run()
            code = 0
        except BaseException as error:
            if process.received_signal() is None:
                print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return pid


def traced(config: TrialConfig, directory: Path, *, takeover: bool, flock: bool) -> None:
    """Run a trial and write down when it trained as which writer."""
    trace = os.open(f"{directory}.trace", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    # Sooner than for people: rounds are short.
    claims._HEARTBEAT = 0.02
    if not flock:
        without_flock()

    def note(number: int, what: str) -> None:
        os.write(trace, f"{time.monotonic_ns()} {number} {what}\n".encode())

    def tick() -> None:
        process.raise_if_stopped()
        writer = claims.latest_writer(directory)
        mine = writer is not None and writer.process is not None and writer.process.pid == os.getpid()
        note(writer.number if writer else 0, "step" if mine else f"step-of-{os.getpid()}")

    class Claim(claims.Claim):
        def release(self) -> None:
            note(self.number, "gave-way" if self._lost else "end")
            super().release()

    claims.Claim = Claim
    options = RunOptions("cpu", takeover=takeover)
    runner.run(config, directory, options, console=False, tick=tick)


def play(config: TrialConfig, directory: Path, whole: float, chance: random.Random, flock: bool) -> Any:
    """One round; what happened in it."""
    counts: dict[str, int] = defaultdict(int)
    living: set[int] = set()

    def start() -> int:
        takeover = chance.random() < 0.5
        counts["started"] += 1
        counts["takeovers"] += takeover
        pid = fork(lambda: traced(config, directory, takeover=takeover, flock=flock))
        living.add(pid)
        return pid

    def end(pid: int, number: signal.Signals) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        os.waitpid(pid, 0)
        living.discard(pid)
        counts["ended"] += 1
        for path in directory.glob("checkpoint-*.safetensors"):
            try:
                read(path)  # raises if it is not whole
            except Exception:
                if path.exists():  # and was not dropped by the other one in between
                    raise

    start()
    for _ in range(3):
        time.sleep(chance.uniform(0.0, 0.5) * whole)
        victim = chance.choice(sorted(living)) if living else None
        fate = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, None])
        if victim is not None and fate == signal.SIGSTOP:
            os.kill(victim, signal.SIGSTOP)
            time.sleep(chance.uniform(0.0, 0.3) * whole)
            os.kill(victim, signal.SIGCONT)
            counts["stopped"] += 1
        elif victim is not None and fate is not None:
            end(victim, fate)
        if len(living) < 2:
            start()
    for pid in sorted(living):
        assert os.waitpid(pid, 0)[1] == 0, directory
    if not (directory / "results.json").exists():
        # Whoever was left was killed. It is Orion that would start another.
        assert os.waitpid(start(), 0)[1] == 0, directory
    return counts


def check_trace(path: Path) -> dict[str, int]:
    """Writers train one after the other, in the order of their numbers."""
    times: dict[int, list[int]] = defaultdict(list)
    ends: dict[str, int] = defaultdict(int)
    for line in path.read_text().splitlines():
        moment, number, what = line.split()
        assert what in ("step", "end", "gave-way"), line
        times[int(number)].append(int(moment))
        if what != "step":
            ends[what] += 1
    writers = sorted(times)
    for before, after in itertools.pairwise(writers):
        assert max(times[before]) < min(times[after]), (path, before, after)
    return ends


def result(directory: Path) -> tuple[Any, ...]:
    """What must be equal to the bit, however often it was disturbed."""
    last = read(max(directory.glob("checkpoint-*.safetensors")))
    entries = json.loads((directory / "results.json").read_text())
    return (
        last.epoch,
        {name: (array.dtype, array.tobytes()) for name, array in last.arrays.items()},
        last.meta["curve"],
        (directory / "curve.jsonl").read_bytes(),
        (directory / "config.yaml").read_bytes(),
        next(entry["value"] for entry in entries if entry["type"] == "objective"),
    )


def main() -> None:
    torch.set_num_threads(1)
    path, root, rounds, seed = sys.argv[1:]
    config = TrialConfig.from_mapping(yamlio.load(Path(path)))
    chance = random.Random(seed)
    # Twice in this process: so that every child finds everything imported, and for what a trial takes.
    for name in ("warm", "undisturbed"):
        begun = time.monotonic()
        runner.run(config, Path(root) / name, RunOptions("cpu"), console=False)
        whole = time.monotonic() - begun
    expected = result(Path(root) / "undisturbed")
    total: dict[str, int] = defaultdict(int)
    for number in range(int(rounds)):
        directory = Path(root) / str(number)
        counts = play(config, directory, whole, chance, flock=number % 3 != 0)
        ends = check_trace(Path(f"{directory}.trace"))
        assert result(directory) == expected, directory
        left = [p.name for p in directory.rglob("*") if p.name.startswith((".", "stage-"))]
        assert not left, (directory, left)
        assert len(list((directory / "writer").iterdir())) == 1
        for what, times in (counts | ends).items():
            total[what] += times
    print(json.dumps(total))


if __name__ == "__main__":
    main()

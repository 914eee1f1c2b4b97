"""Run a trial in child processes that are killed (SIGKILL) at random moments; then let it get through.

    python -m tests.kill_loop CONFIG DIRECTORY KILLS SEED

Children are forked after torch was imported once, so that the kills fall into training, evaluating and
saving rather than into importing. Prints how many children were killed before they were done.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from ppo_hpo import TrialConfig, task, trial, yamlio  # noqa: F401 - imported before the fork
from ppo_hpo.checkpoint import read


def child(config: TrialConfig, directory: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            trial.run(config, directory, device="cpu", console=False)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def wait_until_it_worked(pid: int, seconds: float) -> None:
    """Wait until a child has spent some processor time, which other load on the machine does not change."""
    spent = Path(f"/proc/{pid}/schedstat")
    give_up = time.monotonic() + 60.0
    while time.monotonic() < give_up:
        text = spent.read_text()
        if int(text.split()[0]) >= seconds * 1e9 or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.0005)


def main() -> None:
    torch.set_num_threads(1)
    path, directory, kills, seed = sys.argv[1:]
    config = TrialConfig.from_mapping(yamlio.load(Path(path)))
    chance = random.Random(seed)
    # Twice in this process: so that every child finds everything imported, and for what a trial takes.
    for name in ("-warm", "-clock"):
        begun = time.process_time()
        trial.run(config, Path(directory + name), device="cpu", console=False)
        whole = time.process_time() - begun
    killed = 0
    for _ in range(int(kills)):
        pid = child(config, Path(directory))
        # Long enough that now and then an epoch gets done, and short enough that most kills come before.
        wait_until_it_worked(pid, chance.uniform(0.0, 0.55) * whole)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
        for checkpoint in Path(directory).glob("checkpoint-*.safetensors"):
            read(checkpoint)  # raises if it is not whole
    _, status = os.waitpid(child(config, Path(directory)), 0)
    if status:
        sys.exit(1)
    print(killed)


if __name__ == "__main__":
    main()

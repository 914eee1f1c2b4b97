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


def main() -> None:
    torch.set_num_threads(1)
    path, directory, kills, seed = sys.argv[1:]
    config = TrialConfig.from_mapping(yamlio.load(Path(path)))
    chance = random.Random(seed)
    # Once in this process, so that every child finds everything imported; and for the length of an epoch.
    outcome = trial.run(config, Path(directory + "-clock"), device="cpu", console=False)
    whole = outcome.statistics["wall_seconds"]
    killed = 0
    for _ in range(int(kills)):
        pid = child(config, Path(directory))
        # Long enough that now and then an epoch gets done, and short enough that most kills come before.
        time.sleep(chance.uniform(0.0, 0.36) * whole)
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

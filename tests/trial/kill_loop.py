"""Run a trial in child processes that are killed (SIGKILL) at random moments; then let it get through.

    python -m tests.trial.kill_loop CONFIG DIRECTORY KILLS SEED [EVERY]

Children are forked after torch was imported once, so that the kills fall into training, evaluating and
saving rather than into importing. A child is killed at a random environment step, or before that at a random
amount of processor time, which lies anywhere. Only in every seventh attempt, or as EVERY says, may the random
step come after an epoch's end, so that the trial gets on but is not done before its kills are used up. Prints
how many children were killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ppo_hpo import TrialConfig
from ppo_hpo.spec import yamlio
from ppo_hpo.state.checkpoint import read
from ppo_hpo.trial import runner
from ppo_hpo.trial.options import RunOptions


def fork(config: TrialConfig, directory: Path, last_step: int | None) -> int:
    """Run the trial in a child, which kills itself before its step number ``last_step``."""
    pid = os.fork()
    if pid == 0:
        try:
            runner.run(config, directory, RunOptions("cpu"), console=False, tick=_deadly(last_step))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def _deadly(last_step: int | None) -> Callable[[], None]:
    steps = 0

    def tick() -> None:
        nonlocal steps
        steps += 1
        if steps == last_step:
            os.kill(os.getpid(), signal.SIGKILL)

    return tick


def kill_after(pid: int, seconds: float) -> None:
    """Kill a child when it has spent some processor time, which other load on the machine does not change."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        if int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) >= seconds * 1e9:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.0005)


def main() -> None:
    torch.set_num_threads(1)
    path, directory, kills, seed, every = [*sys.argv[1:], "7"][:5]
    config = TrialConfig.from_mapping(yamlio.load(Path(path)))
    chance = random.Random(seed)
    ticks = config.task.steps_per_epoch // config.env.n_envs
    # Twice in this process: so that every child finds everything imported, and for what a trial takes.
    for name in ("-warm", "-clock"):
        begun = time.process_time()
        runner.run(config, Path(directory + name), RunOptions("cpu"), console=False)
        whole = time.process_time() - begun
    killed = 0
    for attempt in range(1, int(kills) + 1):
        may_finish_an_epoch = attempt % int(every) == 0
        last_step = chance.randint(1, ticks) + ticks * may_finish_an_epoch
        pid = fork(config, Path(directory), last_step)
        if attempt % 2:
            kill_after(pid, chance.uniform(0.0, 0.3) * whole)
        _, status = os.waitpid(pid, 0)
        killed += os.WIFSIGNALED(status)
        for checkpoint in Path(directory).rglob("checkpoint-*.safetensors"):
            read(checkpoint)  # raises if it is not whole
    _, status = os.waitpid(fork(config, Path(directory), None), 0)
    if status:
        sys.exit(1)
    print(killed)


if __name__ == "__main__":
    main()

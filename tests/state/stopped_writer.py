"""Run a trial that stops itself, as SIGSTOP does, at an inconvenient moment; print its objective.

    python -m tests.state.stopped_writer CONFIG DIRECTORY (step | rename | "goes on")

It stops in the third epoch, before a step, or with a checkpoint ready to be renamed. The one that goes on is
started with ``--takeover``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from ppo_hpo import TrialConfig
from ppo_hpo.spec import yamlio
from ppo_hpo.state import claim, lock
from ppo_hpo.trial import runner
from ppo_hpo.trial.options import RunOptions

path, directory, moment = sys.argv[1:]
config = TrialConfig.from_mapping(yamlio.load(Path(path)))
steps = 0


def stop_in_a_step() -> None:
    global steps
    steps += 1
    if steps == 2 * config.task.steps_per_epoch // config.env.n_envs + 50:
        os.kill(os.getpid(), signal.SIGSTOP)


def stop_at_the_rename(source: Path, target: Path) -> None:
    if target.name == "checkpoint-000003.safetensors":
        os.replace = replace
        os.kill(os.getpid(), signal.SIGSTOP)
    replace(source, target)


replace = os.replace
if moment == "rename":
    os.replace = stop_at_the_rename
lock._SILENCE_LIMIT, claim._HEARTBEAT = 1.0, 0.05
outcome = runner.run(
    config,
    Path(directory),
    RunOptions("cpu", takeover=moment == "goes on"),
    tick=stop_in_a_step if moment == "step" else lambda: None,
)
print(json.dumps(outcome.objective))

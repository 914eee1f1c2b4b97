"""The test of a trained policy on fresh episodes, which no evaluation of tuning has seen: ``test.json``.

Tuning scores all trials on the same few episodes (`ppo_hpo.spec.randomness.evaluation_seeds`), so its winner
also won by them. A test has more episodes, and other ones for each training seed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_hpo.spec import results
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import NotFinite, UserError
from ppo_hpo.state.files import read_bytes

if TYPE_CHECKING:
    from ppo_hpo.ppo.task import PPO

FILE = "test.json"
_MAX_BYTES = 1 << 24  # far above what 100,000 episodes take


@dataclass(frozen=True)
class FreshTest:
    """What a policy is worth on fresh episodes."""

    score: float  # mean return; of a trial that diverged, the worst evaluation of its life
    returns: tuple[float, ...] = ()  # of each episode; none if the trial diverged
    steps: int = 0  # environment steps of all episodes


def take(task: PPO, episodes: int) -> FreshTest:
    """Test the policy that a task has now, after the last epoch that its configuration asks for."""
    from ppo_hpo.ppo.device import limited_threads  # imports torch
    from ppo_hpo.ppo.task_envs import Environments

    config = task.config
    if not task.diverged:
        if task.epoch != config.task.epochs:
            raise UserError(
                f"A test needs the policy after epoch {config.task.epochs}, but this directory has that of "
                f"epoch {task.epoch}. Choose another directory for the tests."
            )
        log = logging.getLogger("ppo_hpo")
        with contextlib.suppress(NotFinite), limited_threads(config.task.threads):
            found = Environments(config, task.info, log).evaluate_fresh(task.agent, episodes)
            return FreshTest(math.fsum(found.returns) / episodes, found.returns, sum(found.lengths))
    return FreshTest(-results.objective(task.metrics.curve, task.epoch, diverged=True))


def to_bytes(test: FreshTest, config: TrialConfig) -> bytes:
    """The content of ``test.json``."""
    about = {
        "identity": config.identity(), "epochs": config.task.epochs, "score": test.score,
        "returns": test.returns,
    }  # fmt: skip
    return (json.dumps(about, allow_nan=False) + "\n").encode()


def read(directory: Path, config: TrialConfig, episodes: int) -> FreshTest | None:
    """The test of this configuration on so many episodes; None if there is none."""
    try:
        found = json.loads(read_bytes(directory / FILE, _MAX_BYTES))
        score, returns = float(found["score"]), tuple(float(value) for value in found["returns"])
        own = found["identity"] == config.identity() and found["epochs"] == config.task.epochs
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    whole = len(returns) in (0, episodes) and all(map(math.isfinite, (score, *returns)))
    return FreshTest(score, returns) if own and whole else None

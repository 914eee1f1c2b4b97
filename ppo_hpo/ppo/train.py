"""One epoch of PPO, in the order of the paper; each step is one jump away."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ppo_hpo.envs.make import EnvInfo
from ppo_hpo.envs.vector import VectorEnv
from ppo_hpo.ppo.gae import explained_variance, gae
from ppo_hpo.ppo.learner import Learner
from ppo_hpo.ppo.normalize import ObservationNormalizer, RewardScaler
from ppo_hpo.ppo.rollout import Episodes, Rollout, collect
from ppo_hpo.spec import randomness
from ppo_hpo.spec.config import TrialConfig


@dataclass
class Agent:
    """All that training changes."""

    learner: Learner
    normalizer: ObservationNormalizer
    scaler: RewardScaler

    def finite(self) -> bool:
        """Whether every parameter and every running statistic is a finite number."""
        moments = (self.normalizer.moments, self.scaler.moments)
        return self.learner.finite() and all(
            bool(np.isfinite(part.mean).all() and np.isfinite(part.var).all()) for part in moments
        )


class Diverged(Exception):
    """A loss or a parameter is not a finite number any more.

    Attributes:
        env_steps: steps of the epoch that were spent.
    """

    def __init__(self, message: str, env_steps: int) -> None:
        super().__init__(message)
        self.env_steps = env_steps


def scheduled(name: str, start: float, end: float, progress: float) -> float:
    """A schedule's value at ``progress`` in [0, 1], counted in epochs of `max_epochs`."""
    return start if name == "constant" else start + (end - start) * progress


def train_epoch(
    agent: Agent,
    envs: VectorEnv,
    info: EnvInfo,
    config: TrialConfig,
    epoch: int,
    on_rollout: Callable[[int, Rollout], None] = lambda index, rollout: None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train for one epoch, ``steps_per_epoch`` environment steps.

    Args:
        agent: what is trained, in place.
        envs: the training environments; they are reset with this epoch's seeds.
        info: of the environment.
        config: the trial.
        epoch: epochs done before this one; together with the seed it decides every random number.
        on_rollout: called after each rollout's update.
        tick: called before each step.

    Returns:
        Means over the epoch's rollouts, and the training episodes that ended.

    Raises:
        Diverged: a loss or a parameter became NaN or infinite.
    """
    ppo, seed = config.ppo, config.task.seed
    noise = randomness.make_rng(seed, "action", epoch)
    shuffle = randomness.make_rng(seed, "shuffle", epoch)
    episodes = Episodes()
    episodes.begin(config.env.n_envs)
    agent.scaler.reset()
    raw_obs = envs.reset(randomness.training_seeds(seed, epoch, config.env.n_envs))
    agent.normalizer.update(raw_obs)
    obs = agent.normalizer(raw_obs)
    rows: list[dict[str, float]] = []
    collecting = 0.0

    for index in range(config.rollouts_per_epoch):
        progress = (epoch + index / config.rollouts_per_epoch) / config.max_epochs
        optimizer, schedule = config.optimizer, config.lr_schedule
        lr = scheduled(schedule.name, optimizer.lr, optimizer.lr * schedule.final, progress)
        clip_range = scheduled(ppo.clip_range_schedule, ppo.clip_range, 0.0, progress)

        started = time.perf_counter()
        rollout, obs = collect(
            agent.learner, envs, info, obs, ppo.n_steps,
            agent.normalizer, agent.scaler, noise, episodes, tick,
        )  # fmt: skip
        collecting += time.perf_counter() - started
        next_value = rollout.next_value(agent.learner.values(obs))
        advantage = gae(
            rollout.reward, rollout.value, next_value,
            rollout.terminated, rollout.done, ppo.gamma, ppo.gae_lambda,
        )  # fmt: skip
        returns = advantage + rollout.value
        samples = rollout.samples(advantage, returns)
        stats = agent.learner.update(samples, shuffle, lr, clip_range)

        row = asdict(stats) | {"lr": lr, "clip_range": clip_range}
        losses = (stats.policy_loss, stats.value_loss, stats.entropy)
        if not (np.isfinite(losses).all() and agent.finite()):
            spent = (index + 1) * config.rollout_steps
            raise Diverged(f"rollout {index + 1} of epoch {epoch + 1}", spent)
        row["explained_variance"] = explained_variance(rollout.value, returns)
        rows.append(row)
        on_rollout(index, rollout)

    summary: dict[str, Any] = {key: _mean([row[key] for row in rows]) for key in rows[0]}
    summary |= {key: rows[-1][key] for key in ("lr", "clip_range")}
    summary["n_updates"] = int(sum(row["n_updates"] for row in rows))
    summary["train_episodes"] = len(episodes.returns)
    summary["train_return"] = _mean(episodes.returns)
    summary["train_length"] = _mean([float(length) for length in episodes.lengths])
    summary["collecting_seconds"] = collecting
    return summary


def _mean(values: list[float]) -> float | None:
    """Mean of the finite values; None, which JSON can say, where there is none."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else None

"""One epoch of PPO, in the order of the paper; each step is one jump away."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.envs.make import EnvInfo
from ppo_hpo.envs.step import VectorEnv
from ppo_hpo.ppo.agent import Agent
from ppo_hpo.ppo.collect import Collector
from ppo_hpo.ppo.gae import explained_variance, gae
from ppo_hpo.ppo.rollout import Episodes, Float32, Rollout
from ppo_hpo.spec import randomness
from ppo_hpo.spec.config import PPOConfig, TrialConfig
from ppo_hpo.spec.errors import NotFinite, UserError


class Diverged(Exception):
    """A loss, a parameter, a running statistic or a return is not a finite number any more."""

    def __init__(self, message: str, env_steps: int) -> None:
        super().__init__(message)
        self.env_steps = env_steps  # of the epoch, which were spent


class Rates(NamedTuple):
    """Values of the two schedules: the learning rate, and the bound on the policy's ratio."""

    lr: float
    clip_range: float


class Updates:
    """The updates of one epoch, one for each of its rollouts.

    The seed and ``epoch``, the number of epochs done before, determine every random number.
    """

    def __init__(self, agent: Agent, config: TrialConfig, epoch: int) -> None:
        self.agent, self.config, self.epoch = agent, config, epoch
        self.rows: list[dict[str, float]] = []  # statistics of each update
        self._rng = randomness.make_rng(config.task.seed, "shuffle", epoch)

    @property
    def complete(self) -> bool:
        """Whether every rollout of the epoch had its update."""
        return len(self.rows) == self.config.rollouts_per_epoch

    @property
    def rates(self) -> Rates:
        """The rates of the next update."""
        done = len(self.rows) / self.config.rollouts_per_epoch
        return scheduled_rates(self.config, self.epoch + done)

    def update(self, rollout: Rollout, next_obs: NDArray[Any]) -> None:
        """Update the network on the next rollout; ``next_obs [N, D]`` are the observations that follow it."""
        agent, rates = self.agent, self.rates
        advantage = advantages(rollout, agent.learner.values(next_obs), self.config.ppo)
        returns = advantage + rollout.value
        # Epochs of shuffled minibatches, with one optimizer step for each.
        stats = agent.learner.update(rollout.samples(advantage, returns), self._rng, *rates)

        self.rows.append(asdict(stats) | rates._asdict())
        if not (stats.finite() and agent.finite()):
            place = f"rollout {len(self.rows)} of epoch {self.epoch + 1}"
            raise Diverged(place, len(self.rows) * self.config.rollout_steps)
        self.rows[-1]["explained_variance"] = explained_variance(rollout.value, returns)

    def summary(self, episodes: Episodes) -> dict[str, Any]:
        """One row of the learning curve: means over rollouts, the last rates, and the training episodes."""
        rows = self.rows
        summary: dict[str, Any] = {key: _mean([row[key] for row in rows]) for key in rows[0]}
        summary |= {key: rows[-1][key] for key in Rates._fields}
        summary["n_updates"] = int(sum(row["n_updates"] for row in rows))
        summary["train_episodes"] = len(episodes.returns)
        summary["train_return"] = _mean(episodes.returns)
        summary["train_length"] = _mean(episodes.lengths)
        return summary


def train_epoch(
    updates: Updates,
    envs: VectorEnv,
    info: EnvInfo,
    on_rollout: Callable[[int, Rollout], None] = lambda index, rollout: None,
    before_step: Callable[[], None] = lambda: None,
) -> Episodes:
    """Train for one epoch, and return the episodes that ended in it.

    The environments are reset with this epoch's seeds. ``on_rollout`` is called after each rollout's update,
    with its index.
    """
    config, seed, epoch = updates.config, updates.config.task.seed, updates.epoch
    env_seeds = randomness.training_seeds(seed, epoch, config.env.n_envs)
    action_rng = randomness.make_rng(seed, "action", epoch)
    with diverging(updates.agent, f"the resets of epoch {epoch + 1}", 0):
        collector = Collector(updates.agent, envs, info, env_seeds, action_rng, before_step)
    for index in range(config.rollouts_per_epoch):
        steps = (index + 1) * config.rollout_steps
        with diverging(updates.agent, f"rollout {index + 1} of epoch {epoch + 1}", steps):
            rollout = collector.collect(config.ppo.n_steps)
        updates.update(rollout, collector.obs)
        on_rollout(index, rollout)
    return collector.episodes


@contextlib.contextmanager
def diverging(agent: Agent, where: str, env_steps: int) -> Iterator[None]:
    """Make `NotFinite` a divergence once the agent has learned, since its actions may be the reason then.

    Before its first update nothing but the environment can be. A divergence gives Orion an objective.
    """
    try:
        yield
    except NotFinite as fault:
        if agent.learner.optimizer.n_steps == 0:
            raise
        raise Diverged(f"{where}: {str(fault).rstrip('.')}", env_steps) from fault


def refuse_beyond_schedules(config: TrialConfig, epochs: int) -> None:
    """A UserError where the schedules end before so many epochs."""
    if epochs > config.max_epochs:
        raise UserError(
            f"`epochs <= task.max_epochs` must hold, since schedules end there, but got {epochs} "
            f"and {config.max_epochs}. Make the task with task={{'max_epochs': {epochs}}}."
        )


def scheduled_rates(config: TrialConfig, epochs: float) -> Rates:
    """The schedules' values after so many epochs, whole or not. Schedules end at `task.max_epochs`."""
    progress = epochs / config.max_epochs
    optimizer, schedule, ppo = config.optimizer, config.lr_schedule, config.ppo
    return Rates(
        lr=scheduled(schedule.name, optimizer.lr, optimizer.lr * schedule.final, progress),
        clip_range=scheduled(ppo.clip_range_schedule, ppo.clip_range, 0.0, progress),
    )


def scheduled(name: str, start: float, end: float, progress: float) -> float:
    """The value of a schedule, ``constant`` or ``linear``, at ``progress`` in [0, 1]."""
    return start if name == "constant" else start + (end - start) * progress


def advantages(rollout: Rollout, last_value: Float32, ppo: PPOConfig) -> NDArray[np.float64]:
    """Advantages ``[T, N]`` of a rollout; ``last_value [N]`` are of the observations that follow it."""
    return gae(
        rollout.reward, rollout.value, rollout.next_value(last_value),
        rollout.terminated, rollout.done, ppo.gamma, ppo.gae_lambda,
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    """Mean of the finite values; None, which JSON can write, where there is none."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else None

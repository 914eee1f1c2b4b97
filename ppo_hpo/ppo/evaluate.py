"""Evaluation: whole episodes in environments and with seeds that training never sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.envs.make import EnvInfo, close_all, make_several
from ppo_hpo.envs.take import Intake
from ppo_hpo.ppo.normalize import ObservationNormalizer
from ppo_hpo.ppo.rollout import Float32, sampling_noise
from ppo_hpo.spec.config import EnvConfig


@dataclass(frozen=True)
class Evaluation:
    """Unscaled returns and lengths of the episodes, in the order of their seeds."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]


class Actor(Protocol):
    """What can be evaluated: a `Learner`, or anything else that acts."""

    def act(self, obs: NDArray[Any], noise: Float32 | None) -> NDArray[Any]:
        """Actions for observations ``[N, D]``: sampled by ``noise [N, A]``, or the mode without noise."""


class Evaluator:
    """Evaluates policies: episodes that run at the same time share a forward pass.

    An episode stops after ``max_steps`` steps, for environments without a time limit. There are as many
    environments as episodes, or ``at_once`` of them, which then run one block of episodes after the other.
    """

    def __init__(
        self, config: EnvConfig, info: EnvInfo, seeds: list[int], max_steps: int, at_once: int | None = None
    ) -> None:
        n_envs = len(seeds) if at_once is None else min(at_once, len(seeds))
        self._envs = make_several(config, n_envs, evaluation=True)
        self._info, self._seeds, self._max_steps, self._intake = info, seeds, max_steps, Intake(info)

    def __call__(
        self, policy: Actor, normalizer: ObservationNormalizer, rng: np.random.Generator | None
    ) -> Evaluation:
        """Run every episode to its end, with sampled actions, or without ``rng`` the most probable ones."""
        returns: tuple[float, ...] = ()
        lengths: tuple[int, ...] = ()
        for start in range(0, len(self._seeds), len(self._envs)):
            block = self._run(self._seeds[start : start + len(self._envs)], policy, normalizer, rng)
            returns, lengths = returns + block.returns, lengths + block.lengths
        return Evaluation(returns, lengths)

    def _run(
        self, seeds: list[int], policy: Actor, normalizer: ObservationNormalizer,
        rng: np.random.Generator | None,
    ) -> Evaluation:  # fmt: skip
        n, intake = len(seeds), self._intake
        obs = np.zeros((n, *self._info.obs_shape), self._info.obs_dtype)
        for index, seed in enumerate(seeds):
            obs[index] = intake.reset(self._envs[index].reset(seed=seed))
        intake.check_finite(obs)
        returns, rewards, lengths = np.zeros(n), np.zeros(n), np.zeros(n, np.int64)
        running = np.arange(n)
        while len(running):
            noise = None
            if rng is not None:
                shape = (n, self._info.action_dim)
                noise = sampling_noise(rng, shape, continuous=self._info.continuous)[running]
            actions = policy.act(normalizer(obs[running]), noise)
            still = []
            for index, action in zip(running.tolist(), self._info.to_env(actions), strict=True):
                obs[index], rewards[index], terminated, truncated = intake.step(
                    self._envs[index].step(action)
                )
                lengths[index] += 1
                if not (terminated or truncated or lengths[index] >= self._max_steps):
                    still.append(index)
            intake.check_finite(obs, rewards)
            returns[running] += rewards[running]
            running = np.array(still, np.int64)
        return Evaluation(tuple(returns.tolist()), tuple(lengths.tolist()))

    def close(self) -> None:
        """Close every environment; raise what the first one raised that failed to close."""
        if failure := close_all(self._envs):
            raise failure

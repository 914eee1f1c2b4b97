"""Evaluation: whole episodes on environments and seeds that training never sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.envs.make import EnvInfo, make
from ppo_hpo.envs.vector import number_of, put_obs
from ppo_hpo.ppo.normalize import ObservationNormalizer
from ppo_hpo.ppo.rollout import Float32, sampling_noise
from ppo_hpo.spec.config import EnvConfig


@dataclass(frozen=True)
class Evaluation:
    """Unscaled returns and lengths of the episodes, in the order of their seeds."""

    returns: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def finite(self) -> bool:
        """Whether every return is a finite number, and their mean and deviation too."""
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(np.isfinite(self.returns).all() and np.isfinite(np.var(self.returns)))

    @property
    def steps(self) -> int:
        """Environment steps that the evaluation took."""
        return sum(self.lengths)


class Actor(Protocol):
    """What can be evaluated: a `Learner`, or anything else that acts."""

    def act(self, obs: NDArray[Any], noise: Float32 | None) -> NDArray[Any]:
        """Actions for observations ``[N, D]``: sampled by ``noise [N, A]``, or the mode without noise."""


class Evaluator:
    """One environment for each episode, so that one forward pass serves all that still run."""

    def __init__(self, config: EnvConfig, info: EnvInfo, seeds: list[int], max_steps: int) -> None:
        """Make the environments.

        Args:
            config: the environment.
            info: of the environment.
            seeds: one for each episode.
            max_steps: cut an episode after so many steps, for environments without a time limit.
        """
        self._envs = [make(config, judged=True) for _ in seeds]
        self._info = info
        self._seeds = seeds
        self._max_steps = max_steps

    def __call__(
        self,
        policy: Actor,
        normalizer: ObservationNormalizer,
        stream: np.random.Generator | None,
    ) -> Evaluation:
        """Run every episode to its end.

        Args:
            policy: acts.
            normalizer: of training; nothing is added to it.
            stream: of the actions' noise; None takes the most probable action.
        """
        n = len(self._envs)
        obs = np.zeros((n, *self._info.obs_shape), self._info.obs_dtype)
        for index, (env, seed) in enumerate(zip(self._envs, self._seeds, strict=True)):
            first, _ = env.reset(seed=seed)
            put_obs(self._info.id, first, obs[index])
        returns, lengths = np.zeros(n), np.zeros(n, np.int64)
        running, length = np.arange(n), len(obs[0])
        while len(running):
            noise = None
            if stream is not None:
                shape = (n, self._info.action_dim)
                noise = sampling_noise(stream, shape, continuous=self._info.continuous)[running]
            actions = policy.act(normalizer(obs[running]), noise)
            still = []
            for index, action in zip(running.tolist(), self._info.to_env(actions), strict=True):
                seen, reward, terminated, truncated, _ = self._envs[index].step(action)
                try:
                    obs[index] = seen
                    returns[index] += float(reward)
                    # One number would be spread over the whole row without a word.
                    if len(seen) != length:
                        raise ValueError
                except (TypeError, ValueError):
                    number_of(self._info.id, reward)
                    put_obs(self._info.id, seen, obs[index])
                    raise
                lengths[index] += 1
                if not (terminated or truncated or lengths[index] >= self._max_steps):
                    still.append(index)
            running = np.array(still, np.int64)
        return Evaluation(tuple(returns.tolist()), tuple(lengths.tolist()))

    def close(self) -> None:
        """Close every environment."""
        for env in self._envs:
            env.close()

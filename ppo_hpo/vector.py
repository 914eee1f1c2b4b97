"""Environments stepped side by side without losing a transition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.config import EnvConfig
from ppo_hpo.envs import EnvInfo, make


@dataclass(frozen=True)
class Step:
    """What one step of all environments gave. The arrays are reused by the next step.

    Attributes:
        obs: ``[N, D]`` what to act on next; where an episode ended, the first of the next episode.
        final_obs: ``[N, D]`` what the action led to; differs from ``obs`` where ``done``.
        reward: ``[N]``.
        terminated: ``[N]`` the task itself ended.
        truncated: ``[N]`` the episode was cut, as by a time limit.
    """

    obs: NDArray[np.float64]
    final_obs: NDArray[np.float64]
    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]


class SyncEnvs:
    """N environments stepped one after the other, each reset in the step that ends its episode.

    So every step of every environment is a transition of its own task: there is no reset row to
    mask, and an epoch of n steps is n transitions. gymnasium's `SyncVectorEnv` in its same-step
    mode hands out the environment's own array as final observation, which an environment that
    reuses its buffer overwrites at the reset; here it is copied first.
    """

    def __init__(self, config: EnvConfig, info: EnvInfo) -> None:
        self._envs = [make(config) for _ in range(config.n_envs)]
        self._info = info
        n, d = config.n_envs, info.obs_dim
        self._step = Step(
            obs=np.zeros((n, d)),
            final_obs=np.zeros((n, d)),
            reward=np.zeros(n),
            terminated=np.zeros(n, np.bool_),
            truncated=np.zeros(n, np.bool_),
        )

    def reset(self, seeds: list[int]) -> NDArray[np.float64]:
        """Begin new episodes everywhere, one seed each; return the observations ``[N, D]``."""
        for index, (env, seed) in enumerate(zip(self._envs, seeds, strict=True)):
            self._step.obs[index], _ = env.reset(seed=seed)
        return self._step.obs

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one action in each environment: ``[N]`` integers or ``[N, A]`` reals."""
        step = self._step
        for index, env in enumerate(self._envs):
            action = self._info.to_env(actions[index])
            obs, reward, terminated, truncated, _ = env.step(action)
            step.final_obs[index] = obs
            step.reward[index] = reward
            step.terminated[index] = terminated
            step.truncated[index] = truncated
            if terminated or truncated:
                obs, _ = env.reset()
            step.obs[index] = obs
        return step

    def close(self) -> None:
        """Close every environment."""
        for env in self._envs:
            env.close()

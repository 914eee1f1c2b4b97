"""What all vector environments share: their interface, and the result of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.envs.make import EnvInfo


@dataclass(slots=True)
class Step:
    """Result of one step of all environments, ``[N]`` or ``[N, D]``. The next step reuses the arrays."""

    obs: NDArray[Any]  # to act on next; where an episode ended, the first of the next episode
    final_obs: NDArray[Any]  # the last observations of the episodes that ended; elsewhere undefined
    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]  # the task itself ended
    truncated: NDArray[np.bool_]  # the episode was cut, as by a time limit
    ended: bool = False  # whether any episode ended

    @classmethod
    def empty(cls, n_envs: int, info: EnvInfo) -> Step:
        """Arrays for ``n_envs`` environments."""
        obs = np.zeros((n_envs, *info.obs_shape), info.obs_dtype)
        no = np.zeros(n_envs, np.bool_)
        return cls(obs, obs.copy(), np.zeros(n_envs), no, no.copy())


class VectorEnv(Protocol):
    """N environments side by side."""

    name: str  # how they are stepped, as `env.vectorization` has it

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Reset every environment, with one seed for each; return the observations ``[N, D]``."""

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one action in each environment: ``[N]`` integers or ``[N, A]`` reals."""

    def close(self) -> None:
        """Close every environment."""

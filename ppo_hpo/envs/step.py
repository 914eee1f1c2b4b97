"""What all vector environments share: the result of a step, and checks of what environments return."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.envs.make import EnvInfo
from ppo_hpo.spec.errors import UserError


@dataclass(slots=True)
class Step:
    """Result of one step of all environments. The next step reuses the arrays.

    Attributes:
        obs: ``[N, D]`` observations to act on next; where an episode ended, the first of the next episode.
        final_obs: ``[N, D]`` last observations of the episodes that ended; elsewhere undefined.
        reward: ``[N]`` rewards.
        terminated: ``[N]`` whether the task itself ended.
        truncated: ``[N]`` whether the episode was cut, as by a time limit.
        ended: whether any episode ended.
    """

    obs: NDArray[Any]
    final_obs: NDArray[Any]
    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    ended: bool = False

    @classmethod
    def empty(cls, n_envs: int, info: EnvInfo) -> Step:
        """Arrays for ``n_envs`` environments."""
        obs = np.zeros((n_envs, *info.obs_shape), info.obs_dtype)
        no = np.zeros(n_envs, np.bool_)
        return cls(obs, obs.copy(), np.zeros(n_envs), no, no.copy())


class VectorEnv(Protocol):
    """N environments side by side.

    Attributes:
        name: how they are stepped, as `env.vectorization` has it.
    """

    name: str

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Reset every environment, with one seed for each; return the observations ``[N, D]``."""

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one action in each environment: ``[N]`` integers or ``[N, A]`` reals."""

    def close(self) -> None:
        """Close every environment."""


def put_obs(name: str, obs: Any, row: NDArray[Any]) -> None:
    """Copy an observation into its row of an array.

    Args:
        name: id of the environment.
        obs: observation that it returned.
        row: array of the shape that its space promises.

    Raises:
        UserError: the observation has another shape, or holds something that is not a number.
    """
    try:
        if np.shape(obs) == row.shape:
            row[...] = obs
            return
    except (TypeError, ValueError):
        pass
    raise malformed(name, "observation", obs, f"{row.dtype} of shape {row.shape}")


def to_number(name: str, reward: Any) -> float:
    """A reward as a number.

    Raises:
        UserError: the reward is not a number.
    """
    try:
        return float(reward)
    except (TypeError, ValueError):
        raise malformed(name, "reward", reward, "a number") from None


def malformed(name: str, what: str, value: Any, promised: str) -> UserError:
    """The error for a value that an environment must not return.

    Args:
        name: id of the environment.
        what: what the value is, such as ``reward``.
        value: the value.
        promised: what it should have been.
    """
    found = f"the {what} {value!r:.200}"
    if what == "observation":
        with contextlib.suppress(ValueError):
            found = f"an observation of shape {np.shape(value)}"
    return UserError(f"`env.id: {name}` returned {found}, but it must be {promised}. Fix the environment.")

"""Advantages and returns: pure functions over arrays of shape ``[T, N]``, time first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
BoolArray = NDArray[np.bool_]


def gae(
    reward: FloatArray,
    value: FloatArray,
    next_value: FloatArray,
    terminated: BoolArray,
    done: BoolArray,
    gamma: float,
    lam: float,
) -> NDArray[np.float64]:
    """Generalised advantage estimation (Schulman et al. 2016, equations 11 to 16).

        delta[t] = reward[t] + gamma * next_value[t] * (1 - terminated[t]) - value[t]
        A[t]     = delta[t] + gamma * lam * (1 - done[t]) * A[t + 1],   A[T] = 0

    ``reward[t]`` is the reward of the action that was taken at the observation of ``value[t]``.
    ``next_value[t]`` is the value of the observation that this action led to. At the end of an episode that
    is its final observation, not the first one of the next episode.

    Args:
        reward: ``[T, N]`` rewards.
        value: ``[T, N]`` values of the observations.
        next_value: ``[T, N]`` values of the next observations; ignored where ``terminated``.
        terminated: ``[T, N]`` whether the task itself ended; this stops the bootstrap.
        done: ``[T, N]`` whether the episode was terminated or truncated; this stops the recursion.
        gamma: discount factor, in [0, 1].
        lam: decay of the estimate, in [0, 1]: 0 is the TD error, 1 the discounted return minus the value.

    Returns:
        Advantages, ``[T, N]``, in double precision.
    """
    bootstrap = np.where(terminated, 0.0, next_value)
    advantage = np.asarray(reward + gamma * bootstrap - value, dtype=np.float64)
    decay = gamma * lam * ~done
    for t in range(len(advantage) - 2, -1, -1):
        advantage[t] += decay[t] * advantage[t + 1]
    return advantage


def explained_variance(value: FloatArray, returns: FloatArray) -> float:
    """Share of the variance of the returns that the values explain: 1 - Var[returns - value] / Var[returns].

    A perfect critic has 1, and one that predicts a constant has 0. The result is NaN where all returns are
    equal.
    """
    variance = float(np.var(returns, dtype=np.float64))
    if variance == 0.0:
        return float("nan")
    return 1.0 - float(np.var(returns - value, dtype=np.float64)) / variance

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

    ``reward[t]`` is what the action taken at ``value[t]``'s observation earned. ``next_value[t]``
    values the observation that this very action led to, which at an episode's end is its final
    observation and not the first one of the episode that follows.

    Args:
        reward: ``[T, N]``.
        value: ``[T, N]``.
        next_value: ``[T, N]``; ignored where ``terminated``.
        terminated: ``[T, N]``, the task itself ended: stops the bootstrap.
        done: ``[T, N]``, terminated or truncated: stops the recursion.
        gamma: discount, in [0, 1].
        lam: horizon of the estimate, in [0, 1].

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
    """The share of the returns' variance that the values explain: 1 - Var[returns - value] / Var[returns].

    1 is a perfect critic, 0 one that predicts a constant; NaN where the returns do not vary.
    """
    variance = float(np.var(returns, dtype=np.float64))
    if variance == 0.0:
        return float("nan")
    return 1.0 - float(np.var(returns - value, dtype=np.float64)) / variance

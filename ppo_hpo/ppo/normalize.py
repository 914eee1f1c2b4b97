"""Running statistics of observations and returns, in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-8


class RunningMoments:
    """Mean and population variance of all rows seen, merged batch by batch (Chan, Golub & LeVeque 1983)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.mean = np.zeros(shape, np.float64)
        self.var = np.ones(shape, np.float64)
        self.count = 0.0

    def update(self, batch: NDArray[Any]) -> None:
        """Add B rows, ``[B, *shape]``."""
        n = len(batch)
        batch = np.asarray(batch, np.float64)
        mean = batch.mean(axis=0)
        var = np.square(batch - mean).mean(axis=0)
        total = self.count + n
        delta = mean - self.mean
        # Before the first batch the initial variance of 1 has the weight 0, so it leaves no trace.
        self.var = (self.var * self.count + var * n + delta * delta * (self.count * n / total)) / total
        self.mean = self.mean + delta * (n / total)
        self.count = total

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Copies of the statistics."""
        return {"mean": self.mean.copy(), "var": self.var.copy(), "count": np.array(self.count, np.float64)}

    def load(self, state: dict[str, NDArray[np.float64]]) -> None:
        """Load what `state` returned."""
        self.mean = np.array(state["mean"], np.float64).reshape(self.mean.shape)
        self.var = np.array(state["var"], np.float64).reshape(self.var.shape)
        self.count = float(state["count"])


class ObservationNormalizer:
    """Standardises observations by the statistics of training, then clips them (details 28 and 29).

    Evaluation uses the same statistics and never adds to them. Images, whose ``dim`` is 0, stay unchanged.
    """

    def __init__(self, dim: int, *, enabled: bool, clip: float) -> None:
        self.moments = RunningMoments((dim,))
        self._images = dim == 0
        self.enabled, self._clip = enabled, clip

    def update(self, obs: NDArray[Any]) -> None:
        """Add observations of training, ``[N, D]``."""
        if self.enabled:
            self.moments.update(obs)

    def __call__(self, obs: NDArray[Any]) -> NDArray[Any]:
        """Observations ``[..., D]`` in single precision, or images, as the network sees them."""
        if not self.enabled:
            return obs if self._images else np.asarray(obs, np.float32)
        scaled = (obs - self.moments.mean) / np.sqrt(self.moments.var + EPSILON)
        return np.clip(scaled, -self._clip, self._clip).astype(np.float32)


class RewardScaler:
    """Divides rewards by the standard deviation of the discounted return, then clips (details 30 and 31).

    The discount factor is that of the trial, since the scale that matters is that of the return that the
    critic learns. The mean of the rewards is not subtracted: that would change the task.
    """

    def __init__(self, n_envs: int, gamma: float, *, enabled: bool, clip: float) -> None:
        self.moments = RunningMoments(())
        self.enabled, self._gamma, self._clip = enabled, gamma, clip
        self._return = np.zeros(n_envs, np.float64)

    def reset(self) -> None:
        """Start new returns in all environments, because they were reset."""
        self._return[:] = 0.0

    def __call__(self, reward: NDArray[Any], done: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Add the rewards ``[N]`` of one step, and return them scaled."""
        if not self.enabled:
            return reward
        self._return = self._return * self._gamma + reward
        self.moments.update(self._return)
        self._return[done] = 0.0
        scaled = reward / np.sqrt(self.moments.var + EPSILON)
        return np.clip(scaled, -self._clip, self._clip)

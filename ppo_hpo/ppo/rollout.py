"""Rollouts: the data of one PPO iteration, as arrays ``[T, N]`` with time first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


class Samples(NamedTuple):
    """What an update learns from: a rollout with time and environments merged into one axis, ``[B, ...]``.

    All arrays are contiguous. Actions are integers or single precision, images are bytes, and everything
    else is single precision.
    """

    obs: NDArray[Any]
    action: NDArray[Any]
    old_log_prob: Float32
    old_value: Float32
    advantage: Float32
    returns: Float32


@dataclass(frozen=True)
class Rollout:
    """T steps of N environments, each field ``[T, N]`` or ``[T, N, ...]``.

    Observations ``[T, N, D]`` are as the network saw them, so normalised where the trial normalises. Images
    are ``[T, N, H, W, C]`` or ``[T, N, C, H, W]`` bytes.
    """

    obs: NDArray[Any]
    action: NDArray[Any]  # [T, N] integers or [T, N, A] reals, as sampled: not clipped to the action space
    log_prob: Float32  # of the actions under the policy that took them
    value: Float32  # of ``obs``
    reward: NDArray[np.float64]  # scaled where the trial scales them
    terminated: NDArray[np.bool_]  # the task itself ended: nothing follows
    truncated: NDArray[np.bool_]  # the episode was cut: what would follow is worth ``final_value``
    final_value: Float32  # of the last observation of a truncated episode; elsewhere 0

    @property
    def done(self) -> NDArray[np.bool_]:
        """Where an episode ended, for either reason."""
        return self.terminated | self.truncated

    def next_value(self, last_value: Float32) -> Float32:
        """Values ``[T, N]`` of the observations that the steps led to; ``last_value [N]`` follow the last."""
        following = np.concatenate([self.value[1:], last_value[None]])
        return np.where(self.truncated, self.final_value, following)

    def samples(self, advantage: NDArray[Any], returns: NDArray[Any]) -> Samples:
        """The rollout as samples, each with its advantage and its return, both ``[T, N]``."""
        arrays = (self.obs, self.action, self.log_prob, self.value, advantage, returns)
        flat = [array.reshape(-1, *array.shape[2:]) for array in arrays]
        return Samples(*(a.astype(np.float32) if a.dtype == np.float64 else a for a in flat))


class Episodes:
    """Undiscounted raw returns and lengths of the episodes that ended since the environments were reset."""

    def __init__(self, n_envs: int) -> None:
        self.returns: list[float] = []
        self.lengths: list[int] = []
        self._return = np.zeros(n_envs)
        self._length = np.zeros(n_envs, np.int64)

    def add(self, reward: NDArray[Any], done: NDArray[np.bool_]) -> None:
        """Add a rollout: its rewards ``[T, N]``, and where episodes ended ``[T, N]``."""
        begins = np.zeros(reward.shape[1], np.int64)
        for t, n in np.argwhere(done).tolist():
            self.returns.append(float(self._return[n] + reward[begins[n] : t + 1, n].sum()))
            self.lengths.append(int(self._length[n]) + t + 1 - int(begins[n]))
            self._return[n], self._length[n], begins[n] = 0.0, 0, t + 1
        for n, begin in enumerate(begins.tolist()):
            self._return[n] += reward[begin:, n].sum()
            self._length[n] += len(reward) - begin


def sampling_noise(rng: np.random.Generator, shape: tuple[int, ...], *, continuous: bool) -> Float32:
    """Noise that turns a policy's output into a sample of it, on any device.

    Means take standard normal noise. Logits take standard Gumbel noise: the largest of logits plus noise
    is a sample of their softmax (Gumbel 1954).
    """
    if continuous:
        return rng.standard_normal(shape, np.float32)
    exponential = rng.standard_exponential(shape, np.float32)
    return -np.log(np.maximum(exponential, np.finfo(np.float32).tiny))

"""What an engine is. Two exist: `AutogradEngine` takes any network, `NumpyEngine` is faster for one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.ppo.rollout import Float32, Samples
from ppo_hpo.spec.config import PPOConfig


class MinibatchStats(NamedTuple):
    """Parts of the loss of one minibatch and two diagnostics; numbers, or scalar tensors on a device."""

    policy_loss: Any  # clipped surrogate, to be minimised
    value_loss: Any  # loss of the critic, before its weight `vf_coef`
    entropy: Any  # mean entropy of the policy
    approx_kl: Any  # estimated KL divergence from the policy that acted
    clip_fraction: Any  # share of samples whose ratio was clipped


class Engine(Protocol):
    """Runs and differentiates a network. Arrays are numpy's; images ``[N, H, W, C]`` replace ``[N, D]``."""

    name: str

    def act(self, obs: NDArray[Any], noise: Float32 | None) -> NDArray[Any]:
        """Actions for observations ``[N, D]``: sampled by ``noise [N, A]``, or the mode without noise."""

    def values(self, obs: NDArray[Any]) -> Float32:
        """Values ``[B]`` of observations ``[B, D]``."""

    def log_probs(self, obs: NDArray[Any], action: NDArray[Any]) -> Float32:
        """Log-probabilities ``[B]`` of actions ``[B]`` or ``[B, A]``."""

    def load(self, samples: Samples) -> Any:
        """Bring the samples into the engine's own form, once for all passes."""

    def shuffled(self, loaded: Any, order: NDArray[np.int64], ppo: PPOConfig) -> Iterable[Any]:
        """Minibatches of what `load` returned, taken in ``order``, a permutation of the samples."""

    def backward(self, minibatch: Any, ppo: PPOConfig, clip_range: float) -> MinibatchStats:
        """Compute the gradient of the loss of one minibatch."""

    def mean(self, stats: list[MinibatchStats], norms: list[Any]) -> tuple[MinibatchStats, float]:
        """Means over minibatches, as numbers: of their statistics, and of the norms of their gradients."""

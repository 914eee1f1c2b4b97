"""The general engine: any network, any device, gradients by torch's autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppo_hpo import losses
from ppo_hpo.config import PPOConfig
from ppo_hpo.rollout import Float32, Samples

Criterion = Callable[[Tensor, Tensor], Tensor]


class Batch(NamedTuple):
    """`Samples` as tensors on a device, each ``[B, ...]``."""

    obs: Tensor
    action: Tensor
    old_log_prob: Tensor
    old_value: Tensor
    advantage: Tensor
    returns: Tensor


class AutogradEngine:
    """Acts, rates and differentiates through torch."""

    name = "autograd"

    def __init__(
        self, module: nn.Module, device: torch.device, *, continuous: bool, criterion: Criterion | None
    ) -> None:
        self._module = module
        self._device = device
        self._continuous = continuous
        self._criterion = criterion

    @torch.inference_mode()
    def act(self, obs: Float32, noise: Float32 | None) -> NDArray[Any]:
        """Actions for observations ``[N, D]``: sampled by ``noise [N, A]``, or the mode."""
        output = self._module.policy(self._tensor(obs))  # type: ignore[operator]
        if noise is not None:
            drawn = self._tensor(noise)
            output = output + drawn * self._log_std.exp() if self._continuous else output + drawn
        action = output if self._continuous else output.argmax(-1)
        return action.cpu().numpy()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def values(self, obs: Float32) -> Float32:
        """Values ``[B]`` of observations ``[B, D]``."""
        return self._value(self._tensor(obs)).cpu().numpy()

    @torch.inference_mode()
    def log_probs(self, obs: Float32, action: NDArray[Any]) -> Float32:
        """Log-probabilities ``[B]`` of actions ``[B]`` or ``[B, A]``."""
        log_prob, _ = self._rate(self._tensor(obs), self._tensor(action))
        return log_prob.cpu().numpy()

    def load(self, samples: Samples) -> Batch:
        """All samples on the device, which they reach once for all passes."""
        return Batch(*(self._tensor(array) for array in samples))

    def shuffled(self, batch: Batch, order: NDArray[np.int64], ppo: PPOConfig) -> list[Batch]:
        """The samples in ``order``, a minibatch at a time: gathered once, then sliced."""
        index = self._tensor(order)
        parts = [torch.split(tensor[index], ppo.batch_size) for tensor in batch]
        return [Batch(*tensors) for tensors in zip(*parts, strict=True)]

    def loss(self, batch: Batch, ppo: PPOConfig, clip_range: float) -> losses.LossParts:
        """The loss of one minibatch, and its parts."""
        log_prob, entropy = self._rate(batch.obs, batch.action)
        value = self._value(batch.obs)
        if self._criterion is None:
            critic = losses.value_loss(value, batch.old_value, batch.returns, ppo.clip_range_vf)
        else:
            critic = self._criterion(value, batch.returns)
        advantage = batch.advantage
        if ppo.normalize_advantage:
            advantage = losses.normalize_advantage(advantage)
        return losses.ppo_loss(
            log_prob,
            batch.old_log_prob,
            advantage,
            critic,
            entropy,
            clip_range=clip_range,
            ent_coef=ppo.ent_coef,
            vf_coef=ppo.vf_coef,
        )

    def backward(self, batch: Batch, ppo: PPOConfig, clip_range: float) -> Tensor:
        """Add the loss's gradient to the parameters'; return the parts of the loss, ``[5]``."""
        parts = self.loss(batch, ppo, clip_range)
        parts.loss.backward()  # type: ignore[no-untyped-call]
        return torch.stack([part.detach() for part in parts[1:]])

    @staticmethod
    def mean(rows: list[Tensor], norms: list[Tensor | float]) -> list[float]:
        """Means over minibatches; on a GPU this is where the host first waits for it."""
        norm = torch.stack([torch.as_tensor(norm) for norm in norms]).double().mean()
        return [*torch.stack(rows).double().mean(0).tolist(), float(norm)]

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _value(self, obs: Tensor) -> Tensor:
        return self._module.value(obs)  # type: ignore[operator, no-any-return]

    @property
    def _log_std(self) -> Tensor:
        return self._module.log_std  # type: ignore[return-value]

    def _rate(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        output = self._module.policy(obs)  # type: ignore[operator]
        if self._continuous:
            return losses.diagonal_gaussian(output, self._log_std, action)
        return losses.categorical(output, action)

"""The general engine: any network on any device, with gradients by torch's autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppo_hpo.ppo import losses
from ppo_hpo.ppo.gradient_engine import MinibatchStats
from ppo_hpo.ppo.rollout import Float32, Samples
from ppo_hpo.spec.config import PPOConfig

# Images that pass through a network at once outside of minibatches. 512 of 4 x 84 x 84 fill 100 MB there.
_IMAGES_AT_ONCE = 512

#: Policy output and values of one batch.
Outputs = tuple[Tensor, Tensor]
#: A loss of the critic: ``(value [B], returns [B]) -> scalar``.
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
    """Runs and differentiates any network through torch."""

    name = "autograd"

    def __init__(
        self, module: nn.Module, device: torch.device, *, continuous: bool, criterion: Criterion | None
    ) -> None:
        self._module: Any = module
        # Then acting computes the values too: `act_with_outputs` and `evaluate_outputs` replace `act`,
        # `log_probs` and `values`.
        self.reuses_outputs = hasattr(module, "policy_and_value")
        self._device, self._continuous, self._criterion = device, continuous, criterion

    @torch.inference_mode()
    def act(self, obs: NDArray[Any], noise: Float32 | None) -> NDArray[Any]:
        """Actions for observations ``[N, D]``: sampled by ``noise [N, A]``, or the mode without noise."""
        return self._choose(self._module.policy(self._tensor(obs)), noise)

    @torch.inference_mode()
    def act_with_outputs(self, obs: NDArray[Any], noise: Float32) -> tuple[NDArray[Any], Outputs]:
        """Actions for observations ``[N, D]``, and the network's outputs, which stay on the device."""
        outputs: Outputs = self._module.policy_and_value(self._tensor(obs))
        return self._choose(outputs[0], noise), outputs

    @torch.inference_mode()
    def evaluate_outputs(self, outputs: list[Outputs], action: NDArray[Any]) -> tuple[Float32, Float32]:
        """Log-probabilities and values ``[T * N]`` of the actions of T calls of `act_with_outputs`."""
        output, value = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        log_prob, _ = self._evaluate(output, self._tensor(action))
        return log_prob.cpu().numpy(), value.cpu().numpy()

    @torch.inference_mode()
    def values(self, obs: NDArray[Any]) -> Float32:
        """Values ``[B]`` of observations ``[B, D]``."""
        parts = [self._module.value(self._tensor(part)) for part in _portions(obs)]
        return torch.cat(parts).cpu().numpy()

    @torch.inference_mode()
    def log_probs(self, obs: NDArray[Any], action: NDArray[Any]) -> Float32:
        """Log-probabilities ``[B]`` of actions ``[B]`` or ``[B, A]``."""
        output = torch.cat([self._module.policy(self._tensor(part)) for part in _portions(obs)])
        log_prob, _ = self._evaluate(output, self._tensor(action))
        return log_prob.cpu().numpy()

    def _choose(self, output: Tensor, noise: Float32 | None) -> NDArray[Any]:
        if noise is not None:
            drawn = self._tensor(noise)
            output = output + drawn * self._module.log_std.exp() if self._continuous else output + drawn
        action = output if self._continuous else output.argmax(-1)
        return action.cpu().numpy()

    def load(self, samples: Samples) -> Batch:
        """The samples as tensors on the device."""
        return Batch(*(self._tensor(array) for array in samples))

    def shuffled(self, batch: Batch, order: NDArray[np.int64], ppo: PPOConfig) -> Iterator[Batch]:
        """Minibatches of the samples in ``order``: gathered once, then sliced.

        Images are gathered for each minibatch, so that memory never holds them twice.
        """
        index = self._tensor(order)
        images = batch.obs.ndim > 2
        obs = batch.obs if images else batch.obs[index]
        rest = [torch.split(tensor[index], ppo.batch_size) for tensor in batch[1:]]
        for number, chosen in enumerate(torch.split(index, ppo.batch_size)):
            first = number * ppo.batch_size
            part = obs[chosen] if images else obs[first : first + ppo.batch_size]
            yield Batch(part, *(tensors[number] for tensors in rest))

    def loss(self, batch: Batch, ppo: PPOConfig, clip_range: float) -> losses.LossParts:
        """The loss of one minibatch, and its parts."""
        if self.reuses_outputs:
            output, value = self._module.policy_and_value(batch.obs)
        else:
            output, value = self._module.policy(batch.obs), self._module.value(batch.obs)
        log_prob, entropy = self._evaluate(output, batch.action)
        if self._criterion is None:
            critic_loss = losses.value_loss(value, batch.old_value, batch.returns, ppo.clip_range_vf)
        else:
            critic_loss = self._criterion(value, batch.returns)
        advantage = batch.advantage
        if ppo.normalize_advantage:
            advantage = losses.normalize_advantage(advantage)
        return losses.ppo_loss(
            log_prob, batch.old_log_prob, advantage, critic_loss, entropy,
            clip_range=clip_range, ent_coef=ppo.ent_coef, vf_coef=ppo.vf_coef,
        )  # fmt: skip

    def backward(self, batch: Batch, ppo: PPOConfig, clip_range: float) -> MinibatchStats:
        """Add the gradient of the loss to the parameters' gradients; the statistics stay on the device."""
        parts = self.loss(batch, ppo, clip_range)
        parts.loss.backward()  # type: ignore[no-untyped-call]
        return MinibatchStats(*(part.detach() for part in parts[1:]))

    @staticmethod
    def mean(stats: list[MinibatchStats], norms: list[Any]) -> tuple[MinibatchStats, float]:
        """Means over minibatches, as numbers. On a GPU this is where the host first waits for it."""
        # The fused step of the CPU gives numbers.
        tensors = [
            n if isinstance(n, Tensor) else torch.tensor(n, dtype=torch.float32, device="cpu") for n in norms
        ]
        norm = torch.stack(tensors).double().mean()
        table = torch.stack([torch.stack(row) for row in stats])
        return MinibatchStats(*table.double().mean(0).tolist()), float(norm)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _evaluate(self, output: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[B]`` of actions under the policy's output, and entropies ``[B]``."""
        if self._continuous:
            return losses.diagonal_gaussian(output, self._module.log_std, action)
        return losses.categorical(output, action)


def _portions(obs: NDArray[Any]) -> list[NDArray[Any]]:
    """Split images into portions, since convolutions make them much larger. Vectors stay in one piece."""
    if obs.ndim <= 2:
        return [obs]
    return [obs[at : at + _IMAGES_AT_ONCE] for at in range(0, len(obs), _IMAGES_AT_ONCE)]

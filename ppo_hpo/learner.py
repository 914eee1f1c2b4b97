"""The learner: a network, its optimizer, and the update of PPO through autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppo_hpo import losses
from ppo_hpo.adam import FlatAdam
from ppo_hpo.config import OptimizerConfig, PPOConfig
from ppo_hpo.rollout import Float32, Rollout

Criterion = Callable[[Tensor, Tensor], Tensor]


class Batch(NamedTuple):
    """Samples for one update, each ``[B, ...]``."""

    obs: Tensor
    action: Tensor
    old_log_prob: Tensor
    old_value: Tensor
    advantage: Tensor
    returns: Tensor


@dataclass(frozen=True)
class UpdateStats:
    """Means over the minibatches of one rollout's update.

    Attributes:
        policy_loss: the clipped surrogate's.
        value_loss: the critic's, unweighted.
        entropy: of the policy.
        approx_kl: between the policy that acted and the one that was updated.
        clip_fraction: share of samples whose ratio was clipped.
        grad_norm: before clipping.
        n_updates: optimizer steps taken; fewer than planned where `target_kl` stopped them.
    """

    policy_loss: float
    value_loss: float
    entropy: float
    approx_kl: float
    clip_fraction: float
    grad_norm: float
    n_updates: int


class Learner:
    """Acts, rates and learns, on one device.

    Attributes:
        module: the network, with `policy`, `value` and `log_std`.
        optimizer: Adam over the module's parameters, which are views into its buffer.
        device: where both live.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        ppo: PPOConfig,
        device: torch.device,
        *,
        continuous: bool,
        criterion: Criterion | None = None,
    ) -> None:
        self.module = module.to(device)
        self.device = device
        self._ppo = ppo
        self._continuous = continuous
        self._criterion = criterion
        self._named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.optimizer = FlatAdam([p for _, p in self._named], optimizer.lr, optimizer.eps)

    # ------------------------------------------------------------------ acting

    @torch.inference_mode()
    def act(self, obs: Float32, noise: Float32 | None) -> NDArray[Any]:
        """Actions for observations ``[N, D]``: sampled by ``noise [N, A]``, or the mode."""
        output = self._policy(torch.from_numpy(obs).to(self.device))
        if noise is not None:
            drawn = torch.from_numpy(noise).to(self.device)
            output = output + drawn * self._log_std.exp() if self._continuous else output + drawn
        action = output if self._continuous else output.argmax(-1)
        return action.cpu().numpy()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def values(self, obs: Float32) -> Float32:
        """Values ``[B]`` of observations ``[B, D]``."""
        return self._value(torch.from_numpy(obs).to(self.device)).cpu().numpy()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def log_probs(self, obs: Float32, action: NDArray[Any]) -> Float32:
        """Log-probabilities ``[B]`` of actions ``[B]`` or ``[B, A]``."""
        log_prob, _ = self._rate(
            torch.from_numpy(obs).to(self.device), torch.from_numpy(action).to(self.device)
        )
        return log_prob.cpu().numpy()  # type: ignore[no-any-return]

    # ---------------------------------------------------------------- learning

    def batch(
        self, rollout: Rollout, advantage: NDArray[Any], returns: NDArray[Any]
    ) -> Batch:
        """All samples of a rollout on the device, time and environments flattened into one axis."""

        def flat(array: NDArray[Any]) -> Tensor:
            if array.dtype == np.float64:
                array = array.astype(np.float32)
            flattened = array.reshape(-1, *array.shape[2:])
            return torch.from_numpy(np.ascontiguousarray(flattened)).to(self.device)

        return Batch(
            flat(rollout.obs),
            flat(rollout.action),
            flat(rollout.log_prob),
            flat(rollout.value),
            flat(advantage),
            flat(returns),
        )

    def loss(self, batch: Batch, clip_range: float) -> losses.LossParts:
        """The loss of one minibatch."""
        ppo = self._ppo
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

    def minibatches(self, batch: Batch, stream: np.random.Generator) -> Iterator[Batch]:
        """All samples in a new random order, ``batch_size`` at a time."""
        size = self._ppo.batch_size
        order = torch.from_numpy(stream.permutation(len(batch.obs))).to(self.device)
        shuffled = [tensor[order] for tensor in batch]
        for parts in zip(*(tensor.split(size) for tensor in shuffled), strict=True):
            yield Batch(*parts)

    def update(
        self, batch: Batch, stream: np.random.Generator, lr: float, clip_range: float
    ) -> UpdateStats:
        """Improve the networks on one rollout: ``n_epochs`` passes over its minibatches.

        With ``target_kl`` the first minibatch whose estimated divergence exceeds 1.5 times it ends
        the update, before its own step is taken.
        """
        self.optimizer.lr = lr
        target_kl = self._ppo.target_kl
        history: list[Tensor] = []
        for _ in range(self._ppo.n_epochs):
            for minibatch in self.minibatches(batch, stream):
                parts = self.loss(minibatch, clip_range)
                if target_kl is not None and parts.approx_kl.item() > 1.5 * target_kl:
                    return self._stats(history, parts)
                parts.loss.backward()  # type: ignore[no-untyped-call]
                norm = self.optimizer.step(self._ppo.max_grad_norm)
                history.append(torch.stack([*(part.detach() for part in parts[1:]), norm]))
        return self._stats(history)

    @staticmethod
    def _stats(history: list[Tensor], stopped_by: losses.LossParts | None = None) -> UpdateStats:
        n_updates = len(history)
        if not history:  # the very first minibatch stopped the update: it is all there is to report
            assert stopped_by is not None
            norm = torch.zeros_like(stopped_by.loss)
            history = [torch.stack([*(part.detach() for part in stopped_by[1:]), norm])]
        return UpdateStats(*torch.stack(history).double().mean(0).tolist(), n_updates=n_updates)

    def finite(self) -> bool:
        """Whether every parameter is a finite number."""
        return self.optimizer.finite()

    # ------------------------------------------------------------------- state

    def reset_hyperparameters(self, optimizer: OptimizerConfig, ppo: PPOConfig) -> None:
        """Go on with other hyperparameters, as a forked trial does."""
        self._ppo = replace(ppo)
        self.optimizer.lr, self.optimizer.eps = optimizer.lr, optimizer.eps

    def state(self) -> dict[str, Tensor]:
        """Parameters, buffers and the optimizer's moments by name; the tensors themselves."""
        state = {f"model.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for moment, views in self.optimizer.moments().items():
            for (name, _), view in zip(self._named, views, strict=True):
                state[f"optimizer.{name}.{moment}"] = view
        state["optimizer.n_steps"] = torch.tensor(self.optimizer.n_steps)
        return state

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave; every name and shape must fit.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a tensor has another shape. Nothing was taken over.
        """
        own = self.state()
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"{name} has shape {tuple(state[name].shape)}, but {tuple(tensor.shape)} is needed"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        self.optimizer.n_steps = int(state["optimizer.n_steps"])

    # ----------------------------------------------------------------- network

    def _policy(self, obs: Tensor) -> Tensor:
        return self.module.policy(obs)  # type: ignore[operator, no-any-return]

    def _value(self, obs: Tensor) -> Tensor:
        return self.module.value(obs)  # type: ignore[operator, no-any-return]

    @property
    def _log_std(self) -> Tensor:
        return self.module.log_std  # type: ignore[return-value]

    def _rate(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        output = self._policy(obs)
        if self._continuous:
            return losses.diagonal_gaussian(output, self._log_std, action)
        return losses.categorical(output, action)

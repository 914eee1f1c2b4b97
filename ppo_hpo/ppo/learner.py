"""The learner: a network, its optimizer, and the update of PPO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppo_hpo.ppo import numpy_engine
from ppo_hpo.ppo.adam import FlatAdam
from ppo_hpo.ppo.autograd import AutogradEngine, Criterion
from ppo_hpo.ppo.networks import MLPActorCritic
from ppo_hpo.ppo.rollout import Float32, Samples
from ppo_hpo.spec.config import OptimizerConfig, PPOConfig


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
        engine: ``numpy`` or ``autograd``; see `_choose`.
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
        engine: str = "auto",
    ) -> None:
        """Put a network and its optimizer on a device.

        Args:
            module: the network.
            optimizer: Adam's hyperparameters.
            ppo: of the update.
            device: where to.
            continuous: whether actions are continuous.
            criterion: the critic's loss in the place of the mean squared error.
            engine: ``auto``, or ``autograd`` to take the general one where the fast one could be had.
        """
        if device.type == "cuda":
            # Left alone, cuDNN takes gradients of convolutions that add up in any order: a trial that goes
            # on would not end where it would have ended.
            torch.backends.cudnn.deterministic = True
        self.module = module.to(device)
        self.device = device
        self._ppo = ppo
        self._autograd = AutogradEngine(module, device, continuous=continuous, criterion=criterion)
        named = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        parameters = [p for p in module.parameters() if p.requires_grad]
        is_fast = engine == "auto" and _is_fast(module, device, criterion)
        if is_fast:
            assert isinstance(module, MLPActorCritic)
            parameters = numpy_engine.parameter_order(module)
        self._names = [named[id(p)] for p in parameters]
        self.optimizer = FlatAdam(parameters, optimizer.lr, optimizer.eps)
        self._engine: Any = self._autograd
        if is_fast:
            assert isinstance(module, MLPActorCritic)
            self._engine = numpy_engine.NumpyEngine(
                module, self.optimizer.flat, self.optimizer.grad, continuous=continuous
            )
        self.engine: str = self._engine.name
        self.keeps: bool = self._engine.keeps
        if self.keeps:
            self.act_and_keep, self.rate_kept = self._engine.act_and_keep, self._engine.rate_kept
        # The rollout asks for these thousands of times: no step in between.
        self.act: Callable[[Float32, Float32 | None], NDArray[Any]] = self._engine.act
        self.values: Callable[[Float32], Float32] = self._engine.values
        self.log_probs: Callable[[Float32, NDArray[Any]], Float32] = self._engine.log_probs

    def loss(self, samples: Samples, clip_range: float) -> float:
        """The loss of some samples, without learning from them."""
        with torch.no_grad():
            batch = self._autograd.load(samples)
            return float(self._autograd.loss(batch, self._ppo, clip_range).loss)

    def minibatches(self, samples: Samples, stream: np.random.Generator) -> Iterator[Any]:
        """Each pass's minibatches, in turn: all samples in a new random order, ``batch_size`` at a time."""
        loaded = self._engine.load(samples)
        for _ in range(self._ppo.n_epochs):
            order = stream.permutation(len(samples.obs))
            yield from self._engine.shuffled(loaded, order, self._ppo)

    def update(
        self, samples: Samples, stream: np.random.Generator, lr: float, clip_range: float
    ) -> UpdateStats:
        """Improve the networks on one rollout: ``n_epochs`` passes over its minibatches.

        With ``target_kl`` the first minibatch whose estimated divergence exceeds 1.5 times it ends
        the update, before its own step is taken.
        """
        ppo, optimizer, backward = self._ppo, self.optimizer, self._engine.backward
        optimizer.lr = lr
        rows: list[Any] = []
        norms: list[Any] = []
        for minibatch in self.minibatches(samples, stream):
            row = backward(minibatch, ppo, clip_range)
            if ppo.target_kl is not None and float(row[3]) > 1.5 * ppo.target_kl:
                optimizer.grad.zero_()
                if not rows:  # the very first one stopped the update: it is all there is to report
                    return _stats(self._engine.mean([row], [0.0]), 0)
                break
            norms.append(optimizer.step(ppo.max_grad_norm))
            rows.append(row)
        return _stats(self._engine.mean(rows, norms), len(rows))

    def finite(self) -> bool:
        """Whether every parameter is a finite number."""
        return self.optimizer.finite()

    # ------------------------------------------------------------------- state

    def state(self) -> dict[str, Tensor]:
        """Parameters, buffers and the optimizer's moments by name; the tensors themselves."""
        state = {f"model.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for moment, views in self.optimizer.moments().items():
            for name, view in zip(self._names, views, strict=True):
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


def _stats(means: list[float], n_updates: int) -> UpdateStats:
    policy_loss, value_loss, entropy, approx_kl, clip_fraction, grad_norm = means
    return UpdateStats(policy_loss, value_loss, entropy, approx_kl, clip_fraction, grad_norm, n_updates)


def _is_fast(module: nn.Module, device: torch.device, criterion: Criterion | None) -> bool:
    """The one place that decides between the engines.

    The fast one knows the gradients of one network and one loss, on the CPU and in single precision;
    everything else takes the general one.
    """
    return (
        type(module) is MLPActorCritic
        and device.type == "cpu"
        and criterion is None
        and all(p.dtype == torch.float32 and p.requires_grad for p in module.parameters())
    )

"""The learner: a network, its optimizer, and the update of PPO."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppo_hpo.ppo.adam import FlatAdam
from ppo_hpo.ppo.autograd import AutogradEngine, Criterion
from ppo_hpo.ppo.device import seeded_rng
from ppo_hpo.ppo.gradient_engine import Engine, MinibatchStats
from ppo_hpo.ppo.networks import MLPActorCritic, NatureCNN
from ppo_hpo.ppo.numpy_engine import NumpyEngine, parameter_order
from ppo_hpo.ppo.rollout import Float32, Samples
from ppo_hpo.spec.config import OptimizerConfig, PPOConfig, no_bound_is_infinite
from ppo_hpo.spec.errors import UserError


@dataclass(frozen=True)
class UpdateStats:
    """Means of `MinibatchStats` over the minibatches of one rollout's update, and two numbers more."""

    policy_loss: float
    value_loss: float
    entropy: float
    approx_kl: float
    clip_fraction: float
    grad_norm: float  # mean norm of the gradient before clipping
    n_updates: int  # optimizer steps taken; fewer than planned where `target_kl` stopped the update

    def finite(self) -> bool:
        """Whether the losses and the entropy are finite numbers."""
        return bool(np.isfinite((self.policy_loss, self.value_loss, self.entropy)).all())


class Learner:
    """A network that acts, evaluates and learns, on one device.

    The network has `policy`, `value` and, for continuous actions, `log_std`. Without a ``criterion`` the loss
    of the critic is the mean squared error. The ``engine`` ``auto`` chooses the numpy engine where it can.
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
        if device.type == "cuda":
            # Left alone, cuDNN chooses gradients of convolutions that add up in any order. A resumed trial
            # would then end elsewhere than one that never stopped.
            torch.backends.cudnn.deterministic = True
        self.module, self.device, self._ppo = module.to(device), device, ppo
        self._on = functools.partial(
            Learner, module, optimizer, ppo, continuous=continuous, criterion=criterion, engine=engine
        )
        self._autograd = AutogradEngine(module, device, continuous=continuous, criterion=criterion)
        by_hand = module if engine == "auto" and _numpy_engine_fits(module, device, criterion) else None
        trained = [p for p in module.parameters() if p.requires_grad]
        if by_hand is not None:
            trained = parameter_order(by_hand)
        self._trained = {id(p) for p in trained}
        name_of = {id(p): name for name, p in module.named_parameters()}
        self._names = [name_of[id(p)] for p in trained]
        self.optimizer = FlatAdam(trained, optimizer.lr, optimizer.eps)
        self._engine: Engine = self._autograd
        if by_hand is not None:
            flat, grad = self.optimizer.flat, self.optimizer.grad
            self._engine = NumpyEngine(by_hand, flat, grad, continuous=continuous)
        self.engine: str = self._engine.name
        self.reuses_outputs = self._engine is self._autograd and self._autograd.reuses_outputs
        self.act_with_outputs = self._autograd.act_with_outputs
        self.evaluate_outputs = self._autograd.evaluate_outputs
        #: Whether the network draws random numbers as it learns, as for dropout.
        self.draws = False
        # Ours have no layers with a train mode, and changing modes takes 0.2 ms.
        self._has_modes = type(module) not in (MLPActorCritic, NatureCNN)
        module.eval()
        # A rollout calls these thousands of times, so nothing stands between.
        self.act: Callable[[NDArray[Any], Float32 | None], NDArray[Any]] = self._engine.act
        self.values: Callable[[NDArray[Any]], Float32] = self._engine.values
        self.log_probs: Callable[[NDArray[Any], NDArray[Any]], Float32] = self._engine.log_probs

    def loss(self, samples: Samples, clip_range: float) -> float:
        """The loss of some samples, without learning from them."""
        with torch.no_grad():
            batch = self._autograd.load(samples)
            return float(self._autograd.loss(batch, self._ppo, clip_range).loss)

    def minibatches(self, samples: Samples, rng: np.random.Generator) -> Iterator[Any]:
        """The minibatches of all passes: each pass takes all samples in a new random order."""
        loaded = self._engine.load(samples)
        for _ in range(self._ppo.n_epochs):
            order = rng.permutation(len(samples.obs))
            yield from self._engine.shuffled(loaded, order, self._ppo)

    def update(self, samples: Samples, rng: np.random.Generator, lr: float, clip_range: float) -> UpdateStats:
        """Improve the network on one rollout: ``n_epochs`` passes over its minibatches.

        With ``target_kl`` the update ends at the first minibatch whose estimated KL divergence exceeds 1.5
        times it, before the optimizer step of that minibatch.
        """
        self._refuse_other_parameters()
        self.attach()
        draws = seeded_rng(int(rng.integers(2**63)), self.device) if self.draws else nullcontext()
        if self._has_modes:
            self.module.train()
        try:
            with draws:
                return self._update(samples, rng, lr, clip_range)
        finally:
            if self._has_modes:
                self.module.eval()

    def _update(
        self, samples: Samples, rng: np.random.Generator, lr: float, clip_range: float
    ) -> UpdateStats:
        ppo, optimizer, backward = self._ppo, self.optimizer, self._engine.backward
        max_grad_norm = no_bound_is_infinite(ppo.max_grad_norm)
        optimizer.lr = lr
        taken: list[MinibatchStats] = []
        norms: list[Tensor | float] = []
        for minibatch in self.minibatches(samples, rng):
            stats = backward(minibatch, ppo, clip_range)
            if ppo.target_kl is not None and float(stats.approx_kl) > 1.5 * ppo.target_kl:
                optimizer.grad.zero_()
                if not taken:  # the very first minibatch ended the update: it is all there is to report
                    return self._means([stats], [0.0], n_updates=0)
                break
            norms.append(optimizer.step(max_grad_norm))
            taken.append(stats)
        return self._means(taken, norms, n_updates=len(taken))

    def _means(self, stats: list[MinibatchStats], norms: list[Tensor | float], n_updates: int) -> UpdateStats:
        means, grad_norm = self._engine.mean(stats, norms)
        return UpdateStats(**means._asdict(), grad_norm=grad_norm, n_updates=n_updates)

    def to(self, device: torch.device) -> Learner:
        """A learner on another device, with this one's network and state; this one is of no use after."""
        state = {name: tensor.detach().clone() for name, tensor in self.state().items()}
        return _rebuilt(self._on, device, state, self.draws)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy's engine must share the memory of the copy's network, not have arrays of its own.
        return _rebuilt, (self._on, self.device, self.state(), self.draws)

    def attach(self) -> None:
        """Act and learn with what the module has now, whatever somebody did to it; see `FlatAdam.attach`."""
        self.optimizer.attach()
        if self.module.training:
            self.module.eval()

    def _refuse_other_parameters(self) -> None:
        trained = {id(p) for p in self.module.parameters() if p.requires_grad}
        if trained != self._trained:
            raise UserError(
                "The parameters of the network must stay the same, but some were added, removed or frozen "
                "after `init`. Change the network before `init`."
            )

    def finite(self) -> bool:
        """Whether every parameter, buffer and moment of the optimizer is a finite number."""
        return self.optimizer.finite() and all(bool(torch.isfinite(b).all()) for b in self.module.buffers())

    # ------------------------------------------------------------------- state

    def state(self) -> dict[str, Tensor]:
        """Parameters, buffers and the optimizer's moments by name: the live tensors."""
        state = {f"model.{name}": tensor for name, tensor in self.module.state_dict().items()}
        for moment, views in self.optimizer.moments().items():
            for name, view in zip(self._names, views, strict=True):
                state[f"optimizer.{name}.{moment}"] = view
        state["optimizer.n_steps"] = torch.tensor(self.optimizer.n_steps, device="cpu")
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned. Where anything does not fit, nothing is loaded."""
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


def _rebuilt(
    on: Callable[..., Learner], device: torch.device, state: Mapping[str, Tensor], draws: bool
) -> Learner:
    learner = on(device=device)
    learner.load(state)
    learner.draws = draws
    return learner


def _numpy_engine_fits(
    module: nn.Module, device: torch.device, criterion: Criterion | None
) -> TypeGuard[MLPActorCritic]:
    """The only place that decides between the engines.

    The numpy engine has the gradients of one network and one loss, on the CPU and in single precision.
    """
    return (
        type(module) is MLPActorCritic
        and device.type == "cpu"
        and criterion is None
        and all(p.dtype == torch.float32 and p.requires_grad for p in module.parameters())
    )

"""The actor-critic network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class MLPActorCritic(nn.Module):
    """Two multilayer perceptrons that share nothing: one acts, one judges (details 13 and 26).

    A network of your own needs the same three things: `policy`, `value` and, for continuous
    actions, `log_std`.

    Attributes:
        log_std: ``[A]`` log standard deviations, the same in every state (detail 24), or None
            where actions are discrete.
    """

    log_std: nn.Parameter | None

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        *,
        continuous: bool,
        width: int = 64,
        depth: int = 2,
        activation: str = "tanh",
        ortho_init: bool = True,
        log_std_init: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Build and initialise the networks.

        Args:
            obs_dim: D, entries of an observation.
            action_dim: A, dimensions of a continuous action or number of discrete ones.
            continuous: whether actions are continuous.
            width: units in each hidden layer.
            depth: hidden layers.
            activation: ``tanh`` or ``relu``.
            ortho_init: orthogonal weights with gain sqrt(2), 0.01 for the policy's last layer and
                1 for the value's, and zero biases (detail 2); else torch's own initialisation.
            log_std_init: initial log standard deviation.
            seed: of the initialisation.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shape = (width, depth, activation)
        # Linear layers first fill themselves from torch's global stream, which is the caller's.
        # (`skip_init` would leave that out, but imports sympy: a third of a second in every trial.)
        with torch.random.fork_rng(devices=[]):
            self.actor = _mlp(obs_dim, action_dim, *shape)
            self.critic = _mlp(obs_dim, 1, *shape)
        self.log_std = nn.Parameter(torch.full((action_dim,), log_std_init)) if continuous else None
        for network, last_gain in ((self.actor, 0.01), (self.critic, 1.0)):
            layers = [layer for layer in network if isinstance(layer, nn.Linear)]
            for layer in layers:
                if ortho_init:
                    gain = last_gain if layer is layers[-1] else math.sqrt(2.0)
                    nn.init.orthogonal_(layer.weight, gain, generator=generator)
                    nn.init.zeros_(layer.bias)
                else:
                    bound = 1.0 / math.sqrt(layer.in_features)
                    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def policy(self, obs: Tensor) -> Tensor:
        """Logits or means, ``[B, A]``, for observations ``[B, D]``."""
        return self.actor(obs)  # type: ignore[no-any-return]

    def value(self, obs: Tensor) -> Tensor:
        """Values, ``[B]``, for observations ``[B, D]``."""
        return self.critic(obs).squeeze(-1)  # type: ignore[no-any-return]

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Both, for summaries and export."""
        return self.policy(obs), self.value(obs)


def _mlp(inputs: int, outputs: int, width: int, depth: int, activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers.append(nn.Linear(width if index else inputs, width))
        layers.append(_ACTIVATIONS[activation]())
    layers.append(nn.Linear(width, outputs))
    return nn.Sequential(*layers)

"""The actor-critic networks: one for vectors, one for images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class MLPActorCritic(nn.Module):
    """Two multilayer perceptrons that share nothing: one acts, one judges (details 13 and 26).

    A network of your own needs the same three things: `policy`, `value` and, for continuous
    actions, `log_std`. If the two share layers, give it `policy_and_value` too, as `NatureCNN` has it.

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
                gain = last_gain if layer is layers[-1] else math.sqrt(2.0)
                _initialise(layer, gain, generator, orthogonal=ortho_init)

    def policy(self, obs: Tensor) -> Tensor:
        """Logits or means, ``[B, A]``, for observations ``[B, D]``."""
        return self.actor(obs)  # type: ignore[no-any-return]

    def value(self, obs: Tensor) -> Tensor:
        """Values, ``[B]``, for observations ``[B, D]``."""
        return self.critic(obs).squeeze(-1)  # type: ignore[no-any-return]

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Both, for summaries and export."""
        return self.policy(obs), self.value(obs)


class NatureCNN(nn.Module):
    """One convolutional network that acts and judges (details 21 and 22; Mnih et al. 2015).

    Three convolutions (32 of 8x8 with stride 4, 64 of 4x4 with stride 2, 64 of 3x3) and a dense layer, each
    followed by max(x, 0), and a linear head each for policy and value. Parameters have the shapes and the
    order of Stable-Baselines3's `NatureCNN`.

    Attributes:
        log_std: as in `MLPActorCritic`.
    """

    log_std: nn.Parameter | None

    def __init__(
        self,
        image_shape: tuple[int, ...],
        action_dim: int,
        *,
        continuous: bool,
        channels_last: bool,
        features_dim: int = 512,
        ortho_init: bool = True,
        log_std_init: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Build and initialise the network.

        Args:
            image_shape: ``(H, W, C)`` or ``(C, H, W)``, H and W at least 36.
            action_dim: A, dimensions of a continuous action or number of discrete ones.
            continuous: whether actions are continuous.
            channels_last: whether an image is ``(H, W, C)``.
            features_dim: units of the dense layer.
            ortho_init: as in `MLPActorCritic`, with gain sqrt(2) for convolutions and the dense layer.
            log_std_init: initial log standard deviation.
            seed: of the initialisation.
        """
        super().__init__()
        self._channels_last = channels_last
        generator = torch.Generator().manual_seed(seed)
        height, width, channels = image_shape if channels_last else (*image_shape[1:], image_shape[0])
        rows, columns = (after_convolutions(length) for length in (height, width))
        with torch.random.fork_rng(devices=[]):
            self.convolutions = nn.Sequential(
                nn.Conv2d(channels, 32, 8, stride=4), nn.ReLU(),
                nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
                nn.Conv2d(64, 64, 3), nn.ReLU(),
            )  # fmt: skip
            self.dense = nn.Sequential(nn.Flatten(), nn.Linear(64 * rows * columns, features_dim), nn.ReLU())
            self.policy_head = nn.Linear(features_dim, action_dim)
            self.value_head = nn.Linear(features_dim, 1)
        self.log_std = nn.Parameter(torch.full((action_dim,), log_std_init)) if continuous else None
        gains: dict[nn.Module, float] = {self.policy_head: 0.01, self.value_head: 1.0}
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                _initialise(layer, gains.get(layer, math.sqrt(2.0)), generator, orthogonal=ortho_init)

    def policy(self, images: Tensor) -> Tensor:
        """Logits or means, ``[B, A]``, for images ``[B, *image_shape]`` of bytes."""
        return self.policy_head(self._features(images))  # type: ignore[no-any-return]

    def value(self, images: Tensor) -> Tensor:
        """Values, ``[B]``, for images ``[B, *image_shape]`` of bytes."""
        return self.value_head(self._features(images)).squeeze(-1)  # type: ignore[no-any-return]

    def policy_and_value(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from one pass through the layers that they share."""
        features = self._features(images)
        return self.policy_head(features), self.value_head(features).squeeze(-1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both, for summaries and export."""
        return self.policy_and_value(images)

    def _features(self, images: Tensor) -> Tensor:
        if self._channels_last:
            images = images.permute(0, 3, 1, 2)
        # On the CPU convolutions and their gradients take a third of the time where channels lie together in
        # memory; torch then keeps them so in every layer.
        pixels = images.contiguous(memory_format=torch.channels_last) / 255.0
        return self.dense(self.convolutions(pixels))  # type: ignore[no-any-return]


def after_convolutions(length: int) -> int:
    """Rows or columns that the convolutions leave of so many."""
    for size, stride in ((8, 4), (4, 2), (3, 1)):
        length = (length - size) // stride + 1
    return length


def _initialise(
    layer: nn.Conv2d | nn.Linear, gain: float, generator: torch.Generator, *, orthogonal: bool
) -> None:
    assert layer.bias is not None
    if orthogonal:
        nn.init.orthogonal_(layer.weight, gain, generator=generator)
        nn.init.zeros_(layer.bias)
    else:
        bound = 1.0 / math.sqrt(layer.weight[0].numel())
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def _mlp(inputs: int, outputs: int, width: int, depth: int, activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers.append(nn.Linear(width if index else inputs, width))
        layers.append(_ACTIVATIONS[activation]())
    layers.append(nn.Linear(width, outputs))
    return nn.Sequential(*layers)

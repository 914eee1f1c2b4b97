"""The actor-critic networks: one for vectors, one for images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ppo_hpo.spec.config import ModelConfig

_DEFAULT = ModelConfig()
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
# The caller's `torch.set_default_dtype` and `torch.set_default_device` must not matter.
_HERE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class MLPActorCritic(nn.Module):
    """Two multilayer perceptrons that share no layers: an actor and a critic (details 13 and 26).

    A network of your own needs `policy`, `value` and, for continuous actions, `log_std`. If the two share
    layers, give it `policy_and_value` too, as `NatureCNN` has.
    """

    #: ``[A]`` log standard deviations, the same in every state (detail 24); None where actions are discrete.
    log_std: nn.Parameter | None

    def __init__(
        self, obs_dim: int, action_dim: int, model: ModelConfig = _DEFAULT, *, continuous: bool,
        seed: int | None = 0,
    ) -> None:  # fmt: skip
        """Build and initialise the networks, for observations ``[D]`` and ``A`` actions or their dimensions.

        With `ortho_init` weights are orthogonal, with gain sqrt(2), 0.01 for the last layer of the actor and
        1 for that of the critic, and biases are zero (detail 2). Without it they are as torch initialises
        them. Without a seed nothing is initialised, since the weights will be loaded.
        """
        super().__init__()
        # Linear layers first initialise themselves with torch's global rng, which is the caller's.
        # (`skip_init` would leave that out, but imports sympy: a third of a second in every trial.)
        with torch.random.fork_rng(devices=[]):
            self.actor = _mlp(obs_dim, action_dim, model)
            self.critic = _mlp(obs_dim, 1, model)
        self.log_std = _log_std(action_dim, model) if continuous else None
        _initialise(self, self.actor[-1], self.critic[-1], seed, orthogonal=model.ortho_init)

    def policy(self, obs: Tensor) -> Tensor:
        """Logits or means, ``[B, A]``, for observations ``[B, D]``."""
        return self.actor(obs)  # type: ignore[no-any-return]

    def value(self, obs: Tensor) -> Tensor:
        """Values, ``[B]``, for observations ``[B, D]``."""
        return self.critic(obs).squeeze(-1)  # type: ignore[no-any-return]

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Policy output and values, for summaries and export."""
        return self.policy(obs), self.value(obs)


class NatureCNN(nn.Module):
    """One convolutional network for actor and critic (details 21 and 22; Mnih et al. 2015).

    It has three convolutions (32 of 8x8 with stride 4, 64 of 4x4 with stride 2, 64 of 3x3) and a dense layer,
    each followed by max(x, 0). Policy and value have a linear head each. Parameters have the shapes and the
    order of those of Stable-Baselines3's `NatureCNN`.
    """

    log_std: nn.Parameter | None

    def __init__(
        self,
        image_shape: tuple[int, ...],
        action_dim: int,
        model: ModelConfig = _DEFAULT,
        *,
        continuous: bool,
        channels_last: bool,
        seed: int | None = 0,
    ) -> None:
        """Build and initialise the network, with gain sqrt(2) for convolutions and the dense layer.

        ``image_shape`` is ``(H, W, C)`` with ``channels_last``, else ``(C, H, W)``; H and W are at least 36.
        """
        super().__init__()
        self._channels_last = channels_last
        height, width, channels = image_shape if channels_last else (*image_shape[1:], image_shape[0])
        rows, columns = (after_convolutions(length) for length in (height, width))
        with torch.random.fork_rng(devices=[]):
            self.convolutions = nn.Sequential(
                nn.Conv2d(channels, 32, 8, stride=4, **_HERE), nn.ReLU(),
                nn.Conv2d(32, 64, 4, stride=2, **_HERE), nn.ReLU(),
                nn.Conv2d(64, 64, 3, **_HERE), nn.ReLU(),
            )  # fmt: skip
            features = model.features_dim
            dense = nn.Linear(64 * rows * columns, features, **_HERE)
            self.dense = nn.Sequential(nn.Flatten(), dense, nn.ReLU())
            self.policy_head = nn.Linear(features, action_dim, **_HERE)
            self.value_head = nn.Linear(features, 1, **_HERE)
        self.log_std = _log_std(action_dim, model) if continuous else None
        _initialise(self, self.policy_head, self.value_head, seed, orthogonal=model.ortho_init)

    def policy(self, images: Tensor) -> Tensor:
        """Logits or means, ``[B, A]``, for images ``[B, *image_shape]`` of bytes."""
        return self.policy_head(self._features(images))  # type: ignore[no-any-return]

    def value(self, images: Tensor) -> Tensor:
        """Values, ``[B]``, for images ``[B, *image_shape]`` of bytes."""
        return self.value_head(self._features(images)).squeeze(-1)  # type: ignore[no-any-return]

    def policy_and_value(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Policy output and values, from one pass through the layers that they share."""
        features = self._features(images)
        return self.policy_head(features), self.value_head(features).squeeze(-1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Policy output and values, for summaries and export."""
        return self.policy_and_value(images)

    def _features(self, images: Tensor) -> Tensor:
        if self._channels_last:
            images = images.permute(0, 3, 1, 2)
        # On the CPU convolutions and their gradients take a third of the time where the channels of a pixel
        # are adjacent in memory. Torch then keeps them so in every layer.
        pixels = images.contiguous(memory_format=torch.channels_last).float() / 255.0
        return self.dense(self.convolutions(pixels))  # type: ignore[no-any-return]


def after_convolutions(length: int) -> int:
    """Rows or columns that the convolutions of `NatureCNN` leave of ``length``."""
    for size, stride in ((8, 4), (4, 2), (3, 1)):
        length = (length - size) // stride + 1
    return length


def _initialise(
    network: nn.Module, policy_head: nn.Module, value_head: nn.Module, seed: int | None, *, orthogonal: bool
) -> None:
    if seed is None:
        return
    generator = torch.Generator().manual_seed(seed)
    gains = {policy_head: 0.01, value_head: 1.0}
    for layer in network.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        assert layer.bias is not None
        if orthogonal:
            nn.init.orthogonal_(layer.weight, gains.get(layer, math.sqrt(2.0)), generator=generator)
            nn.init.zeros_(layer.bias)
        else:
            bound = 1.0 / math.sqrt(layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def _log_std(action_dim: int, model: ModelConfig) -> nn.Parameter:
    return nn.Parameter(torch.full((action_dim,), model.log_std_init, **_HERE))


def _mlp(inputs: int, outputs: int, model: ModelConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(model.depth):
        layers.append(nn.Linear(model.width if index else inputs, model.width, **_HERE))
        layers.append(_ACTIVATIONS[model.activation]())
    layers.append(nn.Linear(model.width, outputs, **_HERE))
    return nn.Sequential(*layers)

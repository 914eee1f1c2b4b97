"""The fast engine: a multilayer perceptron on the CPU, its gradient worked out by hand, in numpy.

For the small networks of PPO most of autograd's time is bookkeeping. Here actor and critic, which have the
same shape, run as one stack ``[2, B, width]``; the arrays are allocated once and share their memory with the
torch module's parameters. Outputs of the last layers lie as ``[A, B]``, so that sums over actions run along
contiguous memory. `tests/test_fast.py` holds every gradient to autograd's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ppo_hpo.config import PPOConfig
from ppo_hpo.networks import MLPActorCritic
from ppo_hpo.rollout import Float32, Samples

_HALF_LOG_TWO_PI = np.float32(0.5 * math.log(2.0 * math.pi))
_ONE = np.float32(1.0)


@dataclass(frozen=True)
class _Parameters:
    """Views into one flat buffer, of the parameters or of their gradients.

    Attributes:
        weights: ``[2, out, in]`` for each hidden layer, the actor's and the critic's.
        biases: ``[2, 1, out]`` for each hidden layer.
        policy_weight: ``[A, width]``.
        policy_bias: ``[A, 1]``.
        value_weight: ``[1, width]``.
        value_bias: ``[1, 1]``.
        log_std: ``[A, 1]``; empty where actions are discrete.
    """

    weights: list[Float32]
    biases: list[Float32]
    policy_weight: Float32
    policy_bias: Float32
    value_weight: Float32
    value_bias: Float32
    log_std: Float32


def parameter_order(module: MLPActorCritic) -> list[nn.Parameter]:
    """The module's parameters in the order of the flat buffer: by layer, the actor's beside the critic's."""
    actor = [layer for layer in module.actor if isinstance(layer, nn.Linear)]
    critic = [layer for layer in module.critic if isinstance(layer, nn.Linear)]
    order: list[Any] = []
    for one, other in zip(actor[:-1], critic[:-1], strict=True):
        order += [one.weight, other.weight, one.bias, other.bias]
    order += [actor[-1].weight, actor[-1].bias, critic[-1].weight, critic[-1].bias]
    return order + ([] if module.log_std is None else [module.log_std])


def _views(flat: Float32, module: MLPActorCritic) -> _Parameters:
    linear = [layer for layer in module.actor if isinstance(layer, nn.Linear)]
    position = 0

    def take(*shape: int) -> Float32:
        nonlocal position
        begin, position = position, position + math.prod(shape)
        return flat[begin:position].reshape(shape)

    weights, biases = [], []
    for layer in linear[:-1]:
        weights.append(take(2, layer.out_features, layer.in_features))
        biases.append(take(2, 1, layer.out_features))
    actions, width = linear[-1].out_features, linear[-1].in_features
    heads = take(actions, width), take(actions, 1), take(1, width), take(1, 1)
    log_std = take(0 if module.log_std is None else actions, 1)
    assert position == len(flat)
    return _Parameters(weights, biases, *heads, log_std)


class NumpyEngine:
    """Acts, rates and differentiates an `MLPActorCritic` in numpy, on the CPU."""

    name = "numpy"

    def __init__(
        self, module: MLPActorCritic, flat: torch.Tensor, grad: torch.Tensor, *, continuous: bool
    ) -> None:
        """Look at the network's memory.

        Args:
            module: the network.
            flat: its parameters in `parameter_order`, which they are views into.
            grad: their gradients likewise.
            continuous: whether actions are continuous.
        """
        self._parameters = _views(flat.numpy(), module)
        self._grad = _views(grad.numpy(), module)
        self._continuous = continuous
        self._tanh = any(isinstance(layer, nn.Tanh) for layer in module.actor)
        self._zero = np.zeros(1, np.float32)
        self._buffers: dict[int, list[tuple[Float32, Float32]]] = {}

    # ------------------------------------------------------------------ acting

    def act(self, obs: Float32, noise: Float32 | None) -> NDArray[Any]:
        """Actions for observations ``[N, D]``: sampled by ``noise [N, A]``, or the mode."""
        p = self._parameters
        output = self._hidden(obs, 0) @ p.policy_weight.T + p.policy_bias[:, 0]
        if noise is not None:
            output += noise * np.exp(p.log_std[:, 0]) if self._continuous else noise
        return output if self._continuous else output.argmax(1)

    def values(self, obs: Float32) -> Float32:
        """Values ``[B]`` of observations ``[B, D]``."""
        p = self._parameters
        value: Float32 = self._hidden(obs, 1) @ p.value_weight[0]
        value += p.value_bias[0]
        return value

    def log_probs(self, obs: Float32, action: NDArray[Any]) -> Float32:
        """Log-probabilities ``[B]`` of actions ``[B]`` or ``[B, A]``."""
        p = self._parameters
        output = p.policy_weight @ self._hidden(obs, 0).T + p.policy_bias
        if self._continuous:
            scaled = (action.T - output) * np.exp(-p.log_std)
            density: Float32 = -(0.5 * scaled * scaled + p.log_std + _HALF_LOG_TWO_PI).sum(0)
            return density
        chosen: Float32 = _log_softmax(output)[action, np.arange(len(action))]
        return chosen

    def _hidden(self, obs: Float32, which: int) -> Float32:
        """The last hidden layer of the actor (0) or the critic (1), ``[B, width]``."""
        h = obs
        for weight, bias in zip(self._parameters.weights, self._parameters.biases, strict=True):
            h = h @ weight[which].T
            h += bias[which]
            self._activate(h)
        return h

    def _activate(self, h: Float32) -> None:
        if self._tanh:
            np.tanh(h, out=h)
        else:
            # With an array of zeros: numpy's maximum with a scalar takes twice as long.
            if len(self._zero) < h.shape[-1]:
                self._zero = np.zeros(h.shape[-1], np.float32)
            np.maximum(h, self._zero[: h.shape[-1]], out=h)

    # ---------------------------------------------------------------- learning

    def load(self, samples: Samples) -> Samples:
        """The samples: they are where they are needed already."""
        return samples

    def shuffled(self, samples: Samples, order: NDArray[np.int64], size: int) -> list[Samples]:
        """The samples in ``order``, ``size`` at a time: gathered once, then sliced."""
        gathered = [np.take(array, order, axis=0) for array in samples]
        return [
            Samples(*(array[start : start + size] for array in gathered))
            for start in range(0, len(order), size)
        ]

    def backward(self, batch: Samples, ppo: PPOConfig, clip_range: float) -> list[float]:
        """Set the gradient of the loss; return its parts: policy, value, entropy, KL, clip fraction.

        The loss is `losses.ppo_loss`; the names of gradients are ``d_`` and what they are with respect to.
        """
        p, n = self._parameters, len(batch.obs)
        layers = self._workspace(n)
        below = batch.obs
        for weight, bias, (h, _) in zip(p.weights, p.biases, layers, strict=True):
            np.matmul(below, weight.transpose(0, 2, 1), out=h)
            h += bias
            self._activate(h)
            below = h
        top = below
        output = p.policy_weight @ top[0].T
        output += p.policy_bias
        value = p.value_weight[0] @ top[1].T
        value += p.value_bias[0, 0]

        advantage = batch.advantage
        if ppo.normalize_advantage:
            centred = advantage - advantage.mean()
            deviation = math.sqrt(float(centred @ centred) / (n - 1))
            advantage = centred * np.float32(1.0 / (deviation + 1e-8))
        rate = self._rate_gaussian if self._continuous else self._rate_categorical
        parts, d_output = rate(output, batch, advantage, ppo, clip_range)
        value_loss, d_value = self._value_loss(value, batch, ppo)

        g = self._grad
        np.matmul(d_output, top[0], out=g.policy_weight)
        np.sum(d_output, axis=1, keepdims=True, out=g.policy_bias)
        np.matmul(d_value, top[1], out=g.value_weight[0])
        g.value_bias[0, 0] = d_value.sum()
        d_top = layers[-1][1]
        np.matmul(d_output.T, p.policy_weight, out=d_top[0])
        np.multiply(d_value[:, None], p.value_weight, out=d_top[1])
        self._backward_hidden(batch.obs, layers)
        return [parts[0], value_loss, *parts[1:]]

    def _backward_hidden(self, obs: Float32, layers: list[tuple[Float32, Float32]]) -> None:
        """Carry the gradient with respect to the last hidden layer down to the first."""
        p, g = self._parameters, self._grad
        ones = np.ones((1, len(obs)), np.float32)
        for index in range(len(layers) - 1, -1, -1):
            h, d = layers[index]
            below = layers[index - 1][0] if index else obs
            if self._tanh:  # d tanh = 1 - tanh^2
                slope = h * h
                np.subtract(_ONE, slope, out=slope)
                d *= slope
            else:
                d *= h > 0
            np.matmul(d.transpose(0, 2, 1), below, out=g.weights[index])
            np.matmul(ones, d, out=g.biases[index])  # a product with ones is the fastest sum over samples
            if index:
                np.matmul(d, p.weights[index], out=layers[index - 1][1])

    def _surrogate(
        self, log_prob: Float32, batch: Samples, advantage: Float32, clip_range: float
    ) -> tuple[float, float, float, Float32]:
        """Policy loss, KL, clip fraction, and the gradient with respect to ``log_prob``, ``[B]``."""
        log_ratio = log_prob - batch.old_log_prob
        ratio = np.exp(log_ratio)
        plain = ratio * advantage
        bounded = np.clip(ratio, np.float32(1.0 - clip_range), np.float32(1.0 + clip_range))
        clipped = bounded * advantage
        n = np.float32(len(ratio))
        policy_loss = -float(np.minimum(plain, clipped).sum() / n)
        kl = float((ratio - _ONE - log_ratio).sum() / n)
        fraction = float(np.count_nonzero(np.abs(ratio - _ONE) > clip_range) / n)
        # Where the clipped term is the smaller one, it is constant.
        d_log_prob = plain * (plain <= clipped)
        d_log_prob *= -_ONE / n
        return policy_loss, kl, fraction, d_log_prob

    def _rate_categorical(
        self, logits: Float32, batch: Samples, advantage: Float32, ppo: PPOConfig, clip_range: float
    ) -> tuple[list[float], Float32]:
        n = logits.shape[1]
        log_p = _log_softmax(logits)
        probabilities = np.exp(log_p)
        entropy = -(probabilities * log_p).sum(0)
        columns = np.arange(n)
        policy_loss, kl, fraction, d_log_prob = self._surrogate(
            log_p[batch.action, columns], batch, advantage, clip_range
        )
        # d log p_a / d logits = onehot(a) - p;   dH / d logits = -p (log p + H)
        d_logits = probabilities * (log_p + entropy)
        d_logits *= np.float32(ppo.ent_coef / n)
        d_logits -= probabilities * d_log_prob
        d_logits[batch.action, columns] += d_log_prob
        return [policy_loss, float(entropy.sum() / n), kl, fraction], d_logits

    def _rate_gaussian(
        self, mean: Float32, batch: Samples, advantage: Float32, ppo: PPOConfig, clip_range: float
    ) -> tuple[list[float], Float32]:
        log_std = self._parameters.log_std
        inverse = np.exp(-log_std)
        scaled = (batch.action.T - mean) * inverse
        squared = scaled * scaled
        constant = float(log_std.sum()) + len(log_std) * float(_HALF_LOG_TWO_PI)
        log_prob = np.float32(-0.5) * squared.sum(0) - np.float32(constant)
        policy_loss, kl, fraction, d_log_prob = self._surrogate(log_prob, batch, advantage, clip_range)
        # d log p / d mean = scaled / std;   d log p / d log std = scaled^2 - 1;   dH / d log std = 1
        squared -= _ONE
        squared *= d_log_prob
        np.sum(squared, axis=1, keepdims=True, out=self._grad.log_std)
        self._grad.log_std[:] -= np.float32(ppo.ent_coef)
        scaled *= inverse
        scaled *= d_log_prob
        entropy = constant + 0.5 * len(log_std)
        return [policy_loss, entropy, kl, fraction], scaled

    @staticmethod
    def _value_loss(value: Float32, batch: Samples, ppo: PPOConfig) -> tuple[float, Float32]:
        n = len(value)
        error = value - batch.returns
        squared = error * error
        if ppo.clip_range_vf is not None:
            bound = np.float32(ppo.clip_range_vf)
            change = value - batch.old_value
            clipped = batch.old_value + np.clip(change, -bound, bound) - batch.returns
            clipped *= clipped
            # Where the clipped error is the larger one, it is constant; within the bound both are the
            # same but for rounding, which must not decide.
            error *= (squared >= clipped) | (np.abs(change) <= bound)
            np.maximum(squared, clipped, out=squared)
        error *= np.float32(2.0 * ppo.vf_coef / n)
        return float(squared.sum() / np.float32(n)), error

    @staticmethod
    def mean(rows: list[list[float]], norms: list[Any]) -> list[float]:
        """Means over minibatches."""
        return [*np.mean(rows, axis=0).tolist(), float(np.mean(norms))]

    def _workspace(self, n: int) -> list[tuple[Float32, Float32]]:
        """For each hidden layer its output and the gradient with respect to it, ``[2, n, width]``."""
        if n not in self._buffers:
            widths = [weight.shape[1] for weight in self._parameters.weights]
            self._buffers[n] = [
                (np.empty((2, n, width), np.float32), np.empty((2, n, width), np.float32)) for width in widths
            ]
        return self._buffers[n]


def _log_softmax(logits: Float32) -> Float32:
    """Over the first axis of ``[A, B]``."""
    shifted: Float32 = logits - logits.max(0)
    shifted -= np.log(np.exp(shifted).sum(0))
    return shifted

"""The fast engine: a multilayer perceptron on the CPU, with hand-written gradients in numpy.

For the small networks of PPO autograd spends most of its time on bookkeeping. Here actor and critic, which
have the same shape, run as one stack ``[2, width, B]``. The arrays are allocated once and share their memory
with the parameters of the torch module.

In the update the samples lie along the last axis, ``[width, B]`` and ``[A, B]``. Biases and sums over actions
then run along contiguous memory. At these sizes a call of numpy costs as much as its arithmetic, so
`NumpyEngine.shuffled` does once for a whole pass what it can. `tests/ppo/test_numpy_engine.py` compares every
gradient with autograd's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ppo_hpo.ppo.gradient_engine import MinibatchStats
from ppo_hpo.ppo.networks import MLPActorCritic
from ppo_hpo.ppo.rollout import Float32, Samples
from ppo_hpo.spec.config import PPOConfig

_HALF_LOG_TWO_PI = np.float32(0.5 * math.log(2.0 * math.pi))
_ONE = np.float32(1.0)
# The methods `sum` and `mean` of an array end in this function; calling it at once is faster.
_sum = np.add.reduce
# The entries of a sample that are one number each. They are the last rows of what `NumpyEngine.load` returns.
_SCALARS = Samples._fields[2:]
_ADVANTAGE = _SCALARS.index("advantage") - len(_SCALARS)
# Samples as `NumpyEngine.backward` takes them: observations `[D, B]`, and actions `[A, B]`, which are one-hot
# columns where actions are discrete.
Minibatch = Samples


@dataclass(frozen=True)
class _Parameters:
    """Views into one flat buffer of the parameters, or of their gradients."""

    weights: list[Float32]  # [2, out, in] for each hidden layer: the actor's, then the critic's
    biases: list[Float32]  # [2, out, 1] for each hidden layer
    policy_weight: Float32  # [A, width]
    policy_bias: Float32  # [A, 1]
    value_weight: Float32  # [1, width]
    value_bias: Float32  # [1, 1]
    log_std: Float32  # [A, 1]; empty where actions are discrete


class _Surrogate(NamedTuple):
    """The clipped surrogate of one minibatch, and two diagnostics."""

    policy_loss: float
    approx_kl: float
    clip_fraction: float
    d_log_prob: Float32  # [B] gradient of the loss with respect to the log-probabilities


def parameter_order(module: MLPActorCritic) -> list[nn.Parameter]:
    """The parameters in the order of the flat buffer: layer by layer, the actor's beside the critic's."""
    actor = [layer for layer in module.actor if isinstance(layer, nn.Linear)]
    critic = [layer for layer in module.critic if isinstance(layer, nn.Linear)]
    order: list[Any] = []
    for a, c in zip(actor[:-1], critic[:-1], strict=True):
        order += [a.weight, c.weight, a.bias, c.bias]
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
        biases.append(take(2, layer.out_features, 1))
    actions, width = linear[-1].out_features, linear[-1].in_features
    heads = take(actions, width), take(actions, 1), take(1, width), take(1, 1)
    log_std = take(0 if module.log_std is None else actions, 1)
    assert position == len(flat)
    return _Parameters(weights, biases, *heads, log_std)


class NumpyEngine:
    """Runs and differentiates an `MLPActorCritic` in numpy, on the CPU."""

    name = "numpy"

    def __init__(
        self, module: MLPActorCritic, flat: torch.Tensor, grad: torch.Tensor, *, continuous: bool
    ) -> None:
        """Share the memory of a network, whose parameters are views into ``flat`` in `parameter_order`."""
        self._parameters = p = _views(flat.numpy(), module)
        # Weights and biases of the hidden layers in the form that `_hidden` takes: actor's, then critic's.
        self._hidden_layers = [
            [(w[which].T, b[which, :, 0]) for w, b in zip(p.weights, p.biases, strict=True)]
            for which in (0, 1)
        ]
        self._policy_layer = p.policy_weight.T, p.policy_bias[:, 0]
        self._grad = _views(grad.numpy(), module)
        self._continuous = continuous
        self._tanh = any(isinstance(layer, nn.Tanh) for layer in module.actor)
        self._zero = np.zeros(1, np.float32)
        self._ones = np.ones((1, 1), np.float32)
        self._buffers: dict[int, list[tuple[Float32, Float32]]] = {}

    # ------------------------------------------------------------------ acting

    def act(self, obs: Float32, noise: Float32 | None) -> NDArray[Any]:
        """Actions for observations ``[N, D]``: sampled by ``noise [N, A]``, or the mode without noise."""
        weight, bias = self._policy_layer
        output: Float32 = self._hidden(obs, 0) @ weight
        output += bias
        if noise is not None:
            output += noise * np.exp(self._parameters.log_std[:, 0]) if self._continuous else noise
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
        for weight, bias in self._hidden_layers[which]:
            h = h @ weight
            h += bias
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

    def load(self, samples: Samples) -> Float32:
        """The samples as columns of one array, so that one call gathers all their entries."""
        if self._continuous:
            action = samples.action.T
        else:
            action = samples.action == np.arange(len(self._parameters.policy_weight))[:, None]
        rows = [samples.obs.T, action, np.stack(samples[2:])]
        return np.concatenate(rows, dtype=np.float32, casting="unsafe")

    def shuffled(self, samples: Float32, order: NDArray[np.int64], ppo: PPOConfig) -> list[Minibatch]:
        """Minibatches of the samples in ``order``: gathered once, then sliced."""
        gathered = samples.take(order, axis=1)
        size, n_actions = ppo.batch_size, len(self._parameters.policy_weight)
        scalars = len(gathered) - len(_SCALARS)
        actions = scalars - n_actions
        if ppo.normalize_advantage:
            _standardize(gathered[_ADVANTAGE].reshape(-1, size))
        minibatches = []
        for start in range(0, len(order), size):
            part = gathered[:, start : start + size]
            minibatches.append(Minibatch(part[:actions], part[actions:scalars], *part[scalars:]))
        return minibatches

    def backward(self, batch: Minibatch, ppo: PPOConfig, clip_range: float) -> MinibatchStats:
        """Set the gradient of the loss, which is `losses.ppo_loss`.

        ``d_x`` is the gradient of the loss with respect to ``x``.
        """
        p, layers = self._parameters, self._workspace(batch.obs.shape[1])
        below = batch.obs
        for weight, bias, (h, _) in zip(p.weights, p.biases, layers, strict=True):
            np.matmul(weight, below, out=h)
            h += bias
            self._activate(h)
            below = h
        top = below
        output = p.policy_weight @ top[0]
        output += p.policy_bias
        value = p.value_weight[0] @ top[1]
        value += p.value_bias[0, 0]

        policy_loss = self._gaussian_loss if self._continuous else self._categorical_loss
        surrogate, entropy, d_output = policy_loss(output, batch, ppo, clip_range)
        value_loss, d_value = self._value_loss(value, batch, ppo)

        g = self._grad
        np.matmul(d_output, top[0].T, out=g.policy_weight)
        _sum(d_output, axis=1, keepdims=True, out=g.policy_bias)
        np.matmul(top[1], d_value, out=g.value_weight[0])
        g.value_bias[0, 0] = _sum(d_value)
        d_top = layers[-1][1]
        np.matmul(p.policy_weight.T, d_output, out=d_top[0])
        np.multiply(p.value_weight.T, d_value, out=d_top[1])
        self._backward_hidden(batch.obs, layers)
        return MinibatchStats(
            surrogate.policy_loss, value_loss, entropy, surrogate.approx_kl, surrogate.clip_fraction
        )

    def _backward_hidden(self, obs: Float32, layers: list[tuple[Float32, Float32]]) -> None:
        """Propagate the gradient from the last hidden layer down to the first.

        This overwrites the output of each layer with its slope; the layer above has used it already.
        """
        p, g = self._parameters, self._grad
        if len(self._ones) != obs.shape[1]:
            self._ones = np.ones((obs.shape[1], 1), np.float32)
        for index in range(len(layers) - 1, -1, -1):
            h, d = layers[index]
            if self._tanh:  # d tanh = 1 - tanh^2
                np.multiply(h, h, out=h)
                np.subtract(_ONE, h, out=h)
                d *= h
            else:
                d *= h > 0
            below = layers[index - 1][0].transpose(0, 2, 1) if index else obs.T
            np.matmul(d, below, out=g.weights[index])
            np.matmul(d, self._ones, out=g.biases[index])  # the fastest sum over samples
            if index:
                np.matmul(p.weights[index].transpose(0, 2, 1), d, out=layers[index - 1][1])

    @staticmethod
    def _surrogate(log_prob: Float32, batch: Minibatch, clip_range: float) -> _Surrogate:
        log_ratio = log_prob - batch.old_log_prob
        ratio = np.exp(log_ratio)
        plain = ratio * batch.advantage
        clipped = _bounded(ratio, 1.0 - clip_range, 1.0 + clip_range)
        clipped *= batch.advantage
        n = np.float32(len(ratio))
        policy_loss = -float(_sum(np.minimum(plain, clipped)) / n)
        beyond = ratio - _ONE
        kl = float(_sum(beyond - log_ratio) / n)
        fraction = float(np.count_nonzero(np.abs(beyond) > clip_range) / n)
        # Where the clipped term is the smaller one, it does not depend on the ratio.
        d_log_prob = plain * (plain <= clipped)
        d_log_prob *= -_ONE / n
        return _Surrogate(policy_loss, kl, fraction, d_log_prob)

    def _categorical_loss(
        self, logits: Float32, batch: Minibatch, ppo: PPOConfig, clip_range: float
    ) -> tuple[_Surrogate, float, Float32]:
        """The surrogate, the mean entropy, and the gradient with respect to the logits ``[A, B]``."""
        n = logits.shape[1]
        log_p = _log_softmax(logits)
        probabilities = np.exp(log_p)
        weighted = probabilities * log_p
        surrogate = self._surrogate(_sum(log_p * batch.action), batch, clip_range)
        # d log p_a / d logits = onehot(a) - p;   dH / d logits = -p (log p + H)
        entropy = -float(_sum(weighted, axis=None) / np.float32(n))
        if ppo.ent_coef:
            d_logits = weighted - probabilities * _sum(weighted)
            d_logits *= np.float32(ppo.ent_coef / n)
            d_logits += (batch.action - probabilities) * surrogate.d_log_prob
        else:
            d_logits = batch.action - probabilities
            d_logits *= surrogate.d_log_prob
        return surrogate, entropy, d_logits

    def _gaussian_loss(
        self, mean: Float32, batch: Minibatch, ppo: PPOConfig, clip_range: float
    ) -> tuple[_Surrogate, float, Float32]:
        """The surrogate, the mean entropy, and the gradient with respect to the means ``[A, B]``.

        Sets the gradient with respect to ``log_std`` as well.
        """
        log_std = self._parameters.log_std
        inverse = np.exp(-log_std)
        scaled = (batch.action - mean) * inverse
        squared = scaled * scaled
        constant = float(_sum(log_std, axis=None)) + len(log_std) * float(_HALF_LOG_TWO_PI)
        log_prob = np.float32(-0.5) * _sum(squared)
        log_prob -= np.float32(constant)
        surrogate = self._surrogate(log_prob, batch, clip_range)
        # d log p / d mean = scaled / std;   d log p / d log std = scaled^2 - 1;   dH / d log std = 1
        squared -= _ONE
        squared *= surrogate.d_log_prob
        _sum(squared, axis=1, keepdims=True, out=self._grad.log_std)
        self._grad.log_std[:] -= np.float32(ppo.ent_coef)
        scaled *= inverse
        scaled *= surrogate.d_log_prob
        entropy = constant + 0.5 * len(log_std)
        return surrogate, entropy, scaled

    @staticmethod
    def _value_loss(value: Float32, batch: Minibatch, ppo: PPOConfig) -> tuple[float, Float32]:
        """The critic's loss, and the gradient of its weighted share with respect to the values ``[B]``."""
        n = len(value)
        error = value - batch.returns
        if ppo.clip_range_vf is None:
            total = float(error @ error)
        else:
            squared = error * error
            bound = ppo.clip_range_vf
            change = value - batch.old_value
            clipped = batch.old_value + _bounded(change, -bound, bound) - batch.returns
            clipped *= clipped
            # Where the clipped error is the larger one, it does not depend on the value. Within the bound
            # both errors differ by rounding only, which must not decide.
            error *= (squared >= clipped) | (np.abs(change) <= np.float32(bound))
            total = float(_sum(np.maximum(squared, clipped)))
        error *= np.float32(2.0 * ppo.vf_coef / n)
        return total / n, error

    @staticmethod
    def mean(stats: list[MinibatchStats], norms: list[Any]) -> tuple[MinibatchStats, float]:
        """Means over minibatches."""
        return MinibatchStats(*np.mean(stats, axis=0).tolist()), float(np.mean(norms))

    def _workspace(self, n: int) -> list[tuple[Float32, Float32]]:
        """For each hidden layer two arrays ``[2, width, n]``: its output, and the gradient for it."""
        if n not in self._buffers:
            widths = [weight.shape[1] for weight in self._parameters.weights]
            self._buffers[n] = [
                (np.empty((2, width, n), np.float32), np.empty((2, width, n), np.float32)) for width in widths
            ]
        return self._buffers[n]


def _log_softmax(logits: Float32) -> Float32:
    """Log-softmax over the first axis of ``[A, B]``."""
    shifted: Float32 = logits - np.maximum.reduce(logits)
    shifted -= np.log(_sum(np.exp(shifted)))
    return shifted


def _bounded(array: Float32, low: float, high: float) -> Float32:
    """The same as `numpy.clip`, in a fifth of its time."""
    result: Float32 = np.maximum(array, np.float32(low))
    return np.minimum(result, np.float32(high), out=result)


def _standardize(rows: Float32) -> None:
    """Standardise each row of ``[M, B]`` in place, by the sample's deviation (with B - 1)."""
    size = np.float32(rows.shape[1])
    rows -= _sum(rows, axis=1, keepdims=True) / size
    deviation = np.sqrt(_sum(rows * rows, axis=1, keepdims=True) / (size - _ONE))
    rows /= deviation + np.float32(1e-8)

"""The general engine on a small network with shared layers, for vectors and for images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ppo_hpo.ppo import losses
from ppo_hpo.ppo.autograd import AutogradEngine, Batch
from ppo_hpo.ppo.rollout import Samples
from ppo_hpo.spec.config import PPOConfig

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
SHAPES = pytest.mark.parametrize("shape", [(4,), (2, 3, 1)], ids=["vectors", "images"])


class Apart(nn.Module):
    """Counts the observations of each call."""

    def __init__(self, inputs: int, *, continuous: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.actor, self.critic = nn.Linear(inputs, 8), nn.Linear(8, 3), nn.Linear(8, 1)
        self.log_std = nn.Parameter(torch.tensor([-0.5, 0.1, 0.4])) if continuous else None
        self.calls: list[tuple[str, int]] = []

    def features(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.body(obs.flatten(1).float() / 4.0))

    def policy(self, obs: Tensor) -> Tensor:
        self.calls.append(("policy", len(obs)))
        return self.actor(self.features(obs))

    def value(self, obs: Tensor) -> Tensor:
        self.calls.append(("value", len(obs)))
        return self.critic(self.features(obs)).squeeze(-1)


class Shared(Apart):
    def policy_and_value(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append(("both", len(obs)))
        features = self.features(obs)
        return self.actor(features), self.critic(features).squeeze(-1)


def engine_of(kind: type[Apart], shape: tuple[int, ...], continuous: bool, criterion: Any = None) -> Any:
    module = kind(int(np.prod(shape)), continuous=continuous)
    return AutogradEngine(module, CPU, continuous=continuous, criterion=criterion), module


def samples_of(shape: tuple[int, ...], continuous: bool, n: int = 12) -> Samples:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 9, (n, *shape), np.uint8)
    obs = images if len(shape) > 1 else rng.standard_normal((n, *shape), np.float32)
    action = rng.standard_normal((n, 3), np.float32) if continuous else rng.integers(0, 3, n)
    return Samples(obs, action, *(rng.standard_normal(n, np.float32) for _ in range(4)))


def density(module: Apart, obs: Any, action: Any) -> Tensor:
    with torch.no_grad():
        output, chosen = module.policy(torch.from_numpy(obs)), torch.from_numpy(action)
        if module.log_std is None:
            return losses.categorical(output, chosen)[0]
        return losses.diagonal_gaussian(output, module.log_std, chosen)[0]


@KINDS
@SHAPES
def test_acting_with_outputs_and_without_is_the_same(shape: tuple[int, ...], continuous: bool) -> None:
    engine, module = engine_of(Shared, shape, continuous)
    assert engine.reuses_outputs
    obs, action, *_ = samples_of(shape, continuous)
    noise = np.random.default_rng(1).standard_normal((12, 3), np.float32)
    with torch.no_grad():
        output, value = module.policy_and_value(torch.from_numpy(obs))
    moved = output.numpy() + noise * (np.exp([-0.5, 0.1, 0.4]) if continuous else 1.0)
    mode = output.numpy()
    for given, expected in ((noise, moved), (None, mode)):
        found = engine.act(obs, given)
        np.testing.assert_allclose(found, expected if continuous else expected.argmax(1), rtol=1e-5)
    found, outputs = engine.act_with_outputs(obs, noise)
    np.testing.assert_allclose(found, moved if continuous else moved.argmax(1), rtol=1e-5)
    assert torch.equal(outputs[0], output)
    # Of two steps of six environments each, the outputs are joined in their order.
    parts = [tuple(tensor[half] for tensor in outputs) for half in (slice(0, 6), slice(6, 12))]
    log_prob, values = engine.evaluate_outputs(parts, action)
    np.testing.assert_allclose(log_prob, density(module, obs, action), rtol=1e-5)
    np.testing.assert_allclose(values, value, rtol=1e-6)
    np.testing.assert_allclose(engine.log_probs(obs, action), log_prob, rtol=1e-6)
    np.testing.assert_allclose(engine.values(obs), values, rtol=1e-6)


def test_many_images_pass_in_portions_and_vectors_at_once() -> None:
    for shape, sizes in (((2, 3, 1), [512, 512, 6]), ((4,), [1030])):
        engine, module = engine_of(Apart, shape, continuous=False)
        obs, action, *_ = samples_of(shape, False, 1030)
        expected = density(module, obs, action)
        module.calls.clear()
        np.testing.assert_allclose(engine.log_probs(obs, action), expected, rtol=1e-5)
        assert module.calls == [("policy", size) for size in sizes]
        module.calls.clear()
        values = engine.values(obs)
        assert module.calls == [("value", size) for size in sizes]
        with torch.no_grad():
            np.testing.assert_allclose(values, module.value(torch.from_numpy(obs)), rtol=1e-5, atol=1e-7)


@KINDS
@SHAPES
def test_minibatches_are_the_samples_in_order(shape: tuple[int, ...], continuous: bool) -> None:
    engine, _ = engine_of(Apart, shape, continuous)
    samples = samples_of(shape, continuous)
    order = np.random.default_rng(2).permutation(12)
    found = list(engine.shuffled(engine.load(samples), order, PPOConfig(batch_size=4)))
    assert len(found) == 3
    for number, minibatch in enumerate(found):
        rows = order[4 * number : 4 * number + 4]
        for name, array in samples._asdict().items():
            np.testing.assert_array_equal(getattr(minibatch, name), array[rows], err_msg=name)


@KINDS
@pytest.mark.parametrize("kind", [Apart, Shared])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("criterion", [None, nn.functional.l1_loss])
def test_the_loss_and_its_gradient(kind: Any, continuous: bool, normalize: bool, criterion: Any) -> None:
    engine, module = engine_of(kind, (4,), continuous, criterion)
    ppo = PPOConfig(
        ent_coef=0.1, vf_coef=0.7, normalize_advantage=normalize, clip_range_vf=None if criterion else 0.2
    )
    batch: Batch = engine.load(samples_of((4,), continuous))
    output, value = module.actor(module.features(batch.obs)), module.critic(module.features(batch.obs))[:, 0]
    if continuous:
        log_prob, entropy = losses.diagonal_gaussian(output, module.log_std, batch.action)
    else:
        log_prob, entropy = losses.categorical(output, batch.action)
    if criterion is None:
        critic = losses.value_loss(value, batch.old_value, batch.returns, 0.2)
    else:
        critic = criterion(value, batch.returns)
    advantage = losses.normalize_advantage(batch.advantage) if normalize else batch.advantage
    expected = losses.ppo_loss(
        log_prob, batch.old_log_prob, advantage, critic, entropy, clip_range=0.2, ent_coef=0.1, vf_coef=0.7
    )
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(expected.loss, parameters, retain_graph=True)
    for times in (1.0, 2.0):  # gradients add up
        stats = engine.backward(batch, ppo, 0.2)
        assert [float(part) for part in stats] == pytest.approx([part.item() for part in expected[1:]])
        assert not any(part.requires_grad for part in stats)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, times * gradient, rtol=1e-4, atol=1e-6)
    names = [name for name, _ in module.calls]
    assert names == (["both"] * 2 if kind is Shared else ["policy", "value"] * 2)


def test_means_are_over_minibatches_and_round_as_on_every_device() -> None:
    rows = [losses.LossParts(*(torch.tensor(float(k * n)) for k in range(6)))[1:] for n in (1, 2)]
    stats, norm = AutogradEngine.mean(rows, [0.1, torch.tensor(0.3)])
    assert list(stats) == [1.5, 3.0, 4.5, 6.0, 7.5]
    assert norm == (float(np.float32(0.1)) + float(np.float32(0.3))) / 2

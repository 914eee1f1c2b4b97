"""The numpy engine against autograd: every gradient, every number, and whole trials on both."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppo_hpo import PPO, TrialConfig
from ppo_hpo.ppo.gradient_engine import MinibatchStats
from ppo_hpo.ppo.learner import Learner
from ppo_hpo.ppo.networks import MLPActorCritic
from ppo_hpo.ppo.rollout import Samples
from ppo_hpo.spec.config import ModelConfig, OptimizerConfig, PPOConfig

CPU = torch.device("cpu")
CLIP_FRACTION = MinibatchStats._fields.index("clip_fraction")
B, D, A = 96, 5, 3


def network(*, continuous: bool, width: int = 32, depth: int = 2, activation: str = "tanh") -> MLPActorCritic:
    module = MLPActorCritic(
        D,
        A,
        ModelConfig(width=width, depth=depth, activation=activation, log_std_init=-0.3),  # type: ignore[arg-type]
        continuous=continuous,
        seed=3,
    )
    # Initial weights are nearly symmetric and biases zero: move all of them, so that nothing cancels.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def samples(module: MLPActorCritic, *, continuous: bool) -> Samples:
    stream = np.random.default_rng(5)
    real = lambda *shape: stream.standard_normal(shape, np.float32)  # noqa: E731
    obs = real(B, D)
    action = real(B, A) if continuous else stream.integers(0, A, B)
    learner = Learner(module, OptimizerConfig(), PPOConfig(), CPU, continuous=continuous, engine="autograd")
    old = learner.log_probs(obs, action) + 0.3 * real(B)  # ratios on both sides of the clip range
    return Samples(obs, action, old, real(B), real(B), real(B))


def whole(learner: Learner, batch: Samples, ppo: PPOConfig) -> Any:
    """All samples as one minibatch of the learner's engine."""
    engine, size = learner._engine, len(batch.obs)
    (minibatch,) = engine.shuffled(
        engine.load(batch), np.arange(size), dataclasses.replace(ppo, batch_size=size)
    )
    return minibatch


def gradients(module: MLPActorCritic, engine: str, batch: Samples, ppo: PPOConfig) -> tuple[dict, np.ndarray]:
    continuous = module.log_std is not None
    learner = Learner(module, OptimizerConfig(), ppo, CPU, continuous=continuous, engine=engine)
    learner.optimizer.grad.zero_()
    assert learner.engine == ("autograd" if engine == "autograd" else "numpy")
    row = learner._engine.backward(whole(learner, batch, ppo), ppo, 0.2)
    grads = {name: p.grad.numpy().copy() for name, p in module.named_parameters() if p.grad is not None}
    assert set(grads) == {name for name, _ in module.named_parameters()}
    return grads, np.array([float(part) for part in row])


HYPERPARAMETERS = [
    dict(zip(("ent_coef", "vf_coef", "clip_range_vf", "normalize_advantage"), values, strict=True))
    for values in itertools.product((0.0, 0.05), (0.0, 0.7), (None, 0.3), (False, True))
]
SHAPES = [
    {"width": width, "depth": depth, "activation": activation}
    for width, depth, activation in itertools.product((8, 33), (1, 2, 3), ("tanh", "relu"))
]


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_gradients_equal_autograds(continuous: bool, shape: dict) -> None:
    """Every combination of hyperparameters, to 1e-5 of the largest entry of each gradient."""
    batch = samples(network(continuous=continuous, **shape), continuous=continuous)
    for hyperparameters in HYPERPARAMETERS:
        ppo = PPOConfig(**hyperparameters)
        slow, slow_row = gradients(network(continuous=continuous, **shape), "autograd", batch, ppo)
        fast, fast_row = gradients(network(continuous=continuous, **shape), "auto", batch, ppo)
        np.testing.assert_allclose(fast_row, slow_row, rtol=2e-5, atol=1e-6, err_msg=str(hyperparameters))
        assert 0.1 < fast_row[CLIP_FRACTION] < 0.9  # some samples are clipped and some are not
        scale = max(np.abs(gradient).max() for gradient in slow.values())
        for name, gradient in slow.items():
            error = np.abs(fast[name] - gradient).max()
            assert error <= 1e-5 * max(np.abs(gradient).max(), 0.01 * scale), (name, hyperparameters)


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_a_minibatch_of_one_sample(continuous: bool) -> None:
    batch = samples(network(continuous=continuous), continuous=continuous)
    one = Samples(*(array[:1] for array in batch))
    ppo = PPOConfig(normalize_advantage=False)
    slow, slow_row = gradients(network(continuous=continuous), "autograd", one, ppo)
    fast, fast_row = gradients(network(continuous=continuous), "auto", one, ppo)
    np.testing.assert_allclose(fast_row, slow_row, rtol=2e-5, atol=1e-6)
    for name, gradient in slow.items():
        np.testing.assert_allclose(fast[name], gradient, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_actions_log_probs_and_values_equal_torchs(continuous: bool) -> None:
    stream = np.random.default_rng(2)
    obs = stream.standard_normal((50, D), np.float32)
    noise = stream.standard_normal((50, A), np.float32)
    learners = [
        Learner(
            network(continuous=continuous), OptimizerConfig(), PPOConfig(), CPU,
            continuous=continuous, engine=engine,
        )
        for engine in ("auto", "autograd")
    ]  # fmt: skip
    for given in (noise, None):
        fast, slow = (learner.act(obs, given) for learner in learners)
        assert fast.dtype == slow.dtype
        np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-6)
        rates = [learner.log_probs(obs, slow) for learner in learners]
        np.testing.assert_allclose(*rates, rtol=1e-5, atol=1e-5)
    values = [learner.values(obs) for learner in learners]
    np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-5)
    assert all(array.dtype == np.float32 for array in (*rates, *values))


def test_the_module_sees_every_step() -> None:
    """The arrays are the module's own memory: an update through numpy shows in torch."""
    module = network(continuous=True)
    batch = samples(network(continuous=True), continuous=True)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    learner = Learner(module, OptimizerConfig(lr=0.01), PPOConfig(batch_size=32), CPU, continuous=True)
    assert learner.engine == "numpy"
    learner.update(batch, np.random.default_rng(0), 0.01, 0.2)
    assert all(not torch.equal(before[name], p) for name, p in module.named_parameters())
    obs = torch.from_numpy(batch.obs)
    with torch.no_grad():
        np.testing.assert_allclose(module.value(obs).numpy(), learner.values(batch.obs), atol=1e-5)


def test_other_networks_criteria_and_precisions_take_the_general_engine() -> None:
    class Own(MLPActorCritic):
        pass

    options = {"continuous": False}
    general = [
        Learner(Own(D, A, **options), OptimizerConfig(), PPOConfig(), CPU, **options),
        Learner(network(**options).double(), OptimizerConfig(), PPOConfig(), CPU, **options),
        Learner(
            network(**options), OptimizerConfig(), PPOConfig(), CPU, criterion=torch.nn.MSELoss(), **options
        ),
    ]
    assert [learner.engine for learner in general] == ["autograd"] * 3


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_engines_resume_each_others_checkpoints(env: str, tmp_path: Path) -> None:
    """An epoch on one engine and the next on the other end close to two epochs on either."""
    config = TrialConfig.from_mapping(
        {
            "env": {"id": env, "n_envs": 2},
            "task": {"epochs": 2, "steps_per_epoch": 128, "eval_episodes": 1},
            "ppo": {"n_steps": 64, "batch_size": 64, "n_epochs": 2},
        }
    )

    def fit(engines: tuple[str, str], directory: Path) -> np.ndarray:
        directory.mkdir()
        for epoch, engine in enumerate(engines, start=1):
            task = PPO.from_config(config, "cpu", storage=directory, engine=engine)
            assert task.epoch == epoch - 1
            assert task.agent.learner.engine == {"auto": "numpy"}.get(engine, engine)
            task.fit(epoch)
        return np.concatenate([p.detach().numpy().ravel() for p in task.parameters()])

    ends = [
        fit(engines, tmp_path / "-".join(engines))
        for engines in itertools.product(("auto", "autograd"), repeat=2)
    ]
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], atol=2e-4)

"""Against Stable-Baselines3: advantages, loss, gradients, and whole updates by its own `PPO.train`.

Both get the same numbers: rollout, parameters, and the order of minibatches. The clipped value loss is
compared nowhere: Stable-Baselines3 takes the clipped error alone, and we take the larger one as the
authors' code does (see `ppo_hpo.ppo.losses.value_loss`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import explained_variance as their_explained_variance
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from ppo_hpo.envs.make import probe
from ppo_hpo.envs.vector import SyncEnvs
from ppo_hpo.ppo.agent import Agent
from ppo_hpo.ppo.autograd import AutogradEngine, Batch
from ppo_hpo.ppo.collect import Collector
from ppo_hpo.ppo.gae import explained_variance
from ppo_hpo.ppo.gradient_engine import MinibatchStats
from ppo_hpo.ppo.learner import Learner
from ppo_hpo.ppo.networks import MLPActorCritic
from ppo_hpo.ppo.normalize import ObservationNormalizer, RewardScaler
from ppo_hpo.ppo.rollout import Rollout, Samples
from ppo_hpo.ppo.train import advantages
from ppo_hpo.spec import randomness
from ppo_hpo.spec.config import EnvConfig, ModelConfig, OptimizerConfig, PPOConfig

CPU = torch.device("cpu")
CLIP_FRACTION = MinibatchStats._fields.index("clip_fraction")
WIDTH, CLIP = 16, 0.2
KINDS = {"discrete": "tests.envs:RandomWalk-v0", "continuous": "tests.envs:Target-v0"}
BOTH = pytest.mark.parametrize("kind", list(KINDS))


# ------------------------------------------------------------------ the other side


class DoubleBuffer(RolloutBuffer):
    """Hands out double precision."""

    def to_torch(self, array: np.ndarray, copy: bool = True) -> Tensor:
        return super().to_torch(array, copy).double()


class DoubleExtractor(FlattenExtractor):
    """Undoes the cast of observations to single precision; the values are the same."""

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations).double()


def theirs(kind: str, ppo: PPOConfig, n_steps: int, n_envs: int, *, double: bool = False) -> PPO:
    """Their PPO with the same hyperparameters, on an environment that only names the spaces."""
    policy: dict[str, Any] = {"net_arch": {"pi": [WIDTH] * 2, "vf": [WIDTH] * 2}}
    if double:
        policy["features_extractor_class"] = DoubleExtractor
    other = PPO(
        "MlpPolicy",
        DummyVecEnv([lambda: gymnasium.make(KINDS[kind])] * n_envs),
        learning_rate=3e-4,
        n_steps=n_steps,
        batch_size=ppo.batch_size,
        n_epochs=ppo.n_epochs,
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
        clip_range=CLIP,
        normalize_advantage=ppo.normalize_advantage,
        ent_coef=ppo.ent_coef,
        vf_coef=ppo.vf_coef,
        max_grad_norm=ppo.max_grad_norm,
        target_kl=ppo.target_kl,
        rollout_buffer_class=DoubleBuffer if double else None,
        policy_kwargs=policy,
        device="cpu",
    )
    if double:
        other.policy.double()
    other.set_logger(Logger(None, []))
    return other


def pairs(module: MLPActorCritic, other: PPO) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Our parameters beside theirs, by our names."""
    policy: Any = other.policy
    networks = {
        "actor": [policy.mlp_extractor.policy_net[0], policy.mlp_extractor.policy_net[2], policy.action_net],
        "critic": [policy.mlp_extractor.value_net[0], policy.mlp_extractor.value_net[2], policy.value_net],
    }
    own, found = dict(module.named_parameters()), {}
    for network, layers in networks.items():
        for index, layer in zip((0, 2, 4), layers, strict=True):
            for part in ("weight", "bias"):
                name = f"{network}.{index}.{part}"
                found[name] = (own[name], getattr(layer, part))
    if module.log_std is not None:
        found["log_std"] = (module.log_std, policy.log_std)
    assert set(found) == set(own)
    assert len(found) == len(list(policy.parameters()))
    return found


def network(kind: str) -> MLPActorCritic:
    info = probe(EnvConfig(id=KINDS[kind]))
    module = MLPActorCritic(
        info.obs_dim,
        info.action_dim,
        ModelConfig(width=WIDTH, log_std_init=-0.3),
        continuous=info.continuous,
        seed=3,
    )
    # The policy begins nearly uniform and all biases are zero: move every parameter, lest anything cancels.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def copy_parameters(module: MLPActorCritic, other: PPO) -> None:
    with torch.no_grad():
        for ours, their in pairs(module, other).values():
            their.copy_(ours)


def fill(other: PPO, rollout: Rollout, last_obs: np.ndarray) -> None:
    """Fill their buffer from our rollout, as their `collect_rollouts` does, with values of their own code."""
    policy, buffer = other.policy, other.rollout_buffer
    buffer.reset()
    starts = np.ones(rollout.reward.shape[1], np.bool_)
    with torch.no_grad():
        for t, obs in enumerate(rollout.obs):
            action = torch.from_numpy(rollout.action[t])
            value, log_prob, _ = policy.evaluate_actions(torch.from_numpy(obs), action)
            # They add the value of the final observation to the reward of a truncated step.
            reward = rollout.reward[t] + buffer.gamma * rollout.final_value[t]
            buffer.add(obs, rollout.action[t], reward, starts, value, log_prob)
            starts = rollout.done[t]
        last_value = policy.predict_values(torch.from_numpy(last_obs))
    buffer.compute_returns_and_advantage(last_value, starts)


# ------------------------------------------------------------------------ our side


class Rollouts:
    """Our own rollouts, one after another."""

    def __init__(self, kind: str, learner: Learner, n_steps: int, n_envs: int) -> None:
        config = EnvConfig(id=KINDS[kind], n_envs=n_envs)
        info = probe(config)
        agent = Agent(
            learner,
            ObservationNormalizer(info.obs_dim, enabled=False, clip=10.0),
            RewardScaler(n_envs, 0.9, enabled=False, clip=10.0),
        )
        self._n_steps = n_steps
        self._collector = Collector(
            agent, SyncEnvs(config, info), info, randomness.training_seeds(0, 0, n_envs),
            randomness.make_rng(0, "action", 0),
        )  # fmt: skip

    @property
    def obs(self) -> np.ndarray:
        return self._collector.obs

    def __call__(self) -> Rollout:
        return self._collector.collect(self._n_steps)


def learner_of(kind: str, ppo: PPOConfig, engine: str = "auto") -> Learner:
    continuous = kind == "continuous"
    return Learner(network(kind), OptimizerConfig(), ppo, CPU, continuous=continuous, engine=engine)


def samples_of(rollout: Rollout, last_value: np.ndarray, ppo: PPOConfig) -> Samples:
    advantage = advantages(rollout, last_value, ppo)
    return rollout.samples(advantage, advantage + rollout.value)


def their_order(order: np.ndarray, n_steps: int, n_envs: int) -> np.ndarray:
    """Our row t * N + n is their row n * T + t."""
    return (order % n_envs) * n_steps + order // n_envs


def same_minibatches(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> np.random.Generator:
    """Make their buffer take its permutations from a stream like the one that is returned."""
    theirs, ours = np.random.default_rng(9), np.random.default_rng(9)
    permutation: Callable[[int], np.ndarray] = lambda n: their_order(theirs.permutation(n), *shape)  # noqa: E731
    monkeypatch.setattr(np.random, "permutation", permutation)
    return ours


# --------------------------------------------------------------------------- rollouts


@BOTH
def test_values_log_probs_advantages_and_returns(kind: str) -> None:
    """Everything that follows from a rollout's observations, actions, rewards and ends."""
    ppo = PPOConfig(batch_size=50, gamma=0.9, gae_lambda=0.8)
    learner = learner_of(kind, ppo)
    collector = Rollouts(kind, learner, 50, 3)
    rollout = collector()
    assert rollout.truncated[:-1].any()
    assert rollout.terminated.any() == (kind == "discrete")  # only that environment terminates
    samples = samples_of(rollout, learner.values(collector.obs), ppo)
    other = theirs(kind, ppo, 50, 3)
    copy_parameters(learner.module, other)
    fill(other, rollout, collector.obs)
    buffer = other.rollout_buffer
    for name, array in (
        ("values", samples.old_value),
        ("log_probs", samples.old_log_prob),
        ("advantages", samples.advantage),
        ("returns", samples.returns),
    ):
        np.testing.assert_allclose(array.reshape(50, 3), getattr(buffer, name), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        explained_variance(rollout.value, samples.returns.reshape(50, 3)),
        their_explained_variance(buffer.values.flatten(), buffer.returns.flatten()),
        rtol=1e-4,
    )


# -------------------------------------------------------------------- loss and gradient

N = 64  # samples of one minibatch
COEFFICIENTS = [
    {"ent_coef": 0.0, "vf_coef": 0.0, "normalize_advantage": False},
    {"ent_coef": 0.03, "vf_coef": 0.0, "normalize_advantage": False},
    {"ent_coef": 0.0, "vf_coef": 0.7, "normalize_advantage": False},
    {"ent_coef": 0.0, "vf_coef": 0.0, "normalize_advantage": True},
    {"ent_coef": 0.03, "vf_coef": 0.7, "normalize_advantage": True},
]
EACH = pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=lambda c: "-".join(map(str, c.values())))


def random_samples(kind: str) -> Samples:
    """Samples of which about a third is clipped, on either side."""
    stream = np.random.default_rng(5)
    learner = learner_of(kind, PPOConfig(), "autograd")
    info = probe(EnvConfig(id=KINDS[kind]))

    def real(*shape: int) -> np.ndarray:
        return stream.standard_normal(shape, np.float32)

    obs = real(N, info.obs_dim)
    action = real(N, info.action_dim) if info.continuous else stream.integers(0, info.action_dim, N)
    old_log_prob = learner.log_probs(obs, action) + 0.2 * real(N)
    return Samples(obs, action, old_log_prob, real(N), 1.0 + 2.0 * real(N), 3.0 * real(N))


def their_loss_and_gradient(
    kind: str, samples: Samples, ppo: PPOConfig, *, double: bool
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """By one call of their `train` on one minibatch, which leaves the gradient where it was computed."""
    other = theirs(kind, ppo, N, 1, double=double)
    module = network(kind).double() if double else network(kind)
    copy_parameters(module, other)
    buffer = other.rollout_buffer
    buffer.observations[:] = samples.obs[:, None]
    buffer.actions[:] = samples.action.reshape(N, 1, -1)
    buffer.values[:, 0], buffer.log_probs[:, 0] = samples.old_value, samples.old_log_prob
    buffer.advantages[:, 0], buffer.returns[:, 0] = samples.advantage, samples.returns
    buffer.full = True
    other.train()
    logged = {
        name.partition("/")[2]: float(value)
        for name, value in other.logger.name_to_value.items()
        if name.startswith("train/")
    }
    return logged, {
        name: np.zeros(their.shape) if their.grad is None else their.grad.numpy()
        for name, (_, their) in pairs(module, other).items()
    }


def compare(
    row: np.ndarray,
    gradient: dict[str, np.ndarray],
    reference: tuple[dict[str, float], Any],
    tolerance: float,
) -> None:
    """The five parts of the loss, their weighted sum, and every gradient."""
    logged, their_gradient = reference
    expected = [
        logged["policy_gradient_loss"],
        logged["value_loss"],
        -logged["entropy_loss"],
        logged["approx_kl"],
        logged["clip_fraction"],
    ]
    np.testing.assert_allclose(row, expected, rtol=tolerance, atol=tolerance)
    assert 0.1 < row[CLIP_FRACTION] < 0.9  # some samples are clipped and some are not
    for name, expected_gradient in their_gradient.items():
        np.testing.assert_allclose(
            gradient[name], expected_gradient, rtol=tolerance, atol=tolerance, err_msg=name
        )
    assert max(np.abs(g).max() for g in their_gradient.values()) > 0.05


@BOTH
@EACH
def test_loss_and_gradient_in_double_precision(kind: str, coefficients: dict[str, Any]) -> None:
    """To 1e-6; a tighter bound would compare roundings of what both buffers keep in single precision."""
    ppo = PPOConfig(batch_size=N, n_epochs=1, max_grad_norm=1e9, **coefficients)
    samples = random_samples(kind)
    module = network(kind).double()
    engine = AutogradEngine(module, CPU, continuous=kind == "continuous", criterion=None)
    tensors = [torch.from_numpy(array) for array in samples]
    batch = Batch(*(t.double() if t.is_floating_point() else t for t in tensors))
    parts = engine.loss(batch, ppo, CLIP)
    parts.loss.backward()
    gradient = {
        name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in module.named_parameters()
    }
    reference = their_loss_and_gradient(kind, samples, ppo, double=True)
    compare(np.array([part.item() for part in parts[1:]]), gradient, reference, 1e-6)
    assert parts.loss.item() == pytest.approx(reference[0]["loss"], rel=1e-6, abs=1e-6)


@BOTH
@EACH
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_loss_and_gradient_in_single_precision(kind: str, coefficients: dict[str, Any], engine: str) -> None:
    """What really runs, in both engines."""
    ppo = PPOConfig(batch_size=N, n_epochs=1, max_grad_norm=1e9, **coefficients)
    samples = random_samples(kind)
    learner = learner_of(kind, ppo, engine)
    assert learner.engine == {"auto": "numpy"}.get(engine, engine)
    everything = dataclasses.replace(ppo, batch_size=len(samples.obs))
    order = np.arange(len(samples.obs))
    (batch,) = learner._engine.shuffled(learner._engine.load(samples), order, everything)
    row = learner._engine.backward(batch, ppo, CLIP)
    gradient = {name: p.grad.numpy() for name, p in learner.module.named_parameters()}
    reference = their_loss_and_gradient(kind, samples, ppo, double=False)
    compare(np.array([float(part) for part in row]), gradient, reference, 5e-6)
    assert learner.loss(samples, CLIP) == pytest.approx(reference[0]["loss"], rel=1e-5, abs=1e-6)


# ---------------------------------------------------------------------- whole updates


@BOTH
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_three_updates(kind: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollout, advantages, four passes of minibatches, clipped gradients, Adam: three times over."""
    shape = T, n_envs = 32, 4
    ppo = PPOConfig(batch_size=32, n_epochs=4, gamma=0.9, gae_lambda=0.8, ent_coef=0.01, max_grad_norm=0.5)
    learner = learner_of(kind, ppo, engine)
    collector = Rollouts(kind, learner, T, n_envs)
    other = theirs(kind, ppo, T, n_envs)
    copy_parameters(learner.module, other)
    before = {name: p.detach().clone() for name, p in learner.module.named_parameters()}
    stream = same_minibatches(monkeypatch, shape)
    norms = []
    for _ in range(3):
        rollout = collector()
        samples = samples_of(rollout, learner.values(collector.obs), ppo)
        fill(other, rollout, collector.obs)
        stats = learner.update(samples, stream, 3e-4, CLIP)
        other.train()
        for name, (ours, their) in pairs(learner.module, other).items():
            torch.testing.assert_close(ours.data, their.data, rtol=0.0, atol=1e-5, msg=name)
        logged = other.logger.name_to_value
        assert stats.n_updates == 4 * T * n_envs // 32
        assert stats.value_loss == pytest.approx(logged["train/value_loss"], rel=1e-4)
        assert stats.entropy == pytest.approx(-logged["train/entropy_loss"], rel=1e-4)
        assert stats.clip_fraction == pytest.approx(logged["train/clip_fraction"], abs=1e-3)
        norms.append(stats.grad_norm)
    assert max(norms) > 0.5  # gradients were clipped
    for name, parameter in learner.module.named_parameters():  # and all parameters moved a hundred tolerances
        assert float((parameter.detach() - before[name]).abs().max()) > 1e-3, name


@BOTH
def test_target_kl_stops_where_theirs_stops(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the step of the minibatch that exceeds it."""
    shape = T, n_envs = 32, 4
    ppo = PPOConfig(batch_size=32, n_epochs=10, gamma=0.9, target_kl=4e-4)
    learner = learner_of(kind, ppo)
    collector = Rollouts(kind, learner, T, n_envs)
    rollout = collector()
    samples = samples_of(rollout, learner.values(collector.obs), ppo)
    other = theirs(kind, ppo, T, n_envs)
    copy_parameters(learner.module, other)
    fill(other, rollout, collector.obs)
    stats = learner.update(samples, same_minibatches(monkeypatch, shape), 3e-4, CLIP)
    other.train()
    steps = next(iter(other.policy.optimizer.state.values()))["step"]
    assert stats.n_updates == int(steps)
    assert 4 < stats.n_updates < 40  # not in the first pass, and before the end
    for name, (ours, their) in pairs(learner.module, other).items():
        torch.testing.assert_close(ours.data, their.data, rtol=0.0, atol=1e-5, msg=name)

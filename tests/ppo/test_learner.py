"""The update: minibatches, optimizer steps, and learned values whose true values are known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from ppo_hpo import PPO, TrialConfig
from ppo_hpo.envs.make import probe
from ppo_hpo.envs.vector import SyncEnvs
from ppo_hpo.ppo.agent import Agent
from ppo_hpo.ppo.autograd import AutogradEngine
from ppo_hpo.ppo.collect import Collector
from ppo_hpo.ppo.gae import gae
from ppo_hpo.ppo.learner import Learner
from ppo_hpo.ppo.networks import MLPActorCritic
from ppo_hpo.ppo.normalize import ObservationNormalizer, RewardScaler
from ppo_hpo.ppo.rollout import Rollout, Samples
from ppo_hpo.ppo.train import Diverged, Updates, advantages, scheduled, train_epoch
from ppo_hpo.spec import randomness
from ppo_hpo.spec.config import ModelConfig, OptimizerConfig, PPOConfig
from tests.envs import Target

CPU = torch.device("cpu")
ENGINES = pytest.mark.parametrize("engine", ["auto", "autograd"])
KINDS = pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])


def trial(name: str, **groups: dict[str, Any]) -> TrialConfig:
    env = {"id": f"tests.envs:{name}-v0", "n_envs": 2, **groups.pop("env", {})}
    return TrialConfig.from_mapping({"env": env, **groups})


def network(*, continuous: bool, seed: int = 0) -> MLPActorCritic:
    return MLPActorCritic(3, 2, ModelConfig(width=8), continuous=continuous, seed=seed)


def samples(*, continuous: bool, n: int = 64) -> Samples:
    """Samples of a policy like `network`, every number in them distinct."""
    stream = np.random.default_rng(0)
    real = lambda *shape: stream.standard_normal(shape, np.float32)  # noqa: E731
    obs = real(n, 3)
    action = real(n, 2) if continuous else stream.integers(0, 2, n)
    learner = Learner(
        network(continuous=continuous), OptimizerConfig(), PPOConfig(), CPU, continuous=continuous
    )
    return Samples(obs, action, learner.log_probs(obs, action), learner.values(obs), real(n), 2.0 + real(n))


def learner_of(ppo: PPOConfig, *, continuous: bool, engine: str = "auto", lr: float = 3e-4) -> Learner:
    module = network(continuous=continuous)
    return Learner(module, OptimizerConfig(lr=lr), ppo, CPU, continuous=continuous, engine=engine)


def parameters(learner: Learner) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in learner.module.parameters()])


# -------------------------------------------------------------------------- minibatches


@ENGINES
@KINDS
def test_each_pass_has_every_sample_once_in_a_new_order(continuous: bool, engine: str) -> None:
    batch = samples(continuous=continuous)
    # Unchanged advantages identify the samples.
    ppo = PPOConfig(batch_size=16, n_epochs=3, normalize_advantage=False)
    learner = learner_of(ppo, continuous=continuous, engine=engine)
    minibatches = [
        Samples(*(np.asarray(array) for array in minibatch))
        for minibatch in learner.minibatches(batch, np.random.default_rng(0))
    ]
    if learner.engine == "numpy":  # which has samples along the last axis, discrete actions as ones and zeros
        minibatches = [
            part._replace(obs=part.obs.T, action=part.action.T if continuous else part.action.argmax(0))
            for part in minibatches
        ]
    assert [len(minibatch.obs) for minibatch in minibatches] == [16] * 12
    row_of = {float(advantage): row for row, advantage in enumerate(batch.advantage)}
    assert len(row_of) == 64
    orders = []
    for index in range(3):
        of_pass = minibatches[4 * index : 4 * index + 4]
        order = [row_of[float(a)] for minibatch in of_pass for a in minibatch.advantage]
        assert sorted(order) == list(range(64))  # the set is kept,
        assert order != list(range(64))  # the order is mixed,
        mean_place = np.abs(np.array(order) - np.arange(64)).mean()
        assert mean_place > 64 / 6  # and not only near by: in a random order it is 64 / 3 on average.
        # Samples are mixed, not whole minibatches: neighbours do not stay together.
        assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(order)) < 10
        orders.append(order)
        for name in Samples._fields:  # the entries of a sample stay together
            gathered = np.concatenate([getattr(minibatch, name) for minibatch in of_pass])
            np.testing.assert_array_equal(gathered, getattr(batch, name)[order], err_msg=name)
    assert orders[0] != orders[1] != orders[2] != orders[0]


# ------------------------------------------------------------------------------- update


def slow_update(
    module: MLPActorCritic, batch: Samples, ppo: PPOConfig, lr: float, clip_range: float
) -> tuple[int, list[float]]:
    """The update with torch's own Adam and gradient clipping; steps taken, and norms before clipping."""
    engine = AutogradEngine(module, CPU, continuous=module.log_std is not None, criterion=None)
    optimizer = torch.optim.Adam(module.parameters(), lr=lr, eps=1e-5)
    stream, steps, norms = np.random.default_rng(0), 0, []
    for _ in range(ppo.n_epochs):
        order = stream.permutation(len(batch.obs))
        for start in range(0, len(order), ppo.batch_size):
            rows = order[start : start + ppo.batch_size]
            parts = engine.loss(engine.load(Samples(*(a[rows] for a in batch))), ppo, clip_range)
            if ppo.target_kl is not None and parts.approx_kl > 1.5 * ppo.target_kl:
                return steps, norms
            optimizer.zero_grad()
            parts.loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), ppo.max_grad_norm)))
            optimizer.step()
            steps += 1
    return steps, norms


@ENGINES
@KINDS
@pytest.mark.parametrize("clip_range_vf", [None, 0.1])
def test_update_equals_the_slow_one(continuous: bool, engine: str, clip_range_vf: float | None) -> None:
    ppo = PPOConfig(batch_size=16, n_epochs=4, ent_coef=0.01, max_grad_norm=2.6, clip_range_vf=clip_range_vf)
    batch = samples(continuous=continuous)
    learner, module = (learner_of(ppo, continuous=continuous, engine=engine), network(continuous=continuous))
    stats = learner.update(batch, np.random.default_rng(0), 1e-3, 0.1)
    steps, norms = slow_update(module, batch, ppo, 1e-3, 0.1)
    assert stats.n_updates == steps == 16
    assert stats.grad_norm == pytest.approx(np.mean(norms), rel=1e-4)
    assert min(norms) < 2.6 < max(norms)  # some gradients were clipped and some were not
    expected = np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])
    np.testing.assert_allclose(parameters(learner), expected, rtol=0.0, atol=1e-5)
    assert np.abs(parameters(learner) - parameters(learner_of(ppo, continuous=continuous))).max() > 5e-3


@ENGINES
@KINDS
def test_target_kl_stops_before_the_step(continuous: bool, engine: str) -> None:
    ppo = PPOConfig(batch_size=16, n_epochs=20, target_kl=0.002)
    batch = samples(continuous=continuous)
    learner, module = (learner_of(ppo, continuous=continuous, engine=engine), network(continuous=continuous))
    stats = learner.update(batch, np.random.default_rng(0), 3e-3, 0.2)
    steps, _ = slow_update(module, batch, ppo, 3e-3, 0.2)
    assert stats.n_updates == steps
    assert 4 < steps < 80
    expected = np.concatenate([p.detach().numpy().ravel() for p in module.parameters()])
    np.testing.assert_allclose(parameters(learner), expected, rtol=0.0, atol=2e-5)
    # The statistics are those of the steps that were taken, and each of these was within the bound.
    assert 0.0 < stats.approx_kl <= 1.5 * 0.002


@ENGINES
def test_target_kl_may_stop_the_very_first_step(engine: str) -> None:
    batch = samples(continuous=False)
    stale = batch._replace(old_log_prob=batch.old_log_prob + np.linspace(-1, 1, 64, dtype=np.float32))
    learner = learner_of(PPOConfig(batch_size=64, target_kl=0.01), continuous=False, engine=engine)
    before = parameters(learner)
    stats = learner.update(stale, np.random.default_rng(0), 0.1, 0.2)
    assert stats.n_updates == 0
    assert stats.approx_kl > 0.015
    np.testing.assert_array_equal(parameters(learner), before)
    # The gradient of the step that was not taken is dropped: the next update equals that of a new learner.
    learner.update(batch, np.random.default_rng(0), 1e-3, 0.2)
    other = learner_of(PPOConfig(batch_size=64, target_kl=0.01), continuous=False, engine=engine)
    other.update(batch, np.random.default_rng(0), 1e-3, 0.2)
    np.testing.assert_array_equal(parameters(learner), parameters(other))


# -------------------------------------------------------------------- rollout and update


def first_rollout(config: TrialConfig, learner: Learner) -> tuple[Rollout, Samples]:
    info, n = probe(config.env), config.env.n_envs
    envs = SyncEnvs(config.env, info)
    agent = Agent(
        learner,
        ObservationNormalizer(info.obs_dim, enabled=False, clip=10.0),
        RewardScaler(n, 0.9, enabled=False, clip=10.0),
    )
    collector = Collector(agent, envs, info, list(range(n)), np.random.default_rng(0))
    rollout = collector.collect(config.ppo.n_steps)
    envs.close()
    advantage = advantages(rollout, learner.values(collector.obs), config.ppo)
    return rollout, rollout.samples(advantage, advantage + rollout.value)


@ENGINES
@pytest.mark.parametrize("name", ["RandomWalk", "Target"])
def test_the_ratio_is_1_before_the_first_step(name: str, engine: str) -> None:
    """The update computes what the rollout stored: the ratio differs from 1 only after the first step."""
    config = trial(name, ppo={"n_steps": 64, "batch_size": 128, "n_epochs": 1})
    info = probe(config.env)
    module = MLPActorCritic(info.obs_dim, info.action_dim, ModelConfig(width=16), continuous=info.continuous)
    learner = Learner(module, OptimizerConfig(), config.ppo, CPU, continuous=info.continuous, engine=engine)
    rollout, batch = first_rollout(config, learner)
    assert rollout.value.dtype == rollout.log_prob.dtype == np.float32
    np.testing.assert_allclose(learner.log_probs(batch.obs, batch.action), batch.old_log_prob, atol=1e-6)
    np.testing.assert_allclose(learner.values(batch.obs), batch.old_value, atol=1e-6)
    # With a clip range of 1e-5 a ratio that is off by more would be counted.
    first = learner.update(batch, np.random.default_rng(0), 1e-3, 1e-5)
    second = learner.update(batch, np.random.default_rng(0), 1e-3, 1e-5)
    assert first.clip_fraction == 0.0
    assert abs(first.approx_kl) < 1e-7
    assert second.clip_fraction > 0.9
    assert second.approx_kl > 1e-6


def test_sampled_actions_have_the_policys_log_probabilities() -> None:
    """The log-probability of the sampled actions is on average the negative entropy, in both kinds."""
    for name in ("RandomWalk", "Target"):
        config = trial(
            name, task={"steps_per_epoch": 2000}, ppo={"n_steps": 1000, "batch_size": 2000, "n_epochs": 1}
        )
        info = probe(config.env)
        module = MLPActorCritic(
            info.obs_dim, info.action_dim, ModelConfig(width=4, log_std_init=-0.7), continuous=info.continuous
        )
        with torch.no_grad():
            module.actor[-1].bias.copy_(torch.linspace(-1.0, 1.0, info.action_dim))
        learner = Learner(module, OptimizerConfig(), config.ppo, CPU, continuous=info.continuous)
        _, batch = first_rollout(config, learner)
        entropy = learner.update(batch, np.random.default_rng(0), 1e-9, 0.2).entropy
        error = float(batch.old_log_prob.std()) / math.sqrt(2000)
        assert float(batch.old_log_prob.mean()) == pytest.approx(-entropy, abs=4 * error)


# ------------------------------------------------------------------------ known answers


def test_endless_reward_is_worth_one_over_one_minus_gamma() -> None:
    """A time limit of 5 steps cuts every episode, but the value must not depend on it: 1 / (1 - 0.9)."""
    config = trial(
        "EndlessReward",
        env={"n_envs": 4},
        task={"epochs": 12, "steps_per_epoch": 512, "eval_episodes": 1},
        model={"width": 16, "depth": 1},
        optimizer={"lr": 0.01},
        lr_schedule={"name": "linear"},
        ppo={"n_steps": 32, "batch_size": 32, "gamma": 0.9, "gae_lambda": 0.95, "max_grad_norm": 10.0},
    )
    task = PPO.from_config(config, "cpu")
    rollouts: list[Rollout] = []
    task.events.subscribe("end_rollout", lambda *_, rollout, **__: rollouts.append(rollout))
    task.fit(12)
    task.finish()
    value = task.agent.learner.values(np.ones((1, 1), np.float32))
    assert float(value[0]) == pytest.approx(10.0, rel=0.02)

    # The same rollout, its cuts taken for ends: with k steps to go there is 1 + 0.9 + ... + 0.9^(k-1) to
    # get, on average 2.63 over the five steps. So the critic would have learned a quarter of the value.
    last = rollouts[-1]
    assert not last.terminated.any()
    cuts = np.flatnonzero(last.done[:, 0])
    assert np.diff(cuts).tolist() == [5] * 5
    whole = slice(cuts[0] + 1, cuts[-1] + 1)  # five whole episodes in each environment
    arguments = last.reward[whole], last.value[whole], last.next_value(value.repeat(4))[whole]
    done = last.done[whole]
    wrong = gae(*arguments, done, done, 0.9, 1.0) + last.value[whole]
    to_go = (1.0 - 0.9 ** np.array([5, 4, 3, 2, 1])) / 0.1
    np.testing.assert_allclose(wrong, np.tile(to_go, 5)[:, None].repeat(4, 1), rtol=1e-6)
    assert to_go.mean() == pytest.approx(2.63, abs=0.01)
    right = gae(*arguments, last.terminated[whole], done, 0.9, 1.0) + last.value[whole]
    np.testing.assert_allclose(right, 10.0, rtol=0.02)


def test_the_action_that_pays_is_learned() -> None:
    """`RandomWalk` pays 1 for each step with action 2: then a return is the episode's length."""
    config = trial(
        "RandomWalk",
        task={"epochs": 4, "steps_per_epoch": 512, "eval_episodes": 10},
        model={"width": 16, "depth": 1},
        optimizer={"lr": 0.01},
        ppo={"n_steps": 64, "batch_size": 32, "n_epochs": 4, "gamma": 0.9},
    )
    task = PPO.from_config(config, "cpu")
    task.fit(4)
    task.finish()
    first, last = task.metrics.curve[0], task.metrics.latest
    assert last["return_mean"] == last["episode_length"]
    assert first["return_mean"] < 0.8 * first["episode_length"]  # the untrained policy did not know
    # Nearly all sampled actions are that action, too.
    assert last["train_return"] > 0.95 * last["train_length"]


def test_the_continuous_action_that_pays_is_learned() -> None:
    config = trial(
        "Target",
        env={"n_envs": 4},
        task={"epochs": 8, "steps_per_epoch": 1024, "eval_episodes": 5},
        model={"width": 16, "depth": 1},
        optimizer={"lr": 0.01},
        lr_schedule={"name": "linear"},
        ppo={"n_steps": 64, "batch_size": 64, "n_epochs": 5, "gamma": 0.0},
    )
    task = PPO.from_config(config, "cpu")
    task.fit(8)
    task.finish()
    places = np.random.default_rng(0).uniform(-0.5, 0.5, (100, 3)).astype(np.float32)
    actions = task.agent.learner.act(places, None)
    np.testing.assert_allclose(actions.mean(0), Target.TARGET, atol=0.05)
    assert task.metrics.latest["return_mean"] > 9.8  # of 10, one for each step


# ------------------------------------------------------------------- epoch and network


def test_schedules() -> None:
    assert [scheduled("constant", 0.3, 0.1, p) for p in (0.0, 0.5, 1.0)] == [0.3] * 3
    assert [scheduled("linear", 0.3, 0.1, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.3, 0.2, 0.1])


def test_schedules_run_over_all_epochs_in_steps_of_a_rollout() -> None:
    """2 epochs of 2 rollouts: the rate falls from 1 to 0.2 in quarters, which Adam and the row see."""
    config = trial(
        "RandomWalk",
        task={"epochs": 1, "max_epochs": 2, "steps_per_epoch": 64, "eval_episodes": 1},
        optimizer={"lr": 1e-3},
        lr_schedule={"name": "linear", "final": 0.2},
        ppo={"n_steps": 16, "batch_size": 32, "clip_range": 0.4, "clip_range_schedule": "linear"},
    )
    task = PPO.from_config(config, "cpu")
    rates: list[float] = []
    task.events.subscribe("end_rollout", lambda *_, **__: rates.append(task.agent.learner.optimizer.lr))
    task.fit(2)
    task.finish()
    assert rates == pytest.approx([1e-3, 0.8e-3, 0.6e-3, 0.4e-3])
    assert [row["lr"] for row in task.metrics.curve[1:]] == pytest.approx([0.8e-3, 0.4e-3])
    assert [row["clip_range"] for row in task.metrics.curve[1:]] == pytest.approx([0.3, 0.1])


@pytest.mark.parametrize("part", ["reward", "observation"])
@ENGINES
def test_nan_is_found_in_the_rollout_in_which_it_appears(part: str, engine: str) -> None:
    # Two environments, each good for 40 steps; rollouts of 16 steps: it is in the third, after 96 steps.
    config = trial(
        "BecomesNaN",
        env={"kwargs": {"after": 40, "part": part}},
        task={"steps_per_epoch": 128},
        ppo={"n_steps": 16, "batch_size": 32, "n_epochs": 1},
    )
    info = probe(config.env)
    module = MLPActorCritic(info.obs_dim, info.action_dim, continuous=info.continuous)
    agent = Agent(
        Learner(module, config.optimizer, config.ppo, CPU, continuous=False, engine=engine),
        ObservationNormalizer(1, enabled=False, clip=10.0),
        RewardScaler(2, 0.9, enabled=False, clip=10.0),
    )
    with pytest.raises(Diverged, match="rollout 3 of epoch 1") as caught:
        train_epoch(Updates(agent, config, 0), SyncEnvs(config.env, info), info)
    assert caught.value.env_steps == 96


def test_orthogonal_initialisation() -> None:
    model = ModelConfig(width=16, depth=2, log_std_init=-0.5)
    module = MLPActorCritic(5, 3, model, continuous=True, seed=1)
    for layers, gain in ((module.actor, 0.01), (module.critic, 1.0)):
        first, second, last = (layers[index] for index in (0, 2, 4))
        for layer in (first, second, last):
            assert not layer.bias.any()
        # Columns of the tall one, rows of the others, are orthogonal and of the gain's length.
        torch.testing.assert_close(first.weight.T @ first.weight, 2.0 * torch.eye(5), atol=1e-5, rtol=0.0)
        torch.testing.assert_close(second.weight @ second.weight.T, 2.0 * torch.eye(16), atol=1e-5, rtol=0.0)
        square = gain**2 * torch.eye(len(last.weight))
        torch.testing.assert_close(last.weight @ last.weight.T, square, atol=1e-5 * gain**2, rtol=0.0)
    assert module.log_std is not None
    assert module.log_std.tolist() == [-0.5] * 3


@pytest.mark.parametrize("ortho_init", [True, False])
def test_initialisation_depends_on_its_seed_alone(ortho_init: bool) -> None:
    def weights(seed: int) -> torch.Tensor:
        module = MLPActorCritic(5, 3, ModelConfig(ortho_init=ortho_init), continuous=False, seed=seed)
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    torch.manual_seed(0)
    one, state = weights(1), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # torch's global stream was left alone
    torch.manual_seed(99)
    assert torch.equal(weights(1), one)
    assert not torch.equal(weights(2), one)


def test_seeds_of_a_trial_reach_its_network_and_its_actions() -> None:
    def first_actions(seed: int) -> tuple[np.ndarray, np.ndarray]:
        config = trial(
            "Target",
            task={"epochs": 1, "steps_per_epoch": 32, "seed": seed, "eval_episodes": 1},
            ppo={"n_steps": 16, "batch_size": 32, "n_epochs": 1},
        )
        task = PPO.from_config(config, "cpu")
        seen: list[Rollout] = []
        task.events.subscribe("end_rollout", lambda *_, rollout, **__: seen.append(rollout))
        task.fit(1)
        task.finish()
        return seen[0].obs, seen[0].action

    obs, action = first_actions(0)
    for ours, again, other in zip((obs, action), first_actions(0), first_actions(1), strict=True):
        np.testing.assert_array_equal(ours, again)
        assert not np.isin(ours[0], other[0]).any()
    # The environments were reset with this epoch's seeds.
    expected = SyncEnvs(trial("Target").env, probe(trial("Target").env)).reset(
        randomness.training_seeds(0, 0, 2)
    )
    np.testing.assert_allclose(obs[0], expected)

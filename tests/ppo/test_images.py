"""Images: the convolutional network, its learner, and trials from end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from torch import Tensor, nn

from ppo_hpo import TrialConfig, UserError
from ppo_hpo.envs.make import check_hyperparameters_fit, probe
from ppo_hpo.envs.vector import SyncEnvs
from ppo_hpo.ppo.agent import Agent
from ppo_hpo.ppo.autograd import AutogradEngine, _portions
from ppo_hpo.ppo.collect import Collector
from ppo_hpo.ppo.evaluate import Evaluator
from ppo_hpo.ppo.learner import Learner
from ppo_hpo.ppo.networks import MLPActorCritic, NatureCNN
from ppo_hpo.ppo.normalize import ObservationNormalizer, RewardScaler
from ppo_hpo.ppo.rollout import Samples, sampling_noise
from ppo_hpo.ppo.task import PPO
from ppo_hpo.spec import randomness
from ppo_hpo.spec.config import EnvConfig, ModelConfig, OptimizerConfig, PPOConfig

CPU = torch.device("cpu")
LAST, FIRST = (36, 40, 2), (2, 36, 40)
RANDOM = np.random.default_rng


def network(*, continuous: bool = False, **options: Any) -> NatureCNN:
    """A network whose parameters are moved from their initial values, so that nothing cancels."""
    given = {"image_shape": LAST, "channels_last": True, "seed": 3, **options}
    module = NatureCNN(
        given.pop("image_shape"), 4, ModelConfig(features_dim=16), continuous=continuous, **given
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module


def images(n: int, shape: tuple[int, ...] = LAST, seed: int = 0) -> np.ndarray:
    return RANDOM(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def samples(n: int, seed: int = 0) -> Samples:
    def real() -> np.ndarray:
        return RANDOM(seed + 1).standard_normal(n).astype(np.float32)

    return Samples(images(n, seed=seed), RANDOM(seed).integers(0, 4, n), real() - 1.4, real(), real(), real())


# ----------------------------------------------------------------------- the network


def slowly(module: NatureCNN, image: np.ndarray) -> tuple[np.ndarray, float]:
    """One image ``[H, W, C]`` through the network, pixel by pixel, in double precision."""
    state = {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}
    x = image.astype(np.float64) / 255.0
    for index, stride in ((0, 4), (2, 2), (4, 1)):
        weight = state[f"convolutions.{index}.weight"]  # [out, in, height, width]
        size = weight.shape[-1]
        rows, columns = ((length - size) // stride + 1 for length in x.shape[:2])
        out = np.zeros((rows, columns, len(weight)))
        for i in range(rows):
            for j in range(columns):
                patch = x[i * stride : i * stride + size, j * stride : j * stride + size].transpose(2, 0, 1)
                out[i, j] = (weight * patch).sum((1, 2, 3)) + state[f"convolutions.{index}.bias"]
        x = np.maximum(out, 0.0)
    flat = x.transpose(2, 0, 1).reshape(-1)
    features = np.maximum(state["dense.1.weight"] @ flat + state["dense.1.bias"], 0.0)
    output = state["policy_head.weight"] @ features + state["policy_head.bias"]
    return output, float(state["value_head.weight"][0] @ features + state["value_head.bias"][0])


def test_forward_against_a_slow_version() -> None:
    module, batch = network(), images(3)
    with torch.no_grad():
        output, value = module.policy_and_value(torch.from_numpy(batch))
    assert output.std() > 0.01
    for n, image in enumerate(batch):
        expected, expected_value = slowly(module, image)
        np.testing.assert_allclose(output[n].numpy(), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(float(value[n]), expected_value, rtol=1e-4, atol=1e-5)


def test_all_ways_through_the_network_agree() -> None:
    module, batch = network(), torch.from_numpy(images(3))
    kept = batch.clone()
    with torch.no_grad():
        output, value = module.policy_and_value(batch)
        torch.testing.assert_close(module.policy(batch), output)
        torch.testing.assert_close(module.value(batch), value)
        torch.testing.assert_close(module(batch)[1], value)
        first = network(image_shape=FIRST, channels_last=False)
        torch.testing.assert_close(first.policy(batch.permute(0, 3, 1, 2).contiguous()), output)
    assert torch.equal(batch, kept)


def test_layers_begin_orthogonal_with_their_gains_and_without_bias() -> None:
    model = ModelConfig(features_dim=16, log_std_init=-1.0)
    module = NatureCNN(LAST, 4, model, continuous=True, channels_last=True)
    gains = {"convolutions.0": 2.0, "convolutions.2": 2.0, "convolutions.4": 2.0, "dense.1": 2.0,
             "policy_head": 1e-4, "value_head": 1.0}  # fmt: skip
    for name, square in gains.items():
        layer: Any = module.get_submodule(name)
        flat = layer.weight.detach().flatten(1)
        torch.testing.assert_close(flat @ flat.T, square * torch.eye(len(flat)), rtol=0, atol=1e-5)
        assert not layer.bias.any()
    assert module.log_std is not None
    assert module.log_std.tolist() == [-1.0] * 4
    assert sum(parameter.numel() for parameter in module.parameters()) == (
        (2 * 64 + 1) * 32 + (32 * 16 + 1) * 64 + (64 * 9 + 1) * 64 + (64 + 1) * 16 + 17 * 4 + 17 + 4
    )


def test_uniform_initialisation_and_seeds() -> None:
    def make(seed: int) -> NatureCNN:
        model = ModelConfig(ortho_init=False)
        return NatureCNN(LAST, 4, model, continuous=False, channels_last=True, seed=seed)

    state = torch.random.get_rng_state()
    one, same, other = make(1), make(1), make(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c), name
    bound = 1.0 / np.sqrt(2 * 64)
    weight: Any = one.convolutions[0].weight
    assert 0.95 * bound < weight.abs().max() <= bound


def sb3_policy(module: NatureCNN, shape: tuple[int, ...]) -> ActorCriticCnnPolicy:
    """Stable-Baselines3's policy with the same parameters; it takes channels first."""
    policy = ActorCriticCnnPolicy(
        spaces.Box(0, 255, shape, np.uint8),
        spaces.Discrete(4),
        lambda progress: 1e-3,
        features_extractor_kwargs={"features_dim": 16},
    )
    theirs: Any = policy.features_extractor
    layers = [
        theirs.cnn[0],
        theirs.cnn[2],
        theirs.cnn[4],
        theirs.linear[0],
        policy.action_net,
        policy.value_net,
    ]
    own = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for ours, their in zip(own, layers, strict=True):
            their.weight.copy_(ours.weight)
            their.bias.copy_(ours.bias)
    return policy


def test_densities_values_and_gradients_are_those_of_stable_baselines3() -> None:
    module, batch = network(), samples(32)
    policy = sb3_policy(module, FIRST)
    obs, action = torch.from_numpy(batch.obs), torch.from_numpy(batch.action)
    value, log_prob, entropy = policy.evaluate_actions(obs.permute(0, 3, 1, 2), action)
    engine = AutogradEngine(module, CPU, continuous=False, criterion=None)
    np.testing.assert_allclose(engine.values(batch.obs), value.detach().numpy()[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        engine.log_probs(batch.obs, batch.action), log_prob.detach().numpy(), rtol=1e-4, atol=1e-5
    )
    ppo = PPOConfig(ent_coef=0.01, normalize_advantage=False)
    assert entropy is not None
    ratio = (log_prob - torch.from_numpy(batch.old_log_prob)).exp()
    advantage = torch.from_numpy(batch.advantage)
    surrogate = torch.min(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage).mean()
    error = nn.functional.mse_loss(torch.from_numpy(batch.returns), value.flatten())
    (0.5 * error - 0.01 * entropy.mean() - surrogate).backward()  # type: ignore[no-untyped-call]
    engine.backward(engine.load(batch), ppo, 0.1)
    own = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    extractor: Any = policy.features_extractor
    theirs = [
        *(layer for layer in extractor.modules() if isinstance(layer, nn.Conv2d | nn.Linear)),
        policy.action_net,
        policy.value_net,
    ]
    for ours, their in zip(own, theirs, strict=True):
        gradient: Any = ours.weight.grad
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(gradient, their.weight.grad, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------- the learner


class Twice(nn.Module):
    """The same network without `policy_and_value`, as a custom network may be."""

    log_std = None

    def __init__(self, module: NatureCNN) -> None:
        super().__init__()
        self.module = module

    def policy(self, obs: Tensor) -> Tensor:
        return self.module.policy(obs)

    def value(self, obs: Tensor) -> Tensor:
        return self.module.value(obs)


def learner(module: nn.Module, *, continuous: bool = False, **ppo: Any) -> Learner:
    config = PPOConfig(**{"batch_size": 16, "n_epochs": 2, "ent_coef": 0.01, **ppo})
    return Learner(module, OptimizerConfig(lr=1e-3), config, CPU, continuous=continuous)


@pytest.mark.parametrize("continuous", [False, True], ids=["discrete", "continuous"])
def test_outputs_of_acting_equal_those_that_one_computes_later(continuous: bool) -> None:
    agent = learner(network(continuous=continuous), continuous=continuous)
    assert agent.reuses_outputs
    noise = sampling_noise(RANDOM(0), (3, 5, 4), continuous=continuous)
    batch = images(15).reshape(3, 5, *LAST)
    acted = [agent.act_with_outputs(batch[t], noise[t]) for t in range(3)]
    action = np.concatenate([chosen for chosen, _ in acted])
    for t, (chosen, _) in enumerate(acted):
        np.testing.assert_array_equal(chosen, agent.act(batch[t], noise[t]))
    log_prob, value = agent.evaluate_outputs([outputs for _, outputs in acted], action)
    flat = batch.reshape(-1, *LAST)
    np.testing.assert_allclose(log_prob, agent.log_probs(flat, action), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(value, agent.values(flat), rtol=1e-5, atol=1e-6)


def test_a_network_without_policy_and_value_learns_the_same() -> None:
    batch = samples(48)
    agents = [learner(network()), learner(Twice(network()))]
    assert [agent.reuses_outputs for agent in agents] == [True, False]
    stats = [agent.update(batch, randomness.make_rng(0, "shuffle", 0), 1e-3, 0.2) for agent in agents]
    assert stats[0].n_updates == 6
    assert stats[0].grad_norm == pytest.approx(stats[1].grad_norm, rel=1e-3)
    for one, other in zip(agents[0].module.parameters(), agents[1].module.parameters(), strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_an_update_moves_every_layer_and_shuffles_images_with_their_samples() -> None:
    module = network()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    agent, batch = learner(module), samples(48)
    # The action tells the image that it belongs to.
    batch = batch._replace(action=batch.obs.reshape(48, -1).sum(1, dtype=np.int64))
    seen = []
    for minibatch in agent.minibatches(batch, randomness.make_rng(0, "shuffle", 0)):
        assert minibatch.obs.dtype == torch.uint8
        assert minibatch.obs.flatten(1).sum(1).tolist() == minibatch.action.tolist()
        seen += minibatch.action.tolist()
    assert sorted(seen[:48]) == sorted(seen[48:]) == sorted(batch.action.tolist())
    assert seen[:48] != seen[48:]
    agent.update(samples(48), randomness.make_rng(0, "shuffle", 0), 1e-3, 0.2)
    for parameter, old in zip(module.parameters(), before, strict=True):
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, old)


def test_many_images_are_evaluated_in_portions() -> None:
    many = np.zeros((1100, 1, 1, 1), np.uint8)
    many[:, 0, 0, 0] = np.arange(1100) % 251
    parts = _portions(many)
    assert [len(part) for part in parts] == [512, 512, 76]
    np.testing.assert_array_equal(np.concatenate(parts), many)
    assert len(_portions(np.zeros((5000, 3), np.float32))) == 1


# -------------------------------------------------------------------- from end to end


def eyes(**env: Any) -> EnvConfig:
    return EnvConfig(id="tests.envs:Eyes-v0", **{"n_envs": 2, **env})


@pytest.mark.parametrize("first", [False, True], ids=["channels last", "channels first"])
def test_rollouts_hold_the_bytes_that_the_environment_showed(first: bool) -> None:
    config = eyes(kwargs={"channels_first": first})
    info = probe(config)
    shape = FIRST if first else LAST
    assert (info.obs_shape, info.images, info.channels_last) == (shape, True, not first)
    agent = Agent(
        learner(network(image_shape=shape, channels_last=not first)),
        ObservationNormalizer(0, enabled=False, clip=10.0),
        RewardScaler(2, 0.99, enabled=False, clip=10.0),
    )
    envs, again = SyncEnvs(config, info), SyncEnvs(config, info)
    collector = Collector(agent, envs, info, [1, 2], randomness.make_rng(0, "action", 0))
    rollout, last = collector.collect(30), collector.obs
    assert rollout.obs.shape == (30, 2, *shape)
    assert rollout.obs.dtype == last.dtype == np.uint8
    shown = again.reset([1, 2])
    for t in range(30):
        np.testing.assert_array_equal(rollout.obs[t], shown)
        step = again.step(rollout.action[t])
        np.testing.assert_array_equal(rollout.reward[t], step.reward)
        shown = step.obs
    np.testing.assert_array_equal(last, shown)
    flat = rollout.obs.reshape(-1, *shape)
    np.testing.assert_allclose(rollout.value.reshape(-1), agent.learner.values(flat), rtol=1e-5, atol=1e-6)
    assert rollout.truncated.any()
    assert (rollout.final_value[rollout.truncated] != 0.0).all()
    assert rollout.samples(rollout.value, rollout.value).obs.dtype == np.uint8


def trial(**groups: Any) -> TrialConfig:
    mapping: dict[str, Any] = {
        "env": {"id": "tests.envs:Eyes-v0", "n_envs": 4},
        "task": {"epochs": 3, "steps_per_epoch": 768, "eval_episodes": 10},
        "model": {"features_dim": 32},
        "optimizer": {"lr": 2e-3},
        "lr_schedule": {"name": "linear"},
        "ppo": {"n_steps": 32, "batch_size": 32, "n_epochs": 4, "gamma": 0.0},
    }
    return TrialConfig.from_mapping(
        {g: {**mapping.get(g, {}), **groups.get(g, {})} for g in {*mapping, *groups}}
    )


def test_a_trial_learns_from_images() -> None:
    """Only the place of the square tells which action is rewarded."""
    task = PPO.from_config(trial(), "cpu")
    assert isinstance(task.model, NatureCNN)
    assert "images of 36 x 40 x 2" in task.summary()
    task.fit(3)
    task.finish()
    shares = [row["return_mean"] / row["episode_length"] for row in task.metrics.curve]
    assert shares[0] < 0.6  # one corner of four, or a lucky mixture
    assert shares[-1] > 0.95
    # Random actions are right in a quarter of the steps.
    blind = Evaluator(trial().env, task.info, randomness.evaluation_seeds(40), 12)
    found = blind(
        Blind(), ObservationNormalizer(0, enabled=False, clip=10.0), randomness.make_rng(0, "eval", 0)
    )
    blind.close()
    assert sum(found.returns) / sum(found.lengths) < 0.4


class Blind:
    """A policy that acts by noise alone."""

    def act(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        assert obs.dtype == np.uint8
        assert noise is not None
        return noise.argmax(-1)


def test_a_state_survives_a_file(tmp_path: Any) -> None:
    config = trial(task={"epochs": 2, "max_epochs": 2, "steps_per_epoch": 128, "eval_episodes": 2})
    one = PPO.from_config(config, "cpu", storage=tmp_path)
    one.fit(1)
    other = PPO.from_config(config, "cpu", storage=tmp_path)
    assert other.epoch == 1
    for name, tensor in one.state_dict().items():
        if name != "progress":
            assert torch.equal(tensor, other.state_dict()[name]), name
    one.finish()


# -------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("env", "groups", "message"),
    [
        ("tests.envs:Eyes-v0", {"normalize": {"norm_obs": True}}, r"norm_obs` is for vectors.*has images"),
        (
            "tests.envs:Eyes-v0",
            {"model": {"width": 32}},
            r"width` has no effect where observations are images",
        ),
        ("tests.envs:Eyes-v0", {"model": {"activation": "relu"}}, r"`model\.activation` has no effect"),
        ("CartPole-v1", {"model": {"features_dim": 64}}, r"features_dim` has no effect.*are vectors"),
    ],
)
def test_hyperparameters_without_effect_are_refused(env: str, groups: Any, message: str) -> None:
    config = TrialConfig.from_mapping({"env": {"id": env}, **groups})
    with pytest.raises(UserError, match=message):
        check_hyperparameters_fit(config, probe(config.env))
    with pytest.raises(UserError, match=message):
        PPO.from_config(config, "cpu")


def test_a_custom_network_ignores_the_hyperparameters_of_networks() -> None:
    config = TrialConfig.from_mapping({"env": {"id": "CartPole-v1"}, "model": {"features_dim": 64}})
    PPO.from_config(config, "cpu", model=MLPActorCritic(4, 2, continuous=False))


@pytest.mark.parametrize("kwargs", [{"side": 35}, {"side": 40, "high": 1}], ids=str)
def test_images_that_the_network_cannot_take_are_refused(kwargs: dict[str, int]) -> None:
    message = "must be 36 or more" if kwargs["side"] < 36 else "Box of uint8 from 0 to 255"
    with pytest.raises(UserError, match=message):
        probe(EnvConfig(id="tests.envs:Gray-v0", kwargs=kwargs))
    assert probe(EnvConfig(id="tests.envs:Gray-v0", kwargs={"side": 36})).images

"""Evaluation: whole episodes with their own seeds, which do not influence training."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from ppo_hpo import PPO, TrialConfig
from ppo_hpo.envs.make import probe
from ppo_hpo.ppo.evaluate import Evaluation, Evaluator
from ppo_hpo.ppo.normalize import ObservationNormalizer
from ppo_hpo.ppo.rollout import sampling_noise
from ppo_hpo.spec import randomness
from ppo_hpo.spec.config import EnvConfig
from ppo_hpo.spec.errors import NotFinite


class ByObservation:
    """A discrete policy: action 2 where the first entry is positive, else 0; noise decides where given."""

    def act(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        return np.where(obs[:, 0] > 0.0, 2, 0) if noise is None else noise.argmax(-1)


def evaluator(name: str, seeds: list[int], max_steps: int = 10**6, **env: Any) -> Evaluator:
    config = EnvConfig(id=f"tests.envs:{name}-v0", **env)
    return Evaluator(config, probe(config), seeds, max_steps)


def plain(dim: int = 2) -> ObservationNormalizer:
    return ObservationNormalizer(dim, enabled=False, clip=10.0)


def run(evaluate: Evaluator, stream: np.random.Generator | None = None) -> Evaluation:
    return evaluate(ByObservation(), plain(), stream)


def test_returns_and_lengths_equal_those_of_the_loop_by_hand() -> None:
    """In the order of the seeds, though the episodes end at different times."""
    seeds = randomness.evaluation_seeds(12)
    result = run(evaluator("RandomWalk", seeds))
    env = gymnasium.make("tests.envs:RandomWalk-v0")
    returns, lengths = [], []
    for seed in seeds:
        obs, _ = env.reset(seed=seed)
        total, length, over = 0.0, 0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(2 if obs[0] > 0.0 else 0)
            total, length, over = total + float(reward), length + 1, terminated or truncated
        returns.append(total)
        lengths.append(length)
    assert result.returns == tuple(returns)
    assert result.lengths == tuple(lengths)
    assert len(set(zip(returns, lengths, strict=True))) > 4


def test_blocks_of_episodes_give_the_same_as_all_at_once() -> None:
    seeds, config = randomness.evaluation_seeds(7), EnvConfig(id="tests.envs:RandomWalk-v0")
    whole, blocks = (Evaluator(config, probe(config), seeds, 10**6, at_once=n) for n in (None, 3))
    assert (len(whole._envs), len(blocks._envs)) == (7, 3)
    assert run(blocks) == run(whole)


def test_evaluating_again_gives_the_same_episodes() -> None:
    evaluate = evaluator("RandomWalk", randomness.evaluation_seeds(6))
    assert run(evaluate) == run(evaluate)
    one, other = (run(evaluate, np.random.default_rng(seed)) for seed in (0, 1))
    assert run(evaluate, np.random.default_rng(0)) == one
    assert one.lengths == other.lengths  # the same episodes, in which length does not depend on actions,
    assert one.returns != other.returns  # and other actions


def test_sampled_actions_have_their_own_noise_in_every_episode_and_step() -> None:
    seen: list[np.ndarray] = []

    class Watching(ByObservation):
        def act(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
            assert noise is not None
            assert noise.shape == (len(obs), 3)
            seen.append(noise.copy())
            return super().act(obs, noise)

    evaluate = evaluator("RandomWalk", list(range(300)))
    result = evaluate(Watching(), plain(), np.random.default_rng(0))
    rows = np.concatenate(seen)
    assert len(rows) == sum(result.lengths)
    assert len(np.unique(rows, axis=0)) == len(rows)
    # The noise of an episode does not depend on which other episodes have ended.
    stream, lengths = np.random.default_rng(0), np.array(result.lengths)
    for step, noise in enumerate(seen):
        expected = sampling_noise(stream, (300, 3), continuous=False)
        np.testing.assert_array_equal(noise, expected[lengths > step])
    # Gumbel noise alone picks each of three actions a third of the time, and one of them pays 1.
    share = sum(result.returns) / sum(result.lengths)
    assert share == pytest.approx(1 / 3, abs=4 * np.sqrt(2 / 9 / sum(result.lengths)))


def test_an_episode_without_a_time_limit_is_cut() -> None:
    result = run(evaluator("Counter", [0, 1], max_steps=4))
    assert result.lengths == (4, 4)
    assert result.returns == (1.0 + 2.0 + 3.0 + 4.0,) * 2
    # An episode that ends before is not cut, and one that ends in that very step counts once.
    assert run(evaluator("Counter", [0], max_steps=4, kwargs={"ends_at": 3})).lengths == (3,)
    assert run(evaluator("Counter", [0], max_steps=4, kwargs={"ends_at": 4})).lengths == (4,)


def test_a_reward_that_is_not_finite_is_reported() -> None:
    with pytest.raises(NotFinite, match="returned the reward nan"):
        evaluator("BecomesNaN", [0, 1], kwargs={"after": 3})(ByObservation(), plain(1), None)


@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluation_does_not_influence_training(deterministic: bool) -> None:
    """More evaluation episodes change no parameter, no statistic and no rng of training."""

    def trained(episodes: int) -> dict[str, Any]:
        mapping = {
            "env": {"id": "tests.envs:RandomWalk-v0", "n_envs": 2},
            "task": {
                "epochs": 3,
                "steps_per_epoch": 64,
                "eval_episodes": episodes,
                "eval_deterministic": deterministic,
            },
            "model": {"width": 4, "depth": 1},
            "normalize": {"norm_obs": True, "norm_reward": True},
            "ppo": {"n_steps": 32, "batch_size": 32, "n_epochs": 2},
        }
        task = PPO.from_config(TrialConfig.from_mapping(mapping), "cpu")
        task.fit(3)
        task.finish()
        state = task.state_dict()
        state.pop("progress")
        return {name: tensor.numpy() for name, tensor in state.items()}

    few, many = trained(2), trained(9)
    for name, array in few.items():
        np.testing.assert_array_equal(array, many[name], err_msg=name)
    # 3 epochs, each of 2 observations at the reset and 64 that followed.
    assert few["observation_normalizer.count"] == 3 * (2 + 64)
    assert few["reward_scaler.count"] == 3 * 64


def test_the_policy_sees_observations_as_in_training() -> None:
    """Normalised by training's statistics, which evaluation does not change."""
    seen: list[np.ndarray] = []

    class Watching(ByObservation):
        def act(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
            seen.append(obs.copy())
            return super().act(obs, noise)

    normalizer = ObservationNormalizer(2, enabled=True, clip=10.0)
    normalizer.update(np.array([[1.0, 0.0], [5.0, 4.0]]))  # means 3 and 2, deviations 2 and 2
    before = normalizer.moments.state()
    evaluator("Counter", [0], max_steps=3)(Watching(), normalizer, None)
    # Raw: (0, 0), (1, 1), (2, 2)
    np.testing.assert_allclose(np.concatenate(seen), [[-1.5, -1.0], [-1.0, -0.5], [-0.5, 0.0]], atol=1e-6)
    assert all(obs.dtype == np.float32 for obs in seen)
    for name, array in normalizer.moments.state().items():
        np.testing.assert_array_equal(array, before[name])

"""Rollouts: transitions are in order, final observations have values, and actions are stored as sampled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ppo_hpo.envs.make import EnvInfo, probe
from ppo_hpo.envs.vector import SyncEnvs
from ppo_hpo.ppo.agent import Agent
from ppo_hpo.ppo.collect import Collector
from ppo_hpo.ppo.gae import gae
from ppo_hpo.ppo.normalize import ObservationNormalizer, RewardScaler, RunningMoments
from ppo_hpo.ppo.rollout import Episodes, Rollout, sampling_noise
from ppo_hpo.spec import randomness
from ppo_hpo.spec.config import EnvConfig


class Known:
    """A policy with known answers: the value is 10 (first entry) + 1, and the action comes from the noise."""

    reuses_outputs = False

    def __init__(self, info: EnvInfo, action: float | None = None) -> None:
        self._info = info
        self._action = action

    def act(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        assert obs.dtype == np.float32
        assert noise is not None
        if self._info.continuous:
            return noise if self._action is None else np.full_like(noise, self._action)
        return noise.argmax(-1)

    def values(self, obs: np.ndarray) -> np.ndarray:
        assert obs.dtype == np.float32
        return 10.0 * obs[:, 0] + np.float32(1.0)

    def log_probs(self, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        first = action[:, 0] if self._info.continuous else action
        return (obs[:, 0] - first).astype(np.float32)


class Run:
    """A rollout of `Known` and what it was collected with."""

    def __init__(
        self,
        name: str,
        n_steps: int,
        n_envs: int = 2,
        *,
        action: float | None = None,
        normalize: bool = False,
        gamma: float = 0.9,
        **env: Any,
    ) -> None:
        self.config = EnvConfig(id=f"tests.envs:{name}-v0", n_envs=n_envs, **env)
        self.info = probe(self.config)
        self.seeds = randomness.training_seeds(0, 0, n_envs)
        self.normalizer = ObservationNormalizer(self.info.obs_dim, enabled=normalize, clip=10.0)
        scaler = RewardScaler(n_envs, gamma, enabled=normalize, clip=10.0)
        self.policy = Known(self.info, action)
        self.steps = 0
        self._collector = Collector(
            Agent(self.policy, self.normalizer, scaler),  # type: ignore[arg-type]
            SyncEnvs(self.config, self.info),
            self.info,
            self.seeds,
            randomness.make_rng(0, "action", 0),
            self._count,
        )
        self.episodes = self._collector.episodes
        self.rollout = self.more(n_steps)

    def more(self, n_steps: int) -> Rollout:
        rollout = self._collector.collect(n_steps)
        self.last_obs = self._collector.obs
        return rollout

    def _count(self) -> None:
        self.steps += 1


# ------------------------------------------------------------------- transitions


def test_rows_are_the_steps_of_the_environments() -> None:
    """`Counter` tells the number of each step of its life: none is missing, none is a reset's."""
    run = Run("Counter", 8, max_episode_steps=3)
    rollout = run.rollout
    episode = np.array([0, 1, 2, 0, 1, 2, 0, 1], np.float32)
    for n in range(2):
        np.testing.assert_array_equal(rollout.obs[:, n, 0], episode)
        np.testing.assert_array_equal(rollout.obs[:, n, 1], np.arange(8))
        np.testing.assert_array_equal(rollout.reward[:, n], np.arange(1, 9))  # of the step taken there
    assert run.last_obs.tolist() == [[2.0, 8.0]] * 2
    assert run.steps == 8
    # The next rollout goes on in the middle of the episode.
    following = run.more(2)
    assert following.obs[:, 0].tolist() == [[2.0, 8.0], [0.0, 9.0]]
    assert following.reward[:, 0].tolist() == [9.0, 10.0]


def test_truncation_is_valued_at_the_final_observation() -> None:
    # Steps 3 and 6 of each life cut an episode at 3: worth 10 * 3 + 1. The reset's would be 1.
    run = Run("Counter", 7, max_episode_steps=3)
    rollout = run.rollout
    cut = np.array([False, False, True, False, False, True, False])
    for n in range(2):
        np.testing.assert_array_equal(rollout.truncated[:, n], cut)
        np.testing.assert_array_equal(rollout.final_value[:, n], 31.0 * cut)
        np.testing.assert_array_equal(rollout.value[:, n], [1, 11, 21, 1, 11, 21, 1])
    assert not rollout.terminated.any()
    np.testing.assert_array_equal(rollout.done, rollout.truncated)
    following = rollout.next_value(run.policy.values(run.last_obs))
    np.testing.assert_array_equal(following[:, 0], [11, 21, 31, 11, 21, 31, 11])
    # One-step advantages: reward + gamma * next value - value, the whole way.
    advantage = gae(
        rollout.reward, rollout.value, following, rollout.terminated, rollout.done, 0.5, 0.0
    )[:, 0]  # fmt: skip
    np.testing.assert_allclose(advantage, [5.5, 1.5, -2.5, 8.5, 4.5, 0.5, 11.5])


def test_termination_is_not_valued() -> None:
    run = Run("Counter", 7, kwargs={"ends_at": 3})
    rollout = run.rollout
    assert np.flatnonzero(rollout.terminated[:, 0]).tolist() == [2, 5]
    assert not rollout.truncated.any()
    assert not rollout.final_value.any()
    following = rollout.next_value(run.policy.values(run.last_obs))
    advantage = gae(
        rollout.reward, rollout.value, following, rollout.terminated, rollout.done, 0.5, 0.0
    )[:, 0]  # fmt: skip
    # At 2 and 5 only reward - value is left: 3 - 21 and 6 - 21.
    np.testing.assert_allclose(advantage, [5.5, 1.5, -18.0, 8.5, 4.5, -15.0, 11.5])


def test_both_flags_at_once_are_a_termination() -> None:
    """The task ended in its last allowed step: it is over, whatever the time limit says."""
    both = Run("Counter", 7, kwargs={"ends_at": 3}, max_episode_steps=3).rollout
    ended = Run("Counter", 7, kwargs={"ends_at": 3}).rollout
    assert both.terminated[2].all()
    for name in ("terminated", "truncated", "done", "final_value", "obs", "reward"):
        np.testing.assert_array_equal(getattr(both, name), getattr(ended, name))


def test_random_episodes_equal_those_of_the_loop_by_hand() -> None:
    """`RandomWalk`: lengths from the environment's own random state, ends of both kinds."""
    import gymnasium

    T, n_envs = 100, 3
    run = Run("RandomWalk", T, n_envs)
    rollout = run.rollout
    returns, lengths = [], []
    for n, seed in enumerate(run.seeds):
        env = gymnasium.make("tests.envs:RandomWalk-v0")
        obs, _ = env.reset(seed=seed)
        total, length = 0.0, 0
        for t in range(T):
            np.testing.assert_array_equal(rollout.obs[t, n], obs)
            obs, reward, terminated, truncated, _ = env.step(rollout.action[t, n])
            assert rollout.reward[t, n] == reward
            assert rollout.terminated[t, n] == terminated
            assert rollout.truncated[t, n] == (truncated and not terminated)
            expected = 10.0 * obs[0] + 1.0 if truncated and not terminated else 0.0
            assert rollout.final_value[t, n] == pytest.approx(expected, rel=1e-6)
            total, length = total + float(reward), length + 1
            if terminated or truncated:
                returns.append(total)
                lengths.append(length)
                total, length = 0.0, 0
                obs, _ = env.reset()
        np.testing.assert_array_equal(run.last_obs[n], obs)
    assert rollout.terminated.any()
    assert rollout.truncated.any()
    assert sorted(run.episodes.returns) == sorted(returns)
    assert sorted(run.episodes.lengths) == sorted(lengths)
    assert len(set(lengths)) > 3


def test_episodes_go_on_from_one_rollout_to_the_next() -> None:
    # The first environment ends after steps 1 and 5, the second never, over rollouts of 2, 1 and 3 steps.
    episodes = Episodes(2)
    rewards = np.array([[1.0, 100.0], [2.0, 200.0], [4.0, 300.0], [8.0, 400.0], [16.0, 500.0], [32.0, 600.0]])
    done = np.zeros((6, 2), np.bool_)
    done[[1, 5], 0] = True
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        episodes.add(rewards[part], done[part])
    assert (episodes.returns, episodes.lengths) == ([3.0, 60.0], [2, 4])
    episodes.add(np.array([[0.5, 700.0]]), np.array([[True, True]]))
    assert (episodes.returns[2:], episodes.lengths[2:]) == ([0.5, 2800.0], [1, 7])
    episodes.add(np.array([[0.25, 5.0]]), np.array([[False, True]]))
    episodes.add(np.array([[0.25, 5.0]]), np.array([[True, False]]))
    assert (episodes.returns[4:], episodes.lengths[4:]) == ([5.0, 0.5], [1, 2])


def test_noise_is_normal_or_gumbel() -> None:
    rng = lambda: np.random.default_rng(3)  # noqa: E731
    normal, gumbel = (sampling_noise(rng(), (4, 5), continuous=kind) for kind in (True, False))
    np.testing.assert_array_equal(normal, rng().standard_normal((4, 5), np.float32))
    # The density of -log E is that of Gumbel's distribution, where E is exponential.
    np.testing.assert_allclose(np.exp(-gumbel), rng().standard_exponential((4, 5), np.float32), rtol=1e-6)


# ------------------------------------------------------- actions, values, log-probabilities


def test_continuous_actions_are_stored_as_they_were_sampled() -> None:
    rollout = Run("Target", 5, action=5.0).rollout
    np.testing.assert_array_equal(rollout.action, 5.0)
    np.testing.assert_array_equal(rollout.log_prob, rollout.obs[..., 0] - 5.0)  # those of the stored action
    # What was rewarded is the clipped one, (1, 1): 1 - (0.5^2 + 1.25^2).
    np.testing.assert_allclose(rollout.reward, 1.0 - 0.25 - 1.5625)


def test_values_and_log_probs_belong_to_their_rows() -> None:
    for name in ("RandomWalk", "Target"):
        run = Run(name, 20, 3)
        rollout = run.rollout
        first = rollout.action[..., 0] if run.info.continuous else rollout.action
        np.testing.assert_allclose(rollout.value, 10.0 * rollout.obs[..., 0] + 1.0, rtol=1e-6)
        np.testing.assert_allclose(rollout.log_prob, rollout.obs[..., 0] - first, rtol=1e-6)


def test_noise_comes_from_the_rng_and_is_new_in_every_step_and_environment() -> None:
    run = Run("Target", 20, 3)
    expected = randomness.make_rng(0, "action", 0).standard_normal((20, 3, 2), np.float32)
    np.testing.assert_array_equal(run.rollout.action, expected)
    assert not np.isin(run.more(20).action, expected).any()


@pytest.mark.parametrize("normalize", [False, True])
def test_dtypes(normalize: bool) -> None:
    """The networks' numbers are in single precision, rewards in double until they are samples."""
    for name, action in (("RandomWalk", np.int64), ("Target", np.float32)):
        run = Run(name, 12, normalize=normalize)
        rollout = run.rollout
        assert rollout.action.dtype == action
        assert rollout.reward.dtype == np.float64
        single = (rollout.obs, rollout.log_prob, rollout.value, rollout.final_value, run.last_obs)
        assert {array.dtype for array in single} == {np.dtype(np.float32)}
        assert {rollout.terminated.dtype, rollout.truncated.dtype} == {np.dtype(np.bool_)}
        assert rollout.next_value(run.policy.values(run.last_obs)).dtype == np.float32
        samples = rollout.samples(rollout.reward, rollout.reward)
        assert {array.dtype for array in samples} <= {np.dtype(np.float32), np.dtype(action)}
        assert samples.action.dtype == action
        assert all(array.flags.c_contiguous for array in samples)


def test_samples_keep_rows_together() -> None:
    run = Run("Target", 6, 3)
    rollout = run.rollout
    advantage = np.arange(18.0).reshape(6, 3)
    samples = rollout.samples(advantage, 100.0 + advantage)
    for t in range(6):
        for n in range(3):
            (row,) = np.flatnonzero(samples.advantage == advantage[t, n])
            np.testing.assert_array_equal(samples.obs[row], rollout.obs[t, n])
            np.testing.assert_array_equal(samples.action[row], rollout.action[t, n])
            assert samples.old_log_prob[row] == rollout.log_prob[t, n]
            assert samples.old_value[row] == rollout.value[t, n]
            assert samples.returns[row] == 100.0 + advantage[t, n]


# ------------------------------------------------------------------------ normalising


def test_normalised_rollouts_against_a_slow_version() -> None:
    """Statistics of everything the policy saw; a final observation by those of its own step."""
    plain, run = Run("RandomWalk", 60), Run("RandomWalk", 60, normalize=True)
    rollout, raw = run.rollout, plain.rollout
    np.testing.assert_array_equal(rollout.action, raw.action)  # the same noise: the same episodes
    moments, seen = RunningMoments((2,)), [raw.obs[0]]
    following = np.concatenate([raw.obs[1:], plain.last_obs[None]])
    for t in range(60):
        rows = np.concatenate(seen)
        expected = (raw.obs[t] - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-8)
        np.testing.assert_allclose(rollout.obs[t], np.clip(expected, -10.0, 10.0), rtol=1e-4, atol=1e-5)
        seen.append(following[t])
        rows = np.concatenate(seen)
        for n in np.flatnonzero(raw.truncated[t]):
            final = (raw.final_value[t, n] - 1.0) / 10.0  # the value gives the observation away
            expected = (final - rows[:, 0].mean()) / np.sqrt(rows[:, 0].var() + 1e-8)
            assert rollout.final_value[t, n] == pytest.approx(10.0 * expected + 1.0, rel=1e-3, abs=1e-3)
    assert raw.truncated.any()
    moments.update(np.concatenate(seen))
    assert run.normalizer.moments.count == 61 * 2
    np.testing.assert_allclose(run.normalizer.moments.mean, moments.mean)
    np.testing.assert_allclose(run.normalizer.moments.var, moments.var)
    # Rewards: scaled by the trial's own discount, cut where episodes end; the episodes' returns are not.
    scaler = RewardScaler(2, 0.9, enabled=True, clip=10.0)
    scaled = [scaler(raw.reward[t], raw.done[t]) for t in range(60)]
    np.testing.assert_allclose(rollout.reward, scaled)
    assert run.episodes.returns == plain.episodes.returns
    assert run.episodes.lengths == plain.episodes.lengths

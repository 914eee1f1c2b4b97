"""Environments: supported spaces, conversion of actions, and no lost or invented step."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from ppo_hpo import UserError
from ppo_hpo.envs.make import EnvInfo, make, probe
from ppo_hpo.envs.vector import SyncEnvs
from ppo_hpo.spec.config import EnvConfig
from tests.envs import Target


def config(name: str, **options: Any) -> EnvConfig:
    return EnvConfig(id=f"tests.envs:{name}-v0", **options)


def make_envs(name: str, **options: Any) -> SyncEnvs:
    return SyncEnvs(config(name, **options), probe(config(name, **options)))


# ----------------------------------------------------------------------------- probe


def test_probe_of_a_discrete_environment() -> None:
    info = probe(config("RandomWalk"))
    assert (info.obs_dim, info.kind, info.action_dim, info.first_action) == (2, "discrete", 3, 0)
    assert not info.continuous
    assert info.time_limit == 10


def test_probe_of_a_continuous_environment() -> None:
    info = probe(config("Target"))
    assert (info.obs_dim, info.kind, info.action_dim) == (3, "continuous", 2)
    assert info.continuous
    assert (info.low.tolist(), info.high.tolist()) == ([-1.0, -1.0], [1.0, 1.0])


def test_time_limit_may_be_replaced_or_missing() -> None:
    assert probe(config("RandomWalk", max_episode_steps=3)).time_limit == 3
    assert probe(config("Counter")).time_limit is None


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("tests.envs:Image-v0", r"has the observation space Box\(-inf, inf, \(4, 4\), float32\)"),
        ("tests.envs:Gray-v0", r"images of shape \(35, 35, 1\), but their height and width must be 36"),
        ("tests.envs:Switches-v0", r"has the action space MultiBinary\(3\)\. Supported are"),
        ("tests.envs:Nothing-v0", r"cannot be made.*Nothing"),
        ("no_such_module_of_ours:Any-v0", r"needs the module 'no_such_module_of_ours'"),
    ],
)
def test_unsupported_environments_are_refused(env_id: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        probe(EnvConfig(id=env_id))


def test_arguments_that_the_environment_does_not_take() -> None:
    with pytest.raises(UserError, match=r"does not take `env\.kwargs: \{'gravity': 1\}`"):
        probe(config("Counter", kwargs={"gravity": 1}))


# ---------------------------------------------------------------------------- actions


def test_discrete_actions_start_where_the_space_starts() -> None:
    envs = make_envs("FromFive", n_envs=3)
    envs.reset([0, 1, 2])
    assert probe(config("FromFive")).action_dim == 3
    assert envs.step(np.array([0, 1, 2])).reward.tolist() == [5.0, 6.0, 7.0]


def test_continuous_actions_are_clipped_for_the_environment() -> None:
    """`Target` refuses actions out of bounds, and rewards by the action that it got."""
    envs = make_envs("Target", n_envs=3)
    envs.reset([0, 1, 2])
    actions = np.array([[5.0, -7.0], [0.5, -0.25], [-0.5, 9.0]], np.float32)
    kept = actions.copy()
    # Clipped to (1, -1), (0.5, -0.25) and (-0.5, 1): squared distances 0.25 + 0.5625, 0, 1 + 1.5625.
    np.testing.assert_allclose(envs.step(actions).reward, [0.1875, 1.0, -1.5625])
    np.testing.assert_array_equal(actions, kept)


def test_continuous_actions_get_shape_and_type_and_their_own_bounds() -> None:
    info = EnvInfo(
        "", (1,), np.dtype(np.float32), "continuous", 4, (2, 2), 0,
        np.array([-1.0, -2.0, -np.inf, 0.0]), np.array([1.0, 2.0, np.inf, 0.5]), np.dtype(np.float64), None,
    )  # fmt: skip
    low, high = info.to_env(np.array([[-3.0] * 4, [3.0] * 4], np.float32))
    assert low.tolist() == [[-1.0, -2.0], [-3.0, 0.0]]
    assert high.tolist() == [[1.0, 2.0], [3.0, 0.5]]
    assert low.dtype == np.float64


# --------------------------------------------------------------------------- stepping


def by_hand(name: str, seed: int, actions: np.ndarray) -> list[tuple[Any, ...]]:
    """One environment driven as gymnasium's manual says: (obs, reward, terminated, truncated, next obs)."""
    env = gymnasium.make(f"tests.envs:{name}-v0")
    obs = np.array(env.reset(seed=seed)[0])
    rows = []
    for action in actions:
        final, reward, terminated, truncated, _ = env.step(action)
        final = np.array(final)
        following = np.array(env.reset()[0]) if terminated or truncated else final
        rows.append((obs, reward, terminated, truncated, final, following))
        obs = following
    env.close()
    return rows


def test_every_step_is_a_transition_of_its_own_episode() -> None:
    """Random episodes of random lengths, which end in both ways, against the loop of the manual."""
    T, seeds = 120, [11, 12, 13]
    actions = np.random.default_rng(0).integers(0, 3, (T, len(seeds)))
    expected = [by_hand("RandomWalk", seed, actions[:, n]) for n, seed in enumerate(seeds)]
    assert any(row[2] for rows in expected for row in rows)
    assert any(row[3] for rows in expected for row in rows)
    envs = make_envs("RandomWalk", n_envs=len(seeds))
    obs = envs.reset(seeds).copy()
    for t in range(T):
        step = envs.step(actions[t])
        for n in range(len(seeds)):
            before, reward, terminated, truncated, final, following = expected[n][t]
            np.testing.assert_array_equal(obs[n], before)
            assert step.reward[n] == reward
            assert (step.terminated[n], step.truncated[n]) == (terminated, truncated)
            if terminated or truncated:
                np.testing.assert_array_equal(step.final_obs[n], final)
            assert step.ended == bool((step.terminated | step.truncated).any())
            np.testing.assert_array_equal(step.obs[n], following)
        obs = step.obs.copy()


def test_the_final_observation_survives_a_reused_buffer() -> None:
    """`Counter` overwrites its array at the reset; the final observation must be from before it."""
    envs = make_envs("Counter", n_envs=2, max_episode_steps=3)
    assert envs.reset([0, 1]).tolist() == [[0.0, 0.0]] * 2
    final, following = [], []
    for _ in range(7):
        step = envs.step(np.zeros(2, np.int64))
        final += [step.final_obs[1].tolist()] if step.ended else []
        following.append(step.obs[1].tolist())
    # (steps of the episode, steps of the whole life)
    assert final == [[3, 3], [3, 6]]
    assert following == [[1, 1], [2, 2], [0, 3], [1, 4], [2, 5], [0, 6], [1, 7]]


def test_the_same_seeds_give_the_same_episodes() -> None:
    def observations(envs: SyncEnvs, seeds: list[int]) -> np.ndarray:
        start = envs.reset(seeds).copy()
        return np.stack([start, *(envs.step(np.zeros((2, 2), np.float32)).obs.copy() for _ in range(25))])

    envs = make_envs("Target", n_envs=2)
    first = observations(envs, [3, 4])
    # Used environments start again with their seeds, and each has its own seed.
    np.testing.assert_array_equal(observations(envs, [3, 4]), first)
    np.testing.assert_array_equal(observations(make_envs("Target", n_envs=2), [4, 3]), first[:, ::-1])
    assert not np.array_equal(first[:, 0], first[:, 1])
    assert len({tuple(row) for row in first[[0, 10, 20], 0]}) == 3  # three episodes, three starts


def test_seeds_and_environments_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        make_envs("RandomWalk", n_envs=2).reset([1])


def test_custom_environments_keep_their_time_limit_and_arguments() -> None:
    env = make(config("Counter", kwargs={"ends_at": 2}, max_episode_steps=9))
    env.reset(seed=0)
    assert env.step(0)[2:4] == (False, False)
    assert env.step(0)[2:4] == (True, False)
    assert env.spec is not None
    assert env.spec.max_episode_steps == 9
    assert make(config("Target")).unwrapped.__class__ is Target


def test_observations_shorter_than_their_space_are_refused() -> None:
    with pytest.raises(UserError, match=r"an observation of shape \(1,\), but it must be .* shape \(3,\)"):
        probe(EnvConfig(id="tests.envs:Short-v0"))

"""Random streams are functions of (seed, purpose, epoch), and evaluation never meets training."""

from __future__ import annotations

import itertools
from typing import get_args

import numpy as np
import pytest

from ppo_hpo import PPO, TrialConfig
from ppo_hpo.spec import randomness

PURPOSES = get_args(randomness.Purpose)
GOLDEN_TRAINING = [732106493, 539331303, 122122342]
GOLDEN_EVALUATION = [1905993885, 1135776812, 1659394325]
GOLDEN_FRESH = [1938150007, 1422630668, 2049509045]
GOLDEN_INIT = 1317536309490288386


def test_equal_arguments_give_the_same_numbers() -> None:
    for purpose in PURPOSES:
        one, other = randomness.make_rng(3, purpose, 5), randomness.make_rng(3, purpose, 5)
        np.testing.assert_array_equal(one.random(100), other.random(100))
        assert randomness.integer_seed(3, purpose, 5) == randomness.integer_seed(3, purpose, 5)
    assert randomness.training_seeds(3, 5, 8) == randomness.training_seeds(3, 5, 8)


def test_every_purpose_and_epoch_has_its_own_rng() -> None:
    """Also those that sums of seed and epoch would confuse, as (0, 1) and (1, 0)."""
    places = list(itertools.product(range(4), PURPOSES, range(4)))
    rows = np.array([randomness.make_rng(*place).random(2000) for place in places])
    assert len({row[0] for row in rows}) == len(places)
    # No pair is correlated: 80 streams have 3160 pairs; the largest of so many standard normals is below 5.
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5.0 / np.sqrt(2000)


def test_environments_of_one_epoch_have_different_seeds() -> None:
    for seed, epoch in itertools.product(range(3), range(3)):
        assert len(set(randomness.training_seeds(seed, epoch, 64))) == 64
    # More environments leave the first ones as they are.
    assert randomness.training_seeds(1, 2, 8)[:4] == randomness.training_seeds(1, 2, 4)


def test_evaluation_seeds_are_disjoint_from_all_training_seeds() -> None:
    training = [
        seed
        for trial, epoch in itertools.product((0, 1, 2**31, 2**63), (0, 1, 1000))
        for seed in randomness.training_seeds(trial, epoch, 256)
    ]
    evaluation = randomness.evaluation_seeds(1000)
    assert min(training) >= 0
    assert max(training) < 2**30 <= min(evaluation)
    assert max(evaluation) < 2**31  # environments that want 32 bits with a sign take them
    # Seeds fill their half: both ends of it are reached.
    assert max(training) > 0.99 * 2**30
    assert min(training) < 0.01 * 2**30


def test_fresh_episodes_are_none_of_tuning_and_none_of_training() -> None:
    tuning = set(randomness.evaluation_seeds(100_000))  # as many as `task.eval_episodes` may be
    lists = {seed: randomness.fresh_episode_seeds(seed, 500) for seed in (0, 1, 2**32, 2**63 - 1)}
    every = [number for found in lists.values() for number in found]
    assert not tuning & set(every)
    assert min(every) >= 2**30
    assert max(every) < 2**31
    # Of their own for each training seed, and each once: some of 2,000 draws of 2**30 may meet by chance.
    assert all(len(set(found)) == 500 for found in lists.values())
    assert len(set(every)) > 1990
    assert randomness.fresh_episode_seeds(1, 20) == lists[1][:20]
    assert lists[0][:3] == GOLDEN_FRESH


def test_a_fresh_episode_that_tuning_has_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = GOLDEN_FRESH
    monkeypatch.setattr(randomness, "evaluation_seeds", lambda n: [second])
    assert randomness.fresh_episode_seeds(0, 2) == [first, third]


def test_the_numbers_are_part_of_every_result() -> None:
    """A change here changes every trial: it must be a decision. numpy promises SeedSequence's numbers."""
    assert randomness.training_seeds(0, 0, 3) == GOLDEN_TRAINING
    assert randomness.evaluation_seeds(3) == GOLDEN_EVALUATION
    assert randomness.integer_seed(0, "init") == GOLDEN_INIT


def test_all_trials_are_evaluated_on_the_same_episodes() -> None:
    """In `RandomWalk` an episode's length depends on its seed alone, not on what the policy does."""

    def lengths(seed: int, epochs: int) -> list[float]:
        mapping = {
            "env": {"id": "tests.envs:RandomWalk-v0", "n_envs": 2},
            "task": {"epochs": epochs, "steps_per_epoch": 32, "seed": seed, "eval_episodes": 7},
            "model": {"width": 4, "depth": 1},
            "optimizer": {"lr": 0.1},
            "ppo": {"n_steps": 16, "batch_size": 16, "n_epochs": 1},
        }
        task = PPO.from_config(TrialConfig.from_mapping(mapping), "cpu")
        task.fit(epochs)
        task.finish()
        return [row["episode_length"] for row in task.metrics.curve]

    one, other = lengths(0, 2), lengths(1, 2)
    assert len(one) == 3  # the untrained policy's among them
    assert len({*one, *other}) == 1
    assert one[0] not in (0.0, 10.0)

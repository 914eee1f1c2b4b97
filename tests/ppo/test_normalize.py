"""Running statistics against numpy's over everything seen, and what is done with them."""

from __future__ import annotations

import numpy as np
import pytest

from ppo_hpo.ppo.normalize import ObservationNormalizer, RewardScaler, RunningMoments


def batches(seed: int = 0) -> list[np.ndarray]:
    """Batches of different sizes, one of a single row, around a mean that moves."""
    stream = np.random.default_rng(seed)
    return [5.0 + index + 3.0 * stream.standard_normal((n, 2)) for index, n in enumerate((1, 7, 2, 64, 30))]


def test_moments_equal_numpys_over_everything_seen() -> None:
    moments = RunningMoments((2,))
    seen = batches()
    for count, batch in enumerate(seen, start=1):
        moments.update(batch)
        rows = np.concatenate(seen[:count])
        assert moments.count == len(rows)
        np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.var, rows.var(0), rtol=1e-12, atol=1e-12)


def test_moments_of_numbers_far_from_zero_keep_their_digits() -> None:
    """The mean of squares minus the squared mean would not have one digit right, even in double precision."""
    rows = 1e8 + np.random.default_rng(0).standard_normal(1000)
    moments = RunningMoments(())
    for batch in rows.reshape(20, 50):
        moments.update(batch)
    assert moments.var == pytest.approx(rows.var(), rel=1e-6)


def test_moments_do_not_depend_on_how_rows_are_batched() -> None:
    rows = np.concatenate(batches())
    at_once, one_by_one = RunningMoments((2,)), RunningMoments((2,))
    at_once.update(rows)
    for row in rows:
        one_by_one.update(row[None])
    np.testing.assert_allclose(one_by_one.mean, at_once.mean)
    np.testing.assert_allclose(one_by_one.var, at_once.var)


def test_moments_go_on_from_their_state() -> None:
    whole, first, second = RunningMoments((2,)), RunningMoments((2,)), RunningMoments((2,))
    early, late = batches()[:2], batches()[2:]
    for batch in early:
        whole.update(batch)
        first.update(batch)
    state = first.state()
    first.update(np.zeros((1, 2)))  # the state is a copy, which this does not reach
    second.load(state)
    for batch in late:
        whole.update(batch)
        second.update(batch)
    np.testing.assert_array_equal(second.mean, whole.mean)
    np.testing.assert_array_equal(second.var, whole.var)
    assert second.count == whole.count


def test_observations_are_standardised_and_clipped() -> None:
    # Rows (0, 10), (2, 10), (4, 10): means 2 and 10, variances 8/3 and 0.
    normalizer = ObservationNormalizer(2, enabled=True, clip=1.5)
    normalizer.update(np.array([[0.0, 10.0], [2.0, 10.0], [4.0, 10.0]]))
    normalized = normalizer(np.array([[4.0, 10.0], [-100.0, 10.0], [2.0, 11.0]]))
    expected = [[2.0 / np.sqrt(8.0 / 3.0), 0.0], [-1.5, 0.0], [0.0, 1.5]]
    np.testing.assert_allclose(normalized, expected, rtol=1e-6)
    assert normalized.dtype == np.float32


def test_normalising_adds_nothing_to_the_statistics() -> None:
    normalizer = ObservationNormalizer(2, enabled=True, clip=10.0)
    normalizer.update(batches()[3])
    before = normalizer.moments.state()
    for batch in batches(seed=1):
        normalizer(batch)
    for name, array in normalizer.moments.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_before_anything_was_seen_observations_pass_through() -> None:
    normalizer = ObservationNormalizer(2, enabled=True, clip=10.0)
    np.testing.assert_allclose(normalizer(np.array([[3.0, -4.0]])), [[3.0, -4.0]])


def test_a_disabled_normalizer_changes_nothing() -> None:
    normalizer = ObservationNormalizer(2, enabled=False, clip=0.1)
    for batch in batches():
        normalizer.update(batch)
    assert normalizer.moments.count == 0
    obs = np.array([[100.0, -3.0]])
    normalized = normalizer(obs)
    np.testing.assert_array_equal(normalized, obs)
    assert normalized.dtype == np.float32
    obs[:] = 0.0  # the environments reuse the array: it must have been copied
    assert normalized.tolist() == [[100.0, -3.0]]


def slow_scaled(rewards: np.ndarray, dones: np.ndarray, gamma: float, clip: float) -> np.ndarray:
    """All discounted returns of all environments in one list, whose deviation is taken anew each step."""
    T, N = rewards.shape
    under_way, seen, scaled = [0.0] * N, [], np.zeros((T, N))
    for t in range(T):
        for n in range(N):
            under_way[n] = gamma * under_way[n] + rewards[t, n]
            seen.append(under_way[n])
            if dones[t, n]:
                under_way[n] = 0.0
        scaled[t] = np.clip(rewards[t] / np.sqrt(np.var(seen) + 1e-8), -clip, clip)
    return scaled


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.99])
def test_reward_scaler_equals_the_definition(gamma: float) -> None:
    stream = np.random.default_rng(0)
    rewards = 1.0 + 4.0 * stream.standard_normal((60, 3))
    dones = stream.random((60, 3)) < 0.1
    assert dones[:-1].any(0).all()
    scaler = RewardScaler(3, gamma, enabled=True, clip=1.2)
    scaled = np.stack([scaler(reward, done) for reward, done in zip(rewards, dones, strict=True)])
    expected = slow_scaled(rewards, dones, gamma, 1.2)
    np.testing.assert_allclose(scaled, expected, rtol=1e-9)
    assert (np.abs(expected) == 1.2).any()  # some were clipped,
    assert (np.abs(expected) < 1.2).any()  # and some were not


def test_reward_scaler_keeps_the_sign_and_zero() -> None:
    """The mean is not subtracted: that would pay for, or punish, living longer."""
    scaler = RewardScaler(1, 0.9, enabled=True, clip=10.0)
    never = np.zeros(1, np.bool_)
    for _ in range(20):
        scaler(np.array([5.0]), never)
    assert scaler(np.array([0.0]), never) == 0.0
    assert scaler(np.array([5.0]), never) > 0.0


def test_reward_scaler_begins_anew_after_a_reset() -> None:
    """Returns under way are forgotten, the statistics are not."""
    gamma, never = 0.5, np.zeros(1, np.bool_)
    scaler = RewardScaler(1, gamma, enabled=True, clip=10.0)
    scaler(np.array([4.0]), never)
    scaler.reset()
    scaler(np.array([2.0]), never)
    # Returns 4 and 2; without the reset the second would be 4/2 + 2 = 4.
    assert scaler.moments.count == 2
    assert scaler.moments.mean == 3.0
    assert scaler.moments.var == 1.0


def test_a_disabled_scaler_changes_nothing() -> None:
    scaler = RewardScaler(2, 0.9, enabled=False, clip=0.1)
    for _ in range(3):
        assert scaler(np.array([100.0, -3.0]), np.array([True, False])).tolist() == [100.0, -3.0]
    assert scaler.moments.count == 0

"""Advantages: hand-worked cases, identities, and a slow obvious version."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ppo_hpo.ppo.gae import explained_variance, gae

# One environment, three steps, gamma = lambda = 1/2, so that gamma * lambda = 1/4.
REWARD = np.array([[1.0], [2.0], [3.0]])
VALUE = np.array([[4.0], [6.0], [8.0]])
LAST_VALUE = 2.0
NEVER = np.zeros((3, 1), np.bool_)
SECOND = np.array([[False], [True], [False]])


def advantages(next_value: list[float], terminated: np.ndarray, done: np.ndarray) -> list[float]:
    column = np.array(next_value)[:, None]
    return gae(REWARD, VALUE, column, terminated, done, 0.5, 0.5)[:, 0].tolist()


def test_nothing_ends() -> None:
    # delta = 1 + 6/2 - 4 = 0;  2 + 8/2 - 6 = 0;  3 + 2/2 - 8 = -4
    # A[2] = -4;  A[1] = 0 - 4/4 = -1;  A[0] = 0 - 1/4
    assert advantages([6.0, 8.0, LAST_VALUE], NEVER, NEVER) == [-0.25, -1.0, -4.0]


def test_truncation_in_the_middle() -> None:
    # The second step led to an observation worth 10, where the episode was cut. It counts; what
    # comes after belongs to another episode.
    # delta = 0;  2 + 10/2 - 6 = 1;  -4
    # A[2] = -4;  A[1] = 1 (and not 1 - 4/4 = 0);  A[0] = 0 + 1/4
    assert advantages([6.0, 10.0, LAST_VALUE], NEVER, SECOND) == [0.25, 1.0, -4.0]


def test_termination_in_the_middle() -> None:
    # Nothing follows the second step, whatever stands where its value would be.
    # delta = 0;  2 + 0 - 6 = -4;  -4
    # A[2] = -4;  A[1] = -4;  A[0] = 0 - 4/4
    for nonsense in (10.0, math.nan, math.inf):
        assert advantages([6.0, nonsense, LAST_VALUE], SECOND, SECOND) == [-1.0, -4.0, -4.0]


def test_last_step_ends() -> None:
    # Truncated there: delta[2] = 3 + 10/2 - 8 = 0, so that all is 0. Terminated: delta[2] = 3 - 8 = -5.
    last = np.array([[False], [False], [True]])
    assert advantages([6.0, 8.0, 10.0], NEVER, last) == [0.0, 0.0, 0.0]
    assert advantages([6.0, 8.0, 10.0], last, last) == [-5.0 / 16.0, -5.0 / 4.0, -5.0]


def slow(
    reward: np.ndarray,
    value: np.ndarray,
    next_value: np.ndarray,
    terminated: np.ndarray,
    done: np.ndarray,
    gamma: float,
    lam: float,
) -> np.ndarray:
    """The definition: for each step, the sum over the later steps of its episode."""
    T, N = reward.shape
    advantage = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            weight = 1.0
            for later in range(t, T):
                future = 0.0 if terminated[later, n] else float(next_value[later, n])
                delta = reward[later, n] + gamma * future - float(value[later, n])
                advantage[t, n] += weight * delta
                if done[later, n]:
                    break
                weight *= gamma * lam
    return advantage


def random_case(seed: int) -> tuple[np.ndarray, ...]:
    stream = np.random.default_rng(seed)
    shape = (40, 3)
    terminated = stream.random(shape) < 0.15
    truncated = (stream.random(shape) < 0.15) & ~terminated
    assert (terminated[:-1].sum(0) >= 1).all()
    assert (truncated[:-1].sum(0) >= 1).all()
    real = stream.standard_normal
    value = real(shape, np.float32)
    return real(shape), value, real(shape, np.float32), terminated, terminated | truncated


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0), (0.0, 0.5), (0.7, 1.0)])
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_equals_the_definition(seed: int, gamma: float, lam: float) -> None:
    case = random_case(seed)
    # Only gamma * next_value is in single precision.
    np.testing.assert_allclose(gae(*case, gamma, lam), slow(*case, gamma, lam), rtol=1e-6, atol=1e-6)


def test_arguments_are_left_alone() -> None:
    case = random_case(0)
    copies = [array.copy() for array in case]
    gae(*case, 0.9, 0.9)
    for array, copied in zip(case, copies, strict=True):
        np.testing.assert_array_equal(array, copied)


def test_lambda_0_is_the_td_error() -> None:
    reward, value, next_value, terminated, done = random_case(2)
    error = reward + 0.9 * np.where(terminated, 0.0, next_value) - value
    np.testing.assert_allclose(gae(reward, value, next_value, terminated, done, 0.9, 0.0), error, atol=1e-6)


def test_lambda_1_is_the_discounted_return_minus_the_value() -> None:
    """Within an episode the next value is the next step's: then all values but the last cancel."""
    reward, value, final_value, terminated, done = random_case(4)
    last_value = np.array([0.3, -0.2, 0.1], np.float32)
    next_value = np.where(done, final_value, np.concatenate([value[1:], last_value[None]]))
    discounted = np.zeros_like(reward)
    future = last_value.astype(np.float64)
    for t in reversed(range(len(reward))):
        future = np.where(done[t], final_value[t], future)
        future = reward[t] + 0.9 * np.where(terminated[t], 0.0, future)
        discounted[t] = future
    advantage = gae(reward, value, next_value, terminated, done, 0.9, 1.0)
    np.testing.assert_allclose(advantage + value, discounted, atol=1e-5)


def test_environments_do_not_mix() -> None:
    """Each column equals the result of that column alone."""
    case = random_case(0)
    together = gae(*case, 0.99, 0.95)
    for n in range(3):
        alone = gae(*(array[:, n : n + 1] for array in case), 0.99, 0.95)
        np.testing.assert_array_equal(together[:, n : n + 1], alone)


def test_advantages_are_in_double_precision_even_from_single() -> None:
    case = [array.astype(np.float32) if array.dtype.kind == "f" else array for array in random_case(0)]
    assert gae(*case, 0.9, 0.9).dtype == np.float64


def test_explained_variance() -> None:
    returns = np.array([[1.0, 2.0], [3.0, 4.0]])  # variance 5/4
    assert explained_variance(returns + 7.0, returns) == pytest.approx(1.0)  # an offset has no variance
    assert explained_variance(np.full_like(returns, 3.0), returns) == pytest.approx(0.0)
    # Errors 1, -1, 1, -1 have variance 1: 1 - 1 / (5/4) = 1/5. Twice as large: 1 - 4 / (5/4) = -11/5.
    error = np.array([[1.0, -1.0], [1.0, -1.0]])
    assert explained_variance(returns + error, returns) == pytest.approx(0.2)
    assert explained_variance(returns + 2.0 * error, returns) == pytest.approx(-2.2)
    assert math.isnan(explained_variance(returns, np.ones((2, 2))))

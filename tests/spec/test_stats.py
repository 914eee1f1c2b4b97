"""Statistics of few runs: worked out by hand, by enumerating every resample, and beside scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from ppo_hpo.spec.stats import advantage_interval, bootstrap, claimed_and_kept, iqm, iqm_interval, quartiles


@pytest.mark.parametrize(
    ("values", "middle"),
    [
        ([7.0], 7.0),
        ([1.0, 2.0, 6.0], 3.0),  # a quarter of three is less than one: nothing is left out
        ([100.0, 0.0, 10.0, 0.0], 5.0),  # 0 and 100 are left out
        ([float(n) for n in range(10, 0, -1)], 5.5),  # 1, 2, 9 and 10 are
        ([0.0, 1.0, 1.0, 4.0, 1000.0], 2.0),
    ],
)
def test_interquartile_mean_by_hand(values: list[float], middle: float) -> None:
    assert float(iqm(values)) == pytest.approx(middle, rel=1e-15)


@pytest.mark.parametrize("n", range(1, 21))
def test_interquartile_mean_is_scipys_trimmed_mean(n: int) -> None:
    values = np.random.default_rng(n).normal(size=(3, n))
    expected = scipy.stats.trim_mean(values, 0.25, axis=1)
    np.testing.assert_allclose(iqm(values), expected, rtol=1e-13)


def test_interval_of_a_mean_is_that_of_all_resamples() -> None:
    # Four draws from 0, 1, 2, 3: the sum is at most 1 in 5 of 256 cases (2.0 %), at most 2 in 15 (5.9 %). So
    # the lower end, below which 2.5 % lie, is a sum of 2; the upper one is its mirror image.
    sums = sorted(sum(draw) for draw in itertools.product(range(4), repeat=4))
    assert [sums.count(0), sums.count(1), sums.count(2)] == [1, 4, 10]
    found = bootstrap([[0.0, 1.0, 2.0, 3.0]], lambda groups: groups[0].mean(axis=1))
    assert found == (0.5, 2.5)


def test_interval_of_a_difference_is_that_of_all_resamples() -> None:
    # Of 16 pairs of resamples of (0, 1) and (0, 1), one has the means 0 and 1: 6.25 %, more than 2.5 %.
    assert advantage_interval([0.0, 1.0], [0.0, 1.0]) == (-1.0, 1.0)
    # (0, 0, 0, 4) against (1): the first has the mean 0 in 31.6 % of its resamples, 4 in 0.4 %, 3 in 4.7 %.
    found = bootstrap([[0.0, 0.0, 0.0, 4.0], [1.0]], lambda g: g[0].mean(axis=1) - g[1].mean(axis=1))
    assert found == (-1.0, 2.0)


def test_groups_are_never_mixed() -> None:
    # Whatever is drawn from three fives and two ones, the difference is 4; mixed, it would be anything.
    assert advantage_interval([5.0, 5.0, 5.0], [1.0, 1.0]) == (4.0, 4.0)
    assert bootstrap([[5.0] * 3, [1.0] * 2], lambda groups: groups[0].mean(axis=1)) == (5.0, 5.0)


def test_interval_is_near_scipys() -> None:
    values = np.random.default_rng(3).normal(100.0, 10.0, size=10)
    expected = scipy.stats.bootstrap(
        (values,), lambda v, axis: scipy.stats.trim_mean(v, 0.25, axis=axis), method="percentile",
        n_resamples=10_000, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    # Ends of 10,000 resamples differ by some hundredths of the interval from one drawing to another.
    width = expected.high - expected.low
    np.testing.assert_allclose(iqm_interval(values.tolist()), tuple(expected), atol=0.05 * width)
    assert 5.0 < width < 30.0


def test_interval_is_the_same_each_time_and_of_one_run_a_point() -> None:
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    assert iqm_interval(values) == iqm_interval(values)
    assert iqm_interval(values, seed=1) == pytest.approx(iqm_interval(values), abs=0.5)
    assert iqm_interval([2.5]) == (2.5, 2.5)


def test_interval_covers_training_seeds_and_episodes_where_each_run_has_its_own() -> None:
    """Ten runs of ten episodes. Training seeds and episodes vary equally much; the true mean is 0."""
    rng, runs, episodes, covered, shared = np.random.default_rng(1), 10, 10, 0, 0
    for _ in range(200):
        trained = rng.normal(size=(runs, 1))
        own, common = rng.normal(size=(runs, episodes)), rng.normal(size=(1, episodes))
        for chance in (3 * own, 3 * common):
            scores = (trained + chance).mean(axis=1).tolist()
            low, high = bootstrap([scores], lambda groups: groups[0].mean(axis=1), resamples=500)
            if chance.shape[0] > 1:
                covered += low <= 0.0 <= high
            else:
                shared += low <= 0.0 <= high
    # The bootstrap of ten values covers about 90 % instead of 95 %. With common episodes, as in tuning, half
    # of the chance is the same for all runs and not seen.
    assert covered >= 170
    assert shared <= 140


def test_quartiles_by_hand() -> None:
    assert quartiles([4.0, 0.0, 2.0, 1.0, 3.0]) == (1.0, 3.0)
    assert quartiles([0.0, 10.0]) == (2.5, 7.5)


@pytest.mark.parametrize(
    ("tuning", "expected"),
    [
        # The first shines on the first seed alone: it claims 10 and keeps nothing.
        ([0], (0, 10.0, 0.0)),
        ([1], (1, 5.0, 5.0)),
        ([0, 1], (0, 5.0, 0.0)),
        ([1, 2], (1, 5.5, 4.0)),
    ],
)
def test_claimed_and_kept_by_hand(tuning: list[int], expected: tuple[int, float, float]) -> None:
    scores = np.array([[10.0, 0.0, 0.0], [4.0, 5.0, 6.0]])
    assert claimed_and_kept(scores, tuning) == expected

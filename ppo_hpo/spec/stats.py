"""What is said of a few noisy numbers: the interquartile mean, and how far it can be trusted.

Both are those of Agarwal et al. 2021 ("Deep reinforcement learning at the edge of the statistical precipice",
https://arxiv.org/abs/2108.13264). Their library, rliable, had its last release in 2024 and brings arch and
seaborn; here it is forty lines of numpy, held to exact answers by `tests/spec/test_stats.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
#: Takes one array ``[R, n]`` for each stratum, and gives ``[R]``.
Statistic = Callable[[list[Values]], Values]

RESAMPLES = 10_000
_LEVEL = 0.95


def iqm(values: Values | Sequence[float]) -> Values:
    """The interquartile mean over the last axis: the mean of what lies between the quartiles.

    A quarter of the values is left out at each end, rounded down to whole ones, as in
    ``scipy.stats.trim_mean(values, 0.25)``: of ten the lowest two and the highest two; of three none.
    """
    ordered = np.sort(np.asarray(values, np.float64), axis=-1)
    cut = ordered.shape[-1] // 4
    middle: Values = ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)
    return middle


def bootstrap(
    strata: Sequence[Sequence[float]], statistic: Statistic, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The stratified percentile bootstrap: a 95 % interval for a statistic of several groups of runs.

    Each resample draws from every group as many runs as it has, with replacement, and never from one group
    for another. The statistic's middle 95 % over all resamples is the interval. Of few runs it is too narrow
    (ten or more are advised), and of one it is a point.

    Args:
        strata: the groups, each with one number or more.
        statistic: of the groups, for all resamples at once.
        resamples: R.
        seed: of the drawing: the same runs have the same interval.

    Returns:
        Its lower and its upper end.
    """
    stream = np.random.default_rng(seed)
    drawn = []
    for values in strata:
        group = np.asarray(values, np.float64)
        drawn.append(group[stream.integers(len(group), size=(resamples, len(group)))])
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(statistic(drawn), (tail, 100 - tail))
    return float(low), float(high)


def iqm_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the interquartile mean of one group."""
    return bootstrap([values], lambda groups: iqm(groups[0]), seed=seed)


def advantage_interval(
    values: Sequence[float], others: Sequence[float], seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the difference of two groups' interquartile means, the first less the second."""
    return bootstrap([values, others], lambda groups: iqm(groups[0]) - iqm(groups[1]), seed=seed)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile, interpolated linearly."""
    low, high = np.percentile(np.asarray(values, np.float64), (25, 75))
    return float(low), float(high)


def claimed_and_kept(scores: Values, tuning: Sequence[int]) -> tuple[int, float, float]:
    """Tune on some runs, and judge what won by the others.

    Args:
        scores: ``[C, S]``, a row for each configuration, a column for each seed.
        tuning: columns that tuning sees; at least one has to be left.

    Returns:
        The configuration of the highest mean over the tuning columns, the first among equals; that mean,
        which is what tuning claims; and its mean over the other columns, which is what is left of it.
    """
    seen = np.zeros(scores.shape[1], np.bool_)
    seen[list(tuning)] = True
    claims = scores[:, seen].mean(axis=1)
    winner = int(claims.argmax())
    return winner, float(claims[winner]), float(scores[winner, ~seen].mean())

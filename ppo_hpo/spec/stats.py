"""Statistics of a few noisy scores: the interquartile mean, and intervals of confidence.

Both follow Agarwal et al. 2021 ("Deep reinforcement learning at the edge of the statistical precipice",
https://arxiv.org/abs/2108.13264). Their library rliable had its last release in 2024 and needs arch and
seaborn. Here it is forty lines of numpy, which `tests/spec/test_stats.py` checks against exact answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
#: Takes one array ``[R, n]`` for each group and returns ``[R]``.
Statistic = Callable[[list[Values]], Values]

RESAMPLES = 10_000
_LEVEL = 0.95


def iqm(values: Values | Sequence[float]) -> Values:
    """The interquartile mean over the last axis: the mean of the middle half of the values.

    A quarter of the values is left out at each end, rounded down to whole values, as in
    ``scipy.stats.trim_mean(values, 0.25)``. Of ten values two are left out at each end, of three none.
    """
    ordered = np.sort(np.asarray(values, np.float64), axis=-1)
    cut = ordered.shape[-1] // 4
    middle: Values = ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1)
    return middle


def bootstrap(
    groups: Sequence[Sequence[float]], statistic: Statistic, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The stratified percentile bootstrap: a 95 % interval for a statistic of several groups of runs.

    Each of R ``resamples`` draws from every group as many runs as it has, with replacement. The interval is
    the middle 95 % of the statistic over all resamples. It is too narrow for few runs (ten or more are
    advised), and a point for one run. The ``seed`` gives the same runs the same interval always.

    The interval covers every kind of chance that was drawn anew for each run. In a test on fresh seeds these
    are the training seed and the evaluation episodes (`randomness.fresh_episode_seeds`): the score of a run
    varies by both, and so do resampled runs. Resampling the episodes of each run as well would count their
    chance twice. If runs shared their episodes, as in tuning, the interval would miss the chance of episodes.
    """
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(values, np.float64) for values in groups]
    drawn = [array[rng.integers(len(array), size=(resamples, len(array)))] for array in arrays]
    tail = 100 * (1 - _LEVEL) / 2
    low, high = np.percentile(statistic(drawn), (tail, 100 - tail))
    return float(low), float(high)


def iqm_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the interquartile mean of one group."""
    return bootstrap([values], lambda groups: iqm(groups[0]), seed=seed)


def advantage_interval(
    values: Sequence[float], others: Sequence[float], seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the difference of two groups' interquartile means, first minus second."""
    return bootstrap([values, others], lambda groups: iqm(groups[0]) - iqm(groups[1]), seed=seed)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile, with linear interpolation."""
    low, high = np.percentile(np.asarray(values, np.float64), (25, 75))
    return float(low), float(high)


def claimed_and_kept(scores: Values, tuning: Sequence[int]) -> tuple[int, float, float]:
    """Choose a configuration on some runs, and score it on the other runs.

    ``scores`` is ``[C, S]``: a row for each configuration, a column for each seed. Returned are the first row
    with the highest mean over the ``tuning`` columns; that mean, which is what tuning claims; and the mean of
    the same row over the other columns, which is what is left of it.
    """
    seen = np.zeros(scores.shape[1], np.bool_)
    seen[list(tuning)] = True
    claims = scores[:, seen].mean(axis=1)
    winner = int(claims.argmax())
    return winner, float(claims[winner]), float(scores[winner, ~seen].mean())

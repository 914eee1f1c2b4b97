"""From a learning curve to an objective, and from there to Orion's result file.

The file is a JSON list of ``{"name", "type", "value"}`` at the path in ``ORION_RESULTS_PATH``, with
one entry of type ``objective`` and any number of type ``statistic``. Any language can write it.
"""

from __future__ import annotations

import json
import math
import statistics as stats
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# What a float holds, and so little less that no sum of a few overflows.
_LARGEST = 1e300
# Statistics of one evaluation, in the names of the curve's columns.
_EVALUATION = ("return_mean", "return_std", "return_median", "episode_length")
# Of several seeds: what is added up, and what holds for a trial where it holds for one of them.
_ADDED = (
    "env_steps", "env_steps_here", "env_steps_not_trained", "eval_steps", "eval_steps_here", "wall_seconds",
    "cpu_seconds", "retries",
)  # fmt: skip
_ANY = ("diverged", "stopped", "continued", "forked")


def evaluation_columns(returns: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """What a row of the curve says of one evaluation: population statistics over its episodes."""
    import numpy as np

    return {
        "return_mean": float(np.mean(returns)),
        "return_std": float(np.std(returns)),
        "return_median": float(np.median(returns)),
        "return_min": float(np.min(returns)),
        "return_max": float(np.max(returns)),
        "episode_length": float(np.mean(lengths)),
        "eval_steps": int(np.sum(lengths)),
    }


def is_row(row: Any) -> bool:
    """Whether this is a row of a learning curve, and every number of it finite: it may come from a file."""
    if not isinstance(row, Mapping):
        return False
    wanted = {"epoch", "env_steps", "eval_steps", *_EVALUATION}
    return wanted <= row.keys() and all(
        (value is None and key not in wanted)
        or (isinstance(value, int | float) and type(value) is not bool and abs(value) < _LARGEST)
        for key, value in row.items()
    )


def objective(curve: Sequence[Row], epochs: int, *, diverged: bool) -> float:
    """What Orion minimises: the negative mean return after ``epochs``.

    A trial that diverged scores as the worst evaluation of its life, the untrained policy's
    included: Orion sorts raw floats, and a NaN among them would be promoted.

    Args:
        curve: rows of the learning curve, the first for the untrained policy.
        epochs: the epoch to judge.
        diverged: whether the trial diverged before it got there.
    """
    rows = [row for row in curve if row["epoch"] <= epochs]
    if diverged:
        return -min(float(row["return_mean"]) for row in rows)
    (row,) = (row for row in rows if row["epoch"] == epochs)
    return -float(row["return_mean"])


def statistics(curve: Sequence[Row], epochs: int, *, diverged: bool) -> dict[str, float]:
    """What is known of the trial beside its objective; see `_EVALUATION` for the first four."""
    last = [row for row in curve if row["epoch"] <= epochs][-1]
    return {
        **{name: float(last[name]) for name in _EVALUATION},
        "epochs": float(last["epoch"]),
        "diverged": float(diverged),
    }


def aggregate(scores: Sequence[float], how: str) -> float:
    """One number for the returns of several seeds, higher being better.

    Args:
        scores: one for each seed.
        how: ``mean``, ``median``, ``worst``, or ``iqm``, the interquartile mean: of what is left when the
            lowest and the highest quarter are cut off, each rounded down to whole seeds, as
            ``scipy.stats.trim_mean(scores, 0.25)`` and rliable (https://arxiv.org/abs/2108.13264) do. With
            fewer than four seeds nothing is cut off.
    """
    ordered = sorted(scores)
    if how == "worst":
        return ordered[0]
    if how == "median":
        return stats.median(ordered)
    cut = len(ordered) // 4 if how == "iqm" else 0
    return stats.fmean(ordered[cut : len(ordered) - cut])


def combine(
    objectives: Sequence[float], each: Sequence[Mapping[str, float]], how: str
) -> tuple[float, dict[str, float]]:
    """What several seeds come to.

    Args:
        objectives: of each seed.
        each: their statistics, of the same names.
        how: see `aggregate`.

    Returns:
        The objective, and the statistics: sums of what was spent, the epochs that every seed has, and means
        of the rest; and in addition ``seeds``, their number, ``seed_N``, the return that the N-th counts
        with, and ``seeds_std``, the (population) standard deviation of those.
    """
    scores = [-value for value in objectives]
    found: dict[str, float] = {}
    for name in each[0]:
        values = [one[name] for one in each]
        if name in _ADDED:
            found[name] = sum(values)
        elif name in _ANY:
            found[name] = max(values)
        elif name == "epochs":
            found[name] = min(values)
        elif name == "steps_per_second":
            # Seeds that were done before have none.
            found[name] = stats.fmean([value for value in values if value] or [0.0])
        else:
            found[name] = stats.fmean(values)
    found |= {"seeds": float(len(scores)), "seeds_std": stats.pstdev(scores)}
    found |= {f"seed_{number}": score for number, score in enumerate(scores, 1)}
    return -aggregate(scores, how), found


def combine_curves(curves: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """The learning curve of several seeds, as far as each has one: sums of steps, means of the rest."""
    return [
        {
            "epoch": rows[0]["epoch"],
            **{name: sum(row[name] for row in rows) for name in ("env_steps", "eval_steps")},
            **{name: stats.fmean(row[name] for row in rows) for name in _EVALUATION},
        }
        for rows in zip(*curves, strict=False)
    ]


def seeds_text(values: Mapping[str, float]) -> str:
    """What each seed of a trial came to, in words; empty where there is only one."""
    number = int(values.get("seeds", 1))
    if number == 1:
        return ""
    scores = ", ".join(f"{values[f'seed_{index}']:.1f}" for index in range(1, number + 1))
    return f"of {number} seeds: {scores}; standard deviation {values['seeds_std']:.1f}"


def entries(objective_value: float, extra: Mapping[str, float]) -> list[dict[str, Any]]:
    """The list that Orion reads.

    Raises:
        ValueError: a number is not finite, which Orion would store and sort by.
    """
    values = {"objective": objective_value, **extra}
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise ValueError(f"Results must be finite, but got {', '.join(bad)}.")
    found = [{"name": "objective", "type": "objective", "value": float(objective_value)}]
    return found + [
        {"name": name, "type": "statistic", "value": float(value)} for name, value in extra.items()
    ]


def to_bytes(results: Sequence[Mapping[str, Any]]) -> bytes:
    """The result file."""
    return (json.dumps(list(results), indent=1) + "\n").encode()

"""From a learning curve to an objective, and from there to Orion's result file.

The file is a JSON list of ``{"name", "type", "value"}`` at the path in ``ORION_RESULTS_PATH``. It has one
entry of type ``objective`` and any number of type ``statistic``. A program in any language can write it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, pstdev
from typing import Any

Row = Mapping[str, Any]

# Below the largest float by so much that no sum of a few such numbers overflows.
_LARGEST = 1e300
# Statistics of one evaluation, named like the columns of the curve.
_EVALUATION = ("return_mean", "return_std", "return_median", "episode_length")
# Statistics of a trial of several seeds: those that are summed, and those that are true if any seed's is.
_SUMMED = (
    "env_steps", "env_steps_here", "env_steps_not_trained", "eval_steps", "eval_steps_here", "wall_seconds",
    "cpu_seconds", "retries",
)  # fmt: skip
_ANY = ("diverged", "stopped", "continued", "forked")


def evaluation_columns(returns: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """The columns of a curve's row for one evaluation, with population statistics of its episodes."""
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
    """Whether this is a valid row of a learning curve, with finite numbers only. Any JSON may be given."""
    if not isinstance(row, Mapping):
        return False
    required = {"epoch", "env_steps", "eval_steps", *_EVALUATION}
    return required <= row.keys() and all(
        (value is None and key not in required)
        or (isinstance(value, int | float) and type(value) is not bool and abs(value) < _LARGEST)
        for key, value in row.items()
    )


def objective(curve: Sequence[Row], epochs: int, *, diverged: bool) -> float:
    """What Orion minimises: the negative mean return after ``epochs``.

    A trial that diverged before gets the worst evaluation of its life, that of the untrained policy (the
    curve's first row) included. Orion sorts raw floats, and would promote a NaN.
    """
    rows = [row for row in curve if row["epoch"] <= epochs]
    if diverged:
        return -min(float(row["return_mean"]) for row in rows)
    (row,) = (row for row in rows if row["epoch"] == epochs)
    return -float(row["return_mean"])


def statistics(curve: Sequence[Row], epochs: int, *, diverged: bool) -> dict[str, float]:
    """The statistics of a trial's last evaluation up to ``epochs``, for Orion."""
    last = [row for row in curve if row["epoch"] <= epochs][-1]
    return {
        **{name: float(last[name]) for name in _EVALUATION},
        "epochs": float(last["epoch"]),
        "diverged": float(diverged),
    }


def aggregate(scores: Sequence[float], how: str) -> float:
    """One score for the returns of several seeds: ``mean``, ``median``, ``worst`` or ``iqm``. More is better.

    The interquartile mean leaves out the lowest and the highest quarter, each rounded down to whole seeds,
    like ``scipy.stats.trim_mean(scores, 0.25)`` and rliable (https://arxiv.org/abs/2108.13264).
    """
    ordered = sorted(scores)
    if how == "worst":
        return ordered[0]
    if how == "median":
        return median(ordered)
    cut = len(ordered) // 4 if how == "iqm" else 0
    return fmean(ordered[cut : len(ordered) - cut])


def combine(
    objectives: Sequence[float], each: Sequence[Mapping[str, float]], how: str
) -> tuple[float, dict[str, float]]:
    """Combine the objectives and the statistics of several seeds, ``how`` as in `aggregate`.

    Steps and seconds are summed, ``epochs`` is the number that every seed has, and other statistics are
    means. New are ``seeds``, the number of seeds; ``seed_N``, the return of the N-th seed; and ``seeds_std``,
    the population standard deviation of these returns.
    """
    scores = [-value for value in objectives]
    found: dict[str, float] = {}
    for name in each[0]:
        values = [one[name] for one in each]
        if name in _SUMMED:
            found[name] = sum(values)
        elif name in _ANY:
            found[name] = max(values)
        elif name == "epochs":
            found[name] = min(values)
        elif name == "steps_per_second":
            # It is 0 for seeds that were complete before this process began.
            found[name] = fmean([value for value in values if value] or [0.0])
        else:
            found[name] = fmean(values)
    found |= {"seeds": float(len(scores)), "seeds_std": pstdev(scores)}
    found |= {f"seed_{number}": score for number, score in enumerate(scores, 1)}
    return -aggregate(scores, how), found


def combine_curves(curves: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """One learning curve for several seeds, as long as the shortest: sums of steps, means of the rest."""
    return [
        {
            "epoch": rows[0]["epoch"],
            **{name: sum(row[name] for row in rows) for name in ("env_steps", "eval_steps")},
            **{name: fmean(row[name] for row in rows) for name in _EVALUATION},
        }
        for rows in zip(*curves, strict=False)
    ]


def seeds_text(values: Mapping[str, float]) -> str:
    """The return of each seed in words, from a trial's statistics (see `combine`); empty for one seed."""
    number = int(values.get("seeds", 1))
    if number == 1:
        return ""
    scores = ", ".join(f"{values[f'seed_{index}']:.1f}" for index in range(1, number + 1))
    return f"of {number} seeds: {scores}; standard deviation {values['seeds_std']:.1f}"


def entries(objective_value: float, extra: Mapping[str, float]) -> list[dict[str, Any]]:
    """The list of results that Orion reads: the objective, and ``extra`` statistics by name."""
    # Orion would store a number that is not finite, and sort by it.
    values = {"objective": objective_value, **extra}
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        raise ValueError(f"Results must be finite, but got {', '.join(bad)}.")
    found = [{"name": "objective", "type": "objective", "value": float(objective_value)}]
    return found + [{"name": name, "type": "statistic", "value": float(extra[name])} for name in extra]


def to_bytes(results: Sequence[Mapping[str, Any]]) -> bytes:
    """The content of the result file."""
    return (json.dumps(list(results), indent=1) + "\n").encode()

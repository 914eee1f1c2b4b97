"""Poor trials stop in the middle of their rung: the median rule, and the record of what it decided.

After an epoch's evaluation a trial is compared with its siblings, the other trials of the experiment. The
decision depends on how far those have come by then, so it is written down, in `stopped.json`, before the
epoch is saved. Whoever goes on with the trial finds one of two things: the record, and stops there as well;
or a checkpoint without one, and goes on. Nothing is decided twice, so that continuing is the same as never
having stopped.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ppo_hpo.spec import results, yamlio
from ppo_hpo.spec.canonical import as_read_from_json
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import CheckpointError, UserError
from ppo_hpo.state.curve import read_curve
from ppo_hpo.state.files import read_bytes
from ppo_hpo.trial.restore import listed_trials

RECORD = "stopped.json"
#: Fewer siblings than this are no measure of what is poor; Optuna's and Ray's rules begin with as many.
LEAST = 5
_MAX_RECORD, _MAX_CONFIG = 4096, 1 << 20
# Names in the index are hashes, so that the first of them are as good a sample as any.
_MAX_SIBLINGS = 1000
# What two trials must have in common for their returns to be compared.
_EQUAL = {
    "env": ("id", "kwargs", "max_episode_steps", "wrapper"),
    "task": ("steps_per_epoch", "max_epochs", "seed", "seeds", "eval_episodes", "eval_deterministic"),
}


@dataclass(frozen=True)
class Stop:
    """A decision.

    Attributes:
        identity: of the trial that it was made for.
        epochs: that the trial had been asked for; asked for others, it goes on.
        epoch: after which it stopped.
        best: its best return up to then.
        median: of the siblings; see `median_to_reach`.
        siblings: how many there were.
    """

    identity: str
    epochs: int
    epoch: int
    best: float
    median: float
    siblings: int


def median_to_reach(epoch: int, others: Sequence[Sequence[float]], least: int = LEAST) -> float | None:
    """What the best return of a trial up to ``epoch`` must not be below.

    The median, over the siblings that have come as far, of the mean of each one's returns after the epochs
    1 to ``epoch``. That is the median stopping rule of Golovin et al., "Google Vizier", KDD 2017, section
    3.2.1 (https://doi.org/10.1145/3097983.3098043): the best of the one is compared with running averages
    of the others, so that a curve which goes up and down is not stopped in one of its valleys.

    Args:
        epoch: the present one, from 1 on.
        others: of each sibling the returns after its epochs 1, 2, ...; the untrained policy's is not in it.
        least: fewer siblings that came as far decide nothing.

    Returns:
        The median, or None where there are too few.
    """
    means = [statistics.fmean(returns[:epoch]) for returns in others if len(returns) >= epoch]
    return statistics.median(means) if len(means) >= max(least, 1) else None


def refuse_what_does_not_fit(*, seeds: int = 1, store: object = None) -> None:
    """Raise a `UserError` for a trial that `--stop-poor` is not for.

    Args:
        seeds: of the trial.
        store: of its checkpoints, None where there is none.
    """
    if seeds != 1:
        raise UserError(
            f"`--stop-poor` takes trials of one seed, but `task.seeds` is {seeds}: seeds are trained one "
            f"after another, and half of them are no objective. Leave one of the two out."
        )
    if store is not None:
        raise UserError(
            "`--stop-poor` compares trials by their directories, and a store is for machines that see none "
            "of each other's. Leave one of the two out (a store may also be set by PPO_HPO_STORE)."
        )


class Siblings:
    """The other trials of an experiment, as far as their directories can be read.

    What is missing, torn, or of something else is left out, and never an error: these are files that other
    processes are writing, or have left behind.
    """

    def __init__(self, directory: Path, config: TrialConfig) -> None:
        """The siblings of the trial ``config``.

        Args:
            directory: the one in which the trials' directories lie.
            config: of the trial itself, which is not among them.
        """
        self._directory, self._own = directory, config.identity()[:32]
        self._wanted = _common(config)
        # Both are read anew only when they have to be: a trial asks after each of its epochs.
        self._fits: dict[Path, bool] = {}
        self._curves: dict[Path, tuple[tuple[int, int, int], list[float]]] = {}

    def returns(self) -> list[list[float]]:
        """Of each sibling the mean returns after the epochs 1, 2, ..., as far as it has come.

        A configuration that was promoted has a directory for each rung; it counts once, with the longest.
        """
        found = []
        for identity, places in listed_trials(self._directory, _MAX_SIBLINGS + 1).items():
            if identity == self._own:
                continue
            curves = [self._curve(place) for place in places if self._belongs(place, identity)]
            if longest := max(curves, key=len, default=[]):
                found.append(longest)
        return found[:_MAX_SIBLINGS]

    def _belongs(self, place: Path, identity: str) -> bool:
        """Whether the trial in ``place`` is the one that the index says, and comparable."""
        if place in self._fits:
            return self._fits[place]
        try:
            content = read_bytes(place / "config.yaml", _MAX_CONFIG).decode()
            config = TrialConfig.from_mapping(yamlio.parse(content, str(place)))
        except (UserError, ValueError, AttributeError, TypeError, KeyError):
            return False  # it may only be about to begin
        self._fits[place] = config.identity()[:32] == identity and _common(config) == self._wanted
        return self._fits[place]

    def _curve(self, place: Path) -> list[float]:
        try:
            status = (place / "curve.jsonl").lstat()
        except OSError:
            return []
        seen = (status.st_ino, status.st_size, status.st_mtime_ns)
        if place not in self._curves or self._curves[place][0] != seen:
            rows = read_curve(place)
            whole = [row["epoch"] for row in rows] == list(range(len(rows)))
            self._curves[place] = seen, [float(row["return_mean"]) for row in rows[1:]] if whole else []
        return self._curves[place][1]


def decide(config: TrialConfig, curve: Sequence[results.Row], siblings: Siblings) -> Stop | None:
    """Whether a trial is to stop after the last epoch of its curve.

    Never in its first epoch, which says little, and not in its last, after which it ends anyway.

    Args:
        config: of the trial.
        curve: its rows, the untrained policy's first.
        siblings: the trials that it is compared with.
    """
    epoch = int(curve[-1]["epoch"])
    if not 1 < epoch < config.task.epochs:
        return None
    others = siblings.returns()
    median = median_to_reach(epoch, others)
    best = max(float(row["return_mean"]) for row in curve if row["epoch"] > 0)
    if median is None or not best < median:
        return None
    number = sum(len(returns) >= epoch for returns in others)
    return Stop(config.identity(), config.task.epochs, epoch, best, median, number)


def to_bytes(stop: Stop) -> bytes:
    """The record's file."""
    return (json.dumps(asdict(stop), indent=1, allow_nan=False) + "\n").encode()


def read(directory: Path, config: TrialConfig) -> Stop | None:
    """What was decided for a trial; None where nothing was.

    Orion copies directories for promotions and forks. A record for another fidelity, or of other
    hyperparameters, says nothing of this trial; nor does one that is not as `to_bytes` writes it.
    """
    try:
        content: Any = json.loads(read_bytes(directory / RECORD, _MAX_RECORD))
        stop = Stop(**content)
    except (CheckpointError, ValueError, TypeError, RecursionError):
        return None
    numbers = (stop.epochs, stop.epoch, stop.siblings)
    if not all(type(number) is int for number in numbers) or not 1 < stop.epoch < stop.epochs:
        return None
    if not all(type(value) is float and math.isfinite(value) for value in (stop.best, stop.median)):
        return None
    same = stop.identity == config.identity() and stop.epochs == config.task.epochs
    return stop if same else None


def _common(config: TrialConfig) -> Mapping[str, Any]:
    groups = {**config.to_mapping(), "task": {**config.to_mapping()["task"], "max_epochs": config.max_epochs}}
    # Through JSON: one side comes from a file.
    wanted = {group: {key: groups[group][key] for key in keys} for group, keys in _EQUAL.items()}
    return dict(as_read_from_json(wanted))

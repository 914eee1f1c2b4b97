"""Poor trials stop in the middle of their rung: the median rule, and the record of its decision.

After an epoch's evaluation a trial is compared with its siblings, the other trials of the experiment. The
decision depends on how far they have come by then. So it is written to `stopped.json` before the epoch's
checkpoint is written. A process that resumes the trial finds either the record, and stops there as well, or a
checkpoint without a record, and continues. Nothing is decided twice, so resuming is the same as never having
stopped.
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
#: Fewer siblings than this do not show what is poor. Optuna's and Ray's rules have the same minimum.
MIN_SIBLINGS = 5
_MAX_RECORD, _MAX_CONFIG = 4096, 1 << 20
_MAX_SIBLINGS = 1000  # the first in the index, whose names are hashes: as good a sample as any other
# What two trials must have in common for their returns to be compared.
_COMPARABLE = {
    "env": ("id", "kwargs", "max_episode_steps", "wrapper"),
    "task": ("steps_per_epoch", "max_epochs", "seed", "seeds", "eval_episodes", "eval_deterministic"),
}


@dataclass(frozen=True)
class Stop:
    """The decision to stop a trial."""

    identity: str
    epochs: int  # task.epochs of the trial; with another value it continues
    epoch: int  # after which it stopped
    best: float  # its best mean return until then
    median: float  # what its best return should have reached, see `median_to_reach`
    siblings: int  # number of siblings that it was compared with


def median_to_reach(
    epoch: int, others: Sequence[Sequence[float]], min_siblings: int = MIN_SIBLINGS
) -> float | None:
    """The value that the best return of a trial up to ``epoch`` must reach, or None if it is not known yet.

    It is the median, over the siblings that have come as far, of the mean of each one's returns after the
    epochs 1 to ``epoch``. That is the median stopping rule of Golovin et al., "Google Vizier", KDD 2017,
    section 3.2.1 (https://doi.org/10.1145/3097983.3098043). The best of one trial is compared with running
    averages of the others, so a curve that goes up and down is not stopped in one of its valleys.

    ``others`` has for each sibling the mean returns after its epochs 1, 2, ..., without the untrained
    policy's. At least ``min_siblings`` must have come as far.
    """
    means = [statistics.fmean(returns[:epoch]) for returns in others if len(returns) >= epoch]
    return statistics.median(means) if len(means) >= max(min_siblings, 1) else None


def refuse_what_does_not_fit(*, seeds: int = 1, store: object = None) -> None:
    """Raise a `UserError` for a trial that cannot be stopped early: one of several seeds, or with a store."""
    if seeds != 1:
        raise UserError(
            f"`--stop-poor` takes trials of one seed, but `task.seeds` is {seeds}. Seeds are trained one "
            f"after another, and some of them do not make an objective. Leave one of the two out."
        )
    if store is not None:
        raise UserError(
            "`--stop-poor` compares trials by their directories, but a store is for machines that do not see "
            "each other's directories. Leave one of the two out. PPO_HPO_STORE may also set a store."
        )


class Siblings:
    """The other trials of the experiment of the trial ``config``, in the directory that holds all of them.

    Files that are missing, torn or not of a trial are no error: other processes are writing them or have
    left them behind.
    """

    def __init__(self, directory: Path, config: TrialConfig) -> None:
        self._directory, self._own = directory, config.identity()[:32]
        self._wanted = _comparable_values(config)
        # Files are read again only if they changed, because a trial asks after each of its epochs.
        self._is_comparable: dict[Path, bool] = {}
        self._curves: dict[Path, tuple[tuple[int, int, int], list[float]]] = {}

    def returns(self) -> list[list[float]]:
        """For each sibling the mean returns after its epochs 1, 2, ..., as far as it has come.

        A configuration that was promoted has a directory for each rung. It counts once, with the longest
        curve.
        """
        found = []
        for identity, places in listed_trials(self._directory, _MAX_SIBLINGS + 1).items():
            if identity == self._own:
                continue
            curves = [self._curve(place) for place in places if self._check(place, identity)]
            if longest := max(curves, key=len, default=[]):
                found.append(longest)
        return found[:_MAX_SIBLINGS]

    def _check(self, place: Path, identity: str) -> bool:
        """Whether the trial in ``place`` is the one that the index names, and can be compared."""
        if place in self._is_comparable:
            return self._is_comparable[place]
        try:
            content = read_bytes(place / "config.yaml", _MAX_CONFIG).decode()
            config = TrialConfig.from_mapping(yamlio.parse(content, str(place)))
        except (UserError, ValueError, AttributeError, TypeError, KeyError):
            return False  # It may be about to begin.
        same = config.identity()[:32] == identity and _comparable_values(config) == self._wanted
        self._is_comparable[place] = same
        return same

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
    """Decide whether a trial should stop after the last epoch of its curve.

    It never stops after its first epoch, which says little, nor after its last, when it ends anyway.
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
    """The content of ``stopped.json``."""
    return (json.dumps(asdict(stop), indent=1, allow_nan=False) + "\n").encode()


def read(directory: Path, config: TrialConfig) -> Stop | None:
    """The decision to stop a trial, or None if there is none.

    Orion copies directories for promotions and forks. So a record for another fidelity, or for other
    hyperparameters, is ignored. So is one that `to_bytes` cannot have written.
    """
    try:
        content: Any = json.loads(read_bytes(directory / RECORD, _MAX_RECORD))
        stop = Stop(**content)
    except (CheckpointError, ValueError, TypeError, RecursionError):
        return None
    numbers = (stop.epochs, stop.epoch, stop.siblings)
    valid = all(type(number) is int for number in numbers) and 1 < stop.epoch < stop.epochs
    valid &= all(type(value) is float and math.isfinite(value) for value in (stop.best, stop.median))
    same = stop.identity == config.identity() and stop.epochs == config.task.epochs
    return stop if valid and same else None


def _comparable_values(config: TrialConfig) -> Mapping[str, Any]:
    groups = {**config.to_mapping(), "task": {**config.to_mapping()["task"], "max_epochs": config.max_epochs}}
    # The values pass through JSON, because the other side comes from a file.
    wanted = {group: {key: groups[group][key] for key in keys} for group, keys in _COMPARABLE.items()}
    return dict(as_read_from_json(wanted))

"""Removes checkpoints that nobody will go on from: of trials that can no longer be promoted.

A trial that is not completed keeps everything. One that is completed loses its checkpoints where
this is sure:

- it has the highest fidelity, or the experiment has none: there is nothing to promote it to, and no
  algorithm of Orion's forks from one;
- a completed trial of the same hyperparameters has more epochs. Not for population-based training, in
  which one trial may be the parent of several;
- the algorithm is done: it says so itself;
- the user says so (``--finished``), and `max_trials` is reached and no trial is under way.

The best trial keeps its newest whole checkpoint: it is the policy that was looked for. Curves,
logs and results stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.errors import CheckpointError, UserError
from ppo_hpo.experiment import open_experiment, params_of, statistics_of

if TYPE_CHECKING:
    from ppo_hpo.store import Store

# Their children may have any trial of a lower generation for a parent.
_FORKING = {"pbt", "pb2"}
_UNDER_WAY = ("new", "reserved", "interrupted", "suspended")


@dataclass(frozen=True)
class Cleaned:
    """What became of one trial's checkpoints.

    Attributes:
        trial: its id.
        reason: why none of them is needed; empty where they are.
        removed: number and bytes of those removed.
        kept: number and bytes of those that stay.
        note: why some stay although there is a reason.
    """

    trial: str
    reason: str
    removed: tuple[int, int]
    kept: tuple[int, int]
    note: str = ""


def clean(
    name: str,
    config: str | None = None,
    *,
    dry_run: bool = False,
    finished: bool = False,
    keep: int = 1,
    store: Store | None = None,
) -> str:
    """Remove what can be; say what it was.

    Args:
        name: the experiment's name.
        config: Orion's configuration file of the hunt, for its storage.
        dry_run: remove nothing, and say what would be.
        finished: nobody will raise `max_trials` of an experiment that has reached it.
        keep: of so many of the best trials the newest checkpoint stays; at least 1.
        store: a second place of checkpoints, which is cleaned too.

    Raises:
        UserError: there is no such experiment, it is not finished, or a file cannot be removed.
    """
    if keep < 1:
        raise UserError(f"`--keep >= 1` must hold, but got {keep}: the best trial keeps its checkpoint.")
    client = open_experiment(name, config)
    trials = client.fetch_trials()
    reasons = obsolete(trials, highest(client), forking(client), is_done=_done(client, trials, finished))
    best = [trial.id for trial in sorted(_completed(trials), key=_goodness)[:keep]]
    found = [
        _clean_trial(trial, reasons.get(trial.id, ""), trial.id in best, dry_run, store) for trial in trials
    ]
    return to_text(found, dry_run=dry_run)


def obsolete(trials: Sequence[Any], top: float | None, forks: bool, *, is_done: str = "") -> dict[str, str]:
    """Ids of the trials whose checkpoints nobody needs, and why.

    Args:
        trials: of the experiment, all of them.
        top: the highest fidelity, None where there is none.
        forks: whether the algorithm makes several children of one trial.
        is_done: why no trial at all will be promoted; empty where some may be.
    """
    family: dict[str, list[Any]] = {}
    for trial in trials:
        family.setdefault(_configuration(trial), []).append(trial)
    reasons: dict[str, str] = {}
    for trial in _completed(trials):
        relatives = family[_configuration(trial)]
        further = [t for t in relatives if t.status == "completed" and _epochs(t) > _epochs(trial)]
        if top is None:
            reasons[trial.id] = "there are no promotions"
        elif _epochs(trial) >= top:
            reasons[trial.id] = "has the highest fidelity"
        elif is_done:
            reasons[trial.id] = is_done
        elif further and not forks and all(t.status == "completed" for t in relatives):
            reasons[trial.id] = f"promoted, and completed as {further[0].id[:8]}"
    return reasons


def highest(client: Any) -> float | None:
    """The highest fidelity of an experiment, or None where it has none."""
    from ppo_hpo.client import epochs_prior
    from ppo_hpo.space import parse_prior

    prior = epochs_prior(client.space)
    return None if prior is None else float(parse_prior("task.epochs", prior).arguments[1])


def forking(client: Any) -> bool:
    """Whether an experiment's algorithm forks trials."""
    return any(str(name).lower() in _FORKING for name in client.algorithm.configuration)


def to_text(found: Sequence[Cleaned], *, dry_run: bool) -> str:
    """What was removed, and the sums, as lines."""
    verb = "would remove" if dry_run else "removed"
    lines = [
        f"{verb}  {item.trial[:8]}  {_amount(item.removed)}  {item.reason}"
        + (f"; {item.note}" if item.note else "")
        for item in found
        if item.removed[0]
    ]
    lines += [
        f"kept     {item.trial[:8]}  {_amount(item.kept)}  {item.note}"
        for item in found
        if item.reason and item.note and not item.removed[0] and item.kept[0]
    ]
    removed = [sum(item.removed[i] for item in found) for i in (0, 1)]
    kept = [sum(item.kept[i] for item in found) for i in (0, 1)]
    of = sum(bool(item.kept[0]) for item in found)
    lines.append(f"{verb} {_amount((removed[0], removed[1]))} in all; {_amount((kept[0], kept[1]))} "
                 f"of {of} trial{'' if of == 1 else 's'} {'would stay' if dry_run else 'stay'}")  # fmt: skip
    return "\n".join(lines)


def _done(client: Any, trials: Sequence[Any], finished: bool) -> str:
    """In words, why no trial will be promoted any more; empty where one may be."""
    waiting: dict[str, int] = {}
    for trial in trials:
        if trial.status in _UNDER_WAY:
            waiting[trial.status] = waiting.get(trial.status, 0) + 1
    if not waiting and client.algorithm.is_done:
        return "the algorithm is done"
    if not finished:
        return ""
    if waiting:
        counts = ", ".join(f"{number} {status}" for status, number in sorted(waiting.items()))
        raise UserError(f"{client.name!r} is not finished: {counts}. Leave --finished out, or end them.")
    completed = sum(trial.status == "completed" for trial in trials)
    if completed < client.max_trials:
        raise UserError(
            f"{client.name!r} is not finished: {completed} of {client.max_trials} trials are completed. "
            f"Leave --finished out, or hunt on."
        )
    return "the experiment is finished"


def _clean_trial(trial: Any, reason: str, is_best: bool, dry_run: bool, store: Store | None) -> Cleaned:
    from ppo_hpo import lock
    from ppo_hpo.checkpoint import Storage
    from ppo_hpo.sources import TRIALS

    directory = Path(trial.working_dir)
    paths = [path for path in Storage(directory).paths() if not path.is_symlink()]
    there = _names_in(store, trial.id)
    sizes = [_size(path) for path in paths] + [store.size(TRIALS, trial.id, n) for n in there if store]
    everything = (len(sizes), sum(sizes))
    if not reason or not sizes:
        return Cleaned(trial.id, reason, (0, 0), everything)
    note = ""
    stays: set[str] = set()
    if is_best:
        stays, note = {_newest_whole([*paths], there)}, "the best keeps its newest"
    gone = [(path, _size(path)) for path in paths if path.name not in stays]
    with lock.at_rest(directory) as free:
        if not free:
            return Cleaned(trial.id, reason, (0, 0), everything, "a process has it")
        if not dry_run:
            for path, _ in gone:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise UserError(f"{path} cannot be removed: {error.strerror}.") from None
    away = [(name, store.size(TRIALS, trial.id, name)) for name in there if store and name not in stays]
    if store is not None and not dry_run:
        for name, _ in away:
            store.remove(TRIALS, trial.id, name)
    removed = (len(gone) + len(away), sum(size for _, size in gone) + sum(size for _, size in away))
    return Cleaned(trial.id, reason, removed, (everything[0] - removed[0], everything[1] - removed[1]), note)


def _newest_whole(paths: Sequence[Path], there: Sequence[str]) -> str:
    """The file name of the checkpoint that the best trial keeps."""
    from ppo_hpo.checkpoint import read

    for path in paths:
        try:
            read(path)
        except CheckpointError:
            continue
        return path.name
    return max([*there, *(path.name for path in paths)])


def _names_in(store: Store | None, key: str) -> list[str]:
    from ppo_hpo.checkpoint import epoch_of
    from ppo_hpo.sources import TRIALS

    if store is None:
        return []
    return [name for name in store.names(TRIALS, key) if epoch_of(name) is not None]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _completed(trials: Sequence[Any]) -> list[Any]:
    return [trial for trial in trials if trial.status == "completed" and "epochs" in statistics_of(trial)]


def _goodness(trial: Any) -> tuple[float, float]:
    return (trial.objective.value, -statistics_of(trial)["epochs"])


def _epochs(trial: Any) -> float:
    """What Orion asked for; a trial that diverged has fewer, and is at its fidelity all the same."""
    params: Mapping[str, Any] = params_of(trial)
    return float(params["task.epochs"]) if "task.epochs" in params else statistics_of(trial)["epochs"]


def _configuration(trial: Any) -> str:
    params = {name: value for name, value in params_of(trial).items() if name != "task.epochs"}
    return json.dumps(params, sort_keys=True, default=str)


def _amount(count_and_bytes: tuple[int, int]) -> str:
    count, size = count_and_bytes
    return f"{count} checkpoint{'' if count == 1 else 's'}, {size / 2**20:.2f} MiB"

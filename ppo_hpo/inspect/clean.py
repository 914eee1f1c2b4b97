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

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.orion.experiment import (
    completed_trials,
    configuration_of,
    open_experiment,
    params_of,
    ranking_key,
    statistics_of,
)
from ppo_hpo.spec.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from ppo_hpo.state.remote_store import Store

# Their children may have any trial of a lower generation for a parent.
_FORKING = {"pbt", "pb2"}
_SEED = re.compile(r"seed-[1-9]\d*", re.ASCII)
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
    from ppo_hpo.trial.mirrored_storage import TRIALS

    # Listed once for all: a trial of several seeds has a name for each.
    keys = [] if store is None else store.names(TRIALS)
    # Of one whose directory somebody removed there is nothing to keep.
    ranked = (
        t
        for t in sorted(completed_trials(trials), key=ranking_key)
        if _files(t.id, Path(t.working_dir), store, keys)
    )
    best = [trial.id for trial in itertools.islice(ranked, keep)]
    found = [
        _clean_trial(trial, reasons.get(trial.id, ""), trial.id in best, dry_run, store, keys)
        for trial in trials
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
        family.setdefault(configuration_of(trial), []).append(trial)
    reasons: dict[str, str] = {}
    for trial in completed_trials(trials):
        relatives = family[configuration_of(trial)]
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
    from ppo_hpo.orion.objective import epochs_prior
    from ppo_hpo.spec.prior import highest_fidelity

    prior = epochs_prior(client.space)
    return None if prior is None else float(highest_fidelity(prior))


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


def _clean_trial(
    trial: Any, reason: str, is_best: bool, dry_run: bool, store: Store | None, keys: Sequence[str]
) -> Cleaned:
    from ppo_hpo.state import lock
    from ppo_hpo.trial.mirrored_storage import TRIALS, part_key

    directory = Path(trial.working_dir)
    files = _files(trial.id, directory, store, keys)
    everything = _sum(files)
    if not reason or not files:
        return Cleaned(trial.id, reason, (0, 0), everything)
    note = ""
    stays: set[tuple[str, str]] = set()
    if is_best:
        note = "one of the best: its newest stays"
        for part in {file.part for file in files}:
            own = [file for file in files if file.part == part]
            stays.add((part, _newest_whole([f.path for f in own if f.path], [f.name for f in own])))
    gone = [file for file in files if (file.part, file.name) not in stays]
    with lock.exclude_writers(directory) as free:
        if not free:
            return Cleaned(trial.id, reason, (0, 0), everything, "a process has it")
        for path in [file.path for file in gone if file.path and not dry_run]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{path} cannot be removed: {error.strerror}.") from None
    for file in gone:
        if store is not None and file.path is None and not dry_run:
            store.remove(TRIALS, part_key(trial.id, file.part), file.name)
    removed = _sum(gone)
    return Cleaned(trial.id, reason, removed, (everything[0] - removed[0], everything[1] - removed[1]), note)


@dataclass(frozen=True)
class _File:
    """A checkpoint: of which seed (see `seeds.split_by_seed`), and where; no path means in the store."""

    part: str
    name: str
    size: int
    path: Path | None = None


def _files(trial: str, directory: Path, store: Store | None, keys: Sequence[str]) -> list[_File]:
    """A trial's checkpoints, of each seed newest first; ``keys`` are the names of all trials in the store."""
    from ppo_hpo.state.checkpoint import Storage, epoch_of
    from ppo_hpo.trial.mirrored_storage import TRIALS

    found = []
    for folder in (directory, *sorted(directory.glob("seed-*"))):
        part = "" if folder == directory else folder.name
        if not part or (_SEED.fullmatch(part) and not folder.is_symlink()):
            paths = [path for path in Storage(folder).paths() if not path.is_symlink()]
            found += [_File(part, path.name, _size(path), path) for path in paths]
    for key in keys:
        whose, _, part = key.partition("-")
        if store is not None and whose == trial and (not part or _SEED.fullmatch(part)):
            names = [name for name in store.names(TRIALS, key) if epoch_of(name) is not None]
            found += [_File(part, name, store.size(TRIALS, key, name)) for name in names]
    return found


def _sum(files: Sequence[_File]) -> tuple[int, int]:
    return len(files), sum(file.size for file in files)


def _newest_whole(paths: Sequence[Path], there: Sequence[str]) -> str:
    """The file name of the checkpoint that the best trial keeps."""
    from ppo_hpo.state.checkpoint import read

    for path in paths:
        try:
            read(path)
        except CheckpointError:
            continue
        return path.name
    return max([*there, *(path.name for path in paths)])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _epochs(trial: Any) -> float:
    """What Orion asked for; a trial that diverged has fewer, and is at its fidelity all the same."""
    params: Mapping[str, Any] = params_of(trial)
    return float(params["task.epochs"]) if "task.epochs" in params else statistics_of(trial)["epochs"]


def _amount(count_and_bytes: tuple[int, int]) -> str:
    count, size = count_and_bytes
    return f"{count} checkpoint{'' if count == 1 else 's'}, {size / 2**20:.2f} MiB"

"""Removes checkpoints that no trial can resume from: those of trials that cannot be promoted any more.

A trial that is not completed keeps all checkpoints. A completed trial loses them if one of these holds:

- It has the highest fidelity, or the experiment has no fidelity. Then there is nothing to promote it to, and
  no algorithm of Orion's forks from such a trial.
- A completed trial of the same configuration has more epochs. This does not hold for population-based
  training, where one trial can be the parent of several.
- The algorithm says that it is done.
- The user says so (``--finished``), `max_trials` is reached, and no trial is waiting or running.

The best trial keeps its newest checkpoint that can be read, because that is the policy that the user wants.
Curves, logs and results stay.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ppo_hpo.orion import experiment
from ppo_hpo.spec.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from ppo_hpo.state.remote_store import Store

# Algorithms in which any trial of a lower generation can become a parent.
_FORKING = {"pbt", "pb2"}
_SEED = re.compile(r"seed-[1-9]\d*", re.ASCII)
_UNFINISHED = ("new", "reserved", "interrupted", "suspended")


class _File(NamedTuple):
    """A checkpoint."""

    part: str  # Name of the seed's directory, `seed-N`; empty if the trial has one seed.
    name: str
    size: int  # In bytes.
    path: Path | None = None  # None if the checkpoint is in the checkpoint store.


@dataclass(frozen=True)
class Cleaned:
    """What happened to the checkpoints of one trial."""

    trial: str  # The trial's id.
    reason: str  # Why they are not needed; empty if they are.
    removed: Sequence[_File] = ()
    kept: Sequence[_File] = ()
    note: str = ""  # Why some stay although there is a reason to remove them.


def clean(
    name: str, config: str | None = None, *, dry_run: bool = False, finished: bool = False, keep: int = 1,
    store: Store | None = None,
) -> str:  # fmt: skip
    """Remove the checkpoints that no trial can resume from; what was removed, for the user.

    Args:
        name: name of the experiment, or path of a sweep's directory.
        config: Orion's configuration file, which says where the database is.
        dry_run: remove nothing, and say what would be removed.
        finished: nobody will raise `max_trials` of this experiment, so no trial will be promoted any more.
        keep: how many of the best trials keep their newest checkpoint; at least 1.
        store: checkpoint store, which is cleaned too; None if there is none.
    """
    if keep < 1:
        raise UserError(f"`--keep >= 1` must hold, but got {keep}: the best trial keeps its checkpoint.")
    client = experiment.open_experiment(name, config)
    trials = client.fetch_trials()
    is_done = _why_done(client, trials, finished)
    reasons = obsolete(trials, experiment.highest_epochs(client), forking(client), is_done=is_done)
    files = _all_files(trials, store)
    # If somebody removed the directory of a good trial, the next one keeps its checkpoint instead.
    ranked = (
        trial.id
        for trial in sorted(experiment.completed_trials(trials), key=experiment.ranking_key)
        if files[trial.id]
    )
    best = set(itertools.islice(ranked, keep))
    found = []
    for trial in trials:
        decided = _decide(trial.id, reasons.get(trial.id, ""), files[trial.id], trial.id in best)
        found.append(_remove(trial, decided, store, dry_run) if decided.removed else decided)
    return to_text(found, dry_run=dry_run)


def obsolete(trials: Sequence[Any], top: float | None, forks: bool, *, is_done: str = "") -> dict[str, str]:
    """Find the trials whose checkpoints no trial can resume from; their ids, and why.

    Args:
        trials: all trials of the experiment.
        top: the highest fidelity; None if the experiment has none.
        forks: whether the algorithm makes several children of one trial.
        is_done: why no trial at all will be promoted; empty if some may be.
    """
    by_configuration: dict[str, list[Any]] = {}
    for trial in trials:
        by_configuration.setdefault(experiment.configuration_of(trial), []).append(trial)
    reasons: dict[str, str] = {}
    for trial in experiment.completed_trials(trials):
        relatives = by_configuration[experiment.configuration_of(trial)]
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


def _epochs(trial: Any) -> float:
    epochs = experiment.asked_epochs(trial)
    return experiment.statistics_of(trial)["epochs"] if epochs is None else epochs


def forking(client: Any) -> bool:
    """Whether an experiment's algorithm forks trials."""
    return any(str(name).lower() in _FORKING for name in client.algorithm.configuration)


def _why_done(client: Any, trials: Sequence[Any], finished: bool) -> str:
    """Why no trial will be promoted any more; empty if one may be."""
    statuses = Counter(trial.status for trial in trials)
    unfinished = {status: statuses[status] for status in sorted(_UNFINISHED) if statuses[status]}
    if not unfinished and _algorithm_is_done(client):
        return "the algorithm is done"
    if not finished:
        return ""
    if unfinished:
        counts = ", ".join(f"{number} {status}" for status, number in unfinished.items())
        raise UserError(f"{client.name!r} is not finished: {counts}. Leave --finished out, or finish them.")
    if statuses["completed"] < client.max_trials:
        raise UserError(
            f"{client.name!r} is not finished: {statuses['completed']} of {client.max_trials} trials are "
            f"completed. Leave --finished out, or run the other trials."
        )
    return "the experiment is finished"


def _algorithm_is_done(client: Any) -> bool:
    """Whether the algorithm proposes no further trial, by the state that the database has of it."""
    stored = client.storage.get_algorithm_lock_info(uid=client.id)
    if stored is None or stored.locked or not stored.state:
        return False
    client.algorithm.set_state(stored.state)
    client.algorithm.max_trials = None  # The user may raise it.
    return bool(client.algorithm.is_done)


def _all_files(trials: Sequence[Any], store: Store | None) -> dict[str, list[_File]]:
    """The checkpoints of each trial by its id, those of each seed newest first."""
    from ppo_hpo.state.checkpoint import Storage, epoch_of
    from ppo_hpo.state.mirror import TRIALS

    found: dict[str, list[_File]] = {}
    for trial in trials:
        directory = Path(trial.working_dir)
        files = found[trial.id] = []
        for folder in (directory, *sorted(directory.glob("seed-*"))):
            part = "" if folder == directory else folder.name
            if not part or (_SEED.fullmatch(part) and not folder.is_symlink()):
                paths = [path for path in Storage(folder).paths() if not path.is_symlink()]
                files += [_File(part, path.name, _size(path), path) for path in paths]
    # In the store, a trial of several seeds has one key for each seed.
    for key in [] if store is None else store.names(TRIALS):
        trial_id, _, part = key.partition("-")
        if store is not None and trial_id in found and (not part or _SEED.fullmatch(part)):
            names = [name for name in store.names(TRIALS, key) if epoch_of(name) is not None]
            found[trial_id] += [_File(part, name, store.size(TRIALS, key, name)) for name in names]
    return found


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _decide(trial_id: str, reason: str, files: Sequence[_File], is_best: bool) -> Cleaned:
    """Divide a trial's checkpoints into those to remove and those to keep."""
    if not reason:
        return Cleaned(trial_id, reason, kept=files)
    if not is_best:
        return Cleaned(trial_id, reason, removed=files)
    newest = {
        part: _newest_readable([file for file in files if file.part == part])
        for part in {file.part for file in files}
    }
    removed = [file for file in files if file.name != newest[file.part]]
    kept = [file for file in files if file.name == newest[file.part]]
    return Cleaned(trial_id, reason, removed, kept, "one of the best: its newest stays")


def _newest_readable(files: Sequence[_File]) -> str:
    """Name of the newest checkpoint that can be read; of the newest if none can be read on this machine."""
    from ppo_hpo.state.checkpoint import read

    for file in files:
        if file.path is not None:
            try:
                read(file.path)
            except CheckpointError:
                continue
            return file.name
    return max(file.name for file in files)


def _remove(trial: Any, decided: Cleaned, store: Store | None, dry_run: bool) -> Cleaned:
    """Remove the checkpoints that were decided on, unless a process trains the trial."""
    from ppo_hpo.state import lock
    from ppo_hpo.state.mirror import TRIALS, part_key

    with lock.exclude_writers(Path(trial.working_dir)) as free:
        if not free:
            files = [*decided.removed, *decided.kept]
            return Cleaned(trial.id, decided.reason, kept=files, note="a process is training it")
        if dry_run:
            return decided
        for file in decided.removed:
            if file.path is not None:
                try:
                    file.path.unlink(missing_ok=True)
                except OSError as error:
                    raise UserError(f"{file.path} cannot be removed: {error.strerror}.") from None
    for file in decided.removed:
        if store is not None and file.path is None:
            store.remove(TRIALS, part_key(trial.id, file.part), file.name)
    return decided


def to_text(found: Sequence[Cleaned], *, dry_run: bool) -> str:
    """What was removed and what stays, as lines of text."""
    verb = "would remove" if dry_run else "removed"
    lines = [
        f"{verb}  {item.trial[:8]}  {_amount(item.removed)}  "
        + "; ".join(filter(None, (item.reason, item.note)))
        for item in found
        if item.removed
    ]
    lines += [
        f"kept     {item.trial[:8]}  {_amount(item.kept)}  {item.note}"
        for item in found
        if item.note and item.kept and not item.removed
    ]
    removed = [file for item in found for file in item.removed]
    kept = [file for item in found for file in item.kept]
    trials = sum(bool(item.kept) for item in found)
    lines.append(
        f"{verb} {_amount(removed)} in all; {_amount(kept)} of {trials} trial{'' if trials == 1 else 's'} "
        f"{'would stay' if dry_run else 'stay'}"
    )
    return "\n".join(lines)


def _amount(files: Iterable[_File]) -> str:
    sizes = [file.size for file in files]
    return f"{len(sizes)} checkpoint{'' if len(sizes) == 1 else 's'}, {sum(sizes) / 2**20:.2f} MiB"

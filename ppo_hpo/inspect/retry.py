"""Requeue broken and stuck trials of an experiment, so that the next worker resumes them.

A trial is requeued by giving it the status `interrupted`. It keeps its id and its directory, and so its
checkpoint. A broken trial can always be requeued. A reserved trial may still have a worker, so two things are
checked first:

- the trial's own lock, which shows on any machine whether a process trains the trial (`lock.active_writer`);
- Orion's heartbeat, which a worker renews each minute. If it is younger than two minutes, the worker is
  probably alive, and would fail when it finds its trial taken. A trial that the user names is requeued
  anyway.

A worker that is killed while it holds the lock of the experiment's algorithm leaves it locked, and all other
workers wait. Nothing records who holds the lock, only since when. Workers wait for it for one minute at a
time, so a worker that has held it for `PATIENCE` is gone, or as good as gone.

A worker that is killed after it stored a result, and before it told the algorithm, leaves ASHA and Hyperband
waiting for this result for ever. So the algorithm is told all results that it does not know.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_hpo.orion.experiment import open_experiment
from ppo_hpo.spec.errors import UserError

#: Statuses of trials that can be requeued.
STUCK = ("broken", "reserved")
#: Seconds without a sign of life after which a worker counts as gone: two of Orion's heartbeats, and twice
#: the time that Orion's workers wait for the algorithm's lock.
PATIENCE = 120.0
# Seconds to wait for the algorithm's lock.
_LOCK_SECONDS = 10.0
# Characters of the error of a broken trial that are printed. The trial's directory has all of it.
_ERROR_CHARACTERS = 200


def retry(
    name: str, config: str | None = None, *, trial: str | None = None, status: str | None = None
) -> str:
    """Requeue trials, and repair what a killed worker left behind; what was done, for the user.

    Args:
        name: name of the experiment, or path of a sweep's directory.
        config: Orion's configuration file, which says where the database is.
        trial: id of the only trial to requeue, or the beginning of it. It is requeued even if its worker was
            seen less than two minutes ago.
        status: requeue only trials of this status, ``broken`` or ``reserved``.
    """
    client = open_experiment(name, config, mode="w")
    chosen = _choose(client.fetch_trials(), name, trial, status)
    lines = [_requeue(client, one, named=trial is not None) for one in chosen]
    count = sum(line.endswith("requeued") for line in lines)
    lines += _repair_algorithm(client)
    what = status or "broken or reserved"
    lines.append(f"{count} of {len(chosen)} {what} trial{'' if len(chosen) == 1 else 's'} requeued")
    if count:
        lines.append("Rerun the sweep or the hunt: the next worker resumes them.")
    return "\n".join(lines)


def repair(client: Any) -> list[str]:
    """Requeue reserved trials that a killed worker left, and repair the algorithm, as `retry` does."""
    reserved = client.fetch_trials_by_status("reserved")
    return [_requeue(client, trial, named=False) for trial in reserved] + _repair_algorithm(client)


def _choose(trials: Sequence[Any], name: str, trial: str | None, status: str | None) -> list[Any]:
    wanted = [t for t in trials if t.status in ((status,) if status else STUCK)]
    if trial is None:
        return wanted
    matches = [t for t in trials if trial and t.id.startswith(trial)]
    if len(matches) != 1:
        many = f"{len(matches)} trials" if matches else "no trial"
        raise UserError(
            f"Experiment {name!r} has {many} whose id begins with {trial!r}. Each line that a trial prints "
            f"begins with its id, and `orion status -n {name} --all` lists all ids."
        )
    if matches[0] not in wanted:
        raise UserError(
            f"Trial {matches[0].id} is {matches[0].status}, but only {status or ' or '.join(STUCK)} trials "
            f"can be requeued."
        )
    return matches


def _requeue(client: Any, trial: Any, *, named: bool) -> str:
    """Requeue one trial, unless it has a worker; the line that says so, and why."""
    from orion.storage.base import FailedUpdate

    from ppo_hpo.state import lock
    from ppo_hpo.trial import failure

    was, line = trial.status, f"{trial.id}  {trial.status:8}  "
    directory = Path(trial.working_dir)
    if writer := lock.active_writer(directory):
        if named:
            raise UserError(
                f"Trial {trial.id} is being trained by {writer}. Stop that first, or wait for it."
            )
        return f"{line}skipped: it is being trained by {writer}"
    if was == "reserved" and not named and (seconds := seconds_since(trial.heartbeat)) < PATIENCE:
        return (
            f"{line}skipped: its worker was seen {max(seconds, 0):.0f} s ago; if that worker is gone, try "
            f"again in {PATIENCE - seconds:.0f} s, or use --trial {trial.id[:8]}"
        )
    try:
        client.storage.set_trial_status(trial, "interrupted", was=was)
    except FailedUpdate:
        return f"{line}skipped: its status has just changed"
    record = failure.read_record(directory)
    if record and record.error and was == "broken":
        line += f"{record.error[:_ERROR_CHARACTERS]} ({record.at})  "
    return f"{line}requeued"


def seconds_since(moment: datetime.datetime | None) -> float:
    """Seconds since a moment in UTC without a time zone, as Orion stores it; infinity for None."""
    return float("inf") if moment is None else (_now() - moment).total_seconds()


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


def _repair_algorithm(client: Any) -> list[str]:
    """Release the algorithm's lock if its holder is gone, and tell the algorithm what it does not know."""
    from orion.storage.base import LockAcquisitionTimeout

    lines, held = _release_lock(client)
    try:
        # Workers that are alive hold the lock for a moment only.
        with client._experiment.acquire_algorithm_lock(timeout=_LOCK_SECONDS) as algorithm:
            for trial in client.fetch_trials_by_status("completed"):
                if not algorithm.has_observed(trial):
                    algorithm.observe([trial])
                    lines.append(f"{trial.id}  completed  the algorithm did not know its result: repaired")
    except LockAcquisitionTimeout:
        lines.append(held or "The algorithm is locked. Run this command again if the hunt does not continue.")
    return lines


def _release_lock(client: Any) -> tuple[list[str], str]:
    """Release the algorithm's lock if it was held for too long.

    Orion's own calls cannot do this: they neither say since when the lock is held, nor release it only if
    its holder is still the same. This returns what was done, and what to say if the lock is still held.
    """
    database, query = client.storage._db, {"experiment": client.id, "locked": 1}
    found = database.read("algo", query)
    if not found:
        return [], ""
    since = found[0]["heartbeat"]
    seconds = seconds_since(since)
    held = f"The algorithm has been locked since {since:%Y-%m-%d %H:%M:%S} UTC"
    if seconds < PATIENCE:
        return [], (
            f"{held}, for {max(seconds, 0):.0f} s: skipped; if it stays locked, try again in "
            f"{PATIENCE - seconds:.0f} s"
        )
    data = {"locked": 0, "heartbeat": _now()}
    if database.read_and_write("algo", query={**query, "heartbeat": since}, data=data) is None:
        return [f"{held}: skipped, because another process has just taken or released it"], ""
    return [f"{held}, longer than any worker needs it: released"], ""

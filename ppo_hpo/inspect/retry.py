"""Requeue broken and stuck trials of an experiment, so that the next worker resumes them.

A trial is requeued by giving it the status `interrupted`. It keeps its id and its directory, and so its
checkpoint. A broken trial can always be requeued. A reserved trial may still have a worker, so two things are
checked first:

- the trial's own lock, which shows on any machine whether a process trains the trial (`lock.active_writer`);
- Orion's heartbeat, which a worker renews each minute. If it is younger than two minutes, the worker is
  probably alive, and would fail when it finds its trial taken. A trial that the user names is requeued
  anyway.

A worker that is killed while it holds the lock of the experiment's algorithm leaves it locked, and all other
workers wait. The lock says which process holds it (`ppo_hpo.orion.algorithm_lock`), so it is released if that
process has ended. A holder that cannot be seen from here may be alive: its lock is released only by `retry`,
which the user calls, and only after `PATIENCE`.

A worker that is killed after it stored a result, and before it told the algorithm, leaves ASHA and Hyperband
waiting for this result for ever. So the algorithm is told all results that it does not know.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ppo_hpo.orion import algorithm_lock
from ppo_hpo.orion.algorithm_lock import utc_now
from ppo_hpo.orion.experiment import open_experiment
from ppo_hpo.spec.errors import UserError

if TYPE_CHECKING:
    from ppo_hpo.state.claim import Writer

#: Statuses of trials that can be requeued.
STUCK = ("broken", "reserved")
#: Seconds without a sign of life after which a worker counts as gone: two of Orion's heartbeats, and twice
#: the time that Orion's workers wait for the algorithm's lock.
PATIENCE = 120.0
# Seconds to wait for the algorithm's lock.
_LOCK_SECONDS = 10.0
# Characters of the error of a broken trial that are printed. The trial's directory has all of it.
_ERROR_CHARACTERS = 200


class Waiting:
    """Prints why a wait takes long, once. ``tick`` is called all the time, and may raise to end the wait."""

    def __init__(self, stream: TextIO | None, tick: Callable[[], None] = lambda: None) -> None:
        self._stream, self._tick, self._told = stream, tick, set[str]()

    def __call__(self, text: str) -> None:
        """Say why, while waiting."""
        self._tick()
        if self._stream is not None and text not in self._told:
            print(f"ppo-hpo: {text}", file=self._stream, flush=True)
        self._told.add(text)


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
    waiting = Waiting(sys.stderr)
    lines = _requeue_all(client, chosen, waiting, named=trial is not None)
    count = sum(line.endswith("requeued") for line in lines)
    lines += _release_lock(client, asked=True)
    lines += _repair_algorithm(client, waiting)
    what = status or "broken or reserved"
    lines.append(f"{count} of {len(chosen)} {what} trial{'' if len(chosen) == 1 else 's'} requeued")
    if count:
        lines.append("Rerun the sweep or the hunt: the next worker resumes them.")
    return "\n".join(lines)


def repair(client: Any, waiting: Waiting) -> list[str]:
    """Requeue reserved trials that a killed worker left, and repair the algorithm, as `retry` does.

    This is called without being asked for. So it releases the algorithm's lock only if its holder has ended.
    """
    lines = _requeue_all(client, client.fetch_trials_by_status("reserved"), waiting)
    lines += _release_lock(client, asked=False)
    return lines + _repair_algorithm(client, waiting)


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


def _requeue_all(client: Any, trials: Sequence[Any], waiting: Waiting, *, named: bool = False) -> list[str]:
    """Requeue trials that have no worker; a line for each of them that says what was done, and why."""
    from ppo_hpo.state import lock

    # The heartbeat is read at once, but a lock may have to be watched for a minute. So the lock of a trial
    # whose worker was seen is only looked at, and all others are watched at the same time.
    seen = [trial for trial in trials if not named and _was_seen(trial)]
    silent = [trial for trial in trials if trial not in seen]

    def wait(count: int) -> None:
        plural = "s" if len(silent) > 1 else ""
        waiting(
            f"{len(silent)} trial{plural} may be trained by a process that cannot be seen from here: waits "
            f"at most a minute for its next sign of life"
        )

    writers = [
        *lock.active_writers([Path(trial.working_dir) for trial in seen], limit=0.0),
        *lock.active_writers([Path(trial.working_dir) for trial in silent], wait),
    ]
    both = zip([*seen, *silent], writers, strict=True)
    return [_requeue(client, trial, writer, named=named) for trial, writer in both]


def _was_seen(trial: Any) -> bool:
    """Whether a trial's worker gave a sign of life a short time ago. A clock may have been set back since."""
    return bool(trial.status == "reserved" and abs(seconds_since(trial.heartbeat)) < PATIENCE)


def _requeue(client: Any, trial: Any, writer: Writer | None, *, named: bool) -> str:
    """Requeue one trial, unless it has a worker or a writer; the line that says so, and why."""
    from orion.storage.base import FailedUpdate

    from ppo_hpo.trial import failure

    was, line = trial.status, f"{trial.id}  {trial.status:8}  "
    if writer is not None:
        if named:
            raise UserError(
                f"Trial {trial.id} is being trained by {writer}. Stop that first, or wait for it."
            )
        return f"{line}skipped: it is being trained by {writer}"
    if not named and _was_seen(trial):
        seconds = seconds_since(trial.heartbeat)
        return (
            f"{line}skipped: its worker was seen {max(seconds, 0):.0f} s ago; if that worker is gone, try "
            f"again in {PATIENCE - seconds:.0f} s, or use --trial {trial.id[:8]}"
        )
    try:
        client.storage.set_trial_status(trial, "interrupted", was=was)
    except FailedUpdate:
        return f"{line}skipped: its status has just changed"
    record = failure.read_record(Path(trial.working_dir))
    if record and record.error and was == "broken":
        line += f"{record.error[:_ERROR_CHARACTERS]} ({record.at})  "
    return f"{line}requeued"


def seconds_since(moment: datetime.datetime | None) -> float:
    """Seconds since a moment in UTC without a time zone, as Orion stores it; infinity for None."""
    return float("inf") if moment is None else (utc_now() - moment).total_seconds()


def _release_lock(client: Any, *, asked: bool) -> list[str]:
    """Release the algorithm's lock if its holder has ended, or if the user asked and it cannot be seen.

    Orion's own calls cannot do this: they neither say who holds the lock, nor release it only if its holder
    is still the same. This returns what was done.
    """
    held = algorithm_lock.read(client.storage._db, client.id)
    if held is None or held.holder_runs or (held.holder_runs is None and not asked):
        return []
    text = f"The algorithm has been {held}"
    if held.holder_runs is None and abs(held.seconds) < PATIENCE:
        return [
            f"{text}, for {max(held.seconds, 0):.0f} s: skipped; if it stays locked, try again in "
            f"{PATIENCE - held.seconds:.0f} s"
        ]
    if not algorithm_lock.release(client.storage._db, client.id, held):
        return [f"{text}: skipped, because another process has just taken or released it"]
    why = "longer than any worker needs it" if held.holder_runs is None else "which has ended"
    return [f"{text}, {why}: released"]


def _repair_algorithm(client: Any, waiting: Waiting) -> list[str]:
    """Tell the algorithm the results that it does not know."""
    from orion.storage.base import LockAcquisitionTimeout

    lines = []
    try:
        # Workers that are alive hold the lock for a moment only.
        with client._experiment.acquire_algorithm_lock(timeout=_LOCK_SECONDS) as algorithm:
            for trial in client.fetch_trials_by_status("completed"):
                if not algorithm.has_observed(trial):
                    algorithm.observe([trial])
                    lines.append(f"{trial.id}  completed  the algorithm did not know its result: repaired")
    except LockAcquisitionTimeout:
        if (held := algorithm_lock.read(client.storage._db, client.id)) is not None:
            waiting(f"The algorithm has been {held}. {what_to_do(client, held)}")
    return lines


def what_to_do(client: Any, held: algorithm_lock.AlgorithmLock) -> str:
    """What the user can do about a lock that is held for long."""
    if held.holder_runs:
        return "That process still runs: wait for it, or stop it."
    return (
        f"That process cannot be seen from here. If it has ended, `ppo-hpo retry {client.name}` releases the "
        f"lock."
    )

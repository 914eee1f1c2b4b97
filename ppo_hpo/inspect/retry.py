"""Put failed and stuck trials of an experiment back, so that the next worker goes on with them.

A trial is put back by giving it the status `interrupted`: it keeps its id and its directory, and with
that its checkpoint. A broken trial waits for nothing else. A reserved one may have a worker that lives, so
that two things are looked at:

- the trial's own lock, which tells on any machine whether a process trains it (`lock.active_writer`);
- Orion's heartbeat, which a worker renews each minute: younger than two, its worker lives, and would fail
  when it finds its trial taken. Only who names the trial takes it all the same.

A worker that is killed while it holds the lock of the experiment's algorithm leaves it locked, and all
others wait. Nothing says who holds it, only since when. They wait for a minute at a time, so that one who has
held it for `PATIENCE` is gone, or as good as gone. One that is killed after it stored a result and before it
told the algorithm leaves ASHA and Hyperband waiting for it for ever: results that were not told are told.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_hpo.orion.experiment import open_experiment
from ppo_hpo.spec.errors import UserError

#: Statuses that a trial can be stuck in.
STUCK = ("broken", "reserved")
#: Seconds, two of Orion's heartbeats, and twice what Orion's workers wait for the algorithm's lock.
PATIENCE = 120.0
_MOMENT = 10.0
# Characters of the reason why a trial was broken; the rest is in its directory.
_SHOWN = 200


def retry(
    name: str, config: str | None = None, *, trial: str | None = None, status: str | None = None
) -> str:
    """Put trials back, release a lock that nobody holds any more, and say what was done.

    Args:
        name: the experiment's name.
        config: Orion's configuration file of the hunt, for its storage.
        trial: only this one, by its id or the beginning of it; even if its worker was seen lately.
        status: only those of this status, ``broken`` or ``reserved``.

    Raises:
        UserError: there is no such experiment or trial, or the one that was named is not stuck, or is being
            trained.
    """
    client = open_experiment(name, config, mode="w")
    found = _chosen(client.fetch_trials(), name, trial, status)
    lines = [_put_back(client, one, named=trial is not None) for one in found]
    done = sum(line.endswith("put back") for line in lines)
    lines += _mend_algorithm(client)
    what = f"{status} " if status else "broken or reserved "
    lines.append(f"{done} of {len(found)} {what}trial{'' if len(found) == 1 else 's'} put back")
    if done:
        lines.append("the next worker goes on with them: give the same orion hunt command again")
    return "\n".join(lines)


def mend(client: Any) -> list[str]:
    """Put back what a killed worker left reserved, as `retry` does, and say what was done."""
    stuck = client.fetch_trials_by_status("reserved")
    return [_put_back(client, one, named=False) for one in stuck] + _mend_algorithm(client)


def _chosen(trials: Sequence[Any], name: str, trial: str | None, status: str | None) -> list[Any]:
    wanted = [t for t in trials if t.status in ((status,) if status else STUCK)]
    if trial is None:
        return wanted
    matches = [t for t in trials if trial and t.id.startswith(trial)]
    if len(matches) != 1:
        many = f"{len(matches)} trials" if matches else "no trial"
        raise UserError(
            f"Experiment {name!r} has {many} whose id begins with {trial!r}. What a trial prints begins with "
            f"its id, and `orion status -n {name} --all` lists all of them."
        )
    if matches[0] not in wanted:
        raise UserError(
            f"Trial {matches[0].id} is {matches[0].status}; only what is {status or ' or '.join(STUCK)} is "
            f"put back."
        )
    return matches


def _put_back(client: Any, trial: Any, *, named: bool) -> str:
    """Put one trial back, or not; say so, and why."""
    from orion.storage.base import FailedUpdate

    from ppo_hpo.state import lock
    from ppo_hpo.trial import failure

    was, line = trial.status, f"{trial.id}  {trial.status:8}  "
    directory = Path(trial.working_dir)
    if holder := lock.active_writer(directory):
        text = f"is being trained by {holder}"
        if named:
            raise UserError(f"Trial {trial.id} {text}. End that first, or wait for it.")
        return f"{line}{text}: left alone"
    if was == "reserved" and not named and (seconds := seconds_since(trial.heartbeat)) < PATIENCE:
        return (
            f"{line}has a worker, seen {max(seconds, 0):.0f} s ago: left alone; if that one is gone, try "
            f"again in {PATIENCE - seconds:.0f} s, or take it with --trial {trial.id[:8]}"
        )
    try:
        client.storage.set_trial_status(trial, "interrupted", was=was)
    except FailedUpdate:
        return f"{line}was changed by somebody else just now: left alone"
    record = failure.read_record(directory)
    why = f"{record.error[:_SHOWN]} ({record.at})  " if record and record.error and was == "broken" else ""
    return f"{line}{why}put back"


def seconds_since(moment: datetime.datetime | None) -> float:
    """Seconds since a moment, by this machine's clock; Orion keeps UTC without saying so."""
    if moment is None:
        return float("inf")
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    return (now - moment).total_seconds()


def _mend_algorithm(client: Any) -> list[str]:
    """Release the algorithm's lock where its holder is gone, and tell it what nobody did; say what was."""
    # Orion's own calls neither tell since when it is held nor release it only if that is so still.
    database = client.storage._db
    query, lines = {"experiment": client.id, "locked": 1}, []
    text = ""
    if held := database.read("algo", query):
        since = held[0]["heartbeat"]
        seconds = seconds_since(since)
        text = f"the algorithm's lock is held since {since:%Y-%m-%d %H:%M:%S} UTC"
        if seconds >= PATIENCE:
            now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
            data = {"locked": 0, "heartbeat": now}
            if database.read_and_write("algo", query={**query, "heartbeat": since}, data=data) is None:
                return [f"{text}, and was taken or released just now: left alone"]
            lines.append(f"{text}, longer than anybody needs it: released")
        else:
            text += (
                f", {max(seconds, 0):.0f} s: left alone; if that stays so, try again in "
                f"{PATIENCE - seconds:.0f} s"
            )
    from orion.storage.base import LockAcquisitionTimeout

    try:
        # Workers that live pass it on in a moment.
        with client._experiment.acquire_algorithm_lock(timeout=_MOMENT) as algorithm:
            for trial in client.fetch_trials_by_status("completed"):
                if not algorithm.has_observed(trial):
                    algorithm.observe([trial])
                    lines.append(f"{trial.id}  completed  the algorithm had not been told its result: told")
    except LockAcquisitionTimeout:
        lines.append(text or "the algorithm's lock is taken: give this command again if nothing goes on")
    return lines

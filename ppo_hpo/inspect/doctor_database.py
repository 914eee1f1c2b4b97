"""Checks a database of Orion's: broken trials, stuck trials, and locks that a killed worker left."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.inspect.retry import PATIENCE, seconds_since
from ppo_hpo.orion.experiment import find_database

if TYPE_CHECKING:
    from ppo_hpo.inspect.doctor_report import Report


def check(report: Report, config: str | None) -> None:
    """Check every experiment of a database. Nothing in it is changed.

    Args:
        report: where to add what was found.
        config: Orion's configuration file; None uses the environment, or Orion's default.

    Raises:
        UserError: the configuration file cannot be read, or the database does not exist.
    """
    database = find_database(config)
    if database.storage is None and not database.settings.get("host"):
        report.add_fact("database", "none: name one with -c FILE, or ORION_DB_TYPE and ORION_DB_ADDRESS")
        return
    storage = database.open()
    experiments = storage.fetch_experiments({})
    report.add_fact("database", f"{database}: {len(experiments)} experiment(s)")
    newest: dict[str, int] = {}
    for experiment in experiments:
        newest[experiment["name"]] = max(experiment["version"], newest.get(experiment["name"], 0))
    for document in experiments:
        name, version = document["name"], document["version"]
        experiment = _Experiment(document["_id"], name, version, version == newest[name], config)
        try:
            _check_trials(report, storage, experiment)
            _check_lock(report, storage, experiment)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            report.add_finding(f"Experiment {name!r} could not be checked ({text}).")


@dataclass(frozen=True)
class _Experiment:
    uid: Any
    name: str
    version: int
    is_newest: bool
    config: str | None

    def __str__(self) -> str:
        return f"{self.name}-v{self.version}"

    @property
    def retry(self) -> str:
        """The command that requeues trials. It works on the newest version of an experiment only."""
        option = "" if self.config is None else f" -c {shlex.quote(self.config)}"
        return f"`ppo-hpo retry {shlex.quote(self.name)}{option}`"

    def requeue(self, status: str) -> str:
        """The command that requeues trials of this status."""
        if self.is_newest:
            return self.retry
        return f"`orion db set -f {self.orion_options} status={status} status=interrupted`"

    @property
    def orion_options(self) -> str:
        """What names the experiment in a command of Orion's."""
        return shlex.quote(self.name) + ("" if self.is_newest else f" -v {self.version}")


def _check_trials(report: Report, storage: Any, experiment: _Experiment) -> None:
    from ppo_hpo.state import lock

    trials = storage.fetch_trials(uid=experiment.uid)
    statuses = Counter(trial.status for trial in trials)
    text = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())) or "no trials"
    report.add_fact("", f"{experiment}: {text}")
    if statuses["broken"]:
        does = "prints why and requeues them" if experiment.is_newest else "requeues them"
        command = experiment.requeue("broken")
        report.add_finding(f"{experiment} has {statuses['broken']} broken trial(s): {command} {does}.")
    stuck = [
        trial.id[:8]
        for trial in trials
        if trial.status == "reserved"
        and seconds_since(trial.heartbeat) >= PATIENCE
        and not (trial.exp_working_dir and lock.active_writer(Path(trial.working_dir)))
    ]
    if stuck:
        report.add_finding(
            f"{experiment} has {len(stuck)} reserved trial(s) that no worker trains any more "
            f"({', '.join(stuck)}): {experiment.requeue('reserved')} requeues them."
        )


def _check_lock(report: Report, storage: Any, experiment: _Experiment) -> None:
    for held in storage._db.read("algo", {"experiment": experiment.uid, "locked": 1}):
        seconds = seconds_since(held["heartbeat"])
        report.add_fact("", f"{experiment}: its algorithm has been locked for {seconds:,.0f} s")
        if seconds < PATIENCE:
            continue
        release = f"`orion db release -f {experiment.orion_options}`"
        commands = f"{experiment.retry} or {release}" if experiment.is_newest else release
        report.add_finding(
            f"The algorithm of {experiment} is still locked by a worker that is gone: {commands} releases it."
        )

"""Trains a list of trials on the processes of `ppo_hpo.orion.workers`, and skips those that are done.

With ``fresh_episodes`` each policy is then tested on so many episodes that no trial is evaluated on.

Each trial is an ordinary one in a directory of its own, so it resumes when the same list is run again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError
from ppo_hpo.state.files import read_bytes
from ppo_hpo.sweeps.progress import BatchProgress
from ppo_hpo.trial import fresh_test
from ppo_hpo.trial.options import RETRIES, RunOptions

_MOST_RESULTS = 1 << 20  # bytes, far above what results take
_DEATHS = 2  # how often a worker that was killed, as for lack of memory, is replaced for one trial
_KEPT = "Finished trials are kept. Rerun the command to resume."


@dataclass(frozen=True)
class Job:
    """One trial of the list. Its label is printed."""

    label: str
    config: TrialConfig
    directory: Path


@dataclass(frozen=True)
class Result:
    """The result of a trial."""

    # mean return of the fresh episodes, or of the last evaluation if there are none; if the trial diverged,
    # that of its worst evaluation
    score: float
    statistics: Mapping[str, float]  # of its result file
    read: bool = False  # whether the result was there already


def run_all(
    jobs: Sequence[Job], *, n_workers: int = 2, device: str = "auto", progress: BatchProgress | None = None,
    fresh_episodes: int = 0,
) -> list[Result]:  # fmt: skip
    """Train trials, as many at a time as there are workers. Results come in the order of the jobs.

    Jobs with the same directory must be the same trial, which is trained once. If a trial fails, or its
    worker is killed again and again, the others stop at once. The same call resumes all of them.
    """
    if n_workers < 1:
        raise UserError(f"`n_workers >= 1` must hold, but got {n_workers}.")
    progress = progress or BatchProgress(None, jobs)
    results: dict[Path, Result] = {}
    waiting = []
    for job in {job.directory: job for job in jobs}.values():
        if (found := result_of(job, fresh_episodes)) is None:
            waiting.append(job)
        else:
            results[job.directory] = found
            progress.ended(job, found)
    if waiting:
        # A store is for machines that share no file system, but these trials are all trained here.
        options = RunOptions(device, checkpoint_store="", retries=RETRIES, fresh_episodes=fresh_episodes)
        for job, found in _trained(waiting, min(n_workers, len(waiting)), options, progress):
            results[job.directory] = found
            progress.ended(job, found)
    return [results[job.directory] for job in jobs]


def _trained(
    jobs: Sequence[Job], n_workers: int, options: RunOptions, progress: BatchProgress
) -> Iterator[tuple[Job, Result]]:
    """Yield the jobs with their results, as they end."""
    from ppo_hpo.orion.workers import WorkerDied, Workers

    waiting = list(reversed(jobs))
    running: dict[Any, Job] = {}
    with Workers(n_workers, retries=_DEATHS) as workers:
        while waiting or running:
            try:
                while waiting and len(running) < n_workers:
                    job = waiting.pop()
                    directory = str(job.directory.absolute())
                    running[workers.submit(_train, job.config.to_mapping(), directory, options)] = job
                ended = workers.async_get(list(running), timeout=1.0)
            except OSError as error:
                raise UserError(f"A worker process cannot be started: {error.strerror}. {_KEPT}") from None
            for one in ended:
                job = running.pop(one.future)
                try:
                    failed = one.future.get()
                except WorkerDied as error:
                    failed = str(error)
                found = None if failed else result_of(job, options.fresh_episodes)
                if found is None:
                    failed = (failed or "its result cannot be read").rstrip(".")
                    raise UserError(f"The trial in {job.directory} failed: {failed}. {_KEPT}")
                yield job, replace(found, read=False)
            progress.tick(list(running.values()))


def _train(mapping: Mapping[str, Any], directory: str, options: RunOptions) -> str:
    """Train a trial in a worker; return why it failed, or an empty text."""
    from ppo_hpo.trial import failure
    from ppo_hpo.trial.runner import run

    # What an environment prints must not get into the standard output of the command.
    os.dup2(2, 1)
    # The command itself may run under Orion, whose variables are not about this trial.
    for name in [name for name in os.environ if name.startswith("ORION_TRIAL")]:
        del os.environ[name]
    config = TrialConfig.from_mapping(mapping)
    try:
        run(config, Path(directory), options, console=False)
    except UserError as error:
        return str(error)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return failure.one_line(error)
    return ""


def result_of(job: Job, fresh_episodes: int = 0) -> Result | None:
    """The result of a job that is done; None if it is not, or if its directory belongs to another trial."""
    try:
        config = TrialConfig.from_mapping(yamlio.load(job.directory / "config.yaml"))
        content = json.loads(read_bytes(job.directory / "results.json", _MOST_RESULTS))
        values = {str(entry["name"]): float(entry["value"]) for entry in content}
        done = values["epochs"] == job.config.task.epochs or values["diverged"]
    except (UserError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if config.identity() != job.config.identity() or not done:
        return None
    score = -values.pop("objective")
    if fresh_episodes:
        test = fresh_test.read(job.directory, job.config, fresh_episodes)
        if test is None:
            return None
        score, values["diverged"] = test.score, float(not test.returns)
    return Result(score, values, read=True)

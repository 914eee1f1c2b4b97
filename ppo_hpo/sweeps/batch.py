"""Many trials in one go, on a few worker processes; what was done before is not done again.

Each trial is an ordinary one, in a directory of its own: killed with all of its workers, it goes on from its
last checkpoint when the same list is asked for again, and one that has its result is only read. The
processes are those of `ppo_hpo.orion.workers`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from ppo_hpo.trial.options import RunOptions

# Far above what results and ten thousand epochs take.
_MOST_RESULTS, _MOST_CURVE = 1 << 20, 16 << 20
# A worker that was killed, as for lack of memory, is replaced so often for one trial.
_DEATHS = 2
# Empties the line that a terminal is in.
_ERASE = "\r\x1b[K"


@dataclass(frozen=True)
class Job:
    """One trial of the list.

    Attributes:
        label: what to call it.
        config: the trial.
        directory: of its state.
    """

    label: str
    config: TrialConfig
    directory: Path


@dataclass(frozen=True)
class Result:
    """What a trial came to.

    Attributes:
        score: the negative objective: the mean return of its last evaluation, or of its worst if it diverged.
        statistics: as in its result file.
        read: whether it was there already.
    """

    score: float
    statistics: Mapping[str, float]
    read: bool = False


#: Told of a trial that ended, and how many of how many have.
Listener = Callable[[Job, Result, int, int], None]


def run_all(
    jobs: Sequence[Job],
    *,
    workers: int = 2,
    device: str = "auto",
    on_end: Listener = lambda job, result, ended, of: None,
    on_look: Callable[[Sequence[Job]], None] = lambda under_way: None,
) -> list[Result]:
    """Run trials, as many at a time as there are workers.

    Args:
        jobs: the trials; those that name the same directory have to be the same, and are run once.
        workers: processes.
        device: of all of them.
        on_end: see `Listener`.
        on_look: told about once a second which trials are under way.

    Returns:
        The results, in the order of the jobs.

    Raises:
        UserError: a trial failed, or its worker died again and again. The others stop at once; the same call
            goes on with all of them.
    """
    if workers < 1:
        raise UserError(f"`workers >= 1` must hold, but got {workers}.")
    unique = {job.directory: job for job in jobs}
    results: dict[Path, Result] = {}
    for job in unique.values():
        found = result_of(job)
        if found is not None:
            results[job.directory] = found
            on_end(job, found, len(results), len(unique))
    waiting = [job for job in unique.values() if job.directory not in results]
    if waiting:
        for job, found in _trained(waiting, min(workers, len(waiting)), device, on_look):
            results[job.directory] = found
            on_end(job, found, len(results), len(unique))
    return [results[job.directory] for job in jobs]


def _trained(
    jobs: Sequence[Job], workers: int, device: str, on_look: Callable[[Sequence[Job]], None]
) -> Iterator[tuple[Job, Result]]:
    """The trials with their results, as they end."""
    from ppo_hpo.orion.workers import WorkerDied, Workers
    from ppo_hpo.trial.options import RETRIES, RunOptions

    kept = "What is finished is kept; the same command goes on."
    # A store is for machines that share no file system, but these trials are all trained here.
    options = RunOptions(device, checkpoint_store="", retries=RETRIES)
    waiting = list(reversed(jobs))
    under_way: dict[Any, Job] = {}
    with Workers(workers, retries=_DEATHS) as crew:
        while waiting or under_way:
            try:
                while waiting and len(under_way) < workers:
                    job = waiting.pop()
                    directory = str(job.directory.absolute())
                    under_way[crew.submit(_train, job.config.to_mapping(), directory, options)] = job
                ended = crew.async_get(list(under_way), timeout=1.0)
            except OSError as error:
                raise UserError(f"A worker process cannot be started: {error.strerror}. {kept}") from None
            for one in ended:
                job = under_way.pop(one.future)
                try:
                    answer = one.future.get()
                except WorkerDied as error:
                    answer = {"failed": str(error)}
                if "failed" in answer:
                    failure = answer["failed"].rstrip(".")
                    raise UserError(f"The trial in {job.directory} failed: {failure}. {kept}")
                yield job, Result(-answer["objective"], answer["statistics"])
            on_look(list(under_way.values()))


def _train(mapping: Mapping[str, Any], directory: str, options: RunOptions) -> dict[str, Any]:
    """What a worker does with a trial; what went wrong with it, in words."""
    from ppo_hpo.trial import failure
    from ppo_hpo.trial.runner import run

    # What an environment prints must not come between what the leader tells.
    os.dup2(2, 1)
    # What Orion says of a trial of its own is not said of these.
    for name in [name for name in os.environ if name.startswith("ORION_TRIAL")]:
        del os.environ[name]
    config = TrialConfig.from_mapping(mapping)
    try:
        outcome = run(config, Path(directory), options, console=False)
    except UserError as error:
        return {"failed": str(error)}
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return {"failed": failure.one_line(error)}
    return {"objective": outcome.objective, "statistics": dict(outcome.statistics)}


def result_of(job: Job) -> Result | None:
    """The result of a trial that is done; None where it is not, or has another trial's directory."""
    from ppo_hpo.state.files import read_bytes

    try:
        config = TrialConfig.from_mapping(yamlio.load(job.directory / "config.yaml"))
        content = json.loads(read_bytes(job.directory / "results.json", _MOST_RESULTS))
        values = {str(entry["name"]): float(entry["value"]) for entry in content}
        done = values["epochs"] == job.config.task.epochs or values["diverged"]
    except (UserError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if config.identity() != job.config.identity() or not done:
        return None
    return Result(-values.pop("objective"), values, read=True)


def epochs_of(job: Job) -> int:
    """Epochs that a trial under way has behind it."""
    from ppo_hpo.state.files import read_bytes

    try:
        curve = read_bytes(job.directory / "curve.jsonl", _MOST_CURVE)
    except CheckpointError:
        return 0
    return max(0, min(curve.count(b"\n") - 1, job.config.task.epochs))


class Progress:
    """A line for each trial that ends; on a terminal, one more that says where the others are."""

    def __init__(self, out: TextIO | None, jobs: Sequence[Job]) -> None:
        """Tell ``out``, unless it is None, of these trials; `ended` and `look` are for `run_all`."""
        self._out = out
        self._lively = out is not None and out.isatty()
        self._began = time.monotonic()
        self._epochs = {job.directory: job.config.task.epochs for job in jobs}
        self._ended: set[Path] = set()
        self._read = self._epochs_read = 0

    def ended(self, job: Job, result: Result, number: int, of: int) -> None:
        """Take in a trial that ended."""
        self._ended.add(job.directory)
        if result.read:
            self._read += 1
            self._epochs_read += self._epochs[job.directory]
            return
        self._tell_read()
        how = "  diverged" if result.statistics["diverged"] else ""
        self._line(
            f"{time.monotonic() - self._began:7.0f} s  {number:4} of {of}  {job.label:28}  "
            f"return {result.score:8.1f}{how}"
        )

    def look(self, under_way: Sequence[Job]) -> None:
        """Say where the trials are that are under way."""
        self._tell_read()
        if self._out is None or not self._lively:
            return
        now = [(job.label, epochs_of(job), job.config.task.epochs) for job in under_way]
        done = sum(self._epochs[place] for place in self._ended) + sum(epoch for _, epoch, _ in now)
        new, left = done - self._epochs_read, sum(self._epochs.values()) - done
        minutes = (time.monotonic() - self._began) / 60 / new * left if new > 0 else None
        text = "; ".join(f"{label}: epoch {epoch} of {of}" for label, epoch, of in now)[:150]
        rest = "" if minutes is None else f"; about {max(1, round(minutes))} min left"
        self._out.write(f"{_ERASE}{text}{rest}")
        self._out.flush()

    def close(self) -> None:
        """Leave the terminal's line empty."""
        self._tell_read()
        if self._out is not None and self._lively:
            self._out.write(_ERASE)
            self._out.flush()

    def _tell_read(self) -> None:
        if self._read:
            self._line(f"{self._read} of {len(self._epochs)} trials were done before")
            self._read = 0

    def _line(self, text: str) -> None:
        if self._out is not None:
            self._out.write((_ERASE if self._lively else "") + text + "\n")
            self._out.flush()

"""What is printed while trials run: a line for each trial that ends, and a status line."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ppo_hpo.orion.experiment import params_of, statistics_of
from ppo_hpo.spec.errors import hide_secrets
from ppo_hpo.spec.printing import encodable

if TYPE_CHECKING:
    from ppo_hpo.sweeps.batch import Job, Result

_TAIL = 4096  # bytes at the end of a curve's file that surely hold its last line, which has some hundred
_ERASE = "\r\033[K"


class _Display:
    """Prints lines, and a status line below them on a terminal. Without a stream, nothing."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream, self._began = stream, time.monotonic()
        self.terminal = stream is not None and stream.isatty()

    @property
    def elapsed(self) -> float:
        """Seconds since the display was made."""
        return time.monotonic() - self._began

    def line(self, text: str) -> None:
        self._write((_ERASE if self.terminal else "") + text + "\n")

    def timed_line(self, text: str) -> None:
        """Print a line that begins with the seconds since the display was made."""
        self.line(f"{self.elapsed:7.0f} s  {text}")

    def status(self, text: str) -> None:
        """Overwrite the status line of a terminal."""
        if self.terminal:
            self._write(f"{_ERASE}{text}")

    @property
    def columns(self) -> int:
        """How many characters a status line may have. Where it is no terminal, there is no limit."""
        return shutil.get_terminal_size().columns - 1 if self.terminal else 1 << 20

    def close(self) -> None:
        """Erase the status line."""
        if self.terminal:
            self._write(_ERASE)

    def _write(self, text: str) -> None:
        if self.stream is not None:
            self.stream.write(encodable(text, self.stream))
            self.stream.flush()


def fitted(head: str, running: Sequence[tuple[str, int, int]], columns: int) -> str:
    """A status line of ``head`` and the running trials: name, epoch and last epoch of each.

    If it is longer than ``columns``, the epochs are abbreviated, and then trials are only counted.
    """
    text = head + ", ".join(f"{name} (epoch {epoch} of {of})" for name, epoch, of in running)
    if len(text) <= columns:
        return text
    short = [f"{name} {epoch}/{of}" for name, epoch, of in running]
    for shown in range(len(short), 0, -1):
        more = f", {len(short) - shown} more" if shown < len(short) else ""
        text = head + ", ".join(short[:shown]) + more
        if len(text) <= columns:
            return text
    return head.rstrip(": ")[:columns]


class SweepProgress:
    """Counts the trials of a sweep as they start and end, and prints that.

    Of ``total`` trials, ``done`` were completed before. ``epochs`` are those of the highest fidelity.
    """

    def __init__(
        self, total: int, done: int, best: float | None, epochs: int, stream: TextIO | None = None
    ) -> None:
        self.total, self.done, self.best, self.epochs = total, done, best, epochs
        self.errors: list[str] = []
        self.speed_before = (
            0.0  # steps per second of earlier calls, shown until this one has trained an epoch
        )
        self._display = _Display(stream)
        self._done_before, self._steps, self._shown = done, 0.0, time.monotonic()
        self._running: dict[str, Any] = {}
        # Steps of each running trial when its curve was first seen. They were not trained here.
        self._steps_before: dict[str, float] = {}

    def started(self, trial: Any) -> None:
        """Note that a trial was given to a worker."""
        self._running[trial.id] = trial
        if steps := last_row(Path(trial.working_dir))[1]:
            self._steps_before[trial.id] = steps

    def ended(self, trial: Any, results: Any, error: Exception | None, traceback: str = "") -> None:
        """Note that a trial ended, with results or with an error."""
        self._running.pop(trial.id, None)
        self._steps_before.pop(trial.id, None)
        if error is not None:
            self._failed(trial, error, traceback)
            return
        values = {item["name"]: float(item["value"]) for item in results}
        self._steps += values.get("env_steps_here", 0.0)
        self.done += 1
        found = -values["objective"]
        self.best = found if self.best is None else max(self.best, found)
        epochs = f"{values.get('continued_from_epoch', 0):.0f} -> {values.get('epochs', 0):.0f}"
        self._line(
            f"trial {self.done:3}  {trial.id[:8]}  epoch {epochs}  return {found:8.1f}  "
            f"best {self.best:8.1f}{'  stopped' if values.get('stopped') else ''}"
        )

    def _failed(self, trial: Any, error: Exception, traceback: str) -> None:
        if getattr(error, "return_code", None) is not None:
            return  # an interruption
        text = hide_secrets(" ".join(f"{type(error).__name__}: {error}".split()))
        self.errors.append(f"trial {trial.id[:8]}: {text}; {trial.working_dir}")
        self._line(f"trial {trial.id[:8]}  broken: {text[:200]}")
        if traceback:
            self._display.line(hide_secrets(traceback.rstrip()))

    def tick(self) -> None:
        """Print the status line: each second on a terminal, else each half minute."""
        every, show = 30.0, self._display.timed_line
        if self._display.terminal:
            every, show = 1.0, self._display.status
        if self._display.stream is not None and time.monotonic() - self._shown >= every:
            self._shown = time.monotonic()
            show(self.text())

    def text(self) -> str:
        """The status line."""
        steps, running, elapsed = self._steps, [], self._display.elapsed
        for name, trial in self._running.items():
            epoch, of, now = self._position(trial)
            steps += now
            running.append((name[:8], epoch, of))
        parts = [f"{self.done}/{self.total} trials"]
        if self.errors:
            parts.append(f"{len(self.errors)} broken")
        if self.best is not None:
            parts.append(f"best {self.best:.1f}")
        speed = steps / max(elapsed, 1e-9)
        parts.append(f"{speed if steps else self.speed_before:,.0f} steps/s")
        here = self.done - self._done_before
        if here and self.total > self.done:
            parts.append(f"{duration(elapsed / here * (self.total - self.done))} left")
        parts.append(f"{len(running)} running" + (": " if running else ""))
        return fitted("  ".join(parts), running, self._display.columns)

    def _position(self, trial: Any) -> tuple[int, int, float]:
        """A running trial's epoch, its last epoch, and the steps that it took since it started here."""
        epoch, steps = last_row(Path(trial.working_dir))
        before = self._steps_before.setdefault(trial.id, steps)
        # Without a fidelity, the space fixes the epochs.
        return epoch, int(params_of(trial).get("task.epochs", self.epochs)), steps - before

    def close(self) -> None:
        """Erase the status line."""
        self._display.close()

    def _line(self, text: str) -> None:
        self._display.timed_line(text)
        if self._display.terminal:
            self._shown = 0.0


class BatchProgress:
    """Prints a line for each job that ends, and on a terminal a status line about the others.

    `batch.run_all` calls its methods. Without a stream it prints nothing.
    """

    def __init__(self, stream: TextIO | None, jobs: Sequence[Job], plan: str = "") -> None:
        self._display = _Display(stream)
        self._epochs = {job.directory: job.config.task.epochs for job in jobs}
        self._steps_per_epoch = {job.directory: job.config.task.steps_per_epoch for job in jobs}
        self._ended: set[Path] = set()
        self._found = 0
        # Epochs that each trial had when this began. They were not trained here.
        self._epochs_before = {job.directory: epochs_of(job) for job in jobs}
        if plan:
            self._display.line(plan)

    def ended(self, job: Job, result: Result) -> None:
        """Note that a job ended, or that its result was found."""
        self._ended.add(job.directory)
        if result.read:
            self._found += 1
            self._epochs_before[job.directory] = self._epochs[job.directory]
            return
        self._print_found()
        self._display.timed_line(
            f"{len(self._ended):4} of {len(self._epochs)}  {job.label:34}  return {result.score:8.1f}"
            f"{'  diverged' if result.statistics['diverged'] else ''}"
        )

    def tick(self, running: Sequence[Job]) -> None:
        """Print which epoch the running jobs have reached."""
        self._print_found()
        if not self._display.terminal:
            return
        now = {job.directory: epochs_of(job) for job in running}
        done = self._epochs_before | {place: self._epochs[place] for place in self._ended} | now
        new = left = 0
        for place, steps in self._steps_per_epoch.items():
            new += steps * (done[place] - self._epochs_before[place])
            left += steps * (self._epochs[place] - done[place])
        head = f"{len(self._ended)}/{len(self._epochs)} trials  "
        if new:
            speed = new / max(self._display.elapsed, 1e-9)
            head += f"{speed:,.0f} steps/s  {duration(left / speed)} left  "
        trials = [(job.label, now[job.directory], job.config.task.epochs) for job in running]
        self._display.status(fitted(head, trials, self._display.columns))

    def close(self) -> None:
        """Erase the status line."""
        self._print_found()
        self._display.close()

    def _print_found(self) -> None:
        if self._found:
            self._display.line(f"{self._found} of {len(self._epochs)} trials were done before")
            self._found = 0


def speed_of(trials: Sequence[Any]) -> float:
    """Environment steps per second of one worker, in trials that are completed; 0 if there are none."""
    each = [statistics_of(trial) for trial in trials]
    seconds = sum(found.get("wall_seconds", 0.0) for found in each)
    return sum(found.get("env_steps_here", 0.0) for found in each) / seconds if seconds else 0.0


def epochs_of(job: Job) -> int:
    """How many epochs a running job has trained."""
    return min(last_row(job.directory)[0], job.config.task.epochs)


def last_row(directory: Path) -> tuple[int, float]:
    """Epoch and steps of the last line of a trial's curve; zeros if it cannot be read from this machine."""
    try:
        # Opened so, a pipe of that name has no end to seek to, instead of being waited for.
        opened = os.open(directory / "curve.jsonl", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(opened, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            row = json.loads(file.read().splitlines()[-1])
        return int(row["epoch"]), float(row["env_steps"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0, 0.0


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"

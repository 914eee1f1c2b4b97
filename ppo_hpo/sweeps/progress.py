"""What a sweep prints while it runs: a line for each trial that ends, and one that tells how far it is.

On a terminal that line is written over itself each second; elsewhere it comes now and then, and at the end.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

# Seconds between two looks, on a terminal and elsewhere.
_TERMINAL, _ELSEWHERE = 1.0, 30.0
# A line of a curve is some hundred bytes.
_TAIL = 4096


class Progress:
    """Keeps count of a sweep, and prints it.

    Args:
        total: trials to be completed.
        done: trials that were completed before.
        best: the best return so far, None where there is none.
        epochs: of the highest fidelity.
        stream: where to print; None keeps quiet.
    """

    def __init__(
        self, total: int, done: int, best: float | None, epochs: int, stream: TextIO | None = None
    ) -> None:
        self.total, self.done, self.best, self.epochs, self.stream = total, done, best, epochs, stream
        self.failed = 0
        self.errors: list[str] = []
        self._terminal = stream is not None and stream.isatty()
        self._every = _TERMINAL if self._terminal else _ELSEWHERE
        self._began, self._done_before, self._steps = time.monotonic(), done, 0.0
        self._shown = self._began
        self._running: dict[str, Any] = {}
        # Of each running trial epoch and steps when it was first seen: those were not trained here.
        self._at: dict[str, tuple[int, float] | None] = {}

    def started(self, trial: Any) -> None:
        """A trial was given to a worker."""
        self._running[trial.id] = trial
        seen = last_row(Path(trial.working_dir))
        self._at[trial.id] = seen if seen[1] else None

    def ended(self, trial: Any, results: Any, error: Exception | None, traceback: str = "") -> None:
        """A trial ended, with results or an error."""
        self._running.pop(trial.id, None)
        self._at.pop(trial.id, None)
        if error is not None:
            self._failed(trial, error, traceback)
            return
        values = {item["name"]: float(item["value"]) for item in results}
        self._steps += values.get("env_steps_here", 0.0)
        self.done += 1
        found = -values["objective"]
        self.best = found if self.best is None else max(self.best, found)
        epochs = f"{values.get('continued_from_epoch', 0):.0f} -> {values.get('epochs', 0):.0f}"
        how = "  stopped" if values.get("stopped") else ""
        self._line(
            f"{self._clock()}  trial {self.done:3}  {trial.id[:8]}  epoch {epochs}  return {found:8.1f}  "
            f"best {self.best:8.1f}{how}"
        )

    def _failed(self, trial: Any, error: Exception, traceback: str) -> None:
        if getattr(error, "return_code", None) is not None:
            return  # an interruption
        self.failed += 1
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self.errors.append(f"trial {trial.id[:8]}: {text}; {trial.working_dir}")
        self._line(f"{self._clock()}  trial {trial.id[:8]}  broken: {text[:200]}")
        if traceback and self.stream is not None:
            self._line(traceback.rstrip())

    def tick(self) -> None:
        """Print how far it is, if it is time."""
        if self.stream is None or time.monotonic() - self._shown < self._every:
            return
        self._shown = time.monotonic()
        text = self.text()
        if self._terminal:
            width = shutil.get_terminal_size().columns
            self._write(f"\r\033[K{text[: width - 1]}")
        else:
            self._write(f"{self._clock()}  {text}\n")

    def text(self) -> str:
        """How far it is, in one line."""
        steps = self._steps
        running = []
        for name, trial in self._running.items():
            epoch, of, now = self._look(trial)
            steps += now
            running.append(f"{name[:4]} {epoch}/{of}")
        elapsed = time.monotonic() - self._began
        parts = [f"{self.done}/{self.total} trials"]
        if self.failed:
            parts.append(f"{self.failed} broken")
        parts.append(f"{len(running)} running" + (f" (epoch {', '.join(running)})" if running else ""))
        if self.best is not None:
            parts.append(f"best {self.best:.1f}")
        parts.append(f"{steps / max(elapsed, 1e-9):,.0f} steps/s")
        here = self.done - self._done_before
        if here and self.total > self.done:
            parts.append(f"{duration(elapsed / here * (self.total - self.done))} left")
        return "  ".join(parts)

    def _look(self, trial: Any) -> tuple[int, int, float]:
        """A running trial's epoch, the one it is to reach, and the steps it took since it began here."""
        epoch, steps = last_row(Path(trial.working_dir))
        if self._at[trial.id] is None:
            self._at[trial.id] = (epoch, steps)
        return epoch, epochs_of(trial) or self.epochs, steps - (self._at[trial.id] or (0, 0.0))[1]

    def close(self) -> None:
        """Leave the terminal's line."""
        if self._terminal:
            self._write("\r\033[K")

    def _clock(self) -> str:
        return f"{time.monotonic() - self._began:7.0f} s"

    def _line(self, text: str) -> None:
        self._write(("\r\033[K" if self._terminal else "") + text + "\n")
        if self._terminal:
            self._shown = 0.0

    def _write(self, text: str) -> None:
        if self.stream is not None:
            self.stream.write(text)
            self.stream.flush()


def epochs_of(trial: Any) -> int:
    """The epochs that a trial of Orion's is to reach; 0 where that is fixed."""
    from ppo_hpo.orion.experiment import params_of

    return int(params_of(trial).get("task.epochs", 0))


def last_row(directory: Path) -> tuple[int, float]:
    """Epoch and steps of the last line of a trial's curve; zeros where none can be read from here."""
    try:
        with (directory / "curve.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            row = json.loads(file.read().splitlines()[-1])
        return int(row["epoch"]), float(row["env_steps"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0, 0.0


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def default_stream() -> TextIO:
    """Where progress goes: standard output is for what a program says in the end."""
    return sys.stderr

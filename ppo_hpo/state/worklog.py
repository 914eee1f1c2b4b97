"""The work log: what each process has spent on a trial, in ``work.jsonl`` in the trial's directory.

Orion learns the cost of a trial only from the process that completes it. Processes that failed, were
interrupted or were killed would be forgotten. So each process appends a line when it begins a trial, after
each epoch, and when it ends. All numbers of a line count from the process's begin, so its last line says
everything. A killed process only misses the epoch that it did not finish.

Lines are appended in place, without the atomic rename of other files. They survive the process. A power cut
or a full disk can lose some lines of this log, but no result.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ppo_hpo.state.files import append_line, read_json_lines

FILE = "work.jsonl"
_MAX_BYTES, _MAX_LINE, _LARGEST = 64 << 20, 4 << 10, 1e15

State = Literal["began", "epoch", "failed", "done"]


@dataclass(frozen=True)
class Line:
    """What one process has spent on one seed of a trial so far. Repeated steps count again."""

    # Orion's id; empty outside of Orion. Orion copies a parent's directory to its children, so one file may
    # hold the lines of several trials.
    trial: str
    process: str  # by host, pid and time
    part: str  # the seed's directory; empty if the trial has one seed
    state: State  # `began` or `epoch` while the process runs, and for one that was killed; else how it ended
    began: int  # number of epochs that the trial had when the process began
    epoch: int  # number of epochs that it has now
    epoch_steps: int  # environment steps of one epoch
    steps: int  # taken in training
    eval_steps: int  # taken in evaluations
    wall_seconds: float  # since the process began the trial
    cpu_seconds: float  # of the process, or of its thread


def append(directory: Path, line: Line, log: logging.Logger) -> None:
    """Append a line to the work log of a trial."""
    append_line(directory / FILE, json.dumps(asdict(line)), log)


def read(directory: Path, trial: str) -> list[Line]:
    """The last line of each process and seed of one trial. Invalid lines and other trials' are left out."""
    last: dict[tuple[str, str], Line] = {}
    for row in read_json_lines(directory / FILE, _MAX_BYTES, _MAX_LINE):
        line = _line(row)
        if line is not None and line.trial == trial:
            last[line.process, line.part] = line
    return list(last.values())


def wasted_steps(lines: Sequence[Line]) -> int:
    """Training steps that are in no epoch of the trial: steps done twice, or in epochs that did not end."""
    total = 0
    for part in {line.part for line in lines}:
        own = [line for line in lines if line.part == part]
        kept = max(line.epoch for line in own) - min(line.began for line in own)
        total += sum(line.steps for line in own) - kept * own[-1].epoch_steps
    return max(total, 0)


def _line(row: Any) -> Line | None:
    if not isinstance(row, dict) or row.keys() != Line.__dataclass_fields__.keys():
        return None
    for name, field in Line.__dataclass_fields__.items():
        value = row[name]
        if field.type in ("int", "float"):
            wanted: Any = int if field.type == "int" else (int, float)
            if type(value) is bool or not isinstance(value, wanted) or not 0 <= value <= _LARGEST:
                return None
        elif not isinstance(value, str):
            return None
    return Line(**row)

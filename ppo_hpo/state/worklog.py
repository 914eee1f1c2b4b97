"""What each process has spent on a trial, written down as it goes: ``work.jsonl`` in the trial's directory.

Orion learns what a trial cost from the process that completes it, and nothing of those that failed, were
interrupted or killed before. Each of them appends a line when it comes to the trial, after each epoch, and
when it ends by itself. All numbers of a line are the process's since it began, so its last line says all; of
one that was killed the epoch under way is missing, and nothing else. Lines are appended, not renamed into
place: what is written survives the process, and a power cut costs some lines of a count, no result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ppo_hpo.spec.errors import CheckpointError

FILE = "work.jsonl"
_MAX_BYTES, _MAX_LINE, _LARGEST = 64 << 20, 4 << 10, 1e15

State = Literal["began", "epoch", "failed", "done"]


@dataclass(frozen=True)
class Line:
    """What one process has spent on one seed of a trial so far.

    Attributes:
        trial: Orion's id of the trial, empty by hand: Orion copies a parent's directory to its children.
        process: which process, by host, number and time.
        part: which seed, where there are several.
        state: ``began`` and ``epoch`` while it runs, also of one that was killed then; else how it ended.
        began: epochs that the trial had when the process came.
        epoch: epochs that it has now.
        epoch_steps: training steps of an epoch.
        steps: training steps taken, repeated ones included.
        eval_steps: steps taken in evaluations, repeated ones included.
        wall_seconds: since the process came.
        cpu_seconds: of the process, or of its thread.
    """

    trial: str
    process: str
    part: str
    state: State
    began: int
    epoch: int
    epoch_steps: int
    steps: int
    eval_steps: int
    wall_seconds: float
    cpu_seconds: float


def append(directory: Path, line: Line) -> None:
    """Write a line down.

    Raises:
        UserError: the file cannot be written.
    """
    from ppo_hpo.state.files import explain_write_errors

    path = directory / FILE
    with explain_write_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(line)) + "\n")


def read(directory: Path, trial: str) -> list[Line]:
    """The last line of each process and seed, of this trial alone; torn and foreign lines are left out."""
    # A report imports no numpy until it has something to count.
    from ppo_hpo.state.files import read_bytes

    try:
        content = read_bytes(directory / FILE, _MAX_BYTES)
    except CheckpointError:
        return []
    last: dict[tuple[str, str], Line] = {}
    for text in content.decode(errors="replace").splitlines():
        try:
            line = _line(json.loads(text[:_MAX_LINE]))
        except (ValueError, RecursionError):
            continue
        if line is not None and line.trial == trial:
            last[line.process, line.part] = line
    return list(last.values())


def wasted_steps(lines: Sequence[Line]) -> int:
    """Training steps of a trial that are in none of its epochs: done twice, or in epochs that did not end."""
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

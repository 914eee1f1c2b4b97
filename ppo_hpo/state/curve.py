"""Reading a trial's learning curve from its directory."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

from ppo_hpo.spec.results import is_row
from ppo_hpo.state.files import read_json_lines

# Bytes of a file of 20,000 epochs, twice the most that a trial can have, and of one line.
_MAX_BYTES, _MAX_LINE = 16 << 20, 16 << 10


def read_curve(directory: Path) -> list[dict[str, Any]]:
    """Read the rows of ``curve.jsonl``, up to the first invalid line; empty if there is no such file."""
    return list(takewhile(is_row, read_json_lines(directory / "curve.jsonl", _MAX_BYTES, _MAX_LINE)))

"""Reading a trial's learning curve from its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ppo_hpo.spec.errors import CheckpointError
from ppo_hpo.spec.results import is_row
from ppo_hpo.state.files import read_bytes

# Bytes of a file of 20,000 epochs, twice the most that a trial can have, and of one line.
_MAX_BYTES, _MAX_LINE = 16 << 20, 16 << 10


def read_curve(directory: Path) -> list[dict[str, Any]]:
    """Read the rows of ``curve.jsonl``, up to the first invalid line; empty if there is no such file."""
    rows: list[dict[str, Any]] = []
    try:
        content = read_bytes(directory / "curve.jsonl", _MAX_BYTES)
    except CheckpointError:
        return rows
    for line in content.decode(errors="replace").splitlines():
        try:
            row = json.loads(line[:_MAX_LINE])
        except (ValueError, RecursionError):
            break
        if not is_row(row):
            break
        rows.append(row)
    return rows

"""The space that Orion has stored for an experiment, and whether the experiment may still change it.

Trials of two spaces cannot be compared. So an experiment keeps its space from the moment that one of its
trials has trained an epoch. Before that, the space is whatever the user asks for last.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import GROUPS
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.rules import MARK
from ppo_hpo.spec.space import Space, space_of
from ppo_hpo.state import lock
from ppo_hpo.trial import failure

#: What an experiment that starts anew keeps of its stored configuration, unless it is given again.
KEPT = ("max_trials", "max_broken", "working_dir", "algorithm")
#: In Orion's record of a command, says that `ppo-hpo` read the file and that its options are applied.
READER = {"reader": "ppo_hpo"}
# A trial appends a line to this file after each epoch.
_TIMING = "timing.jsonl"
# A worker that reserved a trial makes the trial's lock within this many seconds.
_START = 60.0


def content_of(stored: Mapping[str, Any]) -> Any:
    """The content of the file that an experiment was made with; None if it was not made with one of ours."""
    parser = stored.get("metadata", {}).get("parser") or {}
    content = parser.get("config_file_data")
    if not isinstance(content, Mapping) or not content or not set(content) <= set(GROUPS):
        return None
    return content if parser.get("reader") == READER["reader"] else _as_we_read(content)


def stored_space(stored: Mapping[str, Any]) -> Space | None:
    """The space of an experiment; None if it has none, or one that is not valid any more."""
    content = content_of(stored)
    if content is None:
        return None
    try:
        return space_of(content, str(stored.get("name")), Path("the database"))
    except UserError:
        return None


def _as_we_read(content: Any) -> Any:
    """What Orion's YAML reader made of a file, which takes 1e-4 for a text."""
    if isinstance(content, Mapping):
        return {key: _as_we_read(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_as_we_read(value) for value in content]
    if isinstance(content, str) and not content.startswith(MARK):
        with contextlib.suppress(UserError):
            return yamlio.parse(content, "the database") if content.strip() else content
    return content


def what_has_begun(storage: Any, stored: Mapping[str, Any]) -> str | None:
    """Why the experiment must keep its space, in words; None if nothing was trained."""
    for trial in storage.fetch_trials(uid=stored["_id"]):
        if trial.status == "completed" or any(place.exists() for place in _files(trial, _TIMING)):
            return f"trial {trial.id[:8]} has trained"
        if trial.status == "reserved" and _runs(trial):
            return f"trial {trial.id[:8]} is running"
    return None


def _files(trial: Any, name: str) -> list[Path]:
    return [Path(trial.working_dir) / name] if trial.exp_working_dir else []


def _runs(trial: Any) -> bool:
    for path in _files(trial, "lock"):
        if path.exists():
            with lock.exclude_writers(path.parent) as free:
                return not free
    now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
    return trial.heartbeat is not None and (now - trial.heartbeat).total_seconds() < _START


def discard(storage: Any, stored: Mapping[str, Any]) -> None:
    """Remove the record of an experiment that has trained nothing, and what its trials began with."""
    from ppo_hpo.state.checkpoint import Storage  # which imports numpy

    for trial in storage.fetch_trials(uid=stored["_id"]):
        for directory in _files(trial, "."):
            # A trial of the same hyperparameters gets the same directory, even if fixed values differ.
            failure.remove_record(directory)
            for place in (directory, *directory.glob("seed-*")):
                for checkpoint in Storage(place).paths():
                    with contextlib.suppress(OSError):
                        checkpoint.unlink()
    storage.delete_trials(uid=stored["_id"])
    storage.delete_algorithm_lock(uid=stored["_id"])
    storage.delete_experiment(uid=stored["_id"])

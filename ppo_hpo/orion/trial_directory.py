"""The directory of a trial, which Orion makes before it runs the trial.

For a promotion or a fork Orion copies the directory of the parent. It copies in place, and takes a directory
that exists for a complete one. So a worker that is killed while it copies leaves a trial that starts from
nothing, or from an older checkpoint. Here the copy is made aside and then renamed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppo_hpo.orion import hunt


def make_or_stop(client: Any, trial: Any) -> None:
    """Make the directory of a trial of ours. If that fails, the hunt stops, and the trial has no fault.

    Orion would mark the trial broken, and so the next ones.
    """
    try:
        if not trial.exp_working_dir:
            trial.exp_working_dir = client.working_dir
        make(client, trial, without_parent=True)
        os.makedirs(trial.working_dir, exist_ok=True)
    except OSError as error:
        import orion.core
        from orion.core.worker.consumer import ExecutionError

        stop = ExecutionError(orion.core.config.worker.interrupt_signal_code)
        # `shutil.Error` has a list of files and reasons.
        reason = error.strerror or str(error.args[0][-1][-1] if isinstance(error, shutil.Error) else error)
        stop.reason = f"The directory {trial.working_dir} cannot be made: {reason.rstrip('.')}"
        hunt.report(stop.reason)
        raise stop from error


def make(client: Any, trial: Any, *, without_parent: bool) -> None:
    """Make a trial's directory, unless it exists or Orion makes it as it should.

    If the parent's directory is not on this machine, Orion fails. With ``without_parent`` the trial gets an
    empty directory instead. Then the store has its parent's checkpoint, or a promoted trial starts again. A
    fork must not start again, because it began as its parent. So its directory says that it is a fork.
    """
    if not trial.parent or os.path.exists(trial.working_dir):
        return
    directory, parent = Path(trial.working_dir), client.get_trial(uid=trial.parent)
    if parent is None:
        return  # Orion has a message for that.
    if os.path.isdir(parent.working_dir):
        _make_whole(directory, lambda aside: shutil.copytree(parent.working_dir, aside))
    elif without_parent and not _descends_from_fork(client, trial, parent):
        directory.mkdir(parents=True, exist_ok=True)
    elif without_parent:
        from ppo_hpo.trial.restore import note_fork

        _make_whole(directory, lambda aside: note_fork(aside, trial.parent))


def _descends_from_fork(client: Any, trial: Any, ancestor: Any) -> bool:
    """Whether a trial is a fork, or a promotion of one."""
    while ancestor is not None:
        if ancestor.hash_params != trial.hash_params:
            return True
        ancestor = client.get_trial(uid=ancestor.parent) if ancestor.parent else None
    return False


def _make_whole(target: Path, fill: Callable[[Path], Any]) -> None:
    """Let ``fill`` make a directory aside, and rename it."""
    aside = target.with_name(f".{target.name}.{secrets.token_hex(8)}.copy")
    try:
        fill(aside)
        os.rename(aside, target)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        # Another worker may have made the same directory, and removed what this one was copying.
        if not (isinstance(error, OSError) and target.is_dir()):
            raise
    # What killed workers left. A living one that is still copying finds the directory here.
    for left in target.parent.glob(f".{target.name}.*.copy"):
        with contextlib.suppress(OSError):
            shutil.rmtree(left)

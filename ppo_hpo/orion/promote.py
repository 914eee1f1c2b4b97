"""Promotions between machines that share no file system, by a plain `orion hunt`.

Before Orion runs a promoted or forked trial it copies the directory of its parent, and where that is on
another machine the whole hunt fails (`prepare_trial_working_dir` in orion/client/runner.py, 0.2.7;
tests/end_to_end/test_hosts.py shows it). From Python `client.prepare_trial` takes its place; a hunt can be
told of none.

`install` gives such a trial an empty directory instead, where the experiment's command is ours: `ppo-hpo run`
finds its beginning in the store, and without one starts again. ``PPO_HPO_FIXES=0`` turns it off.
"""

from __future__ import annotations

import functools
import os
from typing import Any

_OURS = ("ppo-hpo", "ppo_hpo")


def install() -> None:
    """Take the place of the function that Orion calls just before it copies."""
    from orion.core.utils import backward

    plain = backward.ensure_trial_working_dir

    @functools.wraps(plain)
    def ensure_trial_working_dir(experiment: Any, trial: Any) -> None:
        plain(experiment, trial)
        if trial.parent and _is_ours(experiment):
            make_room(experiment, trial)

    backward.ensure_trial_working_dir = ensure_trial_working_dir


def make_room(client: Any, trial: Any) -> None:
    """Make the directory of a trial whose parent's is not on this machine: Orion then copies nothing."""
    parent = client.get_trial(uid=trial.parent)
    if parent is not None and not os.path.isdir(parent.working_dir):
        os.makedirs(trial.working_dir, exist_ok=True)


def _is_ours(experiment: Any) -> bool:
    command = (experiment.metadata or {}).get("user_args") or []
    return any(os.path.basename(str(word)) in _OURS for word in command[:3])

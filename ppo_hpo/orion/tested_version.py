"""Decides for `speedups` and `fixes`, which replace functions of Orion, whether they may do so."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from importlib import metadata

#: The version of Orion that ppo_hpo was tested with.
TESTED_ORION = "0.2.7"

# Applying one kind of patches may import a module that installs another kind.
_lock = threading.RLock()
_installed: dict[tuple[str, str], bool] = {}


def install_once(variable: str, name: str, apply: Callable[[], None]) -> bool:
    """Apply patches to Orion, at most once in a process; whether they are in force.

    They are not if this is not the tested version of Orion, or if the environment variable is ``0``. Both
    arguments together identify the patches.
    """
    with _lock:
        if (variable, name) not in _installed:
            allowed = os.environ.get(variable, "1") != "0" and _is_tested_version(name)
            if allowed:
                apply()  # If it raises, the next call tries again.
            _installed[variable, name] = allowed
        return _installed[variable, name]


def _is_tested_version(name: str) -> bool:
    found = metadata.version("orion")
    if found != TESTED_ORION:
        logging.getLogger("ppo_hpo").warning(
            "%s are off: this is Orion %s, and ppo_hpo was tested with %s", name, found, TESTED_ORION
        )
    return found == TESTED_ORION

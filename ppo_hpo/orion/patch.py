"""The one place that decides whether this process may patch Orion.

`ppo_hpo.orion.speedups` and `ppo_hpo.orion.fixes` replace functions of Orion. They do so only in the version
of Orion that they were tested with, and only if the user did not turn them off.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from importlib import metadata

#: The version of Orion that ppo_hpo was tested with.
TESTED_ORION = "0.2.7"

_lock = threading.Lock()
_installed: dict[str, bool] = {}


def install_once(variable: str, name: str, apply: Callable[[], None]) -> bool:
    """Apply patches to Orion, at most once in a process.

    Args:
        variable: environment variable that turns the patches off when its value is ``0``. It also identifies
            them: a second call with the same variable only returns the first answer.
        name: what the patches are called in the log.
        apply: makes the patches. If it raises, the next call tries again.

    Returns:
        Whether the patches are in force. They are not if the user turned them off, or if this is not the
        tested version of Orion.
    """
    with _lock:
        if variable not in _installed:
            allowed = os.environ.get(variable, "1") != "0" and _is_tested_version(name)
            if allowed:
                apply()
            _installed[variable] = allowed
        return _installed[variable]


def _is_tested_version(name: str) -> bool:
    found = metadata.version("orion")
    if found != TESTED_ORION:
        logging.getLogger("ppo_hpo").warning(
            "%s are off: this is Orion %s, and ppo_hpo was tested with %s", name, found, TESTED_ORION
        )
    return found == TESTED_ORION

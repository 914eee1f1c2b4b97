"""What tests of several processes share: waiting for a condition, and what this user may do."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any


def wait_for(condition: Callable[[], Any], seconds: float, pause: float = 0.02) -> Any:
    """Call ``condition`` until its result is true, and return that. Fail after so many ``seconds``."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(pause)
    return found


def may_mount() -> bool:
    """Whether this user may mount a file system in a namespace of its own, as root may."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False

"""A file system without flock, for tests."""

from __future__ import annotations

import errno
import fcntl
import os


def without_flock() -> None:
    """Make flock fail as on a file system that does not have it."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = refuse

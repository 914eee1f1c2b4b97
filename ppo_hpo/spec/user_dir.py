"""A private directory of the user on this machine, for files that processes share while they run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence


def open_user_dir(variables: Sequence[str]) -> int:
    """Open the directory ``ppo-hpo-UID``, created if necessary, and return its file descriptor.

    Its parent is the first directory that one of these environment variables holds, or else ``/tmp``.
    `PermissionError` is raised if it belongs to another user, or if others may use it.
    """
    bases = [*(os.environ.get(name, "") for name in variables), "/tmp"]
    path = os.path.join(next(filter(os.path.isdir, bases), "/tmp"), f"ppo-hpo-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        os.close(descriptor)
        raise PermissionError(f"{path} must be your own and closed to others (mode 700)")
    return descriptor

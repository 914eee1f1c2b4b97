"""A directory of the user's own on this machine, for what processes tell each other while they run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence


def open_user_dir(variables: Sequence[str]) -> int:
    """Open ``ppo-hpo-UID``, made where it is missing; return its descriptor.

    Args:
        variables: of the environment; the first that names a directory says where, else it is in ``/tmp``.

    Raises:
        PermissionError: it is somebody else's, or open to others.
        OSError: it cannot be made.
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

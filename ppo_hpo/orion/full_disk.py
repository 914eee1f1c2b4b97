"""Orion's database on a full disk: wait for space for a moment, then fail with one sentence.

Orion ends at the first write that fails. What it was about to store is missing in its database, and running
trials stay reserved. Here a write is tried again for 15 seconds. Each write is a transaction, so it can be
repeated.

A database file that is removed while it is in use is an error. Orion's PickledDB would continue with an empty
one.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import time
from collections.abc import Callable
from typing import Any

_PAUSES = (1.0, 2.0, 4.0, 8.0)
_MAY_PASS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
_SQLITE_WORDS = ("disk is full", "disk I/O error")
_METHODS = ("ensure_index", "index_information", "write", "read", "read_and_write", "count", "remove")
_log = logging.getLogger("ppo_hpo")


def apply() -> None:
    """Patch Orion's database in one file, and ours."""
    from orion.core.io.database.pickleddb import PickledDB

    from ppo_hpo.orion.sqlitedb import SQLiteDB

    for database in (PickledDB, SQLiteDB):
        for name in _METHODS:
            setattr(database, name, _patient(getattr(database, name)))


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        from orion.core.io.database import DatabaseError

        for pause in (*_PAUSES, None):
            # Each object remembers it: the next one may be for a new database at the same path.
            if self.__dict__.get("_ppo_hpo_exists") and not os.path.exists(self.host):
                raise DatabaseError(f"{self.host} was removed while it is in use.")
            try:
                result = method(self, *args, **kwargs)
            except (OSError, DatabaseError) as error:
                if pause is None or not _may_pass(error):
                    if isinstance(error, DatabaseError):
                        raise
                    raise DatabaseError(f"{self.host}: {error.strerror or error}.") from error
                _log.warning("%s cannot be written: tries again in %g s", self.host, pause)
            else:
                self._ppo_hpo_exists = os.path.exists(self.host)
                return result
            time.sleep(pause)
        raise AssertionError("unreachable")

    return call


def _may_pass(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _MAY_PASS:
            return True
        if type(error).__module__ == "sqlite3" and any(words in str(error) for words in _SQLITE_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False

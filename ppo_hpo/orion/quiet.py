"""Hiding Orion's own warnings. Nearly all are about Orion's dependencies, and the user can do nothing."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings, and logs unless the program has set up logging.

    They are shown if the user asked for warnings, by PYTHONWARNINGS=default or by Python's option -W.
    """
    if any(not option.startswith("i") for option in sys.warnoptions):  # i for ignore
        yield
        return
    # Without any handler, the first log message would install one for the whole process.
    root, nothing = logging.getLogger(), logging.NullHandler()
    root.addHandler(nothing)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        root.removeHandler(nothing)

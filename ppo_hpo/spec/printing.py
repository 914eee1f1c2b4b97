"""Printing where the terminal or the file is not UTF-8: what cannot be encoded becomes ASCII."""

from __future__ import annotations

import codecs
import contextlib
import io
import sys
from typing import TextIO

# Bars of a learning curve, and lines of a tree. Everything else is escaped, as in \xe9.
_ASCII = str.maketrans("▁▂▃▄▅▆▇█├└─│", "_.:-=+*#|`-|")
_HANDLER = "ppo_hpo.ascii"


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_ASCII)
    return text.encode("ascii", "backslashreplace").decode(), error.end


codecs.register_error(_HANDLER, _to_ascii)


def encodable(text: str, stream: TextIO | None = None) -> str:
    """The text as ``stream`` can print it (default: standard output)."""
    encoding = getattr(sys.stdout if stream is None else stream, "encoding", None) or "utf-8"
    with contextlib.suppress(LookupError):
        return text.encode(encoding, _HANDLER).decode(encoding)
    return text


def print_anything() -> None:
    """Let standard output and standard error print every text."""
    for stream in (sys.stdout, sys.stderr):
        # A stream of a forked process cannot be changed again: it was made for another file.
        if isinstance(stream, io.TextIOWrapper) and stream.errors != _HANDLER:
            stream.reconfigure(errors=_HANDLER)

"""Orion's configuration of the storage of a sweep."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.errors import hide_passwords


def storage_of(storage: str | Mapping[str, Any] | None, place: Path) -> dict[str, Any]:
    """Make Orion's configuration of a storage.

    Args:
        storage: what `sweep` was given.
        place: the sweep's directory. Without ``storage``, its ``orion.yaml`` counts, then its
            ``orion.sqlite``.
    """
    if isinstance(storage, Mapping):
        content = dict(storage)
        return content if "database" in content else {"type": "legacy", "database": content}
    if storage is None and (place / "orion.yaml").is_file():
        content = yamlio.load(place / "orion.yaml")
        if isinstance(content, Mapping) and isinstance(content.get("storage"), Mapping):
            return dict(content["storage"])
    address = str(storage) if storage is not None else str(place / "orion.sqlite")
    scheme, separator, rest = address.partition("://")
    if not separator:
        file = Path(address).absolute()
        database = {"type": _kind(file), "host": str(file)}
    elif scheme in ("sqlite", "sqlitedb", "pickleddb"):  # These are files, although the address is a URL.
        kind = "pickleddb" if scheme == "pickleddb" else "sqlitedb"
        database = {"type": kind, "host": str(Path(rest).absolute())}
    else:
        database = {"type": scheme, "host": address}
    return {"type": "legacy", "database": database}


def _kind(file: Path) -> str:
    """Orion's name for the database in a file, by its content; by its suffix if the file is new."""
    try:
        with file.open("rb") as opened:
            start = opened.read(16)
    except OSError:
        start = b""
    if start:
        return "sqlitedb" if start == b"SQLite format 3\0" else "pickleddb"
    return "sqlitedb" if file.suffix == ".sqlite" else "pickleddb"


def address_text(storage: Mapping[str, Any]) -> str:
    """Address and type of a database, for messages, without its password."""
    database = storage.get("database") or {}
    return hide_passwords(f"{database.get('host') or storage} ({database.get('type')})")

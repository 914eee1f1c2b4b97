"""``orion.yaml`` in a sweep's directory: where the database is, and settings of ``orion hunt``.

The user may add settings of Orion, and they stay. A sweep's directory may be moved or copied. Then this file
and the database still hold absolute paths of the former place, because Orion takes relative ones from the
current directory. `storage_in` and `settle` replace them when the sweep is opened next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.errors import UserError, hide_secrets
from ppo_hpo.state.files import write_atomically

NAME = "orion.yaml"
# Types of databases that are one file.
FILES = ("pickleddb", "sqlitedb")


def read(file: Path) -> dict[str, Any]:
    """The content of a configuration file of Orion's; empty if it is no mapping."""
    content = yamlio.load(file)
    return content if isinstance(content, dict) else {}


def settings(place: Path) -> dict[str, int]:
    """Settings of Orion in a sweep's file that a sweep obeys; empty without a file."""
    file = place / NAME
    content = read(file) if file.is_file() else {}
    found: dict[str, int] = {}
    for name in ("experiment.max_broken", "worker.max_broken", "worker.heartbeat", "worker.n_workers"):
        section, _, key = name.partition(".")
        own = content.get(section)
        if isinstance(own, Mapping) and own.get(key) is not None:
            value = found[name] = own[key]
            if type(value) is not int or value < 1:
                raise UserError(
                    f"`{name}` in {file} must be a whole number of at least 1, but got {value!r}."
                )
    return found


def write(place: Path, storage: Mapping[str, Any], worker: Mapping[str, Any]) -> None:
    """Write the database into a sweep's file, and the sections of ``worker`` if it has none.

    Nothing else changes, and nothing at all if the file has both, so comments stay, too.
    """
    file, wanted = place / NAME, {"storage": dict(storage), "worker": dict(worker)}
    if not file.is_file():
        _write(file, yamlio.dump(wanted))
        return
    content, text = read(file), file.read_text(encoding="utf-8")
    if content.get("storage") not in (None, wanted["storage"]):
        content["storage"], text = wanted["storage"], ""
    missing = {section: values for section, values in wanted.items() if section not in content}
    whole = {**content, **missing}
    if text and not missing:
        keep_private(file, text)
        return
    text = f"{text.rstrip()}\n{yamlio.dump(missing)}" if text and missing else ""
    with contextlib.suppress(UserError):  # A file in flow style, for example, cannot be continued.
        if text and yamlio.parse(text, str(file)) == whole:
            _write(file, text)
            return
    _write(file, yamlio.dump(whole))


def storage_in(file: Path) -> Any:
    """The storage that a configuration file of Orion's names; None if it names none.

    A database that was moved or copied together with the file is found beside it, and the file is corrected.
    """
    content = read(file)
    storage = content.get("storage")
    if storage is None and "database" in content:
        storage = {"type": "legacy", "database": content["database"]}
    database = storage.get("database") if isinstance(storage, Mapping) else None
    if not isinstance(database, Mapping) or str(database.get("type")).lower() not in FILES:
        return storage
    assert isinstance(storage, Mapping)
    former = Path(str(database.get("host") or ""))
    here = file.absolute().parent / former.name
    if not former.is_absolute() or not here.is_file() or not _was_left(former, here):
        return storage
    storage = {**storage, "database": {**database, "host": str(here)}}
    text = file.read_text(encoding="utf-8")
    corrected = text.replace(str(former), str(here))
    with contextlib.suppress(UserError):  # If the file cannot be written, each command finds the database so.
        _write(file, corrected if corrected != text else yamlio.dump({**content, "storage": storage}))
    return storage


def _was_left(former: Path, here: Path) -> bool:
    """Whether the database ``here`` was moved from ``former``, or is a copy of it with its whole sweep."""
    if not former.exists():
        return True
    return not former.samefile(here) and (former.parent / NAME).is_file()


def settle(storage: Any, place: Path) -> None:
    """Correct the paths in the database of experiments that were moved or copied to ``place``."""
    database = storage._db
    for document in storage.fetch_experiments({}):
        trials = Path(str(document.get("working_dir") or ""))
        if not trials.is_absolute() or not _is_in(place, trials, document, database):
            continue
        paths = {key: document[key] for key in ("working_dir", "metadata") if key in document}
        changes = _replaced(paths, str(trials.parent), str(place))
        database.write("trials", {"exp_working_dir": changes["working_dir"]}, {"experiment": document["_id"]})
        database.write("experiments", changes, {"_id": document["_id"]})


def _is_in(place: Path, trials: Path, document: Mapping[str, Any], database: Any) -> bool:
    """Whether ``place`` has the trials of an experiment that Orion looks for in ``trials``."""
    if not (place / trials.name).is_dir():
        return False
    arguments = map(str, (document.get("metadata") or {}).get("user_args") or ())
    is_sweep = str(trials.parent / "space.yaml") in arguments
    has_database = Path(str(getattr(database, "host", ""))).parent == place
    if not trials.exists():
        return is_sweep or has_database
    # A copy of a sweep has a database of its own.
    return is_sweep and has_database and not trials.samefile(place / trials.name)


def _replaced(value: Any, former: str, now: str) -> Any:
    """Plain data in which every path below ``former`` lies below ``now``."""
    if isinstance(value, str):
        return now + value[len(former) :] if value == former or value.startswith(f"{former}/") else value
    if isinstance(value, Mapping):
        return {key: _replaced(item, former, now) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, former, now) for item in value]
    return value


def keep_private(file: Path, text: str) -> None:
    """Let only its owner read a file that holds ``text``, if there is a secret in it."""
    if hide_secrets(text) != text:
        with contextlib.suppress(OSError):  # It may be somebody else's.
            file.chmod(0o600)


def _write(file: Path, text: str) -> None:
    """Write the file; only its owner can read it if it holds a secret."""
    write_atomically(file, text.encode(), private=hide_secrets(text) != text)

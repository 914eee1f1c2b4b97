"""A database for Orion in one SQLite file: ``type: sqlitedb`` instead of Orion's ``type: pickleddb``.

    storage: {type: legacy, database: {type: sqlitedb, host: /shared/orion.sqlite}}      # in orion.yaml
    export ORION_DB_TYPE=sqlitedb ORION_DB_ADDRESS=$PWD/orion.sqlite                     # for every command

Orion makes about twenty operations on its database for each trial. Its PickledDB reads the whole file at each
of them, writes it at half of them, and compares every document in Python. Here an operation reads and writes
only the documents that it needs.

SQLite selects a few candidates. Orion's own `EphemeralDocument` then compares, selects and updates them, so
the results are those of Orion's other databases. Every operation is one transaction on its own connection, so
threads, forked and pickled workers, and any number of processes on one machine can share a file. Documents
are pickles, as in a PickledDB: open only files of people whose programs you would run.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from orion.core.io.database import Database, DatabaseError, DatabaseTimeout, DuplicateKeyError
from orion.core.io.database.ephemeraldb import EphemeralDocument
from orion.core.utils.flatten import flatten

from ppo_hpo.orion import hunt_space

if TYPE_CHECKING:
    import sqlite3

# A document's fields, or a query of Orion's.
Fields = dict[str, Any]
# The fields that Orion asks for most, and their columns. SQLite answers whether one of them equals a value.
_COLUMNS = {"_id": "oid", "experiment": "experiment", "id": "uid", "status": "status"}
# Byte strings that are longer (the algorithm's state) have a table of their own, and are written only when
# they change.
_LARGE = 1024
_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    number INTEGER PRIMARY KEY AUTOINCREMENT, collection TEXT NOT NULL,
    oid, experiment, uid, status, content BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS by_oid ON documents (collection, oid);
CREATE INDEX IF NOT EXISTS by_status ON documents (collection, experiment, status);
CREATE INDEX IF NOT EXISTS by_uid ON documents (collection, experiment, uid);
CREATE TABLE IF NOT EXISTS large (
    number INTEGER NOT NULL, field TEXT NOT NULL, content BLOB NOT NULL, PRIMARY KEY (number, field));
CREATE TABLE IF NOT EXISTS indexes (
    collection TEXT NOT NULL, name TEXT NOT NULL, keys TEXT NOT NULL, PRIMARY KEY (collection, name));
CREATE TABLE IF NOT EXISTS uniques (
    collection TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, number INTEGER NOT NULL,
    PRIMARY KEY (collection, name, value));
CREATE INDEX IF NOT EXISTS uniques_of ON uniques (number);
"""
_VERSION = 1


def _plain(value: Any) -> Any:
    """A value that SQLite compares in the same way as Python; None if it is not such a value."""
    if type(value).__module__ == "numpy" and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):  # This includes truth values.
        return int(value) if -(2**63) <= value < 2**63 else None
    return float(value) if isinstance(value, float) and value == value else None


class _Document(EphemeralDocument):  # type: ignore[misc]
    """A document, and its number in the file."""

    def __init__(self, number: int, data: Fields) -> None:
        self.number, self._data = number, data


class SQLiteDB(Database):  # type: ignore[misc]
    """Orion's database in one SQLite file; see this module's docstring.

    Args:
        host: path of the file. An empty one means ``orion_db.sqlite`` in the user's data directory of Orion.
        timeout: seconds to wait for other processes before DatabaseTimeout is raised.
    """

    host: str

    def __init__(self, host: str = "", timeout: float = 60, *args: Any, **kwargs: Any) -> None:
        self.timeout = timeout
        super().__init__(host or self.get_defaults()["host"])

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}(host={self.host}, timeout={self.timeout})"

    @property
    def is_connected(self) -> bool:
        """Always true, because each operation opens a connection of its own."""
        return True

    @classmethod
    def get_defaults(cls) -> Fields:
        """The default path of the file, in the user's data directory of Orion."""
        import orion.core

        return {"host": os.path.join(orion.core.DIRS.user_data_dir, "orion", "orion_db.sqlite")}

    def initiate_connection(self) -> None:
        """Create the file and its tables, if they do not exist, but not its directory: it may have moved."""
        self.host = os.path.abspath(self.host)
        directory = os.path.dirname(self.host)
        if self.host == self.get_defaults()["host"]:
            os.makedirs(directory, exist_ok=True)
        if not os.path.isdir(directory):
            raise DatabaseError(
                f"The directory {directory} of the database does not exist. If it was moved, `ppo-hpo report "
                f"NAME -c FILE` with its orion.yaml corrects the paths."
            )
        with self._transaction(write=False) as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
        if version == _VERSION:
            return
        with self._transaction() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise DatabaseError(f"{self.host} has version {version}; this ppo_hpo reads {_VERSION}.")
            if version == 0 and db.execute("SELECT 1 FROM sqlite_master").fetchone() is not None:
                raise DatabaseError(f"{self.host} is a SQLite file of another program.")
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {_VERSION}")

    def close_connection(self) -> None:
        """Do nothing, because no connection is open between operations."""

    @contextlib.contextmanager
    def _transaction(self, write: bool = True) -> Iterator[sqlite3.Connection]:
        # Orion imports this module for every user, and Python can be built without SQLite.
        import sqlite3

        db = None
        try:
            db = sqlite3.connect(self.host, timeout=self.timeout, isolation_level=None)
            # If the machine loses power, at most the last operations are lost, and the file stays valid.
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield db
            db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if "locked" in str(error) or "busy" in str(error):
                raise DatabaseTimeout(
                    f"{self.host} was locked by other processes for {self.timeout} seconds."
                ) from error
            raise DatabaseError(f"{self.host}: {error}.") from error
        except sqlite3.DatabaseError as error:
            raise DatabaseError(f"{self.host}: {error}.") from error
        finally:
            if db is not None:
                db.close()  # This rolls back what was not committed.

    def _narrow(self, collection: str, query: Fields | None) -> tuple[str, list[Any], bool]:
        """The part of a query that SQLite can answer, its arguments, and whether it is the whole query."""
        arguments: list[Any] = [collection]
        terms, whole = ["collection = ?"], True
        for key, value in flatten(query or {}).items():
            name, _, operator = key.rpartition(".")
            if key in _COLUMNS and (plain := _plain(value)) is not None:
                terms.append(f"{_COLUMNS[key]} = ?")
                arguments.append(plain)
                continue
            values = [_plain(item) for item in value] if operator == "$in" and name in _COLUMNS else [None]
            if None in values or len(values) >= 100:
                whole = False
            else:
                terms.append(f"{_COLUMNS[name]} IN ({', '.join('?' * len(values))})")
                arguments += values
        return " AND ".join(terms), arguments, whole

    def _find(
        self, db: sqlite3.Connection, collection: str, query: Fields | None, first: bool = False
    ) -> list[_Document]:
        where, arguments, whole = self._narrow(collection, query)
        asked, found = flatten(query or {}), []
        rows = db.execute(f"SELECT number, content FROM documents WHERE {where} ORDER BY number", arguments)
        for number, content in rows:
            try:
                data, large = pickle.loads(content)
            except Exception as error:  # A damaged pickle can raise anything.
                reason = str(error).rstrip(".")
                raise DatabaseError(f"{self.host}: document {number} cannot be read: {reason}.") from error
            document = _Document(number, data)
            # Most queries for the algorithm's state find that another process has locked it. So the state, of
            # some megabytes, is read only if the rest of the query matches.
            rest = {key: value for key, value in asked.items() if not key.startswith(tuple(large))}
            if not whole and not document.match(rest):
                continue
            for field in large:
                (data[field],) = db.execute(
                    "SELECT content FROM large WHERE number = ? AND field = ?", (number, field)
                ).fetchone()
            if whole or document.match(query):
                found.append(document)
                if first:
                    break
        return found

    def _insert(self, db: sqlite3.Connection, collection: str, data: Fields) -> None:
        if "_id" not in data:
            data["_id"] = self._new_id(db, collection)
        cursor = db.execute("INSERT INTO documents (collection, content) VALUES (?, '')", (collection,))
        assert cursor.lastrowid is not None
        self._store(db, collection, _Document(cursor.lastrowid, flatten(data)), {})

    @staticmethod
    def _new_id(db: sqlite3.Connection, collection: str) -> int:
        """One more than the largest id. Ids that are not integers do not count, as in EphemeralDB."""
        # Numbers sort before text, so SQLite reads the index on (collection, oid) backwards from there.
        largest = db.execute(
            "SELECT oid FROM documents WHERE collection = ? AND oid < '' AND typeof(oid) = 'integer' "
            "ORDER BY oid DESC LIMIT 1",
            (collection,),
        ).fetchone()
        if largest is not None:
            return int(largest[0]) + 1
        none = db.execute("SELECT 1 FROM documents WHERE collection = ? LIMIT 1", (collection,)).fetchone()
        return 1 if none is None else 0

    def _store(self, db: sqlite3.Connection, collection: str, document: _Document, before: Fields) -> None:
        data, number = document._data, document.number
        large = {key: value for key, value in data.items() if type(value) is bytes and len(value) > _LARGE}
        rest = {key: None if key in large else value for key, value in data.items()}
        columns = [_plain(data.get(key)) for key in _COLUMNS]
        content = pickle.dumps((rest, list(large)), pickle.HIGHEST_PROTOCOL)
        db.execute(
            "UPDATE documents SET oid = ?, experiment = ?, uid = ?, status = ?, content = ? WHERE number = ?",
            (*columns, content, number),
        )
        for key, value in before.items():
            if type(value) is bytes and len(value) > _LARGE and key not in large:
                db.execute("DELETE FROM large WHERE number = ? AND field = ?", (number, key))
        for key, value in large.items():
            if before.get(key) != value:
                db.execute("INSERT OR REPLACE INTO large VALUES (?, ?, ?)", (number, key, value))
        for name, keys in self._indexes(db, collection).items():
            value = self._value(document, keys)
            if before and value == self._value(_Document(0, before), keys):
                continue
            db.execute("DELETE FROM uniques WHERE number = ? AND name = ?", (number, name))
            self._claim(db, collection, name, value, number)

    @staticmethod
    def _claim(db: sqlite3.Connection, collection: str, name: str, value: str, number: int) -> None:
        row = (collection, name, value, number)
        if db.execute("INSERT OR IGNORE INTO uniques VALUES (?, ?, ?, ?)", row).rowcount == 0:
            raise DuplicateKeyError(f"Duplicate key error: index={name} value={value}")

    @staticmethod
    def _value(document: _Document, keys: Iterable[str]) -> str:
        values = [document[key] for key in keys]
        return repr(tuple(value if (plain := _plain(value)) is None else plain for value in values))

    @staticmethod
    def _indexes(db: sqlite3.Connection, collection: str) -> dict[str, list[str]]:
        rows = db.execute("SELECT name, keys FROM indexes WHERE collection = ?", (collection,))
        return {"_id_": ["_id"], **{name: json.loads(keys) for name, keys in rows}}

    def ensure_index(self, collection_name: str, keys: Any, unique: bool = False) -> None:
        """Create a unique index. Other indexes are not needed, and ignored."""
        if not unique:
            return
        names = [keys] if isinstance(keys, str) else [key for key, _ in keys]
        name = "_id_" if names == ["_id"] else "_".join(f"{key}_1" for key in names)
        with self._transaction(write=False) as db:
            if name in self._indexes(db, collection_name):
                return
        with self._transaction() as db:
            if name in self._indexes(db, collection_name):
                return
            db.execute("INSERT INTO indexes VALUES (?, ?, ?)", (collection_name, name, json.dumps(names)))
            for document in self._find(db, collection_name, None):
                self._claim(db, collection_name, name, self._value(document, names), document.number)

    def index_information(self, collection_name: str) -> dict[str, bool]:
        """Names of the unique indexes, including that of ``_id``."""
        with self._transaction(write=False) as db:
            return dict.fromkeys(self._indexes(db, collection_name), True)

    def drop_index(self, collection_name: str, name: str) -> None:
        """Remove a unique index."""
        with self._transaction() as db:
            if name not in self._indexes(db, collection_name) or name == "_id_":
                raise DatabaseError(f"index not found with name {name}")
            for table in ("indexes", "uniques"):
                db.execute(f"DELETE FROM {table} WHERE collection = ? AND name = ?", (collection_name, name))

    def write(self, collection_name: str, data: Any, query: Fields | None = None) -> int:
        """Insert documents, or update those that match a query; return how many."""
        with self._transaction() as db:
            if query is None:
                documents = data if isinstance(data, list | tuple) else [data]
                for document in documents:
                    self._insert(db, collection_name, document)
                return len(documents)
            found = self._find(db, collection_name, query)
            for document in found:
                self._update(db, collection_name, document, data)
            return len(found)

    def _update(self, db: sqlite3.Connection, collection: str, document: _Document, data: Fields) -> None:
        before = dict(document._data)
        document.update({"$set": data})
        self._store(db, collection, document, before)

    def read(
        self, collection_name: str, query: Fields | None = None, selection: Fields | None = None
    ) -> list[Fields]:
        """Return the documents that match a query."""
        with self._transaction(write=False) as db:
            found = self._find(db, collection_name, query)
        return [document.select(selection) for document in found]

    def read_and_write(
        self, collection_name: str, query: Fields, data: Fields, selection: Fields | None = None
    ) -> Fields | None:
        """Update the first document that matches, and return it updated; None if there is none."""
        with self._transaction() as db:
            found = self._find(db, collection_name, query, first=True)
            if not found:
                return None
            self._update(db, collection_name, found[0], data)
        return cast(Fields, found[0].select(selection))

    def count(self, collection_name: str, query: Fields | None = None) -> int:
        """Count the documents that match a query."""
        with self._transaction(write=False) as db:
            where, arguments, whole = self._narrow(collection_name, query)
            if not whole:
                return len(self._find(db, collection_name, query))
            (found,) = db.execute(f"SELECT count(*) FROM documents WHERE {where}", arguments).fetchone()
            return int(found)

    def remove(self, collection_name: str, query: Fields) -> int:
        """Remove the documents that match a query; return how many."""
        with self._transaction() as db:
            found = self._find(db, collection_name, query)
            for document in found:
                for table in ("documents", "large", "uniques"):
                    db.execute(f"DELETE FROM {table} WHERE number = ?", (document.number,))
            return len(found)


# Orion imports this module when it opens a database, of whatever type, and `ppo_hpo.plugin` only when it
# makes an algorithm. By then `orion hunt` has evaluated the priors of the space.
if "orion.core.io.experiment_builder" in sys.modules:
    hunt_space.install_quietly()

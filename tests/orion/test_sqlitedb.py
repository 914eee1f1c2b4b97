"""The database in one SQLite file: its answers are those of Orion's own, and processes can share it.

Orion's tests of a database (tests/unittests/core/database/test_database.py of 0.2.7) were run on it as well.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import multiprocessing
import pickle
import random
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pkg_resources, at each first import of Orion
    from orion.core.io.database import DatabaseError, DatabaseTimeout, DuplicateKeyError, database_factory
    from orion.core.io.database.ephemeraldb import EphemeralDB

from ppo_hpo.orion.sqlitedb import SQLiteDB

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture
def db(tmp_path: Path) -> SQLiteDB:
    (tmp_path / "folder").mkdir()
    return SQLiteDB(host=str(tmp_path / "folder" / "orion.sqlite"))


def document(stream: random.Random) -> dict[str, Any]:
    """One like Orion's, with values of all kinds, missing ones too."""
    made: dict[str, Any] = {
        "experiment": stream.choice([1, 2, 2.0, True, None, "2", 2**70, "ü"]),
        "id": stream.choice("abcdefgh"),
        "status": stream.choice(["new", "reserved", "completed", None]),
        "heartbeat": stream.choice([None, NOW, NOW + datetime.timedelta(seconds=1)]),
        "results": [{"name": "loss", "value": stream.choice([1, 0.5, float("inf")])}],
        "refers": {"parent_id": stream.choice([None, 1]), "deep": {"er": stream.randrange(3)}, "none": {}},
        "state": stream.choice([None, b"short", b"long" * 1000, b"other" * 1000]),
    }
    for key in list(made):
        if stream.random() < 0.15:
            del made[key]
    return made


def query(stream: random.Random) -> dict[str, Any]:
    terms: list[dict[str, Any]] = [
        {"experiment": stream.choice([1, 2, "2", None, 2**70, 1.5])},
        {"status": stream.choice(["new", "reserved", None])},
        {"status": {"$in": stream.choice([["new", "reserved"], [], ["completed", None]])}},
        {"status": {"$ne": "completed"}},
        {"id": stream.choice("abcdefgh")},
        {"_id": stream.choice([0, 1, 2, 3, "name"])},
        {"heartbeat": {"$lte": NOW}},
        {"refers.deep.er": {"$gte": 1}},
        {"refers": {"parent_id": 1}},
        {"nothing": 1},
    ]
    chosen: dict[str, Any] = {}
    for term in stream.sample(terms, stream.randrange(3)):
        chosen.update(term)
    return chosen


def step(stream: random.Random) -> tuple[str, list[Any]]:
    operation = stream.choice(
        ["insert"] * 4 + ["update"] * 2 + ["read"] * 4 + ["read_and_write"] * 2 + ["count"] * 2 + ["remove"]
    )
    if operation == "insert":
        new = [document(stream) for _ in range(stream.choice([1, 1, 3]))]
        if stream.random() < 0.1:
            new[0]["_id"] = stream.choice([1, 5, "name"])
        return "write", [new if stream.random() < 0.5 else new[0]]
    changes = {
        "heartbeat": NOW,
        "status": stream.choice(["new", "completed"]),
        "state": stream.choice([None, b"s", b"changed" * 1000]),
        "refers": {"parent_id": 3},
        "new.dotted": 1,
    }
    some = {key: changes[key] for key in stream.sample(sorted(changes), 2)}
    if operation == "update":
        return "write", [some, query(stream)]
    if operation == "read":
        choices = [None, {"status": 1}, {"status": 1, "_id": 0}, {"state": 0}, {"refers.deep": 1}]
        return "read", [query(stream), stream.choice(choices)]
    if operation == "read_and_write":
        return operation, [query(stream), some]
    return operation, [query(stream)]


def outcome(database: Any, operation: str, arguments: list[Any]) -> Any:
    try:
        result = getattr(database, operation)("trials", *arguments)
    except DuplicateKeyError:
        return "duplicate"
    return result, arguments  # an insertion gives the documents their `_id`


@pytest.mark.parametrize("seed", range(8))
def test_answers_are_those_of_orions_own_database(db: SQLiteDB, seed: int) -> None:
    stream = random.Random(seed)
    other = EphemeralDB()
    kinds = set()
    for database in (db, other):
        database.ensure_index("trials", "refers.unique_in_some", unique=False)
    for number in range(150):
        operation, arguments = step(stream)
        if operation == "write" and len(arguments) == 1 and isinstance(arguments[0], list):
            # EphemeralDB keeps what it inserted before a duplicate, and we nothing: not compared here.
            for each in arguments[0]:
                each.pop("_id", None)
        given = [copy.deepcopy(arguments), copy.deepcopy(arguments)]
        ours, theirs = outcome(db, operation, given[0]), outcome(other, operation, given[1])
        assert ours == theirs, (number, operation, arguments)
        duplicate = theirs == "duplicate"
        kinds.add((operation, not duplicate and bool(theirs[0]), duplicate))
    assert {operation for operation, *_ in kinds} == {"write", "read", "read_and_write", "count", "remove"}
    assert db.read("trials") == other.read("trials")
    assert ("read", True, False) in kinds
    assert db.count("elsewhere") == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_unique_indexes(db: SQLiteDB, when: str) -> None:
    keys = [("name", 1), ("meta.version", -1)]
    if when == "before":
        db.ensure_index("experiments", keys, unique=True)
    db.write("experiments", [{"name": "a", "meta": {"version": number}} for number in (1, 2)])
    if when == "after":
        db.ensure_index("experiments", keys, unique=True)
    db.ensure_index("experiments", keys, unique=True)
    assert db.index_information("experiments") == {"_id_": True, "name_1_meta.version_1": True}
    with pytest.raises(DuplicateKeyError):
        db.write("experiments", {"name": "a", "meta": {"version": 2}})
    # All or nothing.
    with pytest.raises(DuplicateKeyError):
        db.write("experiments", [{"name": "b"}, {"name": "b"}])
    with pytest.raises(DuplicateKeyError):
        db.write("experiments", {"name": "c", "_id": 1})
    # As MongoDB and unlike EphemeralDB: an update can make a duplicate too.
    with pytest.raises(DuplicateKeyError):
        db.write("experiments", {"meta": {"version": 1}}, {"meta.version": 2})
    assert [found["meta"]["version"] for found in db.read("experiments")] == [1, 2]
    # What is removed or changed is free again.
    assert db.write("experiments", {"meta": {"version": 3}}, {"meta.version": 2}) == 1
    assert db.write("experiments", {"name": "a", "meta": {"version": 2}}) == 1
    assert db.remove("experiments", {"meta.version": 1}) == 1
    assert db.write("experiments", {"name": "a", "meta": {"version": 1}}) == 1
    db.drop_index("experiments", "name_1_meta.version_1")
    assert db.write("experiments", {"name": "a", "meta": {"version": 1}}) == 1
    with pytest.raises(DatabaseError, match="index not found"):
        db.drop_index("experiments", "name_1_meta.version_1")
    with pytest.raises(DuplicateKeyError):
        db.ensure_index("experiments", keys, unique=True)
    assert db.index_information("experiments") == {"_id_": True}


def test_large_values_are_written_when_they_change(db: SQLiteDB) -> None:
    def stored() -> list[tuple[int, int]]:
        connection = sqlite3.connect(db.host)
        rows = connection.execute("SELECT rowid, length(content) FROM large").fetchall()
        connection.close()
        return rows

    state = bytes(range(256)) * 10_000
    db.write("algo", {"experiment": 1, "locked": 0, "state": None})
    db.read_and_write("algo", {"experiment": 1}, {"state": state})
    (before,) = stored()
    assert before[1] == len(state)
    found = db.read_and_write("algo", {"experiment": 1, "locked": 0}, {"locked": 1})
    assert found is not None
    assert found["state"] == state
    assert stored() == [before]  # a replaced row has another number
    db.write("algo", {"state": state[1:]}, {"experiment": 1})
    assert db.read("algo", {"locked": 1})[0]["state"] == state[1:]
    db.write("algo", {"state": b"short"}, {"experiment": 1})
    assert stored() == []
    assert db.read("algo")[0]["state"] == b"short"
    db.write("algo", {"state": state}, {"experiment": 1})
    db.remove("algo", {})
    assert stored() == []


def in_processes(function: Callable[..., Any], arguments: list[Any]) -> list[Any]:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        return pool.starmap(function, arguments)


def insert(db: SQLiteDB, worker: int) -> list[int]:
    done = []
    for number in range(20):
        try:
            db.write("trials", {"id": number, "status": "new", "worker": worker})
            done.append(number)
        except DuplicateKeyError:
            pass
    return done


def claim(db: SQLiteDB, worker: int) -> list[int]:
    claimed = []
    while (
        found := db.read_and_write("trials", {"status": "new"}, {"status": "mine", "who": worker})
    ) is not None:
        claimed.append(found["id"])
    return claimed


def test_processes_share_a_file(db: SQLiteDB) -> None:
    db.ensure_index("trials", "id", unique=True)
    inserted = in_processes(insert, [(db, worker) for worker in range(4)])
    assert sorted(number for numbers in inserted for number in numbers) == list(range(20))
    assert sorted(found["_id"] for found in db.read("trials")) == list(range(1, 21))
    claimed = in_processes(claim, [(pickle.loads(pickle.dumps(db)), worker) for worker in range(4)])
    assert sorted(number for numbers in claimed for number in numbers) == list(range(20))
    for worker, numbers in enumerate(claimed):
        assert sorted(found["id"] for found in db.read("trials", {"who": worker})) == sorted(numbers)


def test_a_writer_that_fails_leaves_nothing(db: SQLiteDB) -> None:
    with pytest.raises(Exception, match="pickle"):
        db.write("trials", [{"id": 1}, {"id": 2, "bad": lambda: None}])
    assert db.count("trials") == 0


def test_what_is_locked_too_long_says_so(tmp_path: Path) -> None:
    impatient = SQLiteDB(host=str(tmp_path / "db"), timeout=0.1)
    other = sqlite3.connect(impatient.host, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DatabaseTimeout, match=r"locked by other processes for 0\.1 seconds"):
        impatient.write("trials", {"id": 1})
    other.close()
    assert impatient.write("trials", {"id": 1}) == 1


def test_what_is_no_database_of_ours_is_refused_and_kept(tmp_path: Path) -> None:
    foreign = tmp_path / "orion.pkl"
    foreign.write_bytes(pickle.dumps(EphemeralDB()) * 20)
    content = foreign.read_bytes()
    with pytest.raises(DatabaseError, match="not a database"):
        SQLiteDB(host=str(foreign))
    assert foreign.read_bytes() == content
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE photos (name)")
    other.close()
    with pytest.raises(DatabaseError, match="of another program"):
        SQLiteDB(host=str(tmp_path / "other"))
    later = sqlite3.connect(tmp_path / "later")
    later.execute("PRAGMA user_version = 7")
    later.close()
    with pytest.raises(DatabaseError, match="has version 7"):
        SQLiteDB(host=str(tmp_path / "later"))


def test_orion_finds_it_by_its_name(tmp_path: Path) -> None:
    found = database_factory.create("sqlitedb", host=str(tmp_path / "db"), timeout=3)
    assert type(found) is SQLiteDB
    assert (found.host, found.timeout, found.is_connected) == (str(tmp_path / "db"), 3, True)


def test_a_document_that_is_torn_is_an_error_of_the_database(tmp_path):
    database = SQLiteDB(host=str(tmp_path / "orion.sqlite"))
    database.initiate_connection()
    database.write("trials", {"_id": "a"})
    with contextlib.closing(sqlite3.connect(database.host)) as db:
        db.execute("UPDATE documents SET content = x'00ff'")
        db.commit()
    with pytest.raises(DatabaseError, match="document 1 cannot be read: invalid load key"):
        database.read("trials")


def test_a_large_value_is_read_only_if_the_rest_matches(
    db: SQLiteDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the algorithm's lock asks again and again, and must not read megabytes each time."""
    statements: list[str] = []
    connect = sqlite3.connect

    def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(statements.append)
        return connection

    state = bytes(2048)
    db.write("algo", {"experiment": 1, "locked": 1, "state": state})
    monkeypatch.setattr(sqlite3, "connect", traced)
    assert db.read_and_write("algo", {"experiment": 1, "locked": 0}, {"locked": 1}) is None
    assert db.read("algo", {"locked": {"$ne": 1}}) == []
    assert not any("FROM large" in statement for statement in statements)
    assert db.read("algo", {"experiment": 1, "locked": 1})[0]["state"] == state
    assert db.read("algo", {"state": state})[0]["locked"] == 1
    assert db.read("algo", {"state": bytes(2047)}) == []
    assert any("FROM large" in statement for statement in statements)

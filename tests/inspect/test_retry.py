"""What `retry` and the start of a sweep do about locks and trials that somebody may still hold."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ppo_hpo.inspect import retry
from ppo_hpo.orion import algorithm_lock
from ppo_hpo.orion.algorithm_lock import utc_now
from ppo_hpo.spec import yamlio
from ppo_hpo.state import lock
from ppo_hpo.state.process_identity import Process


def experiment(folder: Path, kind: str) -> Any:
    from orion.client import build_experiment

    storage = {"type": "legacy", "database": {"type": kind, "host": str(folder / "db")}}
    (folder / "orion.yaml").write_text(yamlio.dump({"storage": storage}))
    return build_experiment(
        "it", space={"x": "uniform(0, 1)"}, algorithm={"random": {"seed": 1}}, storage=storage,
        working_dir=str(folder / "trials"), max_trials=9,
    )  # fmt: skip


def hold(kind: str, folder: Path, connection: Any) -> None:
    from orion.client import get_experiment

    storage = {"type": "legacy", "database": {"type": kind, "host": str(folder / "db")}}
    with get_experiment("it", storage=storage, mode="w")._experiment.acquire_algorithm_lock():
        connection.send("held")
        connection.recv()
    connection.send("left")


@contextlib.contextmanager
def held(folder: Path, kind: str) -> Iterator[tuple[Any, Any]]:
    """Another process that holds the algorithm's lock, and a connection to it."""
    fork = multiprocessing.get_context("fork")  # which has imported Orion
    ours, theirs = fork.Pipe()
    process = fork.Process(target=hold, args=(kind, folder, theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(60)
        assert ours.recv() == "held"
        yield process, ours
    finally:
        process.kill()
        process.join()


def make_old(client: Any, **changes: Any) -> None:
    """Let the lock have been taken five minutes ago, and its holder be another one."""
    database, since = client.storage._db, utc_now() - datetime.timedelta(seconds=300)
    (document,) = database.read("algo", {"experiment": client.id})
    holder = {**json.loads(document["holder"]), **changes, "since": since.isoformat()}
    database.write("algo", {"heartbeat": since, "holder": json.dumps(holder)}, {"experiment": client.id})


def is_locked(client: Any) -> bool:
    return algorithm_lock.read(client.storage._db, client.id) is not None


@pytest.mark.parametrize("kind", ["pickleddb", "sqlitedb"])
def test_an_algorithms_lock_is_released_only_if_its_holder_has_ended(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_LOCK_SECONDS", 0.1)
    client, said = experiment(tmp_path, kind), io.StringIO()
    with held(tmp_path, kind) as (process, _):
        found = algorithm_lock.read(client.storage._db, client.id)
        assert found is not None
        assert found.holder is not None
        assert found.holder.pid == process.pid
        make_old(client)
        # Neither a sweep nor the user's `retry` takes it from a process that is seen to run.
        assert retry.repair(client, retry.Waiting(said)) == []
        assert "released" not in retry.retry("it", str(tmp_path / "orion.yaml"))
        assert is_locked(client)
        assert f"by process {process.pid} on " in said.getvalue()
        assert "That process still runs: wait for it, or stop it." in said.getvalue()
    (line,) = retry.repair(client, retry.Waiting(said))
    assert line.endswith("which has ended: released")
    assert not is_locked(client)


def test_a_lock_whose_holder_cannot_be_seen_stays_until_the_user_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_LOCK_SECONDS", 0.1)
    client, said = experiment(tmp_path, "sqlitedb"), io.StringIO()
    with held(tmp_path, "sqlitedb"):
        make_old(client, host="elsewhere", boot="another")
        assert retry.repair(client, retry.Waiting(said)) == []
        assert is_locked(client)
        assert "`ppo-hpo retry it` releases the lock" in said.getvalue()
        text = retry.retry("it", str(tmp_path / "orion.yaml"))
        assert "longer than any worker needs it: released" in text
        assert not is_locked(client)


def test_a_process_that_lost_the_lock_leaves_the_one_of_the_next(tmp_path: Path) -> None:
    client = experiment(tmp_path, "sqlitedb")
    database = client.storage._db
    with held(tmp_path, "sqlitedb") as (_, connection):
        found = algorithm_lock.read(database, client.id)
        assert found is not None
        assert algorithm_lock.release(database, client.id, found)
        assert not algorithm_lock.release(database, client.id, found)
        with client._experiment.acquire_algorithm_lock(timeout=1):
            mine = algorithm_lock.read(database, client.id)
            connection.send("leave")
            assert connection.poll(60)
            assert connection.recv() == "left"
            assert algorithm_lock.read(database, client.id) == mine
    assert not is_locked(client)
    # A process that does not say who it is may take the lock afterwards.
    database.write("algo", {"locked": 1, "heartbeat": utc_now()}, {"experiment": client.id})
    unknown = algorithm_lock.read(database, client.id)
    assert unknown is not None
    assert unknown.holder is None


def test_trials_of_unseen_workers_are_watched_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute in all. If their workers' heartbeats are young, not even that."""
    client, said, now = experiment(tmp_path, "sqlitedb"), io.StringIO(), [0.0]
    monkeypatch.setattr(
        lock, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.append(now.pop() + s))
    )
    elsewhere = replace(Process.current(), host="elsewhere", boot="another")
    record = {"number": 4, "taken": 1.7e9, "flock": True, **asdict(elsewhere)}
    trials = [client.suggest() for _ in range(4)]
    for trial in trials:
        stage = Path(trial.working_dir) / "writer" / "000004" / "stage-0011223344556677"
        stage.mkdir(parents=True)
        (stage.parent / "record.json").write_text(json.dumps(record))
        client._pacemakers.pop(trial.id).stop()
    lines = retry.repair(client, retry.Waiting(said))
    assert len(lines) == 4
    assert all("skipped: its worker was seen " in line for line in lines)
    assert (now, said.getvalue()) == ([0.0], "")
    ago = utc_now() - datetime.timedelta(seconds=300)
    client.storage._db.write("trials", {"heartbeat": ago}, {"experiment": client.id})
    lines = retry.repair(client, retry.Waiting(said))
    assert all(line.endswith("requeued") for line in lines)
    assert 60 <= now[0] <= 61
    assert said.getvalue() == (
        "ppo-hpo: 4 trials may be trained by a process that cannot be seen from here: waits at most a minute "
        "for its next sign of life\n"
    )

"""A store for checkpoints: a trial that is lost on one machine goes on on another, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import CheckpointError, UserError
from ppo_hpo.state import remote_store as stores
from ppo_hpo.state.checkpoint import Checkpoint, Storage, arrays_digest, read, to_bytes
from ppo_hpo.state.mirror import MirroredStorage
from ppo_hpo.state.remote_store import Store, StoreError, open_store
from ppo_hpo.trial import runner
from tests.runs import run_quietly

REPOSITORY = Path(__file__).parents[2]
TINY: dict[str, dict[str, Any]] = {
    "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
    "task": {"epochs": 4, "max_epochs": 4, "steps_per_epoch": 128, "eval_episodes": 2},
    "model": {"width": 8, "depth": 1},
    "normalize": {"norm_obs": True, "norm_reward": True},
    "ppo": {"n_steps": 64, "batch_size": 64, "n_epochs": 1},
}
CONFIG = TrialConfig.from_mapping(TINY)
LAST = "checkpoint-000004.safetensors"


def some(epoch: int, value: float = 1.0) -> Checkpoint:
    return Checkpoint(epoch, {"w": np.full(8, value, np.float32)}, {"uid": "me"})


def run(directory: Path, epochs: int = 4, **options: Any) -> runner.Outcome:
    groups = {"task": {"epochs": epochs}, **options.pop("groups", {})}
    return run_quietly(CONFIG.replace(**groups), directory, **options)


def assert_equal(one: Path, other: Path) -> None:
    left, right = read(one / LAST), read(other / LAST)
    assert arrays_digest(left.arrays) == arrays_digest(right.arrays)
    assert left.meta["curve"] == right.meta["curve"]
    assert (one / "curve.jsonl").read_bytes() == (other / "curve.jsonl").read_bytes()
    results = [json.loads((path / "results.json").read_text())[0] for path in (one, other)]
    assert results[0] == results[1]


@pytest.fixture(params=["directory", "file://", "memory://"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param != "memory://":
        yield ("file://" if request.param == "file://" else "") + str(tmp_path / "store")
        return
    import fsspec

    yield f"memory://{tmp_path.name}"
    memory = fsspec.filesystem("memory")
    if memory.exists(f"/{tmp_path.name}"):
        memory.rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_PAUSES", (0.0, 0.0))
    monkeypatch.delenv(stores.VARIABLE, raising=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed") / "trial"
    run(directory)
    return directory


# ------------------------------------------------------------------------------ objects


def test_objects_are_put_read_listed_and_removed(url: str) -> None:
    store = Store(url)
    assert store.names("trials", "a") == []
    store.put("trials", "a", "one", content=b"1")
    store.put("trials", "a", "two", content=b"22")
    store.put("trials", "b", "three", content=b"")
    store.put("trials", "a", "one", content=b"one")
    assert store.names("trials", "a") == ["one", "two"]
    assert store.names("trials") == ["a", "b"]
    assert store.get("trials", "a", "one", max_bytes=3) == b"one"
    assert store.get("trials", "b", "three", max_bytes=3) == b""
    assert [store.size("trials", "a", name) for name in ("one", "nothing")] == [3, 0]
    with pytest.raises(CheckpointError, match=r"one is larger than 2 bytes: it is not read"):
        store.get("trials", "a", "one", max_bytes=2)
    store.remove("trials", "a", "one")
    store.remove("trials", "a", "one")
    assert store.names("trials", "a") == ["two"]
    with pytest.raises(CheckpointError, match="one cannot be read"):
        store.get("trials", "a", "one", max_bytes=9)
    # Another worker's store is another object, with no memory of its own.
    assert Store(url).names("trials", "a") == ["two"]


@pytest.mark.parametrize("name", ["..", ".", "", "../b", "a/b", "/etc", "a\n", "-\0", "x" * 200])
def test_names_never_lead_out_of_the_store(url: str, tmp_path: Path, name: str) -> None:
    store = Store(url)
    for use in (
        lambda: store.put("trials", name, "x", content=b""),
        lambda: store.get(name, max_bytes=1),
        lambda: store.remove("trials", name),
        lambda: store.names(name),
        lambda: store.size(name, "x"),
    ):
        with pytest.raises(UserError, match="A name in a store must be letters"):
            use()
    with pytest.raises(UserError, match="A trial's id must be letters"):
        MirroredStorage(tmp_path, store, name)


def test_names_of_others_are_not_seen(tmp_path: Path) -> None:
    for name in (".hidden", "a b", "good"):
        (tmp_path / name).write_text("")
    assert Store(str(tmp_path)).names() == ["good"]


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("nothing://a/b", "cannot be opened: ValueError: Protocol not known"),
        ("simplecache::memory://a", "must be one URL without ::"),
    ],
)
def test_invalid_urls_are_refused(url: str, part: str) -> None:
    with pytest.raises(StoreError, match=part):
        Store(url)


def test_passwords_are_hidden() -> None:
    assert Store("memory://me:secret@host/a").name == "memory://***@host/a"


def test_where_the_store_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert open_store(None) is None
    monkeypatch.setenv("PPO_HPO_STORE", str(tmp_path / "a"))
    found, other = open_store(None), open_store(str(tmp_path / "b"))
    assert found is not None
    assert other is not None
    assert (found.name, other.name) == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert open_store("") is None


# ------------------------------------------------------------------ mirrored checkpoints


def test_the_newest_two_are_kept_in_both_places(url: str, tmp_path: Path) -> None:
    store = Store(url)
    storage = MirroredStorage(tmp_path / "here", store, "key")
    for epoch in range(5):
        storage.save(some(epoch, epoch))
    names = ["checkpoint-000003.safetensors", "checkpoint-000004.safetensors"]
    assert store.names("trials", "key") == names
    for name in names:
        there = store.get("trials", "key", name, max_bytes=1 << 20)
        assert there == (tmp_path / "here" / name).read_bytes()
    found = MirroredStorage(tmp_path / "there", store, "key").load()
    assert found is not None
    assert (found.epoch, found.arrays["w"][0]) == (4, 4.0)
    assert (tmp_path / "there" / names[1]).read_bytes() == (tmp_path / "here" / names[1]).read_bytes()


def test_the_newer_of_both_is_taken(url: str, tmp_path: Path) -> None:
    store, other = Store(url), Storage(tmp_path / "b")
    MirroredStorage(tmp_path / "a", store, "key").save(some(3))
    other.save(some(2))
    found = MirroredStorage(tmp_path / "b", store, "key").load()
    assert found is not None
    assert found.epoch == 3
    # And what only the directory has goes into the store.
    other.save(some(5))
    found = MirroredStorage(tmp_path / "b", store, "key").load()
    assert found is not None
    assert found.epoch == 5
    assert "checkpoint-000005.safetensors" in store.names("trials", "key")


def test_a_torn_checkpoint_in_the_store_is_skipped(url: str, tmp_path: Path) -> None:
    store = Store(url)
    storage = MirroredStorage(tmp_path / "a", store, "key")
    for epoch in (1, 2):
        storage.save(some(epoch))
    name, told = "checkpoint-000002.safetensors", list[str]()
    for damaged, reason in (
        (to_bytes(some(2))[:-1], "torn"),
        (to_bytes(some(7)), "another epoch, 7: the file was renamed"),
    ):
        store.put("trials", "key", name, content=damaged)
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        found = MirroredStorage(tmp_path / "b", store, "key").load(on_refused=lambda e: told.append(str(e)))
        assert found is not None
        assert found.epoch == 1
        assert reason in told.pop()
        assert not told
    # Where the directory has an older one that is whole, a torn one alone in the store takes nothing away.
    store.remove("trials", "key", "checkpoint-000001.safetensors")
    found = MirroredStorage(tmp_path / "b", store, "key").load(on_refused=lambda e: told.append(str(e)))
    assert found is not None
    assert found.epoch == 1
    assert len(told) == 1


def test_a_store_that_is_away_is_a_warning_until_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "store"
    storage = MirroredStorage(tmp_path / "a", Store(str(place)), "key")
    storage.save(some(1))
    shutil.move(place, tmp_path / "aside")
    place.write_text("in the way")
    storage.save(some(2))
    storage.save(some(3))
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert warnings[1].startswith("epoch 3 is here, but not in the store yet: The store ")
    with pytest.raises(StoreError, match=r"What was trained is whole in .*\. Rerun the trial there"):
        storage.finish()
    assert [path.name for path in storage.paths()] == [f"checkpoint-00000{e}.safetensors" for e in (3, 2)]
    place.unlink()
    shutil.move(tmp_path / "aside", place)
    storage.finish()
    assert storage.store is not None
    assert storage.store.names("trials", "key")[-1] == "checkpoint-000003.safetensors"
    storage.finish()


def test_a_directory_with_a_url_for_a_name_is_a_mistake() -> None:
    with pytest.raises(UserError, match="A storage must be a directory, but got 's3://bucket/a'"):
        Storage("s3://bucket/a")


# ------------------------------------------------------------------------------- trials


def test_a_trial_resumes_elsewhere(url: str, tmp_path: Path, undisturbed: Path) -> None:
    run(tmp_path / "a" / "t", 2, trial_id="11aa", checkpoint_store=url)
    shutil.rmtree(tmp_path / "a")
    outcome = run(tmp_path / "b" / "t", trial_id="11aa", checkpoint_store=url)
    assert outcome.statistics["continued_from_epoch"] == 2.0
    assert outcome.statistics["env_steps_here"] == 2 * 128
    assert_equal(tmp_path / "b" / "t", undisturbed)


def test_a_promoted_trial_finds_its_rung_in_the_store(url: str, tmp_path: Path, undisturbed: Path) -> None:
    # Hyperband and EvolutionES: another trial, another directory, and nobody says who the parent is.
    a, b = tmp_path / "a", tmp_path / "b"
    for uid, epochs in (("1a", 1), ("2a", 2)):
        run(a / uid, epochs, trial_id=uid, checkpoint_store=url, siblings=a)
    shutil.rmtree(a)
    outcome = run(b / "4a", trial_id="4a", checkpoint_store=url, siblings=b)
    assert outcome.statistics["continued_from_epoch"] == 2.0
    assert_equal(b / "4a", undisturbed)
    # One that asks for less than all others have begins again, as without a store.
    assert run(b / "0a", 1, trial_id="0a", checkpoint_store=url, siblings=b).statistics["continued"] == 1.0
    other = run(b / "9a", trial_id="9a", checkpoint_store=url, siblings=b, groups={"task": {"seed": 1}})
    assert other.statistics["continued"] == 0.0


def test_a_fork_finds_its_parent_in_the_store(url: str, tmp_path: Path) -> None:
    store, lr = url, {"optimizer": {"lr": 1e-3}}
    run(tmp_path / "a" / "p", 2, trial_id="aa01", checkpoint_store=store)
    child = tmp_path / "b" / "c"
    outcome = run(
        child, 3, trial_id="bb01", checkpoint_store=store, parent="aa01", groups={**lr, "task": {"epochs": 3}}
    )
    assert (outcome.statistics["continued_from_epoch"], outcome.statistics["forked"]) == (2.0, 1.0)
    lineage = read(child / "checkpoint-000003.safetensors").meta["lineage"]
    assert [(born["uid"], born["epoch"]) for born in lineage] == [("aa01", 2)]
    # Without the parent's id nobody could know, and an unforked trial never goes on from a fork.
    fresh = run(
        tmp_path / "c" / "d", 3, trial_id="cc01", checkpoint_store=store, groups={**lr, "task": {"epochs": 3}}
    )
    assert fresh.statistics["continued"] == 0.0
    # The fork itself, lost and retried elsewhere, is still the fork.
    again = run(tmp_path / "d" / "c", 4, trial_id="bb01", checkpoint_store=store, parent="aa01",
                groups={**lr, "task": {"epochs": 4}})  # fmt: skip
    assert (again.statistics["continued_from_epoch"], again.statistics["forked"]) == (3.0, 1.0)


def test_a_copy_of_the_parent_that_is_older_than_the_parent(tmp_path: Path) -> None:
    """The parent was killed here and went on elsewhere; Orion has copied the directory that it left here."""
    store, lr = str(tmp_path / "s"), {"optimizer": {"lr": 1e-3}}
    run(tmp_path / "here" / "p", 1, trial_id="aa01", checkpoint_store=store)
    run(tmp_path / "there" / "p", 2, trial_id="aa01", checkpoint_store=store)
    for uid, options, epoch in (("bb01", {"parent": "aa01"}, 2), ("bb02", {}, 1)):
        shutil.copytree(tmp_path / "here" / "p", tmp_path / "here" / uid)
        groups = {**lr, "task": {"epochs": 3}}
        outcome = run(
            tmp_path / "here" / uid, 3, trial_id=uid, checkpoint_store=store, groups=groups, **options
        )
        assert outcome.statistics["continued_from_epoch"] == epoch
        lineage = read(tmp_path / "here" / uid / "checkpoint-000003.safetensors").meta["lineage"]
        assert [(born["uid"], born["epoch"]) for born in lineage] == [("aa01", epoch)]
    # A promotion is no fork: its parent is found without being told.
    shutil.copytree(tmp_path / "here" / "p", tmp_path / "here" / "cc01")
    assert (
        run(tmp_path / "here" / "cc01", 3, trial_id="cc01", checkpoint_store=store).statistics[
            "env_steps_here"
        ]
        == 128
    )
    # Its own checkpoints are never older than its parent's.
    again = run(tmp_path / "here" / "bb02", 4, trial_id="bb02", parent="aa01", checkpoint_store=store,
                groups={**lr, "task": {"epochs": 4}})  # fmt: skip
    assert again.statistics["continued_from_epoch"] == 3.0


def test_a_missing_parent_is_reported(tmp_path: Path) -> None:
    directory = tmp_path / "a"
    outcome = run(directory, 1, trial_id="bb02", checkpoint_store=str(tmp_path / "s"), parent="aa02")
    assert outcome.statistics["continued"] == 0.0
    assert "the parent aa02 has no checkpoint in" in (directory / "log.txt").read_text()
    with pytest.raises(UserError, match=r"`--parent` must be the id of a trial, but got '\.\./x'"):
        run(tmp_path / "b", 1, trial_id="bb03", checkpoint_store=str(tmp_path / "s"), parent="../x")


def test_another_trials_checkpoint_in_the_store_is_refused(tmp_path: Path) -> None:
    place = str(tmp_path / "s")
    store = Store(place)
    run(tmp_path / "a", 2, checkpoint_store=place)
    key = CONFIG.identity()[:32]
    (name,) = [n for n in store.names("trials", key) if "2" in n]
    other = CONFIG.replace(task={"seed": 3}).identity()[:32]
    store.put("trials", other, name, content=store.get("trials", key, name, max_bytes=1 << 20))
    with pytest.raises(
        CheckpointError, match=r"belongs to other hyperparameters: task\.seed is 0 there and 3"
    ):
        run(tmp_path / "b", 2, checkpoint_store=place, groups={"task": {"epochs": 2, "seed": 3}})


def test_a_store_that_cannot_be_reached_stops_a_trial_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(StoreError, match="cannot be read"):
        run(tmp_path / "a", 1, checkpoint_store=str(tmp_path / "loop"))
    assert not list((tmp_path / "a").glob("checkpoint-*"))


def test_a_trial_whose_store_went_away_fails_at_the_end_and_a_rerun_repairs_it(
    tmp_path: Path, undisturbed: Path
) -> None:
    place, directory = tmp_path / "s", tmp_path / "a"

    def tick() -> None:
        if place.is_dir() and (directory / "checkpoint-000002.safetensors").exists():
            place.rename(tmp_path / "aside")
            place.write_text("in the way")

    with pytest.raises(StoreError, match="What was trained is whole"):
        run(directory, trial_id="77", checkpoint_store=str(place), tick=tick)
    assert not (directory / "results.json").exists()
    place.unlink()
    (tmp_path / "aside").rename(place)
    assert run(directory, trial_id="77", checkpoint_store=str(place)).statistics["env_steps_here"] == 0.0
    assert_equal(directory, undisturbed)
    assert LAST in Store(str(place)).names("trials", "77")


def test_two_hosts_that_share_a_store_only(tmp_path: Path) -> None:
    """Killed (SIGKILL) on one, it goes on on the other, in another directory."""
    config = {**TINY, "task": {**TINY["task"], "epochs": 6, "max_epochs": 6, "steps_per_epoch": 4096}}
    (tmp_path / "c.yaml").write_text(yamlio.dump(config))
    places = tmp_path / "s" / "trials" / TrialConfig.from_mapping(config).identity()[:32]

    def start(directory: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ppo_hpo", "run", "--config", str(tmp_path / "c.yaml"), *options]
        return subprocess.Popen(
            [*command, "--device", "cpu", "--dir", str(tmp_path / directory)],
            cwd=REPOSITORY,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PPO_HPO_STORE": f"file://{tmp_path / 's'}"},
        )

    assert start("whole", "--store", "").wait() == 0
    assert not places.exists()
    first = start("a")
    while not (places / "checkpoint-000002.safetensors").exists():
        assert first.poll() is None
        time.sleep(0.005)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert start("b").wait() == 0
    log = (tmp_path / "b" / "log.txt").read_text()
    assert "found epoch" in log
    assert "resumes, and trains" in log
    for name in ("checkpoint-000005.safetensors", "checkpoint-000006.safetensors"):
        left, right = (read(tmp_path / place / name) for place in ("whole", "b"))
        assert arrays_digest(left.arrays) == arrays_digest(right.arrays)
        assert left.meta["curve"] == right.meta["curve"]
    assert not list(places.glob(".*"))


def test_a_store_that_is_not_mounted_is_not_an_empty_one(tmp_path: Path, undisturbed: Path) -> None:
    place, directory = tmp_path / "mount" / "store", tmp_path / "a"
    run(directory, 2, trial_id="77", checkpoint_store=str(place))
    (tmp_path / "mount").rename(tmp_path / "unmounted")
    for exists in (False, True):
        if exists:
            place.mkdir(parents=True)
        with pytest.raises(StoreError, match=r"is empty, but this trial was kept in it\. Mount it"):
            run(directory, trial_id="77", checkpoint_store=str(place))
        # Nothing went into the directory below the mount point.
        assert not list((tmp_path / "mount").rglob("*checkpoint*"))
    # Orion's copy for a promoted trial knows it too.
    shutil.copytree(directory, tmp_path / "b")
    with pytest.raises(StoreError, match="Mount it"):
        run(tmp_path / "b", trial_id="78", checkpoint_store=str(place))
    shutil.rmtree(tmp_path / "mount")
    (tmp_path / "unmounted").rename(tmp_path / "mount")
    run(directory, trial_id="77", checkpoint_store=str(place))
    assert_equal(directory, undisturbed)
    # Another store may be new, and so may this one, if the user says so.
    run(directory, trial_id="77", checkpoint_store=str(tmp_path / "other"))
    shutil.rmtree(tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / stores.MARK).touch()
    run(directory, trial_id="77", checkpoint_store=str(tmp_path / "other"))
    assert LAST in Store(str(tmp_path / "other")).names("trials", "77")


def test_a_store_that_never_answers_is_given_up(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS does when its server is gone: the call does not come back."""
    answers, write = threading.Event(), stores._Directory.write
    directory, place = tmp_path / "a", tmp_path / "s"

    def stall(self: Any, place: str, content: bytes) -> None:
        if "checkpoint-000002" in place:
            answers.wait()
        write(self, place, content)

    monkeypatch.setattr(stores._Directory, "write", stall)
    monkeypatch.setattr(stores, "_LIMIT", 2.0)
    try:
        with pytest.raises(StoreError, match=r"has still not answered\. What was trained is whole"):
            run(directory, trial_id="77", checkpoint_store=str(place))
    finally:
        answers.set()
    log = (directory / "log.txt").read_text()
    assert log.count("has not answered for 2 seconds") == 1
    assert "epoch 3 is here, but not in the store yet: The store" in log
    monkeypatch.undo()
    run(directory, trial_id="77", checkpoint_store=str(place))
    assert_equal(directory, undisturbed)


def test_what_killed_writers_left_in_the_store_is_removed(url: str, tmp_path: Path) -> None:
    run(tmp_path / "a", 2, trial_id="77", checkpoint_store=url, siblings=tmp_path)
    store = Store(url)
    left = [("trials", "77"), ("identities", CONFIG.identity()[:32])]
    for folder in left:
        for name in (".0123456789abcdef.tmp", ".ppo-hpo-12-0123.tmp"):
            store._objects.write("/".join((*folder, name)), b"torn")
    store.remove("identities", CONFIG.identity()[:32], "77")
    run(tmp_path / "a", trial_id="77", checkpoint_store=url, siblings=tmp_path)
    for folder in left:
        assert not [name for name in store._objects.names("/".join(folder)) if name.startswith(".")]
    assert LAST in store.names("trials", "77")


# ------------------------------------------------------------- servers, where they are installed


def test_s3(tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "a"),
            ("AWS_SECRET_ACCESS_KEY", "b"),
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem().mkdir("bucket")
        run(tmp_path / "a", 2, trial_id="11aa", checkpoint_store="s3://bucket/some/where")
        outcome = run(tmp_path / "b", trial_id="11aa", checkpoint_store="s3://bucket/some/where")
        assert outcome.statistics["continued_from_epoch"] == 2.0
        assert_equal(tmp_path / "b", undisturbed)
        names = Store("s3://bucket/some/where").names("trials", "11aa")
        assert names == ["checkpoint-000003.safetensors", LAST]
    finally:
        server.stop()


def test_sftp(tmp_path: Path, undisturbed: Path) -> None:
    """A server whose files have no appearing at once: an object is written aside, and renamed."""
    pytest.importorskip("paramiko")
    import sftp_server

    root = tmp_path / "served"
    root.mkdir()
    with sftp_server.serving(root) as (port, renames):
        url = f"sftp://me:{sftp_server.PASSWORD}@127.0.0.1:{port}/here/there"
        run(tmp_path / "a", 2, trial_id="11aa", checkpoint_store=url)
        outcome = run(tmp_path / "b", trial_id="11aa", checkpoint_store=url)
        assert outcome.statistics["continued_from_epoch"] == 2.0
        assert_equal(tmp_path / "b", undisturbed)
        there = root / "here" / "there" / "trials" / "11aa"
        assert sorted(path.name for path in there.iterdir()) == ["checkpoint-000003.safetensors", LAST]
        assert f"/here/there/trials/11aa/{LAST}" in renames
        assert sftp_server.PASSWORD not in (tmp_path / "b" / "log.txt").read_text()

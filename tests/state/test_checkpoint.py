"""Checkpoints: whole or refused, whatever happened to the file; and never run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from ppo_hpo.spec.errors import CheckpointError, TornCheckpoint, UserError
from ppo_hpo.state import checkpoint
from ppo_hpo.state.checkpoint import (
    VERSION,
    Checkpoint,
    Storage,
    arrays_digest,
    from_bytes,
    read,
    to_bytes,
)  # fmt: skip
from ppo_hpo.state.files import remove_temporary_files, write_atomically

ARRAYS: dict[str, Any] = {
    "model.weight": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "scalar": np.array(3.5),
    "step": np.array(17, np.int64),
    "flag": np.array(True),
    "half": np.array([1.5, -2.0], np.float16),
    "double": np.array([[1e300, -1e-300]]),
    "bytes": np.array([0, 255], np.uint8),
    "empty": np.zeros((0, 5), np.float32),
}
META = {
    "identity": "ab" * 32,
    "uid": None,
    "curve": [{"epoch": 0, "return_mean": 0.1 + 0.2, "note": 'quotes "sha256":" and ≥'}],
    "hyperparameters": {"optimizer": {"lr": 1e-4}},
}


def some(epoch: int = 3, value: float = 1.0) -> Checkpoint:
    return Checkpoint(epoch, {"w": np.full(8, value, np.float32)}, {"uid": "me"})


def forge(header: dict[str, Any], arrays: dict[str, Any], *, digest: str | None = None) -> bytes:
    """A checkpoint by the letter of the module's description, made without its code."""
    text = header if isinstance(header, str) else json.dumps(header)
    content = safetensors.numpy.save(arrays, metadata={"ppo_hpo": text, "sha256": "0" * 64})
    digest = digest or hashlib.sha256(content).hexdigest()
    assert content.count(b'"sha256":"' + b"0" * 64) == 1
    return content.replace(b'"sha256":"' + b"0" * 64, b'"sha256":"' + digest.encode())


# ------------------------------------------------------------------------- round trip


def test_round_trip_keeps_every_bit_type_and_shape() -> None:
    back = from_bytes(to_bytes(Checkpoint(7, ARRAYS, META)), "it")
    assert back.epoch == 7
    assert back.meta == META
    assert back.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert back.arrays[name].dtype == array.dtype, name
        assert back.arrays[name].shape == array.shape, name
        assert back.arrays[name].tobytes() == array.tobytes(), name


def test_arrays_in_another_order_of_memory_keep_their_meaning() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"transposed": array.T, "strided": array[::2, ::3], "fortran": np.asfortranarray(array)}
    back = from_bytes(to_bytes(Checkpoint(0, views, {})), "it").arrays
    for name, view in views.items():
        np.testing.assert_array_equal(back[name], view)


def test_the_form_is_the_one_described() -> None:
    content = forge({"version": VERSION, "epoch": 5, "uid": "x"}, {"w": np.ones(2)})
    back = from_bytes(content, "it")
    assert (back.epoch, back.meta) == (5, {"uid": "x"})
    np.testing.assert_array_equal(back.arrays["w"], np.ones(2))


def test_any_reader_of_safetensors_reads_the_arrays(tmp_path: Path) -> None:
    path = Storage(tmp_path).save(Checkpoint(1, ARRAYS, META))
    found = safetensors.numpy.load_file(path)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


def test_what_json_cannot_say_is_not_saved() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_bytes(Checkpoint(1, {}, {"curve": [float("nan")]}))


# ------------------------------------------------------------------------------ damage


def test_truncated_at_every_length() -> None:
    content = to_bytes(some())
    assert len(content) > 200
    for length in range(len(content)):
        with pytest.raises(CheckpointError, match=r"it is torn|it cannot be read"):
            from_bytes(content[:length], "it")


def test_every_single_flipped_bit_is_noticed() -> None:
    content = to_bytes(some())
    reasons = set()
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            with pytest.raises(CheckpointError) as error:
                from_bytes(bytes(damaged), "it")
            reasons.add(str(error.value))
    assert reasons == {
        "it is torn, or not a checkpoint of ppo_hpo.",
        "it is torn or was changed: its checksum does not match.",
    }


@pytest.mark.parametrize("extra", [b"\0", b"x" * 1000])
def test_bytes_that_were_added_are_noticed(extra: bytes) -> None:
    with pytest.raises(CheckpointError, match="its checksum does not match"):
        from_bytes(to_bytes(some()) + extra, "it")


def test_a_stretch_of_zeros_is_noticed() -> None:
    # What a file system may leave of a file whose data was never flushed.
    content = to_bytes(Checkpoint(1, ARRAYS, META))
    for start in range(0, len(content), 64):
        damaged = content[:start] + bytes(len(content[start:]))
        with pytest.raises(CheckpointError, match="torn"):
            from_bytes(damaged, "it")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_what_is_not_finite_is_refused(bad: float, dtype: Any) -> None:
    arrays = {"good": np.ones(3, dtype), "actor.weight": np.array([0.0, bad], dtype)}
    with pytest.raises(CheckpointError, match=r"it is not finite: actor.weight holds NaN or infinity"):
        from_bytes(forge({"version": VERSION, "epoch": 1}, arrays), "it")
    with pytest.raises(CheckpointError, match=r"is not saved: actor.weight holds NaN"):
        to_bytes(Checkpoint(1, arrays, {}))


def test_another_version_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"it has version 2, but this ppo_hpo reads version 1\. Resume"):
        from_bytes(forge({"version": VERSION + 1, "epoch": 1}, {"w": np.ones(1)}), "it")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"epoch": 1}, "not a checkpoint of ppo_hpo"),
        ({"version": 1}, "not a checkpoint of ppo_hpo"),
        ({"version": 1, "epoch": "x"}, "not a checkpoint of ppo_hpo"),
        ({"version": 1, "epoch": None}, "not a checkpoint of ppo_hpo"),
        ({"version": 1, "epoch": float("inf")}, "not a checkpoint of ppo_hpo"),
        ([1, 2], "not a checkpoint of ppo_hpo"),
        ("no json", "not a checkpoint of ppo_hpo"),
        ("[" * 100_000, "not a checkpoint of ppo_hpo"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_header_of_somebody_else(header: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        from_bytes(forge(header, {"w": np.ones(1)}), "it")


def test_wrong_digest() -> None:
    with pytest.raises(CheckpointError, match="checksum does not match"):
        from_bytes(forge({"version": 1, "epoch": 1}, {"w": np.ones(1)}, digest="f" * 64), "it")


def raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"hello",
        safetensors.numpy.save({"w": np.ones(4)}),
        safetensors.numpy.save({"w": np.ones(4)}, metadata={"format": "pt"}),
        (2**60).to_bytes(8, "little") + b"{}" * 100,
        (2**64 - 1).to_bytes(8, "little") + b"{}" * 100,
        raw(b"[]"),
        raw(b"3"),
        raw(b"{"),
        raw(b"\xff\xfe"),
        raw(b'{"__metadata__": 3}'),
        raw(b'{"__metadata__": {"sha256": 3, "ppo_hpo": 4}}'),
        raw(rb'{"__metadata__": {"sha256": "\ud800", "ppo_hpo": "{}"}}'),
        raw(b"[" * 100_000),
        raw(b"9" * 10_000),
        pickle.dumps({"epoch": 3, "arrays": [1, 2, 3]}),
        b"PK\x03\x04" + b"\0" * 500,
        random.Random(0).randbytes(5000),
    ],
    ids=lambda content: repr(content[:20]),
)
def test_foreign_files_are_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="torn") as error:
        from_bytes(content, "some/file")
    assert str(error.value).startswith("some/file is ")
    assert "\n" not in str(error.value)


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.victim}",))


def test_loading_runs_no_code(tmp_path: Path) -> None:
    import torch

    victim = tmp_path / "touched"
    path = tmp_path / "checkpoint-000001.safetensors"
    path.write_bytes(pickle.dumps(Bomb(victim)))
    with pytest.raises(CheckpointError):
        read(path)
    torch.save({"bomb": Bomb(victim)}, path)
    with pytest.raises(CheckpointError):
        Storage(tmp_path).load()
    assert not victim.exists()
    pickle.loads(pickle.dumps(Bomb(victim)))  # that it would have, had anybody unpickled it
    assert victim.exists()


def test_file_that_is_no_checkpoint_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-000001.safetensors"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    with pytest.raises(CheckpointError, match="is larger than 4294967296 bytes: it is not read"):
        read(path)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file or directory"):
        read(tmp_path / "checkpoint-000001.safetensors")
    (tmp_path / "checkpoint-000002.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        Storage(tmp_path).load()


# ----------------------------------------------------------------------------- storage


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for epoch in range(1, 13):
        path = storage.save(some(epoch, value=epoch))
        assert path == tmp_path / f"checkpoint-{epoch:06d}.safetensors"
    assert names(tmp_path) == ["checkpoint-000011.safetensors", "checkpoint-000012.safetensors"]
    assert [path.name for path in storage.paths()] == names(tmp_path)[::-1]
    found = storage.load()
    assert found is not None
    assert found.epoch == 12
    assert set(found.arrays["w"]) == {12.0}


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    others = ["notes.txt", "checkpoint-1.safetensors", "checkpoint-000001.safetensors.bak", "checkpoint-best"]
    for other in others:
        (tmp_path / other).write_text("mine")
    for epoch in range(4):
        Storage(tmp_path).save(some(epoch))
    assert names(tmp_path) == sorted(
        [*others, "checkpoint-000002.safetensors", "checkpoint-000003.safetensors"]
    )


def test_nothing_to_load(tmp_path: Path) -> None:
    assert Storage(tmp_path).load() is None
    assert Storage(tmp_path / "nowhere").load() is None
    assert not (tmp_path / "nowhere").exists()


def test_a_torn_checkpoint_is_skipped_with_the_reason(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.save(some(4, value=4.0))
    newest = storage.save(some(5, value=5.0))
    newest.write_bytes(newest.read_bytes()[:-1])
    told: list[str] = []
    found = storage.load(on_refused=lambda error: told.append(str(error)))
    assert found is not None
    assert (found.epoch, found.arrays["w"][0]) == (4, 4.0)
    assert told == [f"{newest} is torn or was changed: its checksum does not match."]
    # Going on from there writes over the torn one.
    storage.save(some(5, value=5.5))
    again = storage.load(on_refused=lambda error: pytest.fail(str(error)))
    assert again is not None
    assert again.arrays["w"][0] == 5.5


def test_a_checkpoint_that_does_not_belong_here_is_skipped(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.save(some(4))
    storage.save(some(5))
    told: list[str] = []

    def check(checkpoint: Checkpoint) -> None:
        if checkpoint.epoch > 4:
            raise CheckpointError("too far")

    found = storage.load(check, lambda error: told.append(str(error)))
    assert found is not None
    assert found.epoch == 4
    assert told == ["too far"]


def test_if_no_checkpoint_is_usable_the_latest_ones_reason_is_raised(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    for epoch in (4, 5):
        path = storage.save(some(epoch))
        path.write_bytes(b"torn")
    told: list[str] = []
    with pytest.raises(CheckpointError, match=r"checkpoint-000005\.safetensors is torn"):
        storage.load(on_refused=lambda error: told.append(str(error)))
    assert not told


# ---------------------------------------------------------------------- writing, whole


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    Storage(tmp_path).save(some(1))
    for name in (".ppo-hpo-1-abc.tmp", ".ppo-hpo-2-x.tmp"):
        (tmp_path / name).write_text("half")
    for name in ("mine.tmp", ".mine.tmp"):
        (tmp_path / name).write_text("mine")
    remove_temporary_files(tmp_path)
    assert names(tmp_path) == [".mine.tmp", "checkpoint-000001.safetensors", "mine.tmp"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_are_as_open_as_others(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        path = Storage(tmp_path).save(some(1))
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written: File exists\. What was saved before"):
        Storage(file).save(some(1))
    with pytest.raises(UserError, match=r"cannot be written: Not a directory\. What was saved before"):
        Storage(file / "below").save(some(1))
    assert file.read_text() == "mine"


def test_directory_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "runs" / "mine")
    assert storage.load() is None
    assert storage.save(some(1)).is_file()


def test_a_directory_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    # Not a mode: the superuser reads in spite of it.
    loop = tmp_path / "trial"
    loop.symlink_to(loop)
    with pytest.raises(UserError, match=r"trial cannot be read: Too many levels of symbolic links\. Fix"):
        Storage(loop).load()
    assert Storage(tmp_path / "missing").paths() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_directory_that_is_not_ours(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    storage.save(some(1))
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot be written: Permission denied"):
            storage.save(some(2))
    finally:
        tmp_path.chmod(0o700)
    assert names(tmp_path) == ["checkpoint-000001.safetensors"]


def python(code: str, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_full_disk_leaves_the_one_before(tmp_path: Path) -> None:
    # A limit on the size of files gives the writer a short write and an error, as a full disk does.
    process = python(
        """
        import resource, signal, sys
        import numpy as np
        from ppo_hpo.state.checkpoint import Checkpoint, Storage
        from ppo_hpo.spec.errors import UserError

        storage = Storage(sys.argv[1])
        storage.save(Checkpoint(1, {"w": np.ones(10)}, {}))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        storage.save(Checkpoint(2, {"w": np.ones(20)}, {}))
        for epoch, again in ((3, 10_000), (2, 10_000)):
            try:
                storage.save(Checkpoint(epoch, {"w": np.ones(again)}, {}))
            except UserError as error:
                print(error)
        """,
        tmp_path,
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 2
    for line, epoch in zip(out.splitlines(), (3, 2), strict=True):
        assert line.startswith(
            f"{tmp_path}/checkpoint-00000{epoch}.safetensors cannot be written: File too large."
        )
        assert "What was saved before is whole" in line
    assert names(tmp_path) == ["checkpoint-000001.safetensors", "checkpoint-000002.safetensors"]
    found = Storage(tmp_path).load(on_refused=lambda error: pytest.fail(str(error)))
    assert found is not None
    assert (found.epoch, found.arrays["w"].size) == (2, 20)


def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from ppo_hpo.state.files import write_atomically

        print("ready", flush=True)
        count = 0
        while True:
            count += 1
            write_atomically(Path(sys.argv[1]), bytes([count % 256]) * 3_000_000)
        """
    path = tmp_path / "file"
    write_atomically(path, b"\0" * 3_000_000)
    chance = random.Random(1)
    seen = set()
    for _ in range(12):
        process = python(code, path)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        content = path.read_bytes()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1
        seen.add(content[0])
    assert len(seen) > 1
    remove_temporary_files(tmp_path)
    assert names(tmp_path) == ["file"]


def test_readers_see_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    import threading

    path = tmp_path / "file"
    contents = [bytes([value]) * 500_000 for value in range(8)]
    write_atomically(path, contents[0])
    done = threading.Event()
    seen: set[bytes] = set()

    def look() -> None:
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=look)
    reader.start()
    for content in contents * 10:
        write_atomically(path, content)
    done.set()
    reader.join()
    assert seen <= set(contents)
    assert len(seen) > 1


def test_an_error_while_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes")  # type: ignore[arg-type]
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


# ------------------------------------------------------------------- limits and digests


def test_limits_are_those_of_the_documentation() -> None:
    """docs/reference/limits-on-files.md: 16 MiB, 600,000 values, and nesting of 40."""
    assert (checkpoint.MAX_BYTES, checkpoint.MAX_HEADER) == (4 * 2**30, 16 * 2**20)
    for text, limit in (
        (b"x" * checkpoint.MAX_HEADER, "16777216 bytes"),
        (b",[{" * 200_000, "600000 values"),
    ):
        assert checkpoint._over_limit(text) == ""
        assert limit in checkpoint._over_limit(text + b",")
    for depth, refused in ((40, False), (41, True)):
        value: Any = 1
        for level in range(depth):
            value = {"deeper": value} if level % 2 else [value]
        assert ("nested more than 40 deep" in checkpoint._not_plain(value)) is refused


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 10**400])
def test_numbers_in_a_header_must_be_finite(bad: Any) -> None:
    assert checkpoint._not_plain({"a": [1, 2.5, True, None, "text", {"b": [bad]}]}) != ""
    assert checkpoint._not_plain({"a": [1, 2.5, True, False, None, "text", {"b": [-3]}]}) == ""


def test_the_digest_of_arrays_knows_names_types_shapes_and_bytes() -> None:
    array = np.arange(4, dtype=np.float32)
    states = [
        {"a": array}, {"b": array}, {"a": array + 1}, {"a": array.reshape(2, 2)}, {"a": array.view(np.int32)},
        {"a": array, "b": array}, {},
    ]  # fmt: skip
    assert len({arrays_digest(state) for state in states}) == len(states)
    assert arrays_digest({"a": array, "b": array + 1}) == arrays_digest({"b": array + 1, "a": array})
    grid = np.arange(6).reshape(2, 3)
    assert arrays_digest({"a": grid.T}) == arrays_digest({"a": np.ascontiguousarray(grid.T)})


def test_a_storage_says_where_it_is_and_writes_as_it_is_told(tmp_path: Path) -> None:
    written: list[Path] = []
    storage = Storage(tmp_path / "deep" / "er", lambda path, content: written.append(path))
    assert repr(storage) == f"Storage({str(tmp_path / 'deep' / 'er')!r})"
    assert storage.save(some()) == written[0] == storage.path_of(some().epoch)
    assert storage.directory.is_dir()


def test_a_header_that_could_not_be_read_is_not_written() -> None:
    deep: Any = 1
    for _ in range(45):
        deep = [deep]
    for value, reason in ((deep, "nested more than 40 deep"), ([0] * 600_000, "more than 600000 values")):
        with pytest.raises(CheckpointError, match=f"is not saved: it.* {reason}"):
            to_bytes(Checkpoint(1, {}, {"curve": value}))


def test_the_epoch_in_a_files_name_is_that_of_its_content(tmp_path: Path) -> None:
    names = [
        "checkpoint-000012.safetensors",
        "checkpoint-12.safetensors",
        "checkpoint-000012.safetensors~",
        "",
    ]
    assert [checkpoint.epoch_of(name) for name in names] == [12, None, None, None]
    path = Storage(tmp_path).save(some(3))
    assert read(path).epoch == 3
    with pytest.raises(CheckpointError, match="is the checkpoint of another epoch, 3: the file was renamed"):
        read(path.rename(tmp_path / "checkpoint-000004.safetensors"))


def test_a_checkpoint_without_arrays_is_whole() -> None:
    assert from_bytes(to_bytes(Checkpoint(2, {}, META)), "it").meta == META


def test_a_header_that_is_cut_is_torn_whatever_it_says() -> None:
    for content in (b"", b"\7", (10**9).to_bytes(8, "little") + b"," * 600_001):
        with pytest.raises(TornCheckpoint, match="it is torn"):
            from_bytes(content, "it")


def test_a_header_beyond_the_limits_is_not_parsed() -> None:
    for text, reason in ((b"[" * 600_001, "600000 values"), (b" " * (16 * 2**20 + 1), "16777216 bytes")):
        with pytest.raises(
            CheckpointError, match=f"it is not a checkpoint of ppo_hpo: its header .* {reason}"
        ):
            from_bytes(len(text).to_bytes(8, "little") + text, "it")


def test_a_digest_in_another_form_is_no_digest() -> None:
    text = json.dumps({"__metadata__": {"sha256": "0" * 64, "ppo_hpo": "{}"}}).encode()  # with spaces
    with pytest.raises(TornCheckpoint, match="its checksum does not match"):
        from_bytes(len(text).to_bytes(8, "little") + text, "it")


def test_a_url_is_no_directory() -> None:
    with pytest.raises(UserError, match=r"A storage must be a directory, but got 's3://bucket/trial'"):
        Storage("s3://bucket/trial")

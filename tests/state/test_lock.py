"""One writer for one trial: claims, who is taken for dead, the fence, and takeovers, with real processes."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.errors import LostLock, UserError
from ppo_hpo.state import claim as claims
from ppo_hpo.state import lock
from ppo_hpo.state.claim import Writer, latest_writer, take_claim
from ppo_hpo.state.files import write_atomically
from ppo_hpo.state.process_identity import HOST_VARIABLE, Process, start_time
from tests.state.lock_race import fork
from tests.state.without_flock import without_flock
from tests.waiting import may_mount

REPOSITORY = Path(__file__).parents[2]
ROUNDS = 50
TINY = {
    "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
    "task": {"epochs": 4, "steps_per_epoch": 256, "eval_episodes": 2},
    "model": {"width": 8, "depth": 1},
    "ppo": {"n_steps": 64, "batch_size": 32, "n_epochs": 2},
}


class Clock:
    """The module's clock, which only runs while somebody sleeps; what is to happen then is called."""

    def __init__(self, each: Callable[[float], None] = lambda now: None) -> None:
        self.now = 1000.0
        self.each = each

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.each(self.now - 1000.0)

    @property
    def waited(self) -> float:
        return self.now - 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    given = SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep)
    monkeypatch.setattr(lock, "time", given)
    return clock


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # put back afterwards
    without_flock()


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Some process that has nothing to do with any trial."""
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


def described(pid: int) -> Process:
    started = start_time(pid)
    assert started is not None
    return replace(Process.current(), pid=pid, started=started)


def leave(directory: Path, process: Process | None, number: int = 4, *, flock: bool = True) -> Path:
    """What a writer has in a trial's directory while it writes; its stage."""
    stage = directory / "writer" / f"{number:06d}" / "stage-0011223344556677"
    stage.mkdir(parents=True)
    record = {"number": number, "taken": 1.7e9, "flock": flock, **(asdict(process) if process else {})}
    (stage.parent / "record.json").write_text(json.dumps(record))
    return stage


def dead() -> Process:
    with subprocess.Popen(["sleep", "600"]) as process:
        who = described(process.pid)
        process.kill()
    return who


ELSEWHERE = Process("elsewhere", "another-boot", "pid:[1]", 12, 34, 0)


# ---------------------------------------------------------------- who is dead


def test_numbers_grow(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        with lock.hold(tmp_path) as claim:
            assert claim.number == number
            writer = latest_writer(tmp_path)
            assert writer is not None
            assert (writer.number, writer.process) == (number, Process.current())
            assert writer.has_ended(have_flock=False) is False
        writer = latest_writer(tmp_path)
        assert writer is not None
        assert writer.has_ended(have_flock=False) is True
        # Nothing but the record of the last writer stays.
        files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir()]
        assert sorted(files) == ["lock", f"writer/00000{number}/record.json"]


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no-flock"])
@pytest.mark.parametrize("case", ["dead", "reused", "done"])
def test_dead_writers_are_not_waited_for(
    case: str, flock: bool, clock: Clock, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not flock:
        request.getfixturevalue("no_flock")
    with sleeper() as living:
        who = described(living.pid)
        if case == "dead":
            who = dead()
        elif case == "reused":
            who = replace(who, started=who.started - 1)
        stage = leave(tmp_path, who, flock=flock)
        if case == "done":
            stage.rmdir()
        with lock.hold(tmp_path, takeover=True) as claim:
            assert claim.number == 5
        assert clock.waited == 0.0
        assert living.poll() is None
        assert [path.name for path in (tmp_path / "writer").iterdir()] == ["000005"]


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no-flock"])
@pytest.mark.parametrize(
    "change",
    [
        None,
        {"host": "elsewhere", "boot": "another-boot"},
        # Another machine of this name, or this one before it was rebooted: nothing tells which.
        {"boot": "another-boot"},
        {"boot": ""},
    ],
    ids=["no-record", "another-host", "another-boot", "no-boot-id"],
)
def test_a_writer_that_cannot_be_seen_counts_as_dead_after_a_minute_of_silence(
    change: dict[str, Any] | None, flock: bool, clock: Clock, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not flock:
        request.getfixturevalue("no_flock")
    stage = leave(tmp_path, None if change is None else replace(dead(), **change))

    def renew(now: float) -> None:
        # A writer whose clock is wrong by years; what counts is that it moves.
        if now < 100.0:
            os.utime(stage, (now, now))

    clock.each = renew
    with lock.hold(tmp_path) as claim:
        assert claim.number == 5
    # Looks are half a second apart.
    assert 159.0 <= clock.waited <= 161.0


def test_a_writer_that_holds_flock_lives_even_without_a_sign_of_life(clock: Clock, tmp_path: Path) -> None:
    # Stopped, and on another machine that shares the lock: it may wake up and go on.
    leave(tmp_path, ELSEWHERE)
    other = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)

    def let_go(now: float) -> None:
        if now > 500.0:
            fcntl.flock(other, fcntl.LOCK_UN)

    clock.each = let_go
    with lock.hold(tmp_path):
        assert 500.0 < clock.waited < 502.0
    os.close(other)


def test_takeover_ignores_the_flock_of_a_silent_writer(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = leave(tmp_path, ELSEWHERE)
    other = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    asked = []
    clock.each = lambda now: asked.append((stage.parent / "asked").exists())
    with lock.hold(tmp_path, takeover=True) as claim:
        assert claim.number == 5
        assert 60.0 <= clock.waited <= 61.0
        # It is a writer although another has flock, and whoever gets that finds it alive.
        writer = latest_writer(tmp_path)
        assert writer is not None
        assert not writer.flock
        assert writer.has_ended(have_flock=True) is False
    os.close(other)
    assert all(asked)
    assert "process 12 on elsewhere, since 2023-11-14" in caplog.text
    assert "is asked to give way" in caplog.text
    assert "cannot be ended from here" in caplog.text


def test_flock_held_by_children_of_a_dead_writer(clock: Clock, tmp_path: Path) -> None:
    leave(tmp_path, dead())
    other = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    with lock.hold(tmp_path):
        assert 5.0 <= clock.waited <= 6.0
    os.close(other)


def test_claims_that_came_with_a_copied_directory(clock: Clock, tmp_path: Path) -> None:
    # Orion copies a parent's directory for its child, and the parent may be going on.
    with lock.hold(tmp_path / "parent") as parent:
        shutil.copytree(tmp_path / "parent", tmp_path / "child")
        with lock.hold(tmp_path / "child", takeover=True) as child:
            assert child.number == parent.number + 1
        parent.check_still_held()
        parent.raise_if_lost()
    assert clock.waited == 0.0


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 4000, "null", '{"pid": 1}', "pid", "x" * 100_000],
    ids=["empty", "torn", "deep", "null", "incomplete", "text", "long"],
)
def test_invalid_records_name_no_process(text: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    assert claims._read_record(path) == (None, 0.0, False)


@pytest.mark.parametrize(
    "change",
    [
        {"pid": -1}, {"pid": 0}, {"pid": 1 << 40}, {"pid": "1"}, {"pid": True}, {"started": 1.5},
        {"host": ""}, {"host": "a\x1b[2J"}, {"host": "a\nb"}, {"boot": None}, {"taken": 1e300},
        {"taken": "soon"},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_records(change: dict[str, Any], tmp_path: Path) -> None:
    stage = leave(tmp_path, ELSEWHERE)
    path = stage.parent / "record.json"
    assert claims._read_record(path)[0] == ELSEWHERE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert claims._read_record(path) == (None, 0.0, False)
    writer = latest_writer(tmp_path)
    assert writer is not None
    assert writer.has_ended(have_flock=True) is None


def test_the_last_number(tmp_path: Path) -> None:
    leave(tmp_path, dead(), number=999_999_999_999)
    with pytest.raises(UserError, match="has no numbers left"), lock.hold(tmp_path):
        pass


def test_the_name_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Process.current()
    assert own.is_running() is True
    # A laptop in another network has another name. A clone of a machine has another boot.
    assert replace(own, host="name-before").is_running() is True
    monkeypatch.setenv(HOST_VARIABLE, "node-7.local")
    assert Process.current() == replace(own, host="node-7.local")
    assert own.is_running() is None
    monkeypatch.setenv(HOST_VARIABLE, "two words")
    with pytest.raises(UserError, match="`PPO_HPO_HOST` must be letters, digits"), lock.hold(tmp_path):
        pass


# ------------------------------------------------------------------ the fence


@pytest.mark.parametrize("moment", ["before", "at the rename"])
def test_a_writer_that_lost_its_claim_cannot_write(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "curve.jsonl"

    def lose() -> None:
        newer = take_claim(tmp_path, 2, flock=False)
        assert newer is not None
        newer.write(path, b"newer")

    real = os.replace

    def lose_at_the_rename(source: Path, target: Path) -> None:
        assert source.read_bytes() == b"older"
        monkeypatch.undo()
        lose()
        real(source, target)

    with lock.hold(tmp_path) as claim:
        claim.write(path, b"first")
        if moment == "before":
            lose()
        else:
            monkeypatch.setattr(os, "replace", lose_at_the_rename)
        with pytest.raises(LostLock, match="writer 1 lost the trial: another process took it over"):
            claim.write(path, b"older")
        assert path.read_bytes() == b"newer"
        with pytest.raises(LostLock):
            claim.check_still_held()
    # Nothing of it is left, and the newer one was not disturbed by its end.
    writer = latest_writer(tmp_path)
    assert writer is not None
    assert (writer.number, writer.has_ended(have_flock=False)) == (2, False)
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def test_without_the_fence_it_would_have_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "curve.jsonl", os.replace

    def lose_at_the_rename(source: Path, target: Path) -> None:
        monkeypatch.undo()
        path.write_bytes(b"newer")
        real(source, target)

    monkeypatch.setattr(os, "replace", lose_at_the_rename)
    write_atomically(path, b"older")
    assert path.read_bytes() == b"older"


def test_numbers_that_begin_again_fence_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "_HEARTBEAT", 600.0)
    with lock.hold(tmp_path) as claim:
        shutil.rmtree(tmp_path)  # somebody cleaned up
        newer = take_claim(tmp_path, 1, flock=True)
        assert newer is not None
        with pytest.raises(LostLock):
            claim.write(tmp_path / "curve.jsonl", b"older")
        newer.write(tmp_path / "curve.jsonl", b"newer")


def test_a_directory_that_cannot_be_written_is_no_lost_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with lock.hold(tmp_path) as claim:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            claim.write(tmp_path / "curve.jsonl", b"x")


def test_one_number_for_one_of_many(tmp_path: Path) -> None:
    # A waiter that judged writer 4 dead and was then stopped for long finds its number taken, or used up.
    leave(tmp_path, dead())
    first = take_claim(tmp_path, 5, flock=False)
    assert first is not None
    assert take_claim(tmp_path, 5, flock=False) is None
    first.check_still_held()
    first.release()
    second = take_claim(tmp_path, 6, flock=False)
    assert second is not None
    assert take_claim(tmp_path, 5, flock=False) is None
    second.check_still_held()
    assert [path.name for path in (tmp_path / "writer").iterdir()] == ["000006"]


def test_many_break_one_dead_lock(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    times = 10
    for n in range(times):
        directory = tmp_path / str(n)
        leave(directory, dead())

        def take(directory: Path = directory) -> None:
            without_flock()
            lock._POLL_LAST = 0.05
            with lock.hold(directory) as claim:
                begun = time.monotonic_ns()
                claim.write(directory / "file", b"x")
                claim.check_still_held()
                line = f"{directory.name} {claim.number} {begun} {time.monotonic_ns()}\n"
                with trace.open("a") as file:
                    file.write(line)

        pids = [fork(take) for _ in range(6)]
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 6
    lines = [tuple(map(int, line.split())) for line in trace.read_text().splitlines()]
    for n in range(times):
        held = sorted(line[1:] for line in lines if line[0] == n)
        assert [number for number, _, _ in held] == [5, 6, 7, 8, 9, 10]
        ends = [moment for _, begun, ended in held for moment in (begun, ended)]
        assert ends == sorted(ends)


# ------------------------------------------------------------------- takeover


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def holding(directory: Path) -> bool:
    writer = latest_writer(directory)
    return writer is not None and writer.stage is not None


def deaf(directory: Path, *, ignores_sigterm: bool) -> int:
    """A writer that never looks whether it was asked to give way."""

    def run() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if ignores_sigterm else signal.SIG_DFL)
        with lock.hold(directory):
            time.sleep(600)

    pid = fork(run)
    until(lambda: holding(directory))
    return pid


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no-flock"])
@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL", "stopped"])
def test_takeover_ends_a_writer_that_does_not_give_way(
    how: str, flock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not flock:
        request.getfixturevalue("no_flock")
    monkeypatch.setattr(lock, "_AFTER_ASKING", 0.1)
    monkeypatch.setattr(lock, "_AFTER_SIGTERM", 0.1)
    pid = deaf(tmp_path, ignores_sigterm=how == "SIGKILL")
    if how == "stopped":
        os.kill(pid, signal.SIGSTOP)
    with lock.hold(tmp_path, takeover=True) as claim:
        assert claim.number == 2
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == (signal.SIGKILL if how == "SIGKILL" else signal.SIGTERM)


def test_two_takeovers_do_not_end_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_AFTER_ASKING", 0.1)
    monkeypatch.setattr(lock, "_AFTER_SIGTERM", 0.1)
    first = deaf(tmp_path, ignores_sigterm=False)

    def take() -> None:
        with lock.hold(tmp_path, takeover=True):
            time.sleep(1.0)

    others = [fork(take), fork(take)]
    assert os.WTERMSIG(os.waitpid(first, 0)[1]) == signal.SIGTERM
    assert [os.waitpid(pid, 0)[1] for pid in others] == [0, 0]
    with lock.hold(tmp_path) as claim:
        assert claim.number == 4


def test_only_the_writer_is_signalled(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    kill = (signal.SIGKILL,)

    def writer(who: Process | None) -> Writer:
        return Writer(1, who, 0.0, True, "stage-00", 0)

    with sleeper() as innocent:
        who = described(innocent.pid)
        for claimed in (
            None,
            who,  # it has not this trial's lock open
            replace(who, started=who.started - 1),
            replace(who, host="elsewhere"),
            replace(who, boot="another-boot"),
            replace(who, namespace="pid:[1]"),
            Process.current(),
        ):
            assert not lock._send(writer(claimed), tmp_path / "lock", kill)
        assert innocent.poll() is None
    with (
        (tmp_path / "lock").open() as inherited,
        subprocess.Popen(["sleep", "600"], stdin=inherited) as process,
    ):
        who = described(process.pid)
        assert not lock._send(writer(replace(who, started=who.started + 1)), tmp_path / "lock", kill)
        assert lock._send(writer(who), tmp_path / "lock", kill)
        assert process.wait() == -signal.SIGKILL
        assert not lock._send(writer(who), tmp_path / "lock", kill)


# -------------------------------------------------------------- whole trials


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yamlio.dump(TINY))
    return path


def test_fifty_times_two_processes_on_one_trial(config: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.state.lock_race", config, tmp_path / "rounds", str(ROUNDS), "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    # It was a race: they were ended, stopped, and gave way to each other.
    assert counts["started"] >= 2 * ROUNDS
    assert min(counts["ended"], counts["stopped"], counts["takeovers"]) >= ROUNDS // 4
    assert counts["gave-way"] >= ROUNDS // 5


@pytest.mark.parametrize("moment", ["step", "rename"])
def test_a_writer_that_wakes_up_too_late_changes_nothing_and_reports_the_others_result(
    moment: str, config: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "trial"
    command = [sys.executable, "-m", "tests.state.stopped_writer", config, directory, moment]
    # Two machines that share a file system, as far as they can tell.
    first = subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, HOST_VARIABLE: "one"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until(lambda: Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        half_way = sorted(path.name for path in directory.glob("checkpoint-*"))
        assert half_way == ["checkpoint-000001.safetensors", "checkpoint-000002.safetensors"]
        second = subprocess.run(
            [*command[:-1], "goes on"], cwd=REPOSITORY, env={**os.environ, HOST_VARIABLE: "two"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert second.returncode == 0, second.stderr
        assert f"process {first.pid} on one, since" in second.stderr
        assert "is asked to give way" in second.stderr
        with lock.hold(directory, takeover=True):
            before = contents(directory)
            assert "checkpoint-000004.safetensors" in before
            first.send_signal(signal.SIGCONT)
            assert first.stderr is not None
            told = ""
            while "writer 1 lost the trial" not in told:
                told = first.stderr.readline()
                assert told
            assert contents(directory) == before
        out, err = first.communicate(timeout=60)
    finally:
        first.kill()
        first.communicate()
    assert first.returncode == 0, err
    assert json.loads(out) == json.loads(second.stdout)
    after = contents(directory)
    for name in (
        "checkpoint-000004.safetensors",
        "checkpoint-000004.safetensors",
        "curve.jsonl",
        "config.yaml",
    ):
        assert after[name] == before[name]
    log = (directory / "log.txt").read_text()
    assert re.search(
        r"writer 1 lost the trial: .*; resumes from what is there\n.*has done epoch 4 already", log
    )
    # The two that trained, and no step of the one that woke up.
    rows = [json.loads(line) for line in (directory / "timing.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert {row["pid"] == first.pid for row in rows[:2]} == {True}
    assert {row["pid"] == first.pid for row in rows[2:]} == {False}


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_waiting_says_for_whom_and_ends_at_once(signum: signal.Signals, config: Path, tmp_path: Path) -> None:
    directory = tmp_path / "trial"
    with lock.hold(directory):
        before = contents(directory)
        process = subprocess.Popen(
            [sys.executable, "-m", "ppo_hpo", "run", "--config", str(config), "--dir", str(directory)],
            cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr is not None
        line = process.stderr.readline()
        assert f"{directory} is in use by writer 1, process {os.getpid()} on " in line
        assert line.endswith(": waiting\n")
        process.send_signal(signum)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 128 + signum
        assert err.startswith(f"ppo-hpo: stopped by {signum.name}")
        assert err.count("\n") == 1
        assert contents(directory) == before


def test_waiting_is_said_again_each_minute(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with sleeper() as other:
        stage = leave(tmp_path, described(other.pid), flock=False)
        clock.each = lambda now: shutil.rmtree(stage, ignore_errors=True) if now > 200.0 else None
        with lock.hold(tmp_path):
            pass
    assert caplog.text.count(": waiting") == 4  # at 0, 60, 120 and 180 seconds


def test_looks_become_rarer_and_reminders_come_each_minute(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, reminders = [0.0], []
    monkeypatch.setattr(lock._log, "warning", lambda *message: reminders.append(clock.waited))
    with sleeper() as other:
        stage = leave(tmp_path, described(other.pid), flock=False)

        def look(now: float) -> None:
            looks.append(now)
            if now > 130.0:
                shutil.rmtree(stage, ignore_errors=True)

        clock.each = look
        with lock.hold(tmp_path):
            pass
    pauses = [after - before for before, after in itertools.pairwise(looks)]
    assert pauses[:10] == pytest.approx([min(0.02 * 1.5**n, 0.5) for n in range(10)])
    assert pauses[10:] == pytest.approx([0.5] * (len(pauses) - 10))
    assert reminders == [0.0, pytest.approx(60.25, abs=0.25), pytest.approx(120.75, abs=0.5)]


def test_who_trains_a_trial(clock: Clock, tmp_path: Path) -> None:
    """Trials are watched at the same time; only writers that cannot be seen from here take a minute."""
    names = ("nobody", "dead", "living", "silent", "moving")
    nobody, *trials = (tmp_path / name for name in names)
    nobody.mkdir()
    counts: list[int] = []
    with sleeper() as other:
        processes = [dead(), described(other.pid), ELSEWHERE, ELSEWHERE]
        stages = [leave(*pair, flock=False) for pair in zip(trials, processes, strict=True)]
        clock.each = lambda now: os.utime(stages[3], (2.0e9 + now, 2.0e9 + now)) if now > 30.0 else None
        (trials[2] / "lock").touch()  # that nobody holds any more says nothing about a writer elsewhere
        found = lock.active_writers([nobody, *trials], counts.append)
        assert [writer is not None for writer in found] == [False, False, True, False, True]
        assert found[2] is not None
        assert found[2].process == processes[1]
        assert clock.waited == pytest.approx(60.0, abs=0.5)  # half a second between two looks
        assert counts == [2] * 61 + [1] * (len(counts) - 61)
        assert len(counts) == 120
        before = clock.waited
        assert lock.active_writers(trials[2:3], limit=10.0) == [None]
        assert clock.waited - before == pytest.approx(10.0, abs=0.5)
        assert lock.active_writer(trials[1]) == found[2]
        assert lock.active_writer(nobody) is None
        holder = lock._Flock(trials[2] / "lock")
        assert holder.attempt() is True
        before = clock.waited
        assert lock.active_writer(trials[2]) is not None  # somebody holds it, whoever that is
        assert clock.waited == before
        holder.release()
    assert not (nobody / "lock").exists()


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no-flock"])
def test_writers_are_kept_out_for_a_moment(
    flock: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not flock:
        request.getfixturevalue("no_flock")
    new, used, linked, left = (tmp_path / name for name in ("new", "used", "linked", "left"))
    new.mkdir()
    with lock.exclude_writers(new) as free:
        assert free is True
    assert not (new / "lock").exists()  # looking creates nothing
    with lock.hold(used), lock.exclude_writers(used) as free:
        assert free is False
    with lock.exclude_writers(used) as free:
        assert free is True
        if flock:  # a writer waits meanwhile
            other = lock._Flock(used / "lock")
            assert other.attempt() is False
    if flock:
        assert other.attempt() is True
        with lock.exclude_writers(used) as free:
            assert free is False
        other.release()
    # A writer without a lock file, and one behind a link, are not disturbed.
    with sleeper() as living:
        leave(left, described(living.pid))
        leave(linked, described(living.pid))
        (linked / "lock").symlink_to(used / "lock")
        for directory in (left, linked):
            with lock.exclude_writers(directory) as free:
                assert free is False


def test_a_lock_file_that_was_removed_is_made_again(tmp_path: Path) -> None:
    first, second = lock._Flock(tmp_path / "lock"), lock._Flock(tmp_path / "lock")
    assert first.attempt() is True
    (tmp_path / "lock").unlink()
    assert second.attempt() is True  # on a new file
    assert (tmp_path / "lock").is_file()
    for flock in (first, second):
        flock.release()


def test_a_lock_is_released_though_a_child_still_has_its_file_open(tmp_path: Path) -> None:
    first, second = lock._Flock(tmp_path / "lock"), lock._Flock(tmp_path / "lock")
    assert first.attempt() is True
    assert first._descriptor is not None
    child = os.dup(first._descriptor)
    first.release()
    assert second.attempt() is True
    second.release()
    os.close(child)


def test_a_takeover_of_a_writer_elsewhere_says_once_that_it_cannot_end_it(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave(tmp_path, ELSEWHERE, flock=False)
    with lock.hold(tmp_path, takeover=True) as claim:
        assert claim.number == 5
    assert clock.waited == pytest.approx(60.0, abs=0.5)
    assert caplog.text.count("is asked to give way") == 1
    assert caplog.text.count("cannot be ended from here") == 1


def test_a_signal_that_could_not_be_sent_was_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open() as file, subprocess.Popen(["sleep", "600"], stdin=file) as process:
        leave(tmp_path, described(process.pid))
        writer = latest_writer(tmp_path)
        assert writer is not None

        def refuse(*_: Any) -> None:
            raise PermissionError

        try:
            with monkeypatch.context() as patched:
                patched.setattr(signal, "pidfd_send_signal", refuse)
                assert lock._send(writer, path, (signal.SIGTERM,)) is False
            assert lock._send(writer, path, (signal.SIGTERM,)) is True
            assert process.wait(10) == -signal.SIGTERM
        finally:
            process.kill()


def test_the_lock_is_as_open_as_other_files(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with lock.hold(tmp_path):
            assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o666
    finally:
        os.umask(before)


# --------------------------------------------------- machines of one name, and containers


class SameName:
    """Starts writers, each on a machine of the same host name, or in a container of its own."""

    def __init__(self, folder: Path, inside: list[str]) -> None:
        self.folder, self.inside = folder, inside
        self.trial = folder / "trial"

    @contextlib.contextmanager
    def start(self, name: str) -> Iterator[subprocess.Popen[str]]:
        boot = self.folder / f"boot-{name}"
        boot.write_text(f"{name}\n")
        inside = [word.replace("BOOT", str(boot)) for word in self.inside]
        process = subprocess.Popen(
            [*inside, sys.executable, "-m", "tests.state.waiting_writer", str(self.trial)],
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        with process:
            try:
                yield process
            finally:
                process.kill()


def first_to_write(*streams: Any) -> tuple[Any, str]:
    """The first of some streams that has a line, and the line."""
    stream = select.select(streams, [], [], 60)[0][0]
    return stream, stream.readline()


MACHINE = ["unshare", "--mount", "sh", "-c"]
MACHINE += ['mount --bind BOOT /proc/sys/kernel/random/boot_id && exec "$@"', "sh"]
CONTAINER = ["unshare", "--pid", "--fork", "--kill-child"]


@pytest.mark.skipif(not may_mount(), reason="this user may not make namespaces")
@pytest.mark.parametrize(
    "inside", [MACHINE, [*CONTAINER, "--mount-proc"], CONTAINER], ids=["boot", "pids", "no-proc"]
)
def test_two_machines_of_one_name_do_not_take_the_trial_from_each_other(
    inside: list[str], tmp_path: Path
) -> None:
    machines = SameName(tmp_path, inside)
    with machines.start("one") as first, machines.start("two") as second:
        # They come at the same moment, so either may be the first.
        stream, line = first_to_write(first.stdout, second.stdout)
        assert line == "1\n"
        winner, loser = (first, second) if stream is first.stdout else (second, first)
        assert "is in use by writer 1, process " in first_to_write(loser.stdout, loser.stderr)[1]
        assert winner.communicate("", timeout=60)[0] == "kept it\n"
        assert loser.communicate("", timeout=60)[0] == "2\nkept it\n"


@pytest.mark.skipif(not may_mount(), reason="this user may not make namespaces")
def test_a_proc_of_other_pids_is_not_believed() -> None:
    """Without a /proc of its own, a container sees strangers under its own pids."""
    code = "from ppo_hpo.state.process_identity import Process; print(Process.current().is_running())"
    for options, seen in ((["--mount-proc"], "True\n"), ([], "None\n")):
        command = [*CONTAINER, *options, sys.executable, "-c", code]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout == seen


def test_who_was_taken_for_dead_believes_signs_of_life_only(clock: Clock, tmp_path: Path) -> None:
    """One of the two sees the other one wrongly. Even then they take the trial from each other once only."""
    stage = leave(tmp_path, dead(), flock=False)

    def renew(now: float) -> None:
        if now < 100.0:
            os.utime(stage, (now, now))

    clock.each = renew
    lost = LostLock(3, "another process took it over")
    with lock.hold(tmp_path, lost=lost) as claim:
        assert claim.number == 5
    assert 159.0 <= clock.waited <= 161.0
    # Who was asked is not doubted: its successor saw it.
    leave(tmp_path, dead(), number=6, flock=False)
    before = clock.waited
    with lock.hold(tmp_path, lost=LostLock(5, "asked", asked=True)) as claim:
        assert claim.number == 7
    assert clock.waited == before

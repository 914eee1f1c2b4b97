"""What a failure leads to: a retry, a broken trial, or a stopped hunt."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppo_hpo.spec.errors import (
    CheckpointError,
    DeterministicFailure,
    Interrupted,
    LostLock,
    MachineError,
    OutOfMemory,
    UserError,
)
from ppo_hpo.state.files import write_atomically
from ppo_hpo.trial import failure, retries
from ppo_hpo.trial.failure import kind, read_record, stops_the_hunt
from ppo_hpo.trial.retries import Work


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        if cause is None:
            raise error
        try:
            raise cause
        except BaseException:
            raise error from None
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "transient"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "transient"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "transient",
        ),
        (OSError(errno.EIO, "Input/output error"), "transient"),
        (OSError(errno.ESTALE, "Stale file handle"), "transient"),
        (EOFError(), "transient"),
        (ConnectionResetError(), "transient"),
        (raised(UserError("cannot be written"), OSError(errno.ENOSPC, "full")), "transient"),
        (raised(UserError("cannot be written"), OSError(errno.EACCES, "denied")), "machine"),
        (MachineError("no such device"), "machine"),
        (UserError("a rule"), "permanent"),
        (CheckpointError("torn"), "permanent"),
        (RuntimeError("anything else"), "unknown"),
        (OSError(errno.ENOENT, "no such file"), "unknown"),
    ],
    ids=repr,
)
def test_kinds(error: BaseException, expected: str) -> None:
    assert kind(error) == expected


class Trial:
    """Fails as told: each entry is the epoch and step of a failure, and the error."""

    def __init__(self, *failures: tuple[int, int, BaseException]) -> None:
        self.failures, self.work, self.pauses = list(failures), Work(), []

    def attempt(self) -> str:
        if not self.failures:
            return "done"
        epoch, step, error = self.failures.pop(0)
        self.work.start_epoch(epoch)
        self.work.add_steps(step)
        raise error

    def run(self, n: int, earlier: str | None = None) -> str:
        return retries.with_retries(self.attempt, self.work, n, earlier, sleep=self.pauses.append)


def test_pauses_grow_and_steps_add_up() -> None:
    trial = Trial((0, 5, MemoryError()), (0, 7, MemoryError()), (0, 9, MemoryError()))
    assert trial.run(3) == "done"
    assert trial.pauses == [1.0, 2.0, 4.0]
    assert (trial.work.steps, trial.work.retries) == (21, 3)


def test_retries_are_counted_anew_after_each_epoch() -> None:
    trial = Trial(*((epoch, 1, MemoryError()) for epoch in range(5) for _ in range(2)))
    assert trial.run(2) == "done"
    assert trial.pauses == [1.0, 2.0] * 5
    stuck = Trial(*((0, 1, MemoryError()) for _ in range(3)))
    with pytest.raises(OutOfMemory, match="not enough memory"):
        stuck.run(2)


def test_the_same_error_at_the_same_step_is_not_tried_twice() -> None:
    trial = Trial((1, 8, RuntimeError("boom")), (1, 8, RuntimeError("boom")))
    with pytest.raises(DeterministicFailure, match=r"boom: failed again at the same step \(epoch 2, step 8"):
        trial.run(9)
    assert trial.work.retries == 1
    # At another step it is another one; what memory does says nothing about the trial.
    assert Trial((1, 8, RuntimeError("boom")), (1, 9, RuntimeError("boom"))).run(2) == "done"
    assert Trial((1, 8, MemoryError()), (1, 8, MemoryError())).run(2) == "done"


def test_an_earlier_process_failed_at_the_same_step() -> None:
    first = Trial((1, 8, RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom") as caught:
        first.run(0)
    again = Trial((1, 8, RuntimeError("boom")))
    with pytest.raises(DeterministicFailure):
        again.run(2, earlier=caught.value.place)  # type: ignore[attr-defined]
    assert not again.work.retries


@pytest.mark.parametrize("error", [UserError("a rule"), MachineError("gone"), CheckpointError("torn")])
def test_sentences_are_not_tried_again(error: UserError) -> None:
    trial = Trial((0, 1, error))
    with pytest.raises(type(error)):
        trial.run(2)
    assert not trial.work.retries


@pytest.mark.parametrize("error", [Interrupted(15), LostLock(1, "taken"), KeyboardInterrupt()])
def test_stops_are_not_failures(error: BaseException) -> None:
    trial = Trial((0, 1, error))
    with pytest.raises(type(error)):
        trial.run(2)
    assert not trial.work.retries


def test_a_file_is_written_again_and_nothing_computed_twice(tmp_path: Path) -> None:
    tries: list[str] = []
    pauses: list[float] = []

    def full(path: Path, content: bytes) -> None:
        tries.append(path.name)
        if len(tries) <= failures:
            raise raised(UserError("cannot be written"), OSError(errno.ENOSPC, "full"))

    def write(n: int) -> None:
        tries.clear()
        pauses.clear()
        log = logging.getLogger("tests")
        retries.retrying_write(full, n, log, sleep=pauses.append)(tmp_path / "name", b"")

    failures = 2
    write(2)
    assert (tries, pauses) == (["name"] * 3, [1.0, 2.0])
    failures = 99
    with pytest.raises(UserError) as caught:
        write(3)
    assert (len(tries), pauses) == (4, [1.0, 2.0, 4.0])
    # It was waited for already.
    trial = Trial((0, 1, caught.value))
    with pytest.raises(UserError, match="cannot be written"):
        trial.run(2)
    assert not trial.work.retries
    with pytest.raises(UserError):
        write(0)
    assert (len(tries), pauses) == (1, [])


@pytest.mark.parametrize("error", [UserError("a rule"), LostLock(1, "taken")])
def test_what_does_not_pass_is_not_written_again(error: BaseException, tmp_path: Path) -> None:
    tries: list[Path] = []

    def never(path: Path, content: bytes) -> None:
        tries.append(path)
        raise error

    write = retries.retrying_write(
        never, 2, logging.getLogger("tests"), sleep=lambda seconds: pytest.fail("waits")
    )
    with pytest.raises(type(error)):
        write(tmp_path / "name", b"")
    assert len(tries) == 1


@pytest.fixture
def trials(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    return make


def test_what_stops_the_hunt(trials: Callable[[str], Path]) -> None:
    one = trials("one")
    assert stops_the_hunt(UserError("a rule"), one, one.parent)
    # It may be alone with it: it does not stop every hunt. Another mistake, or another trial, does.
    assert not stops_the_hunt(UserError("a rule"), one, one.parent)
    assert stops_the_hunt(UserError("another rule"), one, one.parent)
    assert stops_the_hunt(UserError("a rule"), trials("two"), one.parent)
    # Once some trial finished an epoch, a mistake is the trial's own; what is missing here never is.
    (trials("three") / "timing.jsonl").touch()
    assert not stops_the_hunt(UserError("a rule"), trials("four"), one.parent)
    for _ in range(2):
        assert stops_the_hunt(MachineError("no package"), trials("four"), one.parent)
        full = raised(UserError("cannot be written"), OSError(errno.ENOSPC, "full"))
        assert stops_the_hunt(full, trials("four"), one.parent)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [RuntimeError("boom"), CheckpointError("torn"), OutOfMemory("too little")])
def test_what_only_breaks_the_trial(error: Exception, trials: Callable[[str], Path]) -> None:
    one = trials("one")
    assert not stops_the_hunt(error, one, one.parent)
    record = read_record(one)
    assert record is not None
    assert not record.stopped
    failure.remove_record(one)
    assert read_record(one) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "[" * 100_000, '{"error": 1}',
        json.dumps({"error": "\x1b[2J", "at": "", "host": "", "place": None, "stopped": False}),
    ],
    ids=["empty", "list", "torn", "deep", "incomplete", "terminal codes"],
)  # fmt: skip
def test_invalid_records(text: str, trials: Callable[[str], Path]) -> None:
    write_atomically(trials("one") / failure.RECORD, text.encode())
    assert read_record(trials("one")) is None


def test_a_record_that_cannot_be_written_is_left_out(tmp_path: Path) -> None:
    assert not stops_the_hunt(RuntimeError("boom"), tmp_path / "none", tmp_path)

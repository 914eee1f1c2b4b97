"""Torn files: refused with their reason. The trial resumes from the one before, to the same end.

What was damaged is drawn once, by a seed: 200 lengths and 200 bits of a checkpoint that a trial has left.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import TornCheckpoint
from ppo_hpo.state.checkpoint import Checkpoint, Storage, arrays_digest, read
from ppo_hpo.state.curve import read_curve
from ppo_hpo.trial import runner
from tests.runs import run_quietly

CONFIG = TrialConfig.from_mapping(
    {
        "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
        "task": {"epochs": 3, "steps_per_epoch": 128, "eval_episodes": 2},
        "model": {"width": 8, "depth": 1},
        "ppo": {"n_steps": 64, "batch_size": 64, "n_epochs": 1},
    }
)
FILES = ["checkpoint-000001.safetensors", "checkpoint-000002.safetensors", "checkpoint-000003.safetensors"]
SAMPLE = 6


def go_on(directory: Path, epochs: int) -> runner.Outcome:
    return run_quietly(CONFIG.replace(task={"epochs": epochs, "max_epochs": 3}), directory)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trial after two epochs, and the same one after all three."""
    root = tmp_path_factory.mktemp("torn")
    go_on(root / "two", 2)
    shutil.copytree(root / "two", root / "three")
    go_on(root / "three", 3)
    assert sorted(path.name for path in (root / "two").glob("checkpoint-*")) == FILES[:2]
    return root / "two", root / "three"


def cut(content: bytes, count: int) -> list[bytes]:
    """The content at so many lengths, the shortest ones and the longest one among them."""
    lengths = random.Random(4).sample(range(9, len(content) - 1), count - 4)
    return [content[:length] for length in (0, 7, 8, *lengths, len(content) - 1)]


def flipped(content: bytes, count: int) -> list[bytes]:
    """The content with one bit changed, at so many places."""
    found = []
    for place in random.Random(5).sample(range(8 * len(content)), count):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        found.append(bytes(damaged))
    return found


DAMAGE = pytest.mark.parametrize("damage", [cut, flipped])


@DAMAGE
def test_200_torn_checkpoints_are_passed_over_with_the_reason(
    trained: tuple[Path, Path], tmp_path: Path, damage: Callable[[bytes, int], list[bytes]]
) -> None:
    content = (trained[0] / FILES[1]).read_bytes()
    before = read(trained[0] / FILES[0])
    shutil.copy(trained[0] / FILES[0], tmp_path)
    storage, torn = Storage(tmp_path), tmp_path / FILES[1]
    damaged = damage(content, 200)
    assert len(set(damaged)) == 200
    reasons = set()
    for wrong in damaged:
        torn.write_bytes(wrong)
        told: list[str] = []
        found = storage.load(on_refused=lambda error, told=told: told.append(str(error)))  # type: ignore[misc]
        assert isinstance(found, Checkpoint)
        assert (found.epoch, arrays_digest(found.arrays)) == (1, arrays_digest(before.arrays))
        (reason,) = told
        assert reason.startswith(f"{torn} is torn")
        reasons.add(reason)
    assert len(reasons) == 2  # in its first bytes, and elsewhere
    torn.write_bytes(content)
    whole = storage.load(on_refused=lambda error: pytest.fail(str(error)))
    assert whole is not None
    assert whole.epoch == 2


@DAMAGE
def test_a_trial_with_a_torn_checkpoint_ends_where_it_would_have_ended(
    trained: tuple[Path, Path], tmp_path: Path, damage: Callable[[bytes, int], list[bytes]]
) -> None:
    two, three = trained
    damaged = damage((two / FILES[1]).read_bytes(), 200)
    for number, wrong in enumerate(random.Random(6).sample(damaged, SAMPLE)):
        directory = tmp_path / str(number)
        shutil.copytree(two, directory)
        (directory / FILES[1]).write_bytes(wrong)
        outcome = go_on(directory, 3)
        assert outcome.statistics["continued_from_epoch"] == 1.0
        assert "refused: " in (directory / "log.txt").read_text()
        for name in FILES[1:]:
            there, here = read(three / name), read(directory / name)
            assert arrays_digest(here.arrays) == arrays_digest(there.arrays)
            assert here.meta["curve"] == there.meta["curve"]
        assert (directory / "curve.jsonl").read_bytes() == (three / "curve.jsonl").read_bytes()
        assert outcome.objective == json.loads((three / "results.json").read_text())[0]["value"]


def test_by_hand_a_trial_of_which_all_is_torn_says_what_to_do(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(trained[0], tmp_path / "torn")
    for name in FILES[:2]:
        path = tmp_path / "torn" / name
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TornCheckpoint, match=r"No earlier one is whole\. Remove them to start again\.$"):
        go_on(tmp_path / "torn", 3)


def test_on_another_machine_a_trial_of_which_all_is_torn_starts_again(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    def run(directory: Path) -> Path:
        run_quietly(CONFIG, directory, trial_id="abc", checkpoint_store=str(tmp_path / "store"))
        return directory

    run(tmp_path / "here")
    objects = sorted((tmp_path / "store" / "trials" / "abc").iterdir())
    assert len(objects) == 2
    for path in objects:
        path.write_bytes(path.read_bytes()[:-1])
    there = run(tmp_path / "there")
    assert (there / "curve.jsonl").read_bytes() == (trained[1] / "curve.jsonl").read_bytes()
    # What it put into the store took the place of what was torn.
    assert [read(path).epoch for path in objects] == [2, 3]


@DAMAGE
def test_200_torn_curves_are_read_up_to_where_they_are_torn(
    trained: tuple[Path, Path], tmp_path: Path, damage: Callable[[bytes, int], list[bytes]]
) -> None:
    content = (trained[1] / "curve.jsonl").read_bytes()
    whole = read_curve(trained[1])
    assert [row["epoch"] for row in whole] == [0, 1, 2, 3]
    lengths = set()
    for wrong in damage(content, 200):
        (tmp_path / "curve.jsonl").write_bytes(wrong)
        rows = read_curve(tmp_path)
        lengths.add(len(rows))
        if damage is cut:
            # The last line may lack its end only, or a digit of its last number.
            assert rows[:-1] == whole[: len(rows) - 1] or rows == whole[: len(rows)]
        else:
            # A digit may have become another one, which nothing shows; every other row is as it was.
            assert sum(row not in whole for row in rows) <= 1
            assert all(isinstance(row["return_mean"], float | int) for row in rows)
    assert len(lengths) > 2


@DAMAGE
def test_a_trial_with_a_torn_curve_heals_it(
    trained: tuple[Path, Path], tmp_path: Path, damage: Callable[[bytes, int], list[bytes]]
) -> None:
    two, three = trained
    for number, wrong in enumerate(damage((two / "curve.jsonl").read_bytes(), 200)[:: 200 // SAMPLE]):
        directory = tmp_path / str(number)
        shutil.copytree(two, directory)
        (directory / "curve.jsonl").write_bytes(wrong)
        # Without an epoch to train it is as whole as with one.
        for epochs, like in ((2, two), (3, three)):
            go_on(directory, epochs)
            assert (directory / "curve.jsonl").read_bytes() == (like / "curve.jsonl").read_bytes()
    assert number + 1 >= SAMPLE

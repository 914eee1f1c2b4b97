"""From a learning curve to what Orion is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo.spec import results
from ppo_hpo.spec.errors import UserError
from ppo_hpo.state.files import write_atomically


def row(epoch: int, mean: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "return_mean": mean,
        "return_std": 0.5 + epoch,
        "return_median": mean - 1.0,
        "episode_length": 10.0 * (epoch + 1),
        "policy_loss": 3.0,
    }


CURVE = [row(0, 5.0), row(1, -20.0), row(2, 30.0), row(3, 12.0)]


def test_columns_of_an_evaluation_by_hand() -> None:
    # Mean of 1, 2, 6 is 3; squared distances 4, 1, 9 have the mean 14/3; the middle one is 2.
    columns = results.evaluation_columns([6.0, 1.0, 2.0], [10, 20, 31])
    assert columns == {
        "return_mean": 3.0,
        "return_std": pytest.approx(math.sqrt(14 / 3)),
        "return_median": 2.0,
        "return_min": 1.0,
        "return_max": 6.0,
        "episode_length": pytest.approx(61 / 3),
        "eval_steps": 61,
    }
    # They go into JSON, which knows no numpy.
    assert json.loads(json.dumps(columns)) == columns
    assert all(type(value) in (int, float) for value in columns.values())


@pytest.mark.parametrize(("epochs", "expected"), [(0, -5.0), (1, 20.0), (2, -30.0), (3, -12.0)])
def test_objective_is_the_negative_mean_return_of_the_epoch_asked_for(epochs: int, expected: float) -> None:
    assert results.objective(CURVE, epochs, diverged=False) == expected


@pytest.mark.parametrize(
    ("curve", "epochs", "expected"),
    [
        (CURVE, 3, 20.0),  # the worst of its life, not the last
        (CURVE[:3], 3, 20.0),  # it diverged in epoch 3, which has no row
        (CURVE[:1], 16, -5.0),  # in the first epoch: what the untrained policy reached
        (CURVE, 0, -5.0),  # what came after the epoch asked for does not count
    ],
)
def test_a_diverged_trial_scores_as_the_worst_of_its_life(
    curve: list[dict[str, Any]], epochs: int, expected: float
) -> None:
    assert results.objective(curve, epochs, diverged=True) == expected


def test_an_epoch_that_was_not_trained_has_no_objective() -> None:
    with pytest.raises(ValueError, match="not enough values"):
        results.objective(CURVE, 4, diverged=False)


def test_diverging_never_pays() -> None:
    for epochs in range(4):
        sound = results.objective(CURVE, epochs, diverged=False)
        assert results.objective(CURVE, epochs, diverged=True) >= sound


@pytest.mark.parametrize("diverged", [False, True])
def test_statistics_are_of_the_last_evaluation_up_to_the_epoch_asked_for(diverged: bool) -> None:
    assert results.statistics(CURVE, 2, diverged=diverged) == {
        "return_mean": 30.0,
        "return_std": 2.5,
        "return_median": 29.0,
        "episode_length": 30.0,
        "epochs": 2.0,
        "diverged": float(diverged),
    }
    assert results.statistics(CURVE[:2], 16, diverged=True)["epochs"] == 1.0


def test_entries_are_in_orions_form() -> None:
    entries = results.entries(-3, {"return_mean": 3, "diverged": 0.0})
    assert entries == [
        {"name": "objective", "type": "objective", "value": -3.0},
        {"name": "return_mean", "type": "statistic", "value": 3.0},
        {"name": "diverged", "type": "statistic", "value": 0.0},
    ]
    assert all(type(entry["value"]) is float for entry in entries)


def test_orion_takes_the_entries() -> None:
    from orion.core.worker.trial import Trial

    trial = Trial(results=results.entries(-3.5, {"return_mean": 3.5, "epochs": 2.0}))
    assert trial.objective.value == -3.5
    assert {item.name: item.value for item in trial.statistics} == {"return_mean": 3.5, "epochs": 2.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_reaches_orion(bad: float) -> None:
    with pytest.raises(ValueError, match="Results must be finite, but got objective"):
        results.entries(bad, {"epochs": 1.0})
    with pytest.raises(ValueError, match="Results must be finite, but got return_std, seconds"):
        results.entries(1.0, {"return_std": bad, "epochs": 1.0, "seconds": bad})


def test_the_file_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for value in (1.0, 0.1 + 0.2):
        entries = results.entries(value, {"epochs": 2.0})
        write_atomically(path, results.to_bytes(entries))
        assert json.loads(path.read_text()) == entries
    assert list(tmp_path.iterdir()) == [path]


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results.json cannot be written: No such file or directory"):
        write_atomically(tmp_path / "nowhere" / "results.json", results.to_bytes([]))


GOOD_ROW = {**row(1, 2.0), "env_steps": 10, "eval_steps": 5}


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({}, True),
        ({"policy_loss": None}, True),  # a column that is not required may be missing a number
        ({"extra": 3}, True),
        ({"return_mean": 9.9e299}, True),
        ({"return_mean": -9.9e299}, True),
        ({"return_mean": 1e300}, False),
        ({"return_mean": None}, False),
        ({"return_mean": math.nan}, False),
        ({"policy_loss": math.inf}, False),
        ({"return_mean": True}, False),
        ({"return_mean": "3"}, False),
        ({"policy_loss": [1.0]}, False),
    ],
)
def test_rows_of_a_curve(change: dict[str, Any], valid: bool) -> None:
    assert results.is_row({**GOOD_ROW, **change}) is valid


@pytest.mark.parametrize("name", ["epoch", "env_steps", "eval_steps", "return_mean", "return_std"])
def test_a_row_without_a_required_column(name: str) -> None:
    assert results.is_row({key: value for key, value in GOOD_ROW.items() if key != name}) is False
    assert [results.is_row(other) for other in (None, [], 3, "row")] == [False] * 4


def test_the_returns_of_seeds_in_words() -> None:
    assert results.seeds_text({}) == results.seeds_text({"seeds": 1.0, "seed_1": 3.0}) == ""
    values = {"seeds": 3.0, "seed_1": 1.25, "seed_2": -2.0, "seed_3": 10.0, "seeds_std": 5.06}
    assert results.seeds_text(values) == "of 3 seeds: 1.2, -2.0, 10.0; standard deviation 5.1"


def test_seeds_that_had_nothing_left_to_train_have_no_speed() -> None:
    each = [{"steps_per_second": speed, "epochs": 1.0} for speed in (0.0, 300.0, 100.0)]
    assert results.combine([1.0] * 3, each, "mean")[1]["steps_per_second"] == 200.0
    assert results.combine([1.0], [{"steps_per_second": 0.0}], "mean")[1]["steps_per_second"] == 0.0


def test_the_results_file_to_the_byte() -> None:
    expected = b'[\n {\n  "name": "objective",\n  "type": "objective",\n  "value": 1.5\n }\n]\n'
    assert results.to_bytes(results.entries(1.5, {})) == expected

"""With the speed-ups, the suggestions and the stored state are those of unpatched Orion."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import speedups_sweeps

from ppo_hpo.orion import speedups

CASES = [
    f"{algorithm}:{order}" for algorithm in speedups_sweeps.ALGORITHMS for order in speedups_sweeps.STEPS
]


def sweeps(
    folder: Path, on: bool, part: int, cases: list[str], kind: str = "pickleddb"
) -> dict[str, list[Any]]:
    """Run all sweeps in one process, with or without the speed-ups."""
    command = [sys.executable, speedups_sweeps.__file__, str(folder), kind, str(part), *cases]
    # Orion's own registry holds sets of names, whose order would differ between processes.
    done = orion_process(command, on, PYTHONHASHSEED="0")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def orion_process(
    command: list[str], on: bool = True, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ORION_")}
    environment.update({speedups.VARIABLE: "1" if on else "0"}, **variables)
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cwd, check=False, timeout=600
    )


def by_ours(blob: bytes) -> bool:
    """Whether a stored state was written by the speed-ups."""
    return b"_pickle\x94\x8c\x05loads" in blob


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Any]]]:
    """Each sweep without and with the speed-ups; some are continued with and without them."""
    folder = tmp_path_factory.mktemp("lean")
    for name in ("stock", "lean", "sqlite"):
        (folder / name).mkdir()
    result = {name: sweeps(folder / name, name == "lean", 1, CASES) for name in ("stock", "lean")}
    two = [case for case in CASES if case.endswith(":two")]
    result["sqlite"] = sweeps(folder / "sqlite", True, 1, two, "sqlitedb")
    again = [case for case in CASES if case.endswith(":one")]
    shutil.copytree(folder / "stock", folder / "stock2")
    result["stock, stock"] = sweeps(folder / "stock", False, 2, again)
    result["stock, lean"] = sweeps(folder / "stock2", True, 2, again)
    result["lean, stock"] = sweeps(folder / "lean", False, 2, again)
    return result


@pytest.mark.parametrize("case", CASES)
def test_suggestions_and_state_are_those_of_orion(found: dict[str, Any], case: str) -> None:
    told, _, trials, _ = found["stock"][case]
    assert sum(isinstance(item, list) for item in told) >= 5  # trials, and not only waiting
    assert any(status == "completed" for _, status, *_ in trials)
    assert found["lean"][case] == found["stock"][case]


@pytest.mark.parametrize("algorithm", speedups_sweeps.ALGORITHMS)
def test_a_sweep_continues_whoever_began_it(found: dict[str, Any], algorithm: str) -> None:
    case = f"{algorithm}:one"
    assert len(found["stock, stock"][case][2]) > len(found["stock"][case][2])
    assert found["stock, lean"][case] == found["stock, stock"][case]
    assert found["lean, stock"][case] == found["stock, stock"][case]


@pytest.mark.parametrize("algorithm", speedups_sweeps.ALGORITHMS)
def test_a_sqlite_file_changes_nothing_either(found: dict[str, Any], algorithm: str) -> None:
    case = f"{algorithm}:two"
    assert found["sqlite"][case] == found["stock"][case]


# The pickles


def made(**values: Any) -> Any:
    from orion.core.worker.trial import Trial

    params = [{"name": name, "type": "real", "value": value} for name, value in values.items()]
    results = [{"name": "loss", "type": "objective", "value": 1.5}]
    return Trial(experiment=1, params=params, results=results, status="new")


def trial_pickles() -> Any:
    from orion.core.worker.trial import Trial

    return speedups._TrialPickles(Trial)


def as_data(state: Any) -> Any:
    return speedups_sweeps.plain(state, {})


def test_a_state_is_a_plain_pickle_that_keeps_what_is_the_same_object() -> None:
    trials = trial_pickles()
    first, second = made(x=0.25, y=1e-300), made(x=0.5, y=[1.0, 2.0])
    state = {"a": [first, second], "b": {"x": first}, "c": None}
    blob = trials.dumps(state)
    for found in (pickle.loads(blob), trials.loads(blob), trial_pickles().loads(blob)):
        assert as_data(found) == as_data(state)
        assert found["a"][0] is found["b"]["x"]
        assert found["a"][0] is not found["a"][1]


def test_trials_that_are_equal_stay_apart() -> None:
    trials = trial_pickles()
    blob = trials.dumps([made(x=0.5), made(x=0.5)])
    for reader in (trials, trial_pickles()):
        one, other = reader.loads(blob)
        assert one is not other
        again, twin = reader.loads(blob)  # both known by now
        assert again is not twin


def test_a_trial_that_changed_in_place_is_written_anew_and_read_as_it_was() -> None:
    trials = trial_pickles()
    trial = made(x=0.5)
    blob = trials.dumps({"trial": trial})
    trial.status = "broken"
    assert trials.loads(blob)["trial"].status == "new"
    trial._params[0].value = 0.75
    changed = pickle.loads(trials.dumps({"trial": trial}))["trial"]
    assert (changed.status, changed.params) == ("broken", {"x": 0.75})
    shaped = made(x=[0.25, 0.5])
    blob = trials.dumps([shaped])
    shaped._params[0].value[1] = 0.75
    assert trials.loads(blob)[0].params == {"x": [0.25, 0.5]}
    assert pickle.loads(trials.dumps([shaped]))[0].params == {"x": [0.25, 0.75]}


def test_what_has_not_changed_is_not_pickled_or_made_again() -> None:
    trials = trial_pickles()
    state = trials.loads(trial_pickles().dumps([made(x=float(number)) for number in range(5)]))
    blob = trials.dumps([*state, made(x=9.0)])
    again = trials.loads(blob)
    assert all(old is new for old, new in zip(state, again, strict=False))
    other = trial_pickles()  # another worker knows all but the last
    mine = other.loads(trial_pickles().dumps(state))
    assert [a is b for a, b in zip(mine, other.loads(blob), strict=False)] == [True] * 5


def test_a_state_that_orion_pickled_is_read() -> None:
    state = {"a": made(x=0.5), "b": (1, 2)}
    assert as_data(trial_pickles().loads(pickle.dumps(state))) == as_data(state)


# When it does nothing

QUIET = """
import logging, pickle, sys, warnings
warnings.simplefilter("ignore")
logging.basicConfig(format="%(name)s: %(message)s")
from ppo_hpo.orion import tested_version, speedups
tested_version.TESTED_ORION = sys.argv[1]
print(speedups.install(), speedups.install())
import copy, orion.storage.legacy, orion.algo.base.registry
print(orion.storage.legacy.pickle is pickle, orion.algo.base.registry.copy is copy)
"""


def test_another_version_of_orion_is_not_patched_and_one_warning_says_so() -> None:
    done = orion_process([sys.executable, "-c", QUIET, "0.2.6"])
    assert done.stdout.split() == ["False", "False", "True", "True"], done.stderr
    assert done.stderr.count("ppo_hpo: The speed-ups of Orion are off: this is Orion 0.2.7") == 1


def test_the_switch() -> None:
    done = orion_process([sys.executable, "-c", QUIET, "0.2.7"], on=False)
    assert done.stdout.split() == ["False", "False", "True", "True"], done.stderr
    done = orion_process([sys.executable, "-c", QUIET, "0.2.7"])
    assert done.stdout.split() == ["True", "True", "False", "False"], done.stderr


FOREIGN = """
import logging, sys, warnings
warnings.simplefilter("ignore")
logging.basicConfig(format="%(name)s: %(message)s")
from orion.algo.random.random import Random
from orion.client import build_experiment


class Mine(Random):
    pass


if sys.argv[2] == "broken":
    sys.modules["ppo_hpo.orion.speedups"] = None  # its import fails
database = {"type": "pickleddb", "host": sys.argv[1] + "/db"}
client = build_experiment("e", space={"x": "uniform(0, 1)"}, algorithm={sys.argv[3]: {"seed": 1}},
                          storage={"type": "legacy", "database": database}, max_trials=5)
client.observe(client.suggest(), 1.0)
trial = client.suggest()
print(trial.params["x"])
client.release(trial)  # Orion does not exit with a trial under way
"""


@pytest.mark.parametrize(
    ("how", "algorithm", "ours"),
    [("whole", "random", True), ("whole", "mine", False), ("broken", "random", False)],
)
def test_an_unknown_algorithm_or_a_failing_entry_point_leaves_orion_unpatched(
    tmp_path: Path, how: str, algorithm: str, ours: bool
) -> None:
    # Not in the repository, where the egg-info of an earlier build would hide the installed entry points.
    done = orion_process([sys.executable, "-c", FOREIGN, str(tmp_path), how, algorithm], True, tmp_path)
    assert done.returncode == 0, done.stderr
    # Random search with this seed, by Orion as it is.
    (tmp_path / "stock").mkdir()
    command = [sys.executable, "-c", FOREIGN, str(tmp_path / "stock"), how, algorithm]
    assert done.stdout.split() == orion_process(command, False, tmp_path).stdout.split() != []
    assert ("ppo_hpo: ppo_hpo could not install its speedups" in done.stderr) == (how == "broken")
    assert by_ours(stored_state(tmp_path / "db", "pickleddb")) == ours


def stored_state(file: Path, kind: str) -> bytes:
    from orion.core.io.database import database_factory

    (document,) = database_factory.create(kind, host=str(file)).read("algo", {})
    state: bytes = document["state"]
    return state


# Through `orion hunt`, which loads nothing of ours but the entry points


@pytest.mark.parametrize(("kind", "on"), [("pickleddb", True), ("sqlitedb", True), ("sqlitedb", False)])
def test_a_plain_hunt(tmp_path: Path, kind: str, on: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys\n"
        "entry = {'name': 'loss', 'type': 'objective', 'value': float(sys.argv[2])}\n"
        "json.dump([entry], open(os.environ['ORION_RESULTS_PATH'], 'w'))\n"
    )
    configuration = {
        "experiment": {"algorithm": {"random": {"seed": 1}}, "working_dir": str(tmp_path / "trials")},
        "storage": {"type": "legacy", "database": {"type": kind, "host": str(tmp_path / "db")}},
        "worker": {"n_workers": 1, "executor": "singleexecutor"},
    }
    (tmp_path / "orion.json").write_text(json.dumps(configuration))
    orion = [str(Path(sys.executable).parent / "orion"), "hunt", "-n", "hunted", "-c", "orion.json"]
    command = [*orion, "--max-trials", "3", sys.executable, str(script), "--x~uniform(0, 1)"]
    done = orion_process(command, on, tmp_path)
    assert done.returncode == 0, done.stderr
    from orion.client import get_experiment

    client = get_experiment("hunted", storage=configuration["storage"])
    trials = client.fetch_trials()
    assert [trial.status for trial in trials] == ["completed"] * 3
    # What Orion's random search draws with this seed, in any database.
    assert [trial.objective.value for trial in trials] == [trial.params["/x"] for trial in trials]
    assert by_ours(stored_state(tmp_path / "db", kind)) == on

"""Shows each defect of Orion without the fixes, so that a test fails once it is gone, and with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo.orion import fixes

SWEEP = """
import sys, warnings
warnings.simplefilter("ignore")
from orion.client import build_experiment
space = {"x": "uniform(0, 1)", "epochs": "fidelity(1, 4, base=2)"}
database = {"type": "pickleddb", "host": sys.argv[1] + "/db"}
told = []
for part in range(2):  # The second resumes from what the first stored.
    client = build_experiment("e", space=space, algorithm="hyperband", max_trials=99,
                              storage={"type": "legacy", "database": database}, working_dir=sys.argv[1])
    for _ in range(4):
        trial = client.suggest()
        told.append((trial.params["x"], trial.params["epochs"]))
        client.observe(trial, trial.params["x"])
    client.close()
print(len(set(told)), sorted({epochs for _, epochs in told}))
"""
MUTATE = """
import warnings
warnings.simplefilter("ignore")
import numpy as np
from orion.algo.base import algo_factory
algo_factory.get_class("random")
from orion.algo.evolution_es import mutate_functions
from orion.core.io.space_builder import SpaceBuilder

space = SpaceBuilder().build({"eps": "loguniform(1e-8, 1e-4)", "x": "uniform(0, 1)"})
rng = np.random.RandomState(0)
eps = [mutate_functions.default_mutate(space["eps"], rng, 9e-5) for _ in range(200)]
same = np.random.RandomState(1)
x = [mutate_functions.default_mutate(space["x"], same, 0.5) for _ in range(200)]
again = np.random.RandomState(1)
expected = []
for _ in range(200):
    value = 0.5 * (1 / 3 + (3 - 1 / 3) * again.random_sample())
    expected.append(value if value <= 1 else 1 - 0.001 * again.random_sample())
print(any(value not in space["eps"] for value in eps), bool(np.allclose(x, expected, rtol=1e-12)))
"""
ONE_HOT = """
import warnings
warnings.simplefilter("ignore")
import numpy as np
from orion.algo.base import algo_factory
algo_factory.get_class("random")  # which loads the entry points, as every command of Orion's does
from orion.core.io.space_builder import SpaceBuilder
from orion.core.worker.primary_algo import create_algo
from orion.algo.random.random import Random


class Real(Random):
    requires_type, requires_shape = "real", "flattened"


space = SpaceBuilder().build({"c": "choices(['a', 'b', 'c', 'd'])", "n": "uniform(0, 1)"})
algorithm = create_algo(Real, space=space, seed=1)
found = algorithm.suggest(20)
print(sorted({trial.params["c"] for trial in found}))
from orion.core.worker.transformer import OneHotEncode
hot = OneHotEncode(4)
assert hot.transform(2).tolist() == [0, 0, 1, 0]
assert hot.transform([[0, 3]]).tolist() == [[[1, 0, 0, 0], [0, 0, 0, 1]]]
assert hot.reverse(hot.transform([0, 1, 2, 3])).tolist() == [0, 1, 2, 3]
for wrong in (4, -1, 0.5):
    try:
        hot.transform(wrong)
    except AssertionError:
        continue
    raise SystemExit(f"took {wrong}")
"""


def run(on: bool, code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("ORION_")}
    own[fixes.VARIABLE] = "1" if on else "0"
    own["ORION_MAX_IDLE_TIME"] = "1"  # seconds until Orion says that it waits for trials
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, check=False, timeout=180)


def test_mutations_stay_between_their_bounds(tmp_path: Path) -> None:
    """A factor from 1/3 to 3 takes 9e-5 beyond 1e-4 seven times in ten, 0.5 beyond 1 three times in eight."""
    for on in (False, True):
        done = run(on, MUTATE, cwd=tmp_path)
        assert done.stdout == f"{not on} True\n", done.stderr[-2000:]


def test_hyperband_without_a_seed(tmp_path: Path) -> None:
    for on in (False, True):
        folder = tmp_path / str(on)
        folder.mkdir()
        done = run(on, SWEEP, str(folder), cwd=tmp_path)
        if on:
            assert done.returncode == 0, done.stderr[-2000:]
            assert done.stdout.startswith("8 "), done.stdout
        else:
            assert done.returncode != 0
            assert "has no attribute 'rng'" in done.stderr


def test_one_hot_codes_with_numpy_2(tmp_path: Path) -> None:
    without = run(False, ONE_HOT, cwd=tmp_path)
    assert without.returncode != 0
    assert "can only concatenate tuple" in without.stderr
    done = run(True, ONE_HOT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["['a',", "'b',", "'c',", "'d']"]


STORED = """
import sys, warnings
warnings.simplefilter("ignore")
from orion.client import build_experiment
space = {"x": "uniform(0, 1)", "epochs": "fidelity(1, 9, base=3)"}
for name, options in [("hyperband", {"seed": 3, "repetitions": 2}), ("pbt", {"generations": 2}),
                      ("evolutiones", {"seed": 3, "repetitions": 1})]:
    client = build_experiment(name, space=space, algorithm={name: options},
                              storage={"type": "legacy", "database": {"type": "ephemeraldb"}})
    stored = client._experiment.algorithm.configuration[name]
    print(name, {key: stored.get(key, "lost") for key in options}, len(stored))
"""
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "population": (
        {"pbt": {"seed": 3, "population_size": 2, "generations": 2, "fork_timeout": 5}},
        "fidelity(1, 16, base=4)",
        "",
    ),
    "power": ({"pbt": {"seed": 3, "population_size": 5, "generations": 1}}, "fidelity(3, 15, base=5)", ""),
    "hyperband": ({"hyperband": {"seed": 3, "repetitions": 1}}, "fidelity(1, 4, base=2)", "broken"),
    "evolutiones": (
        {"evolutiones": {"seed": 3, "repetitions": 1, "nums_population": 4}},
        "fidelity(1, 4, base=2)",
        "broken",
    ),
    "nan": ({"asha": {"seed": 3, "num_rungs": 3, "num_brackets": 1}}, "fidelity(1, 9, base=3)", "nan"),
}
# Prints of each sweep: x and fidelity of its trials, which was broken, how many NaN were promoted, the end.
SWEEPS = """
import json, math, sys, warnings
warnings.simplefilter("ignore")
from orion.client import build_experiment
from orion.core.utils.exceptions import CompletedExperiment, WaitingForTrials


def sweep(name, algorithm, fidelity, bad):
    client = build_experiment(name, space={"x": "uniform(0, 1)", "epochs": fidelity}, algorithm=algorithm,
                              max_trials=999, max_broken=999, working_dir=sys.argv[2],
                              storage={"type": "legacy", "database": {"type": "ephemeraldb"}})
    told, spoilt, broken, end = [], set(), None, "going on"
    for step in range(30):
        try:
            trial = client.suggest()
        except (WaitingForTrials, CompletedExperiment, KeyError) as error:
            end = type(error).__name__
            break
        x, epochs = trial.params["x"], trial.params["epochs"]
        told.append([x, epochs])
        if bad == "broken" and epochs == 1 and broken is None:
            broken = step
            client.release(trial, status="broken")
        elif bad == "nan" and step in (1, 4, 6):
            spoilt.add(x)
            client.observe(trial, math.nan)
        else:
            client.observe(trial, x)
    promoted = sum(x in spoilt for x, _ in told) - len(spoilt)
    return {"told": told, "promoted": promoted, "end": end, "broken": broken}


print(json.dumps({name: sweep(name, *case) for name, case in json.loads(sys.argv[1]).items()}))
"""


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Run each case in unpatched Orion, and with the fixes."""
    folder = tmp_path_factory.mktemp("sweeps")
    both = []
    for on in (False, True):
        done = run(on, SWEEPS, json.dumps(CASES), str(folder), cwd=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        both.append(json.loads(done.stdout.splitlines()[-1]))
    return both


def test_what_orion_stores_of_an_algorithm_is_whole(tmp_path: Path) -> None:
    with_, without = run(True, STORED, cwd=tmp_path), run(False, STORED, cwd=tmp_path)
    assert with_.returncode == without.returncode == 0, with_.stderr[-2000:]
    assert with_.stdout == without.stdout
    assert "hyperband {'seed': 3, 'repetitions': 2} 2\n" in with_.stdout


def test_a_population_of_two(sweeps: list[dict[str, Any]]) -> None:
    """Two trials of each of three generations; Orion alone continues none of the first two."""
    found = [both["population"] for both in sweeps]
    assert (found[0]["end"], len(found[0]["told"])) == ("WaitingForTrials", 2)
    assert [epochs for _, epochs in found[1]["told"]] == [1, 1, 4, 4, 16, 16]
    assert found[1]["end"] == "CompletedExperiment"
    assert found[1]["told"][:2] == found[0]["told"]


def test_a_lowest_fidelity_that_is_no_exact_power(sweeps: list[dict[str, Any]]) -> None:
    found = [both["power"] for both in sweeps]
    assert found[0]["end"] == "KeyError"
    assert found[1]["end"] == "CompletedExperiment"
    assert {round(epochs, 9) for _, epochs in found[1]["told"]} == {3, 15}


@pytest.mark.parametrize("name", ["hyperband", "evolutiones"])
def test_a_broken_trial_does_not_block_its_rung(sweeps: list[dict[str, Any]], name: str) -> None:
    found = [both[name] for both in sweeps]
    assert found[0]["end"] == "WaitingForTrials"
    assert found[1]["end"] == "CompletedExperiment"
    assert len(found[1]["told"]) > len(found[0]["told"])
    index = found[1]["broken"]
    broken = found[1]["told"][index][0]
    if name == "hyperband":  # the worst of its rung, so not promoted
        assert sum(x == broken for x, _ in found[1]["told"]) == 1
    # Up to there both draw the same.
    assert found[1]["told"][: index + 1] == found[0]["told"][: index + 1]


def test_no_nan_is_promoted(sweeps: list[dict[str, Any]]) -> None:
    found = [both["nan"] for both in sweeps]
    assert found[0]["promoted"] > 0
    assert found[1]["promoted"] == 0


NAN = """
import math, warnings
warnings.simplefilter("ignore")
from orion.algo.base import algo_factory
algo_factory.get_class("random")  # which loads the entry points
from orion.algo.pbt import exploit, pbt
from orion.algo.tpe import tpe
from types import SimpleNamespace as Trial
values = [3.0, math.nan, 1.0, 2.0]
for module in (exploit, tpe):
    order = getattr(module, "sorted", sorted)([Trial(v=v) for v in values], key=lambda trial: trial.v)
    print([trial.v for trial in order])
trial = Trial(objective=Trial(value=math.nan))
print(pbt.get_objective(trial))
"""


def test_nan_is_the_worst_for_pbt_and_tpe(tmp_path: Path) -> None:
    assert run(False, NAN, cwd=tmp_path).stdout.split("\n")[:3] == ["[3.0, nan, 1.0, 2.0]"] * 2 + ["nan"]
    assert run(True, NAN, cwd=tmp_path).stdout.split("\n")[:3] == ["[1.0, 2.0, 3.0, nan]"] * 2 + ["inf"]


SAME = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import speedups_sweeps
speedups_sweeps.main()
from orion.algo.hyperband.hyperband import Hyperband
print(hasattr(Hyperband, "rng"))
"""


def test_sweeps_that_went_well_get_the_very_same_suggestions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweeps of `test_speedups`: what was suggested, the state in the end and all trials."""
    # Orion's own registry holds sets of names, whose order would differ between processes.
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    monkeypatch.setenv("PPO_HPO_LEAN", "0")
    cases = [f"{name}:one" for name in ("hyperband", "EvolutionES", "pbt", "tpe", "asha")]
    arguments = [str(Path(__file__).parent), str(tmp_path), "ephemeraldb", "1", *cases]
    (as_it_is, off), (fixed, on) = (
        run(with_fixes, SAME, *arguments, cwd=tmp_path).stdout.splitlines()[-2:]
        for with_fixes in (False, True)
    )
    assert (off, on) == ("False", "True")
    found = json.loads(as_it_is)
    assert sorted(found) == sorted(cases)
    assert all(len(told) >= 5 for told, *_ in found.values())
    assert json.loads(fixed) == found


def test_another_version_is_left_as_it_is(tmp_path: Path) -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from ppo_hpo.orion import fixes, tested_version\n"
        "tested_version.TESTED_ORION = '0.2.6'\n"
        "from orion.algo.hyperband.hyperband import Hyperband\n"
        "print(fixes.install(), hasattr(Hyperband, 'rng'))\n"
    )
    done = run(True, code, cwd=tmp_path)
    assert done.stdout.split() == ["False", "False"], done.stderr[-2000:]

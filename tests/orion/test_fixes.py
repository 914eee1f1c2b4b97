"""Shows each defect of Orion without the fixes, so that a test fails once it is gone, and with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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


def run(
    on: bool, code: str, *arguments: str, cwd: Path, seconds: float = 180
) -> subprocess.CompletedProcess[str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("ORION_")}
    own[fixes.VARIABLE] = "1" if on else "0"
    own["ORION_MAX_IDLE_TIME"] = "1"  # seconds until Orion says that it waits for trials
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=own, capture_output=True, text=True, check=False, timeout=seconds
    )


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


# Drives an algorithm without a database, with up to four trials at a time. One in twenty breaks, and the
# first one (or the first promoted one) in any case. From time to time another object goes on with the state,
# as each of Orion's processes does.
DRIVE = """
import json, random, sys, warnings
warnings.simplefilter("ignore")
from orion.algo.base import algo_factory
from orion.core.io.space_builder import SpaceBuilder
from orion.core.worker.primary_algo import create_algo
from orion.core.worker.trial import Trial


def drive(name, options, fidelity, count, every, breaks="first"):
    space = SpaceBuilder().build({"x": "uniform(0, 1, precision=8)", "epochs": fidelity})
    chance, told, pending, broken = random.Random(1), [], [], []

    kind = algo_factory.get_class(name)

    def make():
        made = create_algo(kind, space=space, **options)
        # With its wrappers, each trial is copied three times as often.
        return made if every < 1000 else made.unwrapped

    algorithm = make()
    while len(told) < count:
        found = algorithm.suggest(1) if len(pending) < 4 else []
        told += [[trial.params["x"], trial.params["epochs"]] for trial in found]
        pending += found
        if not found and not pending:
            break
        if not found:
            trial = pending.pop(chance.randrange(len(pending)))
            is_first = not broken and (breaks == "first" or trial.params["epochs"] > 1)
            if breaks and (chance.random() < 0.05 or is_first):
                trial.status = "broken"
                broken.append([trial.params["x"], trial.params["epochs"]])
            else:
                trial.status = "completed"
                loss = (trial.params["x"] - 0.3) ** 2
                trial.results = [Trial.Result(name="loss", type="objective", value=loss)]
            algorithm.observe([trial])
        if len(told) % every == 0:
            state, algorithm = algorithm.state_dict, make()
            algorithm.set_state(state)
    return {"told": told, "broken": broken, "done": bool(algorithm.is_done)}


print(json.dumps([drive(*case) for case in json.loads(sys.argv[1])]))
"""

FOUR, SIXTEEN = "fidelity(1, 4, base=2)", "fidelity(1, 16, base=4)"
PBT = {"seed": 1, "population_size": 8, "generations": 4, "fork_timeout": 0.1}
# Fixes on or off; name; algorithm, options, fidelity, count, trials per object, which trial breaks first. All
# of one list run in one process, because a process takes longer to import Orion than most of them.
DRIVES: list[dict[tuple[bool, str], list[Any]]] = [
    {
        (False, "dry"): ["asha", {"seed": 1}, FOUR, 999, 999, ""],
        (False, "stuck"): ["asha", {"seed": 1}, FOUR, 999, 999],
        (False, "pbt stuck"): ["pbt", PBT, "fidelity(1, 16)", 999, 20, "promoted"],
    },
    {
        (True, "asha 4"): ["asha", {"seed": 1}, FOUR, 1000, 1000],
        (True, "asha 16"): ["asha", {"seed": 1}, SIXTEEN, 200, 100],
        (True, "asha"): ["asha", {"seed": 1}, FOUR, 120, 999],
        (True, "asha again"): ["asha", {"seed": 1}, FOUR, 120, 9],
        (True, "asha other"): ["asha", {"seed": 2}, FOUR, 120, 999],
        (True, "random"): ["random", {"seed": 1}, FOUR, 100, 50],
        (True, "tpe"): ["tpe", {"seed": 1}, FOUR, 40, 20],
        (True, "pbt"): ["pbt", PBT, "fidelity(1, 16)", 999, 20],
        (True, "pbt promoted"): ["pbt", PBT, "fidelity(1, 16)", 999, 20, "promoted"],
    },
    {
        (True, "hyperband 4"): ["hyperband", {"seed": 1}, FOUR, 1000, 1000],
        (True, "hyperband 16"): ["hyperband", {"seed": 1}, SIXTEEN, 400, 200],
        (True, "hyperband"): ["hyperband", {"seed": 1}, FOUR, 120, 999],
        (True, "hyperband again"): ["hyperband", {"seed": 1}, FOUR, 120, 9],
        (True, "hyperband other"): ["hyperband", {"seed": 2}, FOUR, 120, 999],
        (True, "es"): ["evolutiones", {"seed": 1, "nums_population": 6}, FOUR, 150, 50],
        (True, "es once"): [
            "evolutiones",
            {"seed": 1, "nums_population": 6, "repetitions": 1},
            FOUR,
            999,
            20,
        ],
    },
]


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("drives")

    def one(cases: dict[tuple[bool, str], list[Any]]) -> dict[str, dict[str, Any]]:
        ((on, _), *_) = cases
        done = run(on, DRIVE, json.dumps([*cases.values()]), cwd=folder, seconds=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return dict(zip([name for _, name in cases], json.loads(done.stdout.splitlines()[-1]), strict=True))

    with ThreadPoolExecutor(2) as pool:
        return {name: found for part in pool.map(one, DRIVES) for name, found in part.items()}


def test_asha_and_hyperband_never_run_dry(driven: dict[str, dict[str, Any]]) -> None:
    # Orion alone: ASHA has 40 configurations, and fewer trials if the first one breaks.
    assert len({x for x, _ in driven["dry"]["told"]}) == 40
    assert len(driven["stuck"]["told"]) < 20
    for name, count in (("asha 4", 1000), ("hyperband 4", 1000), ("asha 16", 200), ("hyperband 16", 400)):
        told = driven[name]["told"]
        assert len(told) == count
        assert len({tuple(each) for each in told}) == count
        assert sum(epochs == max(epochs for _, epochs in told) for _, epochs in told) >= count / 25
        broken = {x for x, epochs in driven[name]["broken"] if epochs == 1}
        assert len(broken) > count / 100
        assert not broken & {x for x, epochs in told if epochs > 1}


@pytest.mark.parametrize("name", ["asha", "hyperband"])
def test_a_seed_repeats_a_sweep_that_goes_on_for_long(driven: dict[str, dict[str, Any]], name: str) -> None:
    """In the same order, whichever process goes on: another object reads the state before each suggestion."""
    assert len(driven[name]["told"]) == 120
    assert driven[name] == driven[f"{name} again"]
    assert not {x for x, _ in driven[name]["told"]} & {x for x, _ in driven[f"{name} other"]["told"]}


def test_other_algorithms_go_on_or_say_that_they_are_done(driven: dict[str, dict[str, Any]]) -> None:
    assert [len(driven[name]["told"]) for name in ("random", "tpe", "es")] == [100, 40, 150]
    assert [driven[name]["done"] for name in ("pbt", "pbt promoted", "es once")] == [True] * 3
    assert not driven["pbt stuck"]["done"]  # Where its first promoted trial breaks, PBT alone does not end.

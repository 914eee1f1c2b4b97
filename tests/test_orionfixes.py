"""Defects of Orion's: each is shown without the mending, so that one that is gone is seen, and with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ppo_hpo import orionfixes

SWEEP = """
import sys, warnings
warnings.simplefilter("ignore")
from orion.client import build_experiment
space = {"x": "uniform(0, 1)", "epochs": "fidelity(1, 4, base=2)"}
database = {"type": "pickleddb", "host": sys.argv[1] + "/db"}
told = []
for part in range(2):  # the second goes on from what the first stored
    client = build_experiment("e", space=space, algorithm="hyperband", max_trials=99,
                              storage={"type": "legacy", "database": database}, working_dir=sys.argv[1])
    for _ in range(4):
        trial = client.suggest()
        told.append((trial.params["x"], trial.params["epochs"]))
        client.observe(trial, trial.params["x"])
    client.close()
print(len(set(told)), sorted({epochs for _, epochs in told}))
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
    own[orionfixes.VARIABLE] = "1" if on else "0"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, check=False, timeout=180)


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


def test_another_version_is_left_as_it_is(tmp_path: Path) -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from ppo_hpo import orionfixes\n"
        "orionfixes.TESTED_ORION = '0.2.6'\n"
        "from orion.algo.hyperband.hyperband import Hyperband\n"
        "print(orionfixes.install(), Hyperband.__init__.__module__)\n"
    )
    done = run(True, code, cwd=tmp_path)
    assert done.stdout.split() == ["False", "orion.algo.hyperband.hyperband"], done.stderr[-2000:]

"""Orion without its copies: the suggestions and the stored state are those of Orion as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# One run of a sweep in a process of its own, because Orion is changed for a whole process. It prints every
# suggestion, and the algorithm's state as plain data; clocks, which differ between any two runs, are left out.
RUN = """
import json, pickle, random, sys, warnings
from collections import defaultdict

warnings.simplefilter("ignore")
import numpy
from orion.client import build_experiment, get_experiment
from orion.core.utils.exceptions import CompletedExperiment, WaitingForTrials
from orion.core.worker.trial import Trial
from ppo_hpo import lean

file, kind, algorithm, order, part = sys.argv[1:]
assert lean.install() == (LEAN := __import__("os").environ["PPO_HPO_LEAN"] != "0")
storage = {"type": "legacy", "database": {"type": kind, "host": file}}
algorithm = json.loads(algorithm)
name = next(iter(algorithm)).lower()
space = {"group": {"x": "uniform(0, 1)", "y": "loguniform(1e-4, 1)", "z": "choices(['a', 'b', 'c'])"},
         "n": "uniform(1, 6, discrete=True)"}
if name in ("asha", "hyperband", "pbt", "evolutiones"):
    space["epochs"] = "fidelity(1, 9, base=3)"
if name == "gridsearch":
    space = {"x": "uniform(0, 1)", "n": "uniform(1, 6, discrete=True)"}


def client():
    return build_experiment("same", space=space, algorithm=algorithm, storage=storage,
                            working_dir=file + ".d", max_trials=1000, max_broken=1000)


def objective(trial):
    return round(sum(hash_of(p.value) for p in trial._params), 6)


def hash_of(value):
    return float(value) if not isinstance(value, str) else ord(value) / 100


def plain(value, seen):
    if isinstance(value, Trial):
        return ["trial", value.status, value.parent, value.experiment, value.id,
                [p.to_dict() for p in value._params], [r.to_dict() for r in value._results]]
    if isinstance(value, dict):
        return [type(value).__name__, [[plain(k, seen), plain(v, seen)] for k, v in value.items()]]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [plain(item, seen) for item in value]]
    if isinstance(value, set):
        return ["set", sorted(map(str, value))]
    if isinstance(value, numpy.ndarray):
        return ["array", str(value.dtype), value.tolist()]
    if isinstance(value, numpy.generic):
        return [type(value).__name__, value.item()]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if id(value) in seen:
        return ["again", seen[id(value)]]
    seen[id(value)] = len(seen)
    return [type(value).__name__, plain(vars(value), seen)]


clients = [client(), client()] if order == "two" else [client()]
stream = random.Random(part)
pending, told = [], []
for step in range(int({"two": 26, "one": 26, "restart": 13, "failing": 26}[order])):
    here = clients[stream.randrange(len(clients))]
    # Up to three at once, told in any order; some are broken, some released and handed out again.
    if pending and (len(pending) == 3 or stream.random() < 0.5):
        owner, trial = pending.pop(stream.randrange(len(pending)))
        chance = stream.random()
        if chance < 0.1 and name in ("random", "tpe", "asha", "gridsearch"):
            owner.release(trial, status="broken")
        elif chance < 0.2:
            owner.release(trial)
        else:
            owner.observe(trial, [{"name": "loss", "type": "objective", "value": objective(trial)},
                                  {"name": "more", "type": "statistic", "value": 1.5}])
        continue
    if order == "failing" and step % 5 == 4:
        # An algorithm that fails in the middle: Orion puts the state back that it has read.
        try:
            with here._experiment.acquire_algorithm_lock() as inner:
                inner.suggest(2)
                raise RuntimeError("in the middle")
        except RuntimeError:
            pass
    try:
        trial = here.suggest(pool_size=stream.choice([1, 1, 3]))
    except (WaitingForTrials, CompletedExperiment) as error:
        told.append(type(error).__name__)
        continue
    told.append([trial.id, trial.parent, trial.params])
    pending.append((here, trial))
for owner, trial in pending:
    owner.release(trial)
state = clients[0].storage.get_algorithm_lock_info(uid=clients[0].id).state
document = clients[0].storage._db.read("algo", {"experiment": clients[0].id})[0]
assert plain(pickle.loads(document["state"]), {}) == plain(state, {})
trials = clients[0].fetch_trials()
stored = [[t.id, t.status, t.parent, t.params, [r.to_dict() for r in t.results]] for t in trials]
print(json.dumps([told, plain(state, {}), stored, clients[0].is_done]))


"""
ALGORITHMS: dict[str, dict[str, Any]] = {
    "random": {"seed": 3},
    "gridsearch": {"n_values": 4},
    "tpe": {"seed": 3, "n_initial_points": 5},
    "asha": {"seed": 3, "num_rungs": 3},
    "hyperband": {"seed": 3, "repetitions": 2},
    "EvolutionES": {"seed": 3, "repetitions": 1, "nums_population": 6},
    "pbt": {"seed": 3, "population_size": 5, "generations": 2},
}


def run(folder: Path, lean: str, kind: str, algorithm: str, order: str, part: int) -> list[Any]:
    arguments = [
        str(folder / f"db.{kind}"),
        kind,
        json.dumps({algorithm: ALGORITHMS[algorithm]}),
        order,
        str(part),
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ORION_")}
    environment.update(PPO_HPO_LEAN=lean, PYTHONHASHSEED="0")
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("order", ["one", "two", "failing"])
def test_suggestions_and_state_are_those_of_orion(tmp_path: Path, algorithm: str, order: str) -> None:
    found = {}
    for lean in ("0", "1"):
        (tmp_path / lean).mkdir()
        found[lean] = run(tmp_path / lean, lean, "pickleddb", algorithm, order, 1)
    assert sum(isinstance(item, list) for item in found["0"][0]) >= 5
    assert found["1"] == found["0"]

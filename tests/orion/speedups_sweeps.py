"""Runs sweeps of each algorithm for `test_speedups.py`, and prints the suggestions and the final database.

    python speedups_sweeps.py FOLDER DATABASE PART CASE...

A CASE is ``algorithm:order``, of `ALGORITHMS` and `STEPS`.

Run in a process of its own, because Orion is changed for a whole process. It prints JSON. Clocks, which
differ between any two runs, are left out.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import sys
import warnings
from typing import Any

import numpy as np

ALGORITHMS: dict[str, dict[str, Any]] = {
    "random": {"seed": 3},
    "gridsearch": {"n_values": 4},
    "tpe": {"seed": 3, "n_initial_points": 5},
    "asha": {"seed": 3, "num_rungs": 3},
    "hyperband": {"seed": 3, "repetitions": 2},
    "EvolutionES": {"seed": 3, "repetitions": 1, "nums_population": 6},
    "pbt": {"seed": 3, "population_size": 5, "generations": 2},
}
STEPS = {"one": 20, "two": 20, "failing": 12}
FIDELITY = ("asha", "hyperband", "pbt", "EvolutionES")


def space_of(algorithm: str) -> dict[str, Any]:
    if algorithm == "gridsearch":
        return {"x": "uniform(0, 1)", "n": "uniform(1, 6, discrete=True)"}
    group = {"x": "uniform(0, 1)", "y": "loguniform(1e-4, 1)", "z": "choices(['a', 'b', 'c'])"}
    space: dict[str, Any] = {"group": group, "n": "uniform(1, 6, discrete=True)"}
    if algorithm in FIDELITY:
        space["epochs"] = "fidelity(1, 9, base=3)"
    return space


def number(value: Any) -> float:
    return ord(value) / 100 if isinstance(value, str) else float(value)


def plain(value: Any, seen: dict[int, int]) -> Any:
    """Any object as JSON: its type and all that it holds, in order, and which objects are the same one."""
    from orion.core.worker.trial import Trial

    if value is None or isinstance(value, str | int | float | bool):
        return [type(value).__name__, value]
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), value.tolist()]
    if isinstance(value, np.generic):
        return [type(value).__name__, value.item()]
    if isinstance(value, set):
        return ["set", sorted(map(str, value))]
    if isinstance(value, type):
        return ["type", value.__name__]
    if isinstance(value, Trial):
        parts = [item.to_dict() for item in (*value._params, *value._results)]
        clocks = [getattr(value, n) is None for n in ("submit_time", "start_time", "end_time", "heartbeat")]
        rest = [value.status, value.parent, value.experiment, value.id, value.id_override is None, clocks]
        return ["trial", *rest, plain(parts, {})]
    if id(value) in seen:
        return ["again", seen[id(value)]]
    seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return [type(value).__name__, [[plain(k, seen), plain(v, seen)] for k, v in value.items()]]
    if isinstance(value, list | tuple):
        return [type(value).__name__, [plain(item, seen) for item in value]]
    return [type(value).__name__, plain(copy.copy(value).__reduce_ex__(2)[2], seen)]


def sweep(folder: str, kind: str, part: int, algorithm: str, order: str) -> list[Any]:
    from orion.client import build_experiment
    from orion.core.utils.exceptions import CompletedExperiment, WaitingForTrials

    database = {"type": kind, "host": f"{folder}/{algorithm}-{order}"}

    def client() -> Any:
        return build_experiment(
            "same",
            space=space_of(algorithm),
            algorithm={algorithm: dict(ALGORITHMS[algorithm])},
            storage={"type": "legacy", "database": database},
            working_dir=f"{folder}/trials",
            max_trials=1000,
            max_broken=1000,
        )

    clients = [client() for _ in range(2 if order == "two" else 1)]
    stream = random.Random(f"{algorithm} {order} {part}")
    pending: list[tuple[Any, Any]] = []
    told: list[Any] = []
    for step in range(STEPS[order]):
        here = clients[stream.randrange(len(clients))]
        # Up to three trials at once, observed in any order. Some break, some are suggested again.
        if pending and (len(pending) == 3 or stream.random() < 0.5):
            owner, trial = pending.pop(stream.randrange(len(pending)))
            chance = stream.random()
            if chance < 0.1 and algorithm in ("random", "tpe", "gridsearch"):
                owner.release(trial, status="broken")  # which would block the rungs of the others
            elif chance < 0.2:
                owner.release(trial)
            else:
                loss = round(sum(number(param.value) for param in trial._params), 6)
                results = [("loss", "objective", loss), ("more", "statistic", 1.5)]
                owner.observe(trial, [dict(zip(("name", "type", "value"), r, strict=True)) for r in results])
            continue
        if order == "failing" and step % 3 == 2:
            # What fails in the middle: Orion puts the state back that it has read.
            try:
                with here._experiment.acquire_algorithm_lock() as inner:
                    inner.suggest(2)
                    raise LookupError
            except LookupError:
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
    storage = clients[0].storage
    blob = storage._db.read("algo", {"experiment": clients[0].id})[0]["state"]
    trials = [
        [t.id, t.status, t.parent, t.params, [r.to_dict() for r in t.results]]
        for t in clients[0].fetch_trials()
    ]
    # The state by the plain `pickle`, as any other process reads it.
    return [told, plain(pickle.loads(blob), {}), trials, bool(clients[0].is_done)]


def main() -> None:
    warnings.simplefilter("ignore")
    from ppo_hpo.orion import speedups

    assert speedups.install() == (os.environ["PPO_HPO_LEAN"] != "0")
    folder, kind, part, *cases = sys.argv[1:]
    print(json.dumps({case: sweep(folder, kind, int(part), *case.split(":")) for case in cases}))


if __name__ == "__main__":
    main()

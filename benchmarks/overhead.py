"""What Orion costs around a trial that trains nothing, by the number of trials stored, as it is and by ours.

    python benchmarks/overhead.py                           # as committed; about forty minutes
    python benchmarks/overhead.py --stored 10 --no-hunt     # a quick look; writes nothing

An experiment with nine dimensions (and epochs as fidelity for ASHA), filled with so many completed trials
that its algorithm has suggested (TPE's are drawn at random) and observed; then a few more, one worker, each
of which reports at once. Each row starts from the same file, for Orion as it is, for `orion/speedups` on the
same PickledDB, and for `orion/speedups` on `orion/sqlitedb`. All figures are CPU seconds for each trial,
because what else the machine does changes them less than the clock; Orion computes all the time.

- Python: `suggest` and `observe` of `ExperimentClient`. "Database" is the time inside the database's
  operations, "copies" that of copying and pickling the algorithm's state, "suggestion" that inside the
  algorithm's own `suggest` and `observe` without copies, and the rest is Orion's bookkeeping.
- `orion hunt`: that of a longer hunt less that of a shorter one, for each trial more, as it is on PickledDB
  and by ours on SQLiteDB. "Script" is a Python script that imports nothing but `json`; "plain" is `ppo-hpo
  run` on a trial of 16 steps, "warm" the same with `--preload`: the difference from the script is what
  imports and the start of a trial cost.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import numpy as np
import usage

RESULTS = Path(__file__).resolve().parent / "results"
BIN = Path(sys.executable).parent
STORED = (10, 100, 500, 2000)
ALGORITHMS = ("random", "tpe", "asha")
KINDS = {
    "stock": "as it is, PickledDB",
    "pickled": "without copies, PickledDB",
    "sqlite": "without copies, SQLiteDB",
}
# A trial that takes one rollout and one episode of evaluation.
SPACE = """env: {id: CartPole-v1, n_envs: 1}
task: {epochs: 1, max_epochs: 1, steps_per_epoch: 16, eval_episodes: 1}
model: {width: 8, depth: 1}
optimizer: {lr: 'orion~uniform(1e-3, 0.1)', eps: 'orion~uniform(1e-3, 0.1)'}
ppo:
  n_steps: 16
  batch_size: 16
  n_epochs: 1
  gamma: orion~uniform(1e-3, 0.1)
  gae_lambda: orion~uniform(1e-3, 0.1)
  clip_range: orion~uniform(1e-3, 0.1)
  ent_coef: orion~uniform(1e-3, 0.1)
  vf_coef: orion~uniform(1e-3, 0.1)
  max_grad_norm: orion~uniform(1e-3, 0.1)
  target_kl: orion~uniform(1e-3, 0.1)
"""
SCRIPT = """import json, os
with open(os.environ["ORION_RESULTS_PATH"], "w") as file:
    json.dump([{"name": "objective", "type": "objective", "value": 1.0}], file)
"""


def fill(database: Path, algorithm: str, stored: int) -> None:
    """An experiment with so many completed trials: made in memory, pickled, and so a PickledDB."""
    from orion.client import build_experiment
    from orion.storage.base import setup_storage

    names = [f"/x{index}" for index in range(9)]
    space = dict.fromkeys(names, "uniform(0, 1)")
    if algorithm == "asha":
        space["/epochs"] = "fidelity(1, 256, base=4)"
    storage = setup_storage({"type": "legacy", "database": {"type": "ephemeraldb", "host": ""}})
    client = build_experiment(
        "cost", space=space, algorithm={algorithm: {"seed": 1}}, storage=storage,
        max_trials=10**6, max_broken=10**6, working_dir=str(database.parent),
    )  # fmt: skip
    _grow(client, stored, drawn=algorithm == "tpe")  # which takes minutes to suggest so many
    database.write_bytes(pickle.dumps(storage._db))


def _grow(client: Any, stored: int, drawn: bool = False) -> None:
    """Give an experiment so many completed trials, which its algorithm has suggested and observed."""
    from orion.core.worker.trial import Trial

    experiment = client._experiment
    stream = np.random.default_rng(0)
    now = datetime.now(UTC).replace(tzinfo=None)
    with experiment.acquire_algorithm_lock() as whole:
        while len(whole.registry) < stored:
            trials = [_drawn(client.space, stream)] if drawn else whole.suggest(1)
            if not trials:
                raise SystemExit(f"{whole} has no {stored} trials to suggest")
            for trial in trials:
                experiment.register_trial(trial, status="completed")
                trial.start_time = trial.end_time = now
                objective = float(stream.random())
                trial.results = [Trial.Result(name="objective", type="objective", value=objective)]
                client.storage.update_trial(trial, **trial.to_dict())
            whole.observe(trials)


def _drawn(space: Any, stream: np.random.Generator) -> Any:
    from orion.core.utils import format_trials

    return format_trials.dict_to_trial({name: float(stream.random()) for name in space}, space)


class Clock:
    """Seconds inside some functions, each counted once however they call one another."""

    def __init__(self) -> None:
        self.seconds = {"database": 0.0, "copies": 0.0, "suggestion": 0.0}
        self._inside: list[str] = []

    def wrap(self, owner: Any, name: str, kind: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            with self._count(kind):
                return plain(*args, **options)

        setattr(owner, name, timed)

    @contextlib.contextmanager
    def _count(self, kind: str) -> Iterator[None]:
        started = time.process_time()
        self._inside.append(kind)
        try:
            yield
        finally:
            self._inside.pop()
            spent = time.process_time() - started
            if kind not in self._inside:
                self.seconds[kind] += spent
                if self._inside:  # what is inside another kind is not counted there
                    self.seconds[self._inside[-1]] -= spent


def filled(file: str, algorithm: str, stored: int) -> None:
    """Fill a database, by ours, which is quicker and leaves the same; run in a process of its own."""
    from ppo_hpo.orion import speedups

    if not speedups.install():
        raise SystemExit(f"{speedups.VARIABLE} does not fit")
    fill(Path(file), algorithm, stored)


def moved(source: Path, target: Path) -> None:
    """What is in a PickledDB, into a SQLite file."""
    from orion.storage.base import setup_storage

    old = setup_storage({"type": "legacy", "database": {"type": "pickleddb", "host": str(source)}})
    new = setup_storage({"type": "legacy", "database": {"type": "sqlitedb", "host": str(target)}})
    for collection in ("experiments", "trials", "algo"):
        new._db.write(collection, old._db.read(collection, {}))


def python(file: str, kind: str, trials: int) -> dict[str, float]:
    """CPU seconds per trial of `suggest` and `observe`; run in a process of its own."""
    clock = Clock()
    # Before Orion is imported. The two are all that is done to copy a state, or to store it.
    clock.wrap(copy, "deepcopy", "copies")
    import orion.storage.legacy
    from orion.algo.base import BaseAlgorithm
    from orion.client import build_experiment
    from orion.core.io.database.pickleddb import PickledDB
    from orion.storage.legacy import Legacy

    from ppo_hpo.orion import speedups
    from ppo_hpo.orion.sqlitedb import SQLiteDB

    if speedups.install() != (kind != "stock"):
        raise SystemExit(f"{speedups.VARIABLE} does not fit")
    database = Path(file)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "sqlite":
            moved(database, Path(folder) / "orion.sqlite")
            chosen = {"type": "sqlitedb", "host": f"{folder}/orion.sqlite"}
        else:
            (Path(folder) / "orion.pkl").write_bytes(database.read_bytes())
            chosen = {"type": "pickleddb", "host": f"{folder}/orion.pkl"}
        own_pickle = orion.storage.legacy.pickle
        orion.storage.legacy.pickle = states = types.SimpleNamespace(
            dumps=own_pickle.dumps, loads=own_pickle.loads
        )
        for name in ("dumps", "loads"):
            clock.wrap(states, name, "copies")
        for name in ("read", "write", "read_and_write", "count", "remove"):
            clock.wrap(SQLiteDB if kind == "sqlite" else PickledDB, name, "database")
        client = build_experiment("cost", storage={"type": "legacy", "database": chosen})
        assert isinstance(client.storage, Legacy)
        own = type(client.algorithm.unwrapped)
        assert issubclass(own, BaseAlgorithm)
        for name in ("suggest", "observe"):
            clock.wrap(own, name, "suggestion")

        def one() -> float:
            started = time.process_time()
            trial = client.suggest()
            client.observe(trial, [{"name": "objective", "type": "objective", "value": 1.0}])
            return time.process_time() - started

        one()  # takes in all that is stored
        for part in clock.seconds:
            clock.seconds[part] = 0.0
        whole = sum(one() for _ in range(trials))
        client.close()
    parts = {part: seconds / trials for part, seconds in clock.seconds.items()}
    return {"whole": whole / trials, **parts, "rest": whole / trials - sum(parts.values())}


def grown(file: str, stored: int) -> None:
    """Fill up a hunt's own experiment, by ours; run in a process of its own."""
    from orion.client import build_experiment
    from orion.storage.base import setup_storage

    from ppo_hpo.orion import speedups

    if not speedups.install():
        raise SystemExit(f"{speedups.VARIABLE} does not fit")
    storage = setup_storage({"type": "legacy", "database": {"type": "ephemeraldb", "host": ""}})
    storage._db = pickle.loads(Path(file).read_bytes())
    _grow(build_experiment("cost", storage=storage), stored)
    Path(file).write_bytes(pickle.dumps(storage._db))
    moved(Path(file), Path(file).with_suffix(".sqlite"))


def hunt(kind: str, orion: str, stored: int) -> float:
    """CPU seconds for each further trial of `orion hunt` with random search."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "script.py").write_text(SCRIPT)
        (directory / "space.yaml").write_text(SPACE)
        database = directory / "orion.pkl"
        own = {k: v for k, v in os.environ.items() if not k.startswith(("ORION_", "PYTHON"))}
        environment = {**own, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        environment["XDG_RUNTIME_DIR"] = folder
        configuration: dict[str, Any] = {
            "experiment": {"algorithm": {"random": {"seed": 1}}, "working_dir": f"{folder}/trials"},
            "storage": {"type": "legacy", "database": {"type": "pickleddb", "host": str(database)}},
            "worker": {"n_workers": 1, "executor": "singleexecutor"},
        }
        (directory / "orion.json").write_text(json.dumps(configuration))
        command = {
            "script": [sys.executable, "script.py"],
            "plain": [str(BIN / "ppo-hpo"), "run", "--device", "cpu"],
            "warm": [str(BIN / "ppo-hpo"), "run", "--preload", "--device", "cpu"],
        }[kind]

        def run(trials: int) -> float:
            whole = [str(BIN / "orion"), "hunt", "-n", "cost", "-c", "orion.json"]
            whole += ["--worker-trials", str(trials), *command, "--config", "space.yaml"]
            return usage.timed(whole, directory, environment)["cpu_seconds"]

        run(1)
        in_a_process("grown", str(database), stored, lean=True)
        if orion == "sqlite":
            configuration["storage"]["database"] = {
                "type": "sqlitedb",
                "host": str(directory / "orion.sqlite"),
            }
            (directory / "orion.json").write_text(json.dumps(configuration))
        few, many = (2, 4) if stored >= 500 else (2, 10)
        shorter = run(few)
        return (run(many) - shorter) / (many - few)


def in_a_process(function: str, *arguments: Any, lean: bool = False) -> Any:
    """One measurement in a fresh process, which imports and patches for itself."""
    command = [sys.executable, __file__, "--measure", json.dumps([function, *arguments])]
    environment = {**os.environ, "PPO_HPO_LEAN": "1" if lean else "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict[str, Any]], hunts: list[dict[str, Any]]) -> str:
    """Seconds per trial."""
    parts = ("whole", "copies", "database", "suggestion", "rest")
    lines = [
        "| Python | stored trials | Orion | CPU seconds per trial | copies | database | suggestion | rest |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        for kind, name in KINDS.items():
            cells = [f"{row[kind][part]:.3f}" for part in parts]
            lines.append(f"| {row['algorithm']} | {row['stored']:,} | {name} | " + " | ".join(cells) + " |")
    if hunts:
        lines += [
            "",
            "| `orion hunt`, random, CPU seconds per trial | script | plain trial | warm trial |",
            "|---" * 4 + "|",
        ]
    for row in hunts:
        for kind in ("stock", "sqlite"):
            cells = [f"{row[kind][what]:.2f}" for what in ("script", "plain", "warm")]
            lines.append(f"| {row['stored']:,} stored, {KINDS[kind]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stored", type=int, nargs="+", default=list(STORED), metavar="N")
    parser.add_argument("--algorithm", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    parser.add_argument("--no-hunt", action="store_true", help="leave out `orion hunt`")
    parser.add_argument("--note", default="", help="what else the machine did, for the result")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        warnings.simplefilter("ignore")
        function, *given = json.loads(arguments.measure)
        print(
            json.dumps({"filled": filled, "grown": grown, "python": python, "hunt": hunt}[function](*given))
        )
        return 0
    rows, hunts = [], []
    for stored in arguments.stored:
        for algorithm in arguments.algorithm:
            with tempfile.TemporaryDirectory() as folder:
                file = f"{folder}/filled.pkl"
                in_a_process("filled", file, algorithm, stored, lean=True)
                row: dict[str, Any] = {"algorithm": algorithm, "stored": stored}
                for kind in KINDS:
                    few = stored >= 500 and kind == "stock"
                    row[kind] = in_a_process("python", file, kind, 2 if few else 8, lean=kind != "stock")
            rows.append(row)
            print(json.dumps(row), flush=True)
        if not arguments.no_hunt:
            kinds = ("script", "plain", "warm")
            hunts.append(
                {
                    "stored": stored,
                    **{
                        orion: {
                            kind: in_a_process("hunt", kind, orion, stored, lean=orion != "stock")
                            for kind in kinds
                        }
                        for orion in ("stock", "sqlite")
                    },
                }
            )
            print(json.dumps(hunts[-1]), flush=True)
    print(table(rows, hunts))
    if arguments.stored == list(STORED) and arguments.algorithm == list(ALGORITHMS):
        RESULTS.mkdir(exist_ok=True)
        content = {"machine": machine.describe(), "note": arguments.note, "python": rows, "hunt": hunts}
        (RESULTS / "overhead.json").write_text(json.dumps(content, indent=1) + "\n")
        note = f"\nMeasured while: {arguments.note}\n" if arguments.note else ""
        (RESULTS / "overhead.md").write_text(table(rows, hunts) + "\n" + note)
    return 0


if __name__ == "__main__":
    sys.exit(main())

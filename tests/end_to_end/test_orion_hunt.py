"""Real `orion hunt` processes: every algorithm, promotions, forks, stops and mistakes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.space import space_path
from ppo_hpo.state.checkpoint import Checkpoint, Storage, arrays_digest, read

DATA = Path(__file__).parents[1] / "data"
STEPS = 1024  # of one epoch
BIN = Path(sys.executable).parent
# Far above what a hunt takes, so that one that hangs fails instead of holding up the suite.
PATIENCE = 300

# What each algorithm needs besides a seed is described in docs/reference/orion-algorithms.md.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "random": {"seed": 1},
    "gridsearch": {"n_values": 4},
    "tpe": {"seed": 1, "n_initial_points": 6},
    "asha": {"seed": 1, "num_rungs": 3, "num_brackets": 1},
    "hyperband": {"seed": 1},
    "EvolutionES": {"seed": 1, "nums_population": 4, "repetitions": 1},
    "pbt": {"seed": 1, "population_size": 5, "generations": 2},
}
SPACES = {"gridsearch": DATA / "grid.yaml", "pbt": space_path("classic-control-pbt")}
PROMOTING = ["asha", "hyperband", "EvolutionES"]

_ANNOUNCEMENT = re.compile(r" trains(?: for \S+)? from epoch (\d+) to (\d+) on ")


def shrink(path: Path) -> str:
    """A shipped space with short epochs, small networks and little learning; no prior is lost."""
    text = path.read_text(encoding="utf-8")
    for line, replacement in (
        (r"  epochs: .*", "  epochs: orion~fidelity(1, 4, base=2)"),
        (r"  max_epochs: .*", "  max_epochs: 4"),
        (r"  steps_per_epoch: .*", f"  steps_per_epoch: {STEPS}"),
        (r"  eval_episodes: .*", "  eval_episodes: 2"),
        (r"  width: orion~choices.*", "  width: orion~choices([4, 8, 16])"),
        (r"  n_steps: orion~choices.*", "  n_steps: orion~choices([32, 64, 128])"),
        (r"  n_epochs: orion~choices.*", "  n_epochs: orion~choices([1, 2, 3])"),
    ):
        text = re.sub(rf"(?m)^{line}$", replacement, text)
    return text


@dataclass
class Record:
    """What a trial left: Orion's record of it and its own files."""

    trial: Any
    config: TrialConfig
    began: int
    epochs: int
    statistics: dict[str, float]
    directory: Path

    @property
    def steps_here(self) -> float:
        return self.statistics["env_steps_here"]


@dataclass
class Hunt:
    """One experiment in a directory of its own."""

    directory: Path
    name: str
    process: subprocess.Popen[bytes] | None = None
    options: list[str] = field(default_factory=list)

    def write(self, algorithm: dict[str, Any], space: str, *, max_trials: int, n_workers: int = 2) -> Hunt:
        (self.directory / "space.yaml").write_text(space, encoding="utf-8")
        configuration = {
            "experiment": {
                "max_trials": max_trials,
                "algorithm": algorithm,
                "working_dir": str(self.directory / "trials"),
            },
            "storage": self.storage,
            "worker": {
                "n_workers": n_workers,
                "executor": "joblib",
                "executor_configuration": {"backend": "threading"},
            },
        }
        (self.directory / "orion.yaml").write_text(yamlio.dump(configuration), encoding="utf-8")
        return self

    @property
    def storage(self) -> dict[str, Any]:
        return {"type": "legacy", "database": {"type": "pickleddb", "host": str(self.directory / "db.pkl")}}

    @property
    def output(self) -> str:
        return (self.directory / "output.txt").read_text(encoding="utf-8")

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        command = [str(BIN / "orion"), "hunt", "-n", self.name, "-c", "orion.yaml"]
        command += ["ppo-hpo", "run", "--config", "space.yaml", *self.options]
        with open(self.directory / "output.txt", "wb") as output:
            self.process = subprocess.Popen(
                command, cwd=self.directory, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        return self.process

    def run(self) -> int:
        """Hunt to the end; return the exit code."""
        process = self.start()
        try:
            return process.wait(PATIENCE)
        finally:
            process.kill()

    def trials(self) -> list[Any]:
        from orion.client import get_experiment

        return list(get_experiment(self.name, storage=self.storage).fetch_trials())

    def records(self) -> list[Record]:
        found = []
        for trial in self.trials():
            if trial.status != "completed":
                continue
            directory = Path(trial.working_dir)
            config = TrialConfig.from_mapping(yamlio.load(directory / "config.yaml"))
            # A copied directory has the parent's log as well, so the last announcement is its own.
            began, epochs = _ANNOUNCEMENT.findall((directory / "log.txt").read_text(encoding="utf-8"))[-1]
            statistics = {s.name: s.value for s in trial.statistics}
            found.append(Record(trial, config, int(began), int(epochs), statistics, directory))
        return found


@pytest.fixture(scope="module")
def hunted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Hunt]:
    """Twelve trials of an algorithm; each is hunted once for all tests."""
    done: dict[str, Hunt] = {}

    def hunt(name: str) -> Hunt:
        if name not in done:
            space = shrink(SPACES.get(name, space_path("classic-control")))
            new = Hunt(tmp_path_factory.mktemp(name), name)
            new.write({name: ALGORITHMS[name]}, space, max_trials=12)
            code = new.run()
            assert code == 0, new.output
            done[name] = new
        return done[name]

    return hunt


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_hunt_completes(name: str, hunted: Callable[[str], Hunt]) -> None:
    hunt = hunted(name)
    trials = hunt.trials()
    # Orion may hand out one trial more for each further worker, and leave one that nobody began.
    assert {trial.status for trial in trials} <= {"completed", "new"}
    records = hunt.records()
    assert 12 <= len(records) <= 13
    for record in records:
        assert math.isfinite(record.trial.objective.value)
        assert record.trial.objective.value == -record.statistics["return_mean"]
        assert record.epochs == record.config.task.epochs == record.trial.params["/task/epochs"]
        assert record.statistics["env_steps"] == record.epochs * STEPS
        assert record.steps_here == (record.epochs - record.began) * STEPS
    assert "Search finished successfully" in hunt.output


@pytest.mark.parametrize("name", PROMOTING)
def test_promoted_trials_go_on_from_their_rung(name: str, hunted: Callable[[str], Hunt]) -> None:
    lives: dict[str, list[Record]] = defaultdict(list)
    for record in hunted(name).records():
        lives[record.config.identity()].append(record)
    promoted = 0
    for life in lives.values():
        life.sort(key=lambda record: record.epochs)
        for lower, higher in zip([None, *life], life, strict=False):
            assert higher.began == (lower.epochs if lower else 0)
            assert higher.statistics["continued"] == float(lower is not None)
            promoted += lower is not None
    assert promoted
    # No step was trained twice: what all trials cost is what the highest rungs show.
    records = [record for life in lives.values() for record in life]
    spent = sum(record.steps_here for record in records)
    assert spent == sum(life[-1].epochs for life in lives.values()) * STEPS
    assert spent < sum(record.epochs for record in records) * STEPS


def test_forks_go_on_from_their_parents(hunted: Callable[[str], Hunt]) -> None:
    records = {record.trial.id: record for record in hunted("pbt").records()}
    assert {record.epochs for record in records.values()} == {1, 2, 4}
    forks = 0
    for record in records.values():
        parent = records.get(record.trial.parent)
        assert record.began == (parent.epochs if parent else 0)
        changed = parent is not None and parent.config.identity() != record.config.identity()
        forks += changed
        assert record.statistics["forked"] == float(
            changed or (parent is not None and bool(parent.statistics["forked"]))
        )
        if changed:
            assert "forked at epoch" in (record.directory / "log.txt").read_text(encoding="utf-8")
            # At its birth the child was its parent's checkpoint, to the bit.
            (*_, born) = newest(record.directory).meta["lineage"]
            assert (born["uid"], born["epoch"]) == (parent.trial.id, parent.epochs)
            assert born["state_sha256"] == arrays_digest(newest(parent.directory).arrays)
    assert forks


def newest(directory: Path) -> Checkpoint:
    return read(Storage(directory).paths()[0])


def test_the_lineage_is_printed(hunted: Callable[[str], Hunt]) -> None:
    hunt = hunted("pbt")
    done = subprocess.run(
        [BIN / "ppo-hpo", "lineage", "pbt", "-c", hunt.directory / "orion.yaml"],
        check=True,
        capture_output=True,
        text=True,
    )
    *lines, last = done.stdout.splitlines()
    trials = {trial.id[:8]: trial for trial in hunt.trials()}
    assert len(lines) == len(trials)
    above: list[str] = []  # the ids on the way down to the line
    forks = 0
    for line in lines:
        id, *_ = (words := line.lstrip("│├└─ ").split("  "))
        depth = (len(line) - len(line.lstrip("│├└─ "))) // 3
        above = [*above[:depth], id]
        parent = trials[id].parent
        assert (parent or "")[:8] == (above[depth - 1] if depth else "")
        assert f"epochs {trials[id].params['/task/epochs']:g}" in words
        changed = parent and any(
            value != trials[parent[:8]].params[name]
            for name, value in trials[id].params.items()
            if name != "/task/epochs"
        )
        assert any(word.startswith("forked: ") for word in words) == bool(changed)
        forks += bool(changed)
    assert last.startswith(f"{len(trials)} trials: ")
    assert last.endswith(f" {forks} forked")
    assert forks


@pytest.mark.parametrize("name", ["asha", "hyperband", "EvolutionES"])
def test_a_promoted_trial_is_the_one_that_ran_through(
    name: str, hunted: Callable[[str], Hunt], tmp_path: Path
) -> None:
    record = max(hunted(name).records(), key=lambda record: (record.began > 0, record.epochs))
    assert record.began > 0
    subprocess.run(
        [BIN / "ppo-hpo", "run", "--config", record.directory / "config.yaml", "--dir", tmp_path / "through"],
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    through = tmp_path / "through"
    assert " from epoch 0 to " in (through / "log.txt").read_text(encoding="utf-8")
    assert (through / "curve.jsonl").read_bytes() == (record.directory / "curve.jsonl").read_bytes()
    (objective,) = (
        entry["value"]
        for entry in json.loads((through / "results.json").read_text())
        if entry["type"] == "objective"
    )
    assert objective == record.trial.objective.value


def test_without_a_horizon_a_trial_is_refused_under_orion(tmp_path: Path) -> None:
    (tmp_path / "no-horizon.yaml").write_text("task: {epochs: 1}\n", encoding="utf-8")
    environment = {
        **os.environ,
        "ORION_TRIAL_ID": "0" * 32,
        "ORION_EXPERIMENT_NAME": "e",
        "ORION_EXPERIMENT_VERSION": "1",
        "ORION_WORKING_DIR": str(tmp_path / "trials" / "one"),
        "ORION_RESULTS_PATH": str(tmp_path / "results"),
    }
    done = subprocess.run(
        [BIN / "ppo-hpo", "run", "--config", tmp_path / "no-horizon.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    # So would all others be: the hunt stops.
    assert done.returncode == 130
    assert len(done.stderr.splitlines()) == 1
    assert "no `task.max_epochs`" in done.stderr
    assert not (tmp_path / "results").exists()

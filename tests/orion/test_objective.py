"""The Orion edge in Python: `workon` with an objective, and `suggest`/`observe` with `run_trial`."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ppo_hpo.ppo.task
from ppo_hpo import TrialConfig, UserError, get_space, objective, run_trial
from ppo_hpo.spec import yamlio

if TYPE_CHECKING:
    from orion.client import ExperimentClient

STEPS = 256
SPACE = """
env:
  id: CartPole-v1
  n_envs: 4
task:
  epochs: orion~fidelity(1, 4, base=2)
  max_epochs: 4
  steps_per_epoch: 256
  eval_episodes: 2
model:
  width: orion~choices([4, 8])
  depth: 1
optimizer:
  lr: orion~loguniform(1e-4, 1e-2, precision=4)
ppo:
  n_steps: 32
  n_epochs: 1
  n_minibatches: orion~choices([1, 2])
"""


# In a process of its own, because forked workers have all that this one has imported.
SWEEP = """
import os, sys
from orion.client import build_experiment
from ppo_hpo import get_space, objective

space, folder, executor = sys.argv[1:]
function = objective(space, console=False)


def run(trial, **params):
    new = "ppo_hpo.ppo.task" not in sys.modules
    found = function(trial=trial, **params)
    with open(folder + "/seen.txt", "a") as file:
        file.write(f"{os.getpid()} {new}\\n")
    return found


database = {"type": "pickleddb", "host": folder + "/db.pkl"}
client = build_experiment(
    "warm",
    space=get_space(space),
    algorithm={"random": {"seed": 1}},
    storage={"type": "legacy", "database": database},
    working_dir=folder + "/trials",
    max_trials=7,
)
assert "ppo_hpo.ppo.task" not in sys.modules
with client.tmp_executor(executor, n_workers=2):
    client.workon(run, trial_arg="trial", n_workers=2)
"""


@pytest.fixture
def space(tmp_path: Path) -> str:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE, encoding="utf-8")
    return str(path)


def build(
    tmp_path: Path, space: str, algorithm: dict[str, Any] | None = None, **fidelities: Any
) -> ExperimentClient:
    from orion.client import build_experiment

    return build_experiment(
        "client",
        space=get_space(space, **fidelities),
        algorithm=algorithm or {"random": {"seed": 1}},
        storage={"type": "legacy", "database": {"type": "pickleddb", "host": str(tmp_path / "db.pkl")}},
        working_dir=str(tmp_path / "trials"),
        max_trials=10,
    )


def statistics(trial: Any) -> dict[str, float]:
    return {entry.name: entry.value for entry in trial.statistics}


def began_at(trial: Any) -> list[int]:
    """The epochs at which each process, the parent's included, began, by the trial's log."""
    text = (Path(trial.working_dir) / "log.txt").read_text(encoding="utf-8")
    return [int(epoch) for epoch in re.findall(r"trains(?: for \S+)? from epoch (\d+) to ", text)]


def assert_no_step_was_trained_twice(trials: list[Any]) -> None:
    lives: dict[str, list[Any]] = defaultdict(list)
    for trial in trials:
        config = TrialConfig.from_mapping(yamlio.load(Path(trial.working_dir) / "config.yaml"))
        lives[config.identity()].append(trial)
    assert len(lives) < len(trials)
    spent = sum(statistics(trial)["env_steps_here"] for trial in trials)
    assert spent == STEPS * sum(
        max(trial.params["task"]["epochs"] for trial in life) for life in lives.values()
    )
    for life in lives.values():
        life.sort(key=lambda trial: trial.params["task"]["epochs"])
        for lower, higher in zip([None, *life], life, strict=False):
            assert began_at(higher)[-1] == (lower.params["task"]["epochs"] if lower else 0)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, epoch: int, error: BaseException) -> None:
    """Let every task fail right after it saved an epoch."""
    save = ppo_hpo.ppo.task.PPO._save

    def save_and_stop(task: Any) -> None:
        save(task)
        if task.epoch == epoch:
            raise error

    monkeypatch.setattr(ppo_hpo.ppo.task.PPO, "_save", save_and_stop)


@pytest.mark.parametrize("algorithm", ["asha", "hyperband"])
@pytest.mark.parametrize(
    ("executor", "options"),
    [("singleexecutor", {}), ("joblib", {"n_workers": 2, "backend": "threading"})],
    ids=["single", "joblib"],
)
def test_workon(tmp_path: Path, space: str, algorithm: str, executor: str, options: dict[str, Any]) -> None:
    settings = {"asha": {"seed": 1, "num_rungs": 3, "num_brackets": 1}, "hyperband": {"seed": 1}}
    client = build(tmp_path, space, {algorithm: settings[algorithm]})
    with client.tmp_executor(executor, **options):
        client.workon(
            objective(space, console=False),
            trial_arg="trial",
            max_trials=10,
            n_workers=options.get("n_workers", 1),
        )
    trials = client.fetch_trials_by_status("completed")
    assert 10 <= len(trials) <= 11
    assert not client.fetch_trials_by_status("broken")
    for trial in trials:
        assert math.isfinite(trial.objective.value)
        assert statistics(trial)["epochs"] == trial.params["task"]["epochs"]
        assert trial.objective.value == -statistics(trial)["return_mean"]
    assert_no_step_was_trained_twice(trials)


@pytest.mark.parametrize("executor", ["joblib", "poolexecutor"])
def test_workers_are_reused(tmp_path: Path, space: str, executor: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SWEEP, space, str(tmp_path), executor]
    subprocess.run(command, check=True, timeout=300)
    seen = [line.split() for line in (tmp_path / "seen.txt").read_text().splitlines()]
    workers = {worker for worker, _ in seen}
    assert len(seen) >= 7
    assert len(workers) <= 2
    # Each worker imports what training needs in its first trial and in no other one.
    assert sorted(worker for worker, new in seen if new == "True") == sorted(workers)
    # The trials' own records name the same processes.
    rows = [path.read_text().splitlines()[0] for path in tmp_path.glob("trials/*/timing.jsonl")]
    assert {str(json.loads(row)["pid"]) for row in rows} == workers


def test_fidelities_and_overrides_reach_the_trial(tmp_path: Path, space: str) -> None:
    client = build(tmp_path, space, epochs="fidelity(1, 2, base=2)")
    function = objective(
        space,
        env="Acrobot-v1",
        overrides={"env": {"max_episode_steps": 20}, "task": {"seed": 7}},
        console=False,
        epochs="fidelity(1, 2, base=2)",
    )
    client.workon(function, trial_arg="trial", max_trials=1, n_workers=1)
    (trial,) = client.fetch_trials_by_status("completed")
    config = TrialConfig.from_mapping(yamlio.load(Path(trial.working_dir) / "config.yaml"))
    assert config.env.id == "Acrobot-v1"
    assert config.env.max_episode_steps == 20
    assert config.task.seed == 7
    # Random search always proposes the highest fidelity, and schedules end there.
    assert trial.params["task"]["epochs"] == config.task.epochs == config.max_epochs == 2
    assert config.optimizer.lr == trial.params["optimizer"]["lr"]


def test_an_objective_can_be_pickled_and_called_without_orion(tmp_path: Path, space: str) -> None:
    function = pickle.loads(pickle.dumps(objective(space, directory=tmp_path / "runs", console=False)))
    params: dict[str, Any] = {
        "task": {"epochs": 2},
        "model": {"width": 4},
        "optimizer": {"lr": 1e-3},
        "ppo": {"n_minibatches": 2},
    }
    first, second = function(**params), function(**params)
    assert [entry["type"] for entry in first].count("objective") == 1
    assert first[0] == second[0]
    # The second call found the first one's directory, in which nothing was left to do.
    by_name = {entry["name"]: entry["value"] for entry in second}
    assert by_name["env_steps_here"] == 0
    assert by_name["continued_from_epoch"] == 2
    assert len(list((tmp_path / "runs").iterdir())) == 1


@pytest.mark.parametrize("algorithm", ["asha", "hyperband"])
def test_suggest_and_observe(tmp_path: Path, space: str, algorithm: str) -> None:
    client = build(tmp_path, space, {algorithm: {"seed": 1}})
    while not client.is_done:
        trial = client.suggest()
        observed = run_trial(client, trial, space, console=False)
        assert client.get_trial(uid=trial.id).objective.value == observed[0]["value"]
    trials = client.fetch_trials()
    assert [trial.status for trial in trials] == ["completed"] * 10
    assert_no_step_was_trained_twice(trials)


def test_promotions_on_machines_that_share_only_the_database_and_a_store(tmp_path: Path, space: str) -> None:
    """Each trial's directory is gone before the next begins, as if that one ran elsewhere."""
    store = str(tmp_path / "store")
    client = build(tmp_path, space, {"asha": {"seed": 1, "num_rungs": 3, "num_brackets": 1}})
    while not client.is_done:
        trial = client.suggest()
        run_trial(client, trial, space, console=False, checkpoint_store=store)
        shutil.rmtree(trial.working_dir)
    promoted = [trial for trial in client.fetch_trials() if trial.parent]
    assert promoted
    for trial in promoted:
        parent = client.get_trial(uid=trial.parent)
        assert statistics(trial)["continued_from_epoch"] == parent.params["task"]["epochs"]


def test_an_interrupted_trial_goes_on(tmp_path: Path, space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = build(tmp_path, space)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3, KeyboardInterrupt())
        trial = client.suggest()
        with pytest.raises(KeyboardInterrupt):
            run_trial(client, trial, space, console=False)
    assert client.get_trial(uid=trial.id).status == "interrupted"

    again = client.suggest()
    assert again.id == trial.id
    run_trial(client, again, space, console=False)
    done = client.get_trial(uid=trial.id)
    assert done.status == "completed"
    assert began_at(done) == [0, 3]
    assert statistics(done)["env_steps_here"] == STEPS

    # An undisturbed one ends at the same objective.
    through = objective(space, directory=tmp_path / "through", console=False)(**done.params)
    assert through[0]["value"] == done.objective.value


def test_a_trial_that_fails_is_released_as_broken(
    tmp_path: Path, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = build(tmp_path, space)
    trial = client.suggest()
    interrupt_at(monkeypatch, 2, RuntimeError("the machine is on fire"))
    with pytest.raises(RuntimeError, match="on fire"):
        run_trial(client, trial, space, console=False, retries=0)
    assert client.get_trial(uid=trial.id).status == "broken"
    # It was let go, so another one can be had, and the client still works.
    monkeypatch.undo()
    other = client.suggest()
    assert other.id != trial.id
    run_trial(client, other, space, console=False)
    assert client.get_trial(uid=other.id).status == "completed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": {"ppo": {"n_steps": 7}}}, "must divide task.steps_per_epoch"),
        ({"overrides": {"ppo": {"n_stpes": 32}}}, "Did you mean n_steps?"),
        ({"env": "Pendulum-v7"}, "Pendulum-v7"),
        ({"device": "gpu"}, "`device` must be auto, cpu, cuda, cuda:N or cuda:N,M"),
    ],
    ids=["combination", "name", "environment", "device"],
)
def test_bad_input_is_reported_and_the_trial_released(
    tmp_path: Path, space: str, options: dict[str, Any], message: str
) -> None:
    client = build(tmp_path, space)
    trial = client.suggest()
    with pytest.raises(UserError, match=re.escape(message)):
        run_trial(client, trial, space, console=False, **options)
    # Others would be refused by the same mistake.
    assert client.get_trial(uid=trial.id).status == "interrupted"


def test_another_space_than_the_experiments_is_reported(tmp_path: Path, space: str) -> None:
    client = build(tmp_path, space)
    trial = client.suggest()
    with pytest.raises(UserError, match=r"searches `model\.depth`, but no value was proposed"):
        run_trial(client, trial, "classic-control", console=False)
    assert client.get_trial(uid=trial.id).status == "interrupted"


def test_errors_inside_workon_break_the_trial_and_only_it(
    tmp_path: Path, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = build(tmp_path, space)
    function = objective(space, console=False)
    run, calls = ppo_hpo.trial.runner.run, []

    def run_but_once(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == 1:
            raise RuntimeError("the first one fails")
        return run(*arguments, **options)

    monkeypatch.setattr(ppo_hpo.trial.runner, "run", run_but_once)
    with client.tmp_executor("singleexecutor"):
        client.workon(function, trial_arg="trial", max_trials=2, n_workers=1)
    assert len(client.fetch_trials_by_status("broken")) == 1
    assert len(client.fetch_trials_by_status("completed")) == 2


def test_a_fault_that_passes_is_not_heard_of_by_orion(
    tmp_path: Path, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = build(tmp_path, space)
    trial = client.suggest()
    interrupt_at(monkeypatch, 2, MemoryError())
    run_trial(client, trial, space, console=False)
    done = client.get_trial(uid=trial.id)
    assert done.status == "completed"
    assert statistics(done)["retries"] == 1
    assert statistics(done)["env_steps_here"] == 4 * STEPS
    assert began_at(done) == [0, 2]


@pytest.mark.parametrize("executor", ["singleexecutor", "joblib"])
def test_a_mistake_that_others_would_share_stops_workon(
    tmp_path: Path, space: str, executor: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = build(tmp_path, space)
    function = objective(space, console=False, env="nosuchmodule:Env-v0")
    options = {"n_workers": 2, "backend": "threading"} if executor == "joblib" else {}
    with client.tmp_executor(executor, **options), pytest.raises(KeyboardInterrupt):
        client.workon(function, trial_arg="trial", max_trials=4, n_workers=options.get("n_workers", 1))
    assert not client.fetch_trials_by_status("broken")
    assert client.fetch_trials_by_status("interrupted")
    assert "the hunt stops: `env.id: nosuchmodule:Env-v0` needs the module 'nosuchmodule'" in caplog.text

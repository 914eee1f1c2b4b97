"""Orion's benchmark on PPO, by Orion itself; and the budget of `experiments/which-algorithm`."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ppo_hpo import UserError
from ppo_hpo.spec import yamlio

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Orion's own tasks tell of GPy
    from ppo_hpo.orion.benchmark import PPOBenchmark

SCRIPT = Path(__file__).parents[2] / "experiments" / "which-algorithm" / "run.py"
SPACE = {
    "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 20},
    "task": {"epochs": "orion~fidelity(1, 4, base=2)", "max_epochs": 4, "steps_per_epoch": 64,
             "eval_episodes": 1},
    "model": {"width": 4, "depth": 1},
    "optimizer": {"lr": "orion~loguniform(1e-4, 1e-2)"},
    "ppo": {"n_steps": 32, "n_epochs": 1, "gamma": "orion~uniform(0.9, 0.999)"},
}  # fmt: skip


@pytest.fixture
def space(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yamlio.dump(SPACE))
    return str(path)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("which_algorithm", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def benchmark_of(database: Path, **given: Any) -> Any:
    from orion.benchmark.benchmark_client import get_or_create_benchmark
    from orion.executor.single_backend import SingleExecutor
    from orion.storage.base import setup_storage

    storage = setup_storage({"type": "legacy", "database": {"type": "pickleddb", "host": str(database)}})
    return get_or_create_benchmark(storage, "tiny", executor=SingleExecutor(), **given)


def test_orions_benchmark_compares_two_algorithms(space: str, tmp_path: Path) -> None:
    from orion.benchmark.assessment import AverageRank, AverageResult
    from orion.benchmark.task.base import bench_task_factory

    # By its name through the installed entry point.
    task = bench_task_factory.create(
        "PPOBenchmark", max_trials=4, space=space, seed=3, device="cpu", directory=str(tmp_path / "trials")
    )
    assert type(task) is PPOBenchmark
    benchmark = benchmark_of(
        tmp_path / "orion.pkl",
        algorithms=["random", {"asha": {"seed": 1, "num_brackets": 1}}],
        targets=[{"assess": [AverageResult(1), AverageRank(1)], "task": [task]}],
    )
    benchmark.process()
    told = benchmark.status()
    assert [(row["Algorithms"], row["Submitted Trials"]) for row in told] == [("random", 4), ("asha", 4)] * 2
    assert all(row["Completed Experiments"] == 1 for row in told)
    epochs = {
        trial.params["task"]["epochs"] if "task" in trial.params else trial.params["task.epochs"]
        for _, experiment in benchmark.studies[0].get_experiments(["random"])
        for trial in experiment.fetch_trials()
    }
    assert epochs == {4}  # random search trains to the highest fidelity
    written = list((tmp_path / "trials").glob("*/config.yaml"))
    assert written
    assert {yamlio.load(path)["task"]["seed"] for path in written} == {3}

    figures = benchmark.analysis()
    for assessment, kind in (("AverageResult", "regrets"), ("AverageRank", "rankings")):
        figure = figures[assessment]["PPOBenchmark"][kind]
        lines = {line.name: list(line.y) for line in figure.data if line.showlegend is not False}
        assert {name: len(values) for name, values in lines.items()} == {"random": 4, "asha": 4}
    regrets = figures["AverageResult"]["PPOBenchmark"]["regrets"]
    for _, experiment in benchmark.studies[0].get_experiments():
        best = min(trial.objective.value for trial in experiment.fetch_trials())
        name = next(iter(experiment.configuration["algorithm"]))
        assert next(line for line in regrets.data if line.name == name).y[-1] == best

    # Made again from the database alone, and done already.
    again = benchmark_of(tmp_path / "orion.pkl")
    assert again.configuration == benchmark.configuration
    assert again.status() == told
    (other,) = again.targets[0]["task"]
    assert other.configuration == task.configuration
    assert other.get_search_space() == task.get_search_space()


def test_a_promotion_goes_on_and_costs_what_is_new(space: str, tmp_path: Path) -> None:
    task = PPOBenchmark(space=space, directory=str(tmp_path), device="cpu")
    params = {"optimizer": {"lr": 1e-3}, "ppo": {"gamma": 0.9}}
    low, high, low_again = (
        {str(row["name"]): row["value"] for row in task(task={"epochs": epochs}, **params)}
        for epochs in (1, 4, 1)
    )
    assert (low["env_steps_here"], high["env_steps_here"], low_again["env_steps_here"]) == (64, 192, 0)
    # Another algorithm may ask for the lower rung when the higher one is there already.
    assert low_again["objective"] == low["objective"]
    assert (low_again["epochs"], high["epochs"]) == (1, 4)


def test_what_a_task_is_made_of_is_its_configuration(space: str) -> None:
    given: dict[str, Any] = {
        "max_trials": 7, "env": "Acrobot-v1", "space": space, "epochs": "fidelity(1, 2, base=2)", "seed": 5,
        "overrides": {"optimizer": {"lr": 0.002}}, "device": "cpu", "directory": None,
    }  # fmt: skip
    task = PPOBenchmark(**given)
    assert task.configuration == {"PPOBenchmark": given}
    kept = json.loads(json.dumps(task.configuration["PPOBenchmark"]))
    again = PPOBenchmark(**kept)
    assert again.configuration == task.configuration
    # What is fixed is not searched.
    wanted = {"task.epochs": "fidelity(1, 2, base=2)", "ppo.gamma": "uniform(0.9, 0.999)"}
    assert again.get_search_space() == wanted
    assert pickle.loads(pickle.dumps(task)).get_search_space() == wanted


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_trials": 0}, "`max_trials` must be a whole number of at least 1, but got 0"),
        ({"overrides": {"ppo": {"gama": 0.9}}}, "Did you mean gamma?"),
        ({"overrides": {"ppo": {"gamma": 0.9}, 3: {}}}, "must be made of text"),
        ({"directory": Path("here")}, "`directory` must be made of text"),
        ({"epochs": 1, "overrides": {"ppo": {"gamma": 0.9}, "optimizer": {"lr": 1e-3}}}, "searches nothing"),
    ],
)
def test_bad_tasks_are_refused(space: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        PPOBenchmark(**{"space": space, **given})
    assert said in str(caught.value)


def test_a_history_is_cut_at_the_budget(script: ModuleType) -> None:
    history = [{"steps": 100, "score": -9.0}, {"steps": 250, "score": -4.0}, {"steps": 400, "score": 2.0}]
    found = [script.cut(history, budget) for budget in (99, 100, 249, 250, 399.5, 400, 10**9)]
    assert [None if row is None else row["score"] for row in found] == [None, -9, -9, -4, -4, 2, 2]
    assert script.cut([], 100) is None


def test_the_table_is_of_medians_and_ranges(script: ModuleType) -> None:
    def run(repetition: int, first: int, scores: list[float]) -> dict[str, Any]:
        rows = [{"steps": first * (n + 1), "score": score, "epochs": 1} for n, score in enumerate(scores)]
        return {
            "env": "Pendulum-v1", "algorithm": "asha", "repetition": repetition, "budget": 1000, "trials": 4,
            "judged": scores[-1] - 10, "orion_cpu_seconds": 1.0 + repetition, "history": rows,
        }  # fmt: skip

    # At 250 steps the third has none yet; at 500: -30, -45, -60; at 1000: -30, -45, -50.
    runs = [run(1, 200, [-50, -30]), run(2, 250, [-70, -45]), run(3, 400, [-60, -50])]
    lines = script.table(runs).splitlines()
    assert len(lines) == 3
    assert lines[2].split(" | ")[2:] == [
        "-60 (-70 to -50, 1 of 3 had none)", "-45 (-60 to -30)", "-45 (-50 to -30)", "-55 (-60 to -40)",
        "4", "3.0 |",
    ]  # fmt: skip


@pytest.mark.parametrize("env", ["Pendulum-v1", "LunarLander-v3"])
def test_every_algorithm_has_a_space_that_orion_takes(script: ModuleType, env: str, tmp_path: Path) -> None:
    from ppo_hpo.spec.space import read_space

    setup, searched = script.SETUPS[env], {}
    for algorithm in script.ALGORITHMS:
        path = tmp_path / f"{algorithm}.yaml"
        path.write_text(yamlio.dump(script.document_of(env, setup, algorithm, 2)))
        space = read_space(str(path))
        searched[algorithm] = {f"{g}.{key}" for g, priors in space.priors.items() for key in priors}
        assert space.fixed["task"]["seed"] == 2
        assert space.fixed["task"]["max_epochs"] == space.max_epochs
        assert f"{space.priors['task']['epochs']}" == setup.epochs
    changing = {"optimizer.lr", "task.epochs"} | {
        f"ppo.{key}"
        for key in ("n_steps", "n_minibatches", "n_epochs", "one_minus_gamma", "one_minus_gae_lambda",
                    "clip_range", "ent_coef", "vf_coef", "max_grad_norm")
    }  # fmt: skip
    assert searched["pbt"] == changing
    assert all(len(searched[name]) == 21 for name in script.ALGORITHMS if name != "pbt")
    # PBT's generations are whole epochs: low * base ** generations = high.
    high = read_space(str(tmp_path / "pbt.yaml")).max_epochs
    generations = setup.options["pbt"]["generations"]
    assert 2**generations == high

"""PPO as a task of Orion's benchmark: Orion's own comparison of algorithms, on any environment.

    from orion.benchmark.assessment import AverageResult
    from orion.benchmark.benchmark_client import get_or_create_benchmark
    from orion.storage.base import setup_storage
    from ppo_hpo.orion.benchmark import PPOBenchmark

    storage = setup_storage({"type": "legacy", "database": {"type": "pickleddb", "host": "benchmark.pkl"}})
    task = PPOBenchmark(20, env="Acrobot-v1", space="classic-control", directory="benchmark-trials")
    benchmark = get_or_create_benchmark(
        storage, "acrobot", algorithms=["random", "asha"],
        targets=[{"assess": [AverageResult(5)], "task": [task]}],
    )
    benchmark.process()
    benchmark.analysis()["AverageResult"]["PPOBenchmark"]["regrets"].show()

Orion finds it by its name through the entry point group ``BenchmarkTask``, when it makes a benchmark again
from the database. It counts trials; ``experiments/which-algorithm`` counts environment steps.

Orion's own package of tasks imports torch where that is installed. Nothing here does before a trial runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orion.benchmark.task.base import BenchmarkTask

from ppo_hpo.orion.objective import Objective, objective
from ppo_hpo.spec.config import check_value
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.space import get_space


class PPOBenchmark(BenchmarkTask):  # type: ignore[misc]
    """Train PPO, and return what its last evaluation says.

    A trial's directory follows from its configuration alone, because Orion tells a task no more than the
    hyperparameters. So a promotion of ASHA, Hyperband or EvolutionES goes on from its lower rung, and a
    configuration that two algorithms propose is trained once. A child of PBT begins untrained.
    """

    def __init__(
        self,
        max_trials: int = 20,
        env: str | None = None,
        space: str = "default",
        epochs: str | int | None = None,
        seed: int | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        device: str = "auto",
        directory: str | None = None,
    ) -> None:
        """The task; all of it goes into Orion's database, from which the same task is made again.

        Args:
            max_trials: of each experiment.
            env: the environment's id; None is that of the space.
            space: a shipped space's name, or the path of a file.
            epochs: replaces the space's fidelity, as in ``fidelity(1, 16, base=4)``; a number fixes it.
            seed: of every trial, ``task.seed``; None is that of the space.
            overrides: group to key to value: fixes what the space searches or fixes otherwise.
            device: see `objective`.
            directory: of the trials; None is ``ppo-hpo-runs``, in the current directory.

        Raises:
            UserError: an unknown space, environment key or value, nothing that is searched, or something
                that JSON does not keep.
        """
        if type(max_trials) is not int or max_trials < 1:
            raise UserError(f"`max_trials` must be a whole number of at least 1, but got {max_trials!r}.")
        given = {
            "env": env, "space": space, "epochs": epochs, "seed": seed, "overrides": overrides,
            "device": device, "directory": directory,
        }  # fmt: skip
        kept = {name: _in_json(name, value) for name, value in given.items()}
        super().__init__(max_trials, **kept)
        fixed = {group: dict(values) for group, values in (overrides or {}).items()}
        for group, values in fixed.items():
            for key, value in values.items():
                check_value(group, key, value)
        if seed is not None:
            fixed.setdefault("task", {})["seed"] = seed
        fidelities: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
        self._objective: Objective = objective(
            space, env=env, overrides=fixed, directory=directory, device=device, console=False, **fidelities
        )
        self._space = {
            f"{group}.{key}": prior
            for group, values in get_space(space, **fidelities).items()
            for key, prior in values.items()
            if key not in fixed.get(group, {})
        }
        if not self._space:
            raise UserError("Nothing is searched in this space: every value is fixed.")

    def call(self, **params: Any) -> list[dict[str, Any]]:
        """Train one trial, or go on with it.

        Args:
            **params: what Orion proposes, nested as in the space.

        Returns:
            Orion's results: the objective, the negative mean return of the last evaluation, and the
            statistics.
        """
        return self._objective(**params)

    def get_search_space(self) -> dict[str, str]:
        """Dotted name to prior, of what is searched."""
        return dict(self._space)


def _in_json(name: str, value: Any) -> Any:
    """A copy of a value as JSON keeps it, which has to be the value."""
    try:
        copy = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        copy = None
    if copy != value:
        raise UserError(
            f"`{name}` must be what JSON keeps (text, numbers, lists, mappings by text), because Orion makes "
            f"the task again from its database, but got {value!r}."
        )
    return copy

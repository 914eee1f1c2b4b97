"""PPO as a task of Orion's benchmarks, which compare Orion's algorithms.

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

When Orion loads a benchmark from its database, it finds this task by its name, through the entry point group
``BenchmarkTask``. Orion's benchmarks compare algorithms at equal numbers of trials. To compare them at equal
environment steps, see ``experiments/which-algorithm``.

Orion's own package of tasks imports torch if it is installed. This module does not, before a trial runs.
"""

from __future__ import annotations

import json
from typing import Any

from orion.benchmark.task.base import BenchmarkTask

from ppo_hpo.orion.objective import Objective, objective
from ppo_hpo.spec.config import check_value
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.settings import Overrides, settings_of
from ppo_hpo.spec.space import get_space


class PPOBenchmark(BenchmarkTask):  # type: ignore[misc]
    """Train PPO, and return the result of its last evaluation.

    Orion passes only the hyperparameters to a task, so a trial's directory depends on its configuration
    alone. A trial that ASHA, Hyperband or EvolutionES promotes resumes from its lower rung. A configuration
    that two algorithms propose is trained once. A fork of PBT starts untrained.

    Args:
        max_trials: number of trials of each experiment.
        env: id of the environment. None means the one of the space.
        space: name of a shipped space, or path of a space file.
        epochs: replaces the space's fidelity, for example ``fidelity(1, 16, base=4)``. A number fixes it.
        seed: seed of every trial (``task.seed``). None means the one of the space.
        overrides: values by group and key. They fix hyperparameters that the space searches or fixes.
        device: see `ppo_hpo.objective`.
        directory: parent directory of the trials. None means ``ppo-hpo-runs`` in the current directory.

    Raises:
        UserError: a value breaks a rule, the space searches nothing, or JSON cannot keep an argument.
    """

    def __init__(
        self, max_trials: int = 20, env: str | None = None, space: str = "default",
        epochs: str | int | None = None, seed: int | None = None,
        overrides: Overrides | None = None, device: str = "auto",
        directory: str | None = None,
    ) -> None:  # fmt: skip
        if type(max_trials) is not int or max_trials < 1:
            raise UserError(f"`max_trials` must be a whole number of at least 1, but got {max_trials!r}.")
        given = {
            "env": env, "space": space, "epochs": epochs, "seed": seed, "overrides": overrides,
            "device": device, "directory": directory,
        }  # fmt: skip
        kept = {name: _in_json(name, value) for name, value in given.items()}
        super().__init__(max_trials, **kept)
        fixed: dict[str, Any] = {}
        for group, key, value in settings_of(overrides):
            fixed[f"{group}.{key}"] = check_value(group, key, value)
        if seed is not None:
            fixed["task.seed"] = seed
        fidelities: dict[str, Any] = {} if epochs is None else {"epochs": epochs}
        self._objective: Objective = objective(
            space, env=env, overrides=fixed, directory=directory, device=device, console=False, **fidelities
        )
        self._space = {
            f"{group}.{key}": prior
            for group, values in get_space(space, **fidelities).items()
            for key, prior in values.items()
            if f"{group}.{key}" not in fixed
        }
        if not self._space:
            raise UserError("This space searches nothing, because every value is fixed.")

    def call(self, **params: Any) -> list[dict[str, Any]]:
        """Run or resume a trial. Its objective is the negative mean episode return of the last evaluation."""
        return self._objective(**params)

    def get_search_space(self) -> dict[str, str]:
        """The priors of the searched hyperparameters, by dotted name."""
        return dict(self._space)


def _in_json(name: str, value: Any) -> Any:
    """A copy of a value that went through JSON, as in Orion's database. It must be equal to the value."""
    try:
        copy = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        copy = None
    if copy != value:
        raise UserError(
            f"`{name}` must be made of text, numbers, lists and mappings with text keys, because Orion "
            f"stores it as JSON, but got {value!r}."
        )
    return copy

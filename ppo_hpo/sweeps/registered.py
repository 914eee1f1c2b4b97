"""An environment that the running script or notebook registered, in the worker processes of its sweep.

A worker is a new process, which imports neither the script nor the notebook. So the objective brings what
gymnasium knows of the environment here: a class of the script is pickled with its code.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any

from ppo_hpo.orion.objective import Objective


@dataclass(frozen=True)
class RegisteringObjective:
    """An objective that first registers an environment where it is not registered yet."""

    function: Objective
    spec: Any  # gymnasium's record of the environment

    def __call__(self, trial: Any = None, **params: Any) -> list[dict[str, Any]]:
        """Run one trial, as `Objective` does."""
        import gymnasium

        gymnasium.registry.setdefault(self.spec.id, self.spec)
        return self.function(trial, **params)


def with_registration(function: Objective) -> Objective | RegisteringObjective:
    """The objective together with the environment of its space, if this process has registered it."""
    name = str(function.space.fixed.get("env", {}).get("id", ""))
    gymnasium = sys.modules.get("gymnasium")
    spec = None if gymnasium is None else gymnasium.registry.get(name)
    if spec is None:
        return function
    module, _, attribute = str(spec.entry_point).partition(":")
    if module == "__main__" and hasattr(sys.modules["__main__"], attribute):
        spec = copy.copy(spec)
        spec.entry_point = getattr(sys.modules["__main__"], attribute)  # A worker has another `__main__`.
    try:
        import cloudpickle

        cloudpickle.dumps(spec)
    except Exception:  # Classes can make pickling fail in any way. A module of its own is then needed.
        return function
    return RegisteringObjective(function, spec)

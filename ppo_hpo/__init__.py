"""Tune Proximal Policy Optimization with Orion: trials that never get lost."""

from __future__ import annotations

# `typing` is not imported for it: until a trial's process has imported this, a signal makes it broken.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ppo_hpo.inspect.cost import Cost
    from ppo_hpo.orion.objective import objective, run_trial
    from ppo_hpo.ppo.components import ActorCritic, LRSchedule, Optimizer, RolloutLoader
    from ppo_hpo.ppo.guard import BadResumeGuard
    from ppo_hpo.ppo.policy import Policy, export_policy, load_policy
    from ppo_hpo.ppo.task import PPO
    from ppo_hpo.spec.config import TrialConfig
    from ppo_hpo.spec.errors import BadResume, CheckpointError, UserError
    from ppo_hpo.spec.space import get_space, list_spaces
    from ppo_hpo.sweeps.result import SweepResult
    from ppo_hpo.sweeps.run import SweepInterrupted, sweep

__version__ = "0.1.0"

# Imported when first asked for, so that `import ppo_hpo` costs nothing and Orion's workers, which
# only want a space or an objective, never import torch.
_MODULES = {
    "inspect.cost": ("Cost",),
    "orion.objective": ("objective", "run_trial"),
    "ppo.components": ("ActorCritic", "LRSchedule", "Optimizer", "RolloutLoader"),
    "ppo.guard": ("BadResumeGuard",),
    "ppo.policy": ("Policy", "export_policy", "load_policy"),
    "ppo.task": ("PPO",),
    "spec.config": ("TrialConfig",),
    "spec.errors": ("BadResume", "CheckpointError", "UserError"),
    "spec.space": ("get_space", "list_spaces"),
    "sweeps.result": ("SweepResult",),
    "sweeps.run": ("SweepInterrupted", "sweep"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "PPO", "ActorCritic", "BadResume", "BadResumeGuard", "CheckpointError", "Cost", "LRSchedule", "Optimizer",
    "Policy", "RolloutLoader", "SweepInterrupted", "SweepResult", "TrialConfig", "UserError", "export_policy",
    "get_space", "list_spaces", "load_policy", "objective", "run_trial", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ppo_hpo' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"ppo_hpo.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

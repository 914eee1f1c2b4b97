"""Tune Proximal Policy Optimization with Orion: trials that never get lost."""

from __future__ import annotations

# `typing` is not imported for it: until a trial's process has imported this, a signal makes it broken.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ppo_hpo.client import objective, run_trial
    from ppo_hpo.components import ActorCritic, LRSchedule, Optimizer, RolloutLoader
    from ppo_hpo.config import TrialConfig
    from ppo_hpo.cost import Cost
    from ppo_hpo.errors import BadResume, CheckpointError, UserError
    from ppo_hpo.guard import BadResumeGuard
    from ppo_hpo.policy import Policy, export_policy, load_policy
    from ppo_hpo.space import get_space, list_spaces
    from ppo_hpo.sweeps import SweepInterrupted, SweepResult, sweep
    from ppo_hpo.task import PPO

__version__ = "0.1.0"

# Imported when first asked for, so that `import ppo_hpo` costs nothing and Orion's workers, which
# only want a space or an objective, never import torch.
_HOMES = {
    "ActorCritic": "components",
    "BadResume": "errors",
    "BadResumeGuard": "guard",
    "CheckpointError": "errors",
    "Cost": "cost",
    "LRSchedule": "components",
    "Optimizer": "components",
    "PPO": "task",
    "Policy": "policy",
    "RolloutLoader": "components",
    "SweepInterrupted": "sweeps",
    "SweepResult": "sweeps",
    "TrialConfig": "config",
    "UserError": "errors",
    "export_policy": "policy",
    "get_space": "space",
    "list_spaces": "space",
    "load_policy": "policy",
    "objective": "client",
    "run_trial": "client",
    "sweep": "sweeps",
}

__all__ = [
    "PPO",
    "ActorCritic",
    "BadResume",
    "BadResumeGuard",
    "CheckpointError",
    "Cost",
    "LRSchedule",
    "Optimizer",
    "Policy",
    "RolloutLoader",
    "SweepInterrupted",
    "SweepResult",
    "TrialConfig",
    "UserError",
    "export_policy",
    "get_space",
    "list_spaces",
    "load_policy",
    "objective",
    "run_trial",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ppo_hpo' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"ppo_hpo.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

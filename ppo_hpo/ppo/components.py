"""Deferred components: parts of a task that may be named before their hyperparameters are known.

Each fixes some hyperparameters and leaves the others open. `PPO.get_space` collects the open ones,
with the priors of the space `default`; `PPO.init` supplies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppo_hpo.spec.config import check_value, field_names

Groups = dict[str, dict[str, Any]]


class _Component:
    """Some hyperparameters of one group, fixed or open."""

    group: str

    def __init__(self, **fixed: Any) -> None:
        """Fix hyperparameters by name.

        Raises:
            UserError: an unknown name or a value that breaks its rule.
        """
        self.fixed: Groups = {self.group: {}}
        for key, value in fixed.items():
            self.fixed[self.group][key] = check_value(self.group, key, value)

    def get_space(self) -> dict[str, dict[str, str]]:
        """Group to key to prior, for what is still open."""
        return open_priors([(self.group, key) for key in field_names(self.group)], self.fixed)

    def __repr__(self) -> str:
        fixed = ", ".join(f"{key}={value!r}" for key, value in self.fixed[self.group].items())
        return f"{type(self).__name__}({fixed})"


class ActorCritic(_Component):
    """The networks: ``width``, ``depth``, ``activation``, ``features_dim``, ``ortho_init``, ``log_std_init``.

    ``features_dim`` is for images, the first three for vectors.
    """

    group = "model"


class Optimizer(_Component):
    """Adam: ``lr``, ``eps``."""

    group = "optimizer"


class LRSchedule(_Component):
    """The learning rate's schedule: ``name`` (constant or linear), ``final``."""

    group = "lr_schedule"


class RolloutLoader(_Component):
    """Where experience comes from: the environment, and how much of it makes a rollout and an epoch."""

    group = "env"

    def __init__(
        self,
        id: str,
        *,
        n_steps: int | None = None,
        steps_per_epoch: int | None = None,
        **env: Any,
    ) -> None:
        """Name the environment.

        Args:
            id: gymnasium id, also ``module:EnvId``.
            n_steps: steps of each environment in one rollout; open where it is None.
            steps_per_epoch: environment steps in one epoch.
            **env: ``n_envs``, ``kwargs``, ``max_episode_steps``, ``vectorization``, ``wrapper``.
        """
        super().__init__(id=id, **env)
        if n_steps is not None:
            self.fixed["ppo"] = {"n_steps": check_value("ppo", "n_steps", n_steps)}
        if steps_per_epoch is not None:
            steps = check_value("task", "steps_per_epoch", steps_per_epoch)
            self.fixed["task"] = {"steps_per_epoch": steps}

    def get_space(self) -> dict[str, dict[str, str]]:
        """The prior of ``n_steps`` where it is open."""
        return open_priors([("ppo", "n_steps")], self.fixed)


def open_priors(keys: list[tuple[str, str]], fixed: Mapping[str, Mapping[str, Any]]) -> Groups:
    """Priors of the space `default` for those of ``keys`` that are searched there and not fixed."""
    from ppo_hpo.spec.config import OTHER_SPELLINGS
    from ppo_hpo.spec.space import read_space

    priors = read_space("default").priors
    found: Groups = {}
    for group, key in keys:
        meant = OTHER_SPELLINGS.get(group, {}).get(key, key)
        spellings = {meant, *(o for o, n in OTHER_SPELLINGS.get(group, {}).items() if n == meant)}
        if key in priors.get(group, {}) and not spellings & set(fixed.get(group, {})):
            found.setdefault(group, {})[key] = priors[group][key]
    return found


def merge(*parts: Mapping[str, Mapping[str, Any]]) -> Groups:
    """Nested mappings in one, the later ones winning."""
    merged: Groups = {}
    for part in parts:
        for group, values in part.items():
            merged.setdefault(group, {}).update(values)
    return merged

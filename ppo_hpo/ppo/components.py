"""Deferred components: parts of a task that can be made before their hyperparameters are known.

Each component fixes some hyperparameters and leaves the others open. `PPO.get_space` collects what is open,
with the priors of the space `default`, and `PPO.init` supplies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppo_hpo.spec.config import OTHER_SPELLINGS, TrialConfig, check_value, field_names
from ppo_hpo.spec.errors import UserError

Groups = dict[str, dict[str, Any]]


class _Component:
    """Hyperparameters of one group, each fixed or open."""

    group: str

    def __init__(self, **fixed: Any) -> None:
        """Fix hyperparameters by name.

        Raises:
            UserError: a name is unknown, or a value breaks its rule.
        """
        checked = {key: check_value(self.group, key, value) for key, value in fixed.items()}
        self.fixed: Groups = {self.group: checked}

    def get_space(self) -> Groups:
        """Priors of what is open, by group and key."""
        return open_priors([(self.group, key) for key in field_names(self.group)], self.fixed)

    def __repr__(self) -> str:
        fixed = ", ".join(f"{key}={value!r}" for key, value in self.fixed[self.group].items())
        return f"{type(self).__name__}({fixed})"


class ActorCritic(_Component):
    """The network: ``width``, ``depth``, ``activation``, ``features_dim``, ``ortho_init``, ``log_std_init``.

    ``features_dim`` is for images; the first three are for vectors.
    """

    group = "model"


class Optimizer(_Component):
    """Adam: ``lr``, ``eps``."""

    group = "optimizer"


class LRSchedule(_Component):
    """The schedule of the learning rate: ``name`` (constant or linear), ``final``."""

    group = "lr_schedule"


class RolloutLoader(_Component):
    """Where experience comes from: the environment, and the sizes of a rollout and of an epoch."""

    group = "env"

    def __init__(
        self, id: str, *, n_steps: int | None = None, steps_per_epoch: int | None = None, **env: Any
    ) -> None:
        """Name the environment.

        Args:
            id: gymnasium id, such as ``CartPole-v1`` or ``module:EnvId``.
            n_steps: steps of each environment in one rollout; None leaves it open.
            steps_per_epoch: environment steps in one epoch, of all environments together.
            **env: ``n_envs``, ``kwargs``, ``max_episode_steps``, ``vectorization``, ``wrapper``.

        Raises:
            UserError: a name is unknown, or a value breaks its rule.
        """
        super().__init__(id=id, **env)
        if n_steps is not None:
            self.fixed["ppo"] = {"n_steps": check_value("ppo", "n_steps", n_steps)}
        if steps_per_epoch is not None:
            steps = check_value("task", "steps_per_epoch", steps_per_epoch)
            self.fixed["task"] = {"steps_per_epoch": steps}

    def get_space(self) -> Groups:
        """The prior of ``n_steps`` where it is open."""
        return open_priors([("ppo", "n_steps")], self.fixed)


class Hyperparameters:
    """What a task's constructor fixed, until `complete` makes a configuration of it."""

    #: Discount factor where nobody gives one.
    DEFAULT_GAMMA = 0.99

    def __init__(
        self,
        model: object,
        dataloader: RolloutLoader,
        optimizer: Optimizer,
        lr_scheduler: LRSchedule,
        groups: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Join what the components fix with further hyperparameters by group and key."""
        for name, component, kind in (
            ("dataloader", dataloader, RolloutLoader),
            ("optimizer", optimizer, Optimizer),
            ("lr_scheduler", lr_scheduler, LRSchedule),
        ):
            if not isinstance(component, kind):
                raise UserError(f"`{name}` must be a {kind.__name__}, but got {component!r}.")
        for group, values in groups.items():
            for key, value in values.items():
                check_value(group, key, value)
        self.components = (dataloader, optimizer, lr_scheduler)
        self._all = (*self.components, *([model] if isinstance(model, ActorCritic) else []))
        self.fixed = merge(*(component.fixed for component in self._all), groups)
        self.max_epochs: int | None = None  # highest fidelity that `get_space` was asked for

    def get_space(self, fidelities: Mapping[str, str]) -> Groups:
        """Priors of what is open, and fidelities; see `PPO.get_space`."""
        from ppo_hpo.spec.space import Space, spaces_directory, with_fidelities

        keys = [(group, key) for group in ("ppo", "normalize") for key in field_names(group)]
        open_space = merge(open_priors(keys, self.fixed), *(component.get_space() for component in self._all))
        given = with_fidelities(Space("PPO", spaces_directory(), {}, {}), fidelities)
        if given.max_epochs is not None:
            self.max_epochs = given.max_epochs
        return {k: v for k, v in merge(open_space, given.priors).items() if v}

    def complete(self, gamma: float, supplied: Groups) -> TrialConfig:
        """Add what `PPO.init` was given, by group and key; the rest takes its default."""
        self._check_not_fixed(supplied)
        groups = merge(self.fixed, supplied)
        if self.max_epochs is not None:
            groups.setdefault("task", {}).setdefault("max_epochs", self.max_epochs)
        ppo = groups.setdefault("ppo", {})
        if "gamma" not in ppo and "one_minus_gamma" not in ppo:
            ppo["gamma"] = gamma
        elif gamma not in (self.DEFAULT_GAMMA, ppo.get("gamma")):
            raise UserError(f"`ppo.gamma` is given twice: init got gamma={gamma!r} beside {ppo!r}.")
        return TrialConfig.from_mapping(groups)

    def _check_not_fixed(self, supplied: Groups) -> None:
        for group, values in supplied.items():
            fixed = self.fixed.get(group, {})
            for key, value in values.items():
                meant = OTHER_SPELLINGS.get(group, {}).get(key, key)
                if meant in fixed and (key != meant or value != fixed[meant]):
                    raise UserError(
                        f"`{group}.{meant}` was fixed to {fixed[meant]!r} when the task was made, but init "
                        f"got {key}={value!r}. Leave it open in the constructor (None) to set it in init."
                    )


def open_priors(keys: list[tuple[str, str]], fixed: Mapping[str, Mapping[str, Any]]) -> Groups:
    """Priors of the space `default` for those of ``keys`` that are searched there and not fixed."""
    from ppo_hpo.spec.space import read_space

    priors = read_space("default").priors
    found: Groups = {}
    for group, key in keys:
        others = OTHER_SPELLINGS.get(group, {})
        meant = others.get(key, key)
        spellings = {meant, *(other for other, name in others.items() if name == meant)}
        if key in priors.get(group, {}) and not spellings & set(fixed.get(group, {})):
            found.setdefault(group, {})[key] = priors[group][key]
    return found


def merge(*parts: Mapping[str, Mapping[str, Any]]) -> Groups:
    """Merge nested mappings; the later ones win."""
    merged: Groups = {}
    for part in parts:
        for group, values in part.items():
            merged.setdefault(group, {}).update(values)
    return merged

"""Configurations that a sweep tries first."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.space import Space, read_space

if TYPE_CHECKING:
    from orion.client import ExperimentClient

# These algorithms start trials at the lowest fidelity.
_MULTI_FIDELITY = ("asha", "hyperband", "evolutiones", "pbt", "pb2")


def configurations_of(warm_start: Any) -> list[TrialConfig]:
    """Read what `sweep` was given to try first.

    Args:
        warm_start: a preset's name or file, a nested mapping, or a list of these.

    Raises:
        UserError: one is a search space, or not a legal configuration.
    """
    if isinstance(warm_start, str | Mapping):
        warm_start = [warm_start]
    found = []
    for one in warm_start:
        if isinstance(one, str):
            space = read_space(one)
            if any(space.priors.values()):
                raise UserError(
                    f"A warm start takes presets and configurations, but {one!r} is a search space."
                )
            one = space.fixed
        found.append(TrialConfig.from_mapping(one))
    return found


def insert(client: ExperimentClient, space: Space, configurations: Sequence[TrialConfig]) -> None:
    """Register trials of these configurations, which workers take first.

    Raises:
        UserError: a configuration is outside of the space.
    """
    from orion.core.io.database import DuplicateKeyError
    from orion.core.utils.format_trials import dict_to_trial

    ((algorithm, _),) = client.algorithm.configuration.items()
    for config in configurations:
        params, outside = {}, []
        for dimension_name, dimension in client.space.items():
            group, _, key = dimension_name.lstrip("/").replace("/", ".").partition(".")
            if (group, key) == ("task", "epochs"):
                low, high = dimension.low, dimension.high
                value: Any = int(low if algorithm.lower() in _MULTI_FIDELITY else high)
            else:
                value = _value(config, group, key, dimension)
            if value not in dimension:
                outside.append(f"{group}.{key} = {value!r} is not in {dimension.get_prior_string()}")
            params[dimension_name] = value
        if outside:
            raise UserError(f"A warm start must be inside the space, but {'; '.join(outside)}.")
        trial = dict_to_trial(params, client.space)
        with contextlib.suppress(DuplicateKeyError):
            client._experiment.register_trial(trial, status="new")


def _value(config: TrialConfig, group: str, key: str, dimension: Any) -> Any:
    """The value of a hyperparameter as the dimension spells it."""
    values = config.to_mapping()[group]
    if key == "one_minus_gamma":
        value: Any = 1 - values["gamma"]
    elif key == "one_minus_gae_lambda":
        value = 1 - values["gae_lambda"]
    elif key == "n_minibatches":
        value = config.rollout_steps // values["batch_size"]
    else:
        value = values[key]
    if dimension.type == "categorical":
        # Choices may be texts, as 'none' or '0.2'.
        for choice in dimension.interval():
            if choice == value and type(choice) is type(value):
                return choice
        for choice in dimension.interval():
            if str(choice).lower() == str(value).lower():
                return choice
        return value
    if isinstance(value, float) and (precision := getattr(dimension, "precision", None)):
        return float(f"{value:.{precision}g}")
    return value

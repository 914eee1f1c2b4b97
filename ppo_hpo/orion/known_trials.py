"""Trials that an experiment is given and did not propose: warm starts, and those of an earlier experiment."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_hpo.orion.experiment import asked_epochs, completed_trials, open_experiment, statistics_of
from ppo_hpo.orion.stored_space import stored_space
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.settings import flatten_params, get
from ppo_hpo.spec.space import Space, fill

_MULTI_FIDELITY = ("asha", "hyperband", "evolutiones", "pbt", "pb2")  # They start at the lowest fidelity.
# Algorithms that look only at trials which they proposed, and that can be told of others.
_WITH_BRACKETS = ("ASHA", "Hyperband")
# What belongs to the processes that trained a trial, and not to the trial.
_NOT_COPIED = shutil.ignore_patterns("lock", "writer", "trial_*.conf", "results_*.log", "*.tmp", "*.torn")


def points_of(
    configurations: Sequence[TrialConfig], dimensions: Mapping[str, Any], algorithm: str
) -> list[dict[str, Any]]:
    """The parameters of trials that try these configurations first; `UserError` if one is outside the space.

    ``dimensions`` is Orion's space, and ``algorithm`` a name.
    """
    found = []
    for config in configurations:
        point = _point(config, dimensions)
        for name, dimension in dimensions.items():
            if _dotted(name) == "task.epochs":
                first = dimension.low if algorithm.lower() in _MULTI_FIDELITY else dimension.high
                point[name] = int(first)
        outside = [
            f"{_dotted(name)} = {point.get(name)!r} is not in {dimension.get_prior_string()}"
            for name, dimension in dimensions.items()
            if name not in point or point[name] not in dimension
        ]
        if outside:
            raise UserError(f"A warm start must be inside the space, but {'; '.join(outside)}.")
        found.append(point)
    return found


def insert(client: Any, points: Sequence[Mapping[str, Any]]) -> None:
    """Register trials with these parameters, which workers take first."""
    from orion.core.io.database import DuplicateKeyError
    from orion.core.utils.format_trials import dict_to_trial

    for point in points:
        with contextlib.suppress(DuplicateKeyError):
            client._experiment.register_trial(dict_to_trial(dict(point), client.space), status="new")


def _dotted(name: str) -> str:
    return name.lstrip("/").replace("/", ".")


def _point(config: TrialConfig, dimensions: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as a point of Orion's space, without arguments that the environment was not given."""
    values, found = config.to_mapping(), {}
    for name, dimension in dimensions.items():
        group, _, key = _dotted(name).partition(".")
        with contextlib.suppress(KeyError):
            found[name] = _spelled(config, values, group, key, dimension)
    return found


def _spelled(
    config: TrialConfig, values: Mapping[str, Mapping[str, Any]], group: str, key: str, dimension: Any
) -> Any:
    """The value of a hyperparameter as the dimension spells it."""
    if key.startswith("one_minus_"):
        value: Any = 1 - values[group][key.removeprefix("one_minus_")]
    elif key == "n_minibatches":
        value = config.rollout_steps // values[group]["batch_size"]
    else:
        value = get(values, group, key)
    if dimension.type == "categorical":
        # Choices may be texts, as 'none' or '0.2'.
        choices = dimension.interval()
        same = [choice for choice in choices if choice == value and type(choice) is type(value)]
        alike = [choice for choice in choices if str(choice).lower() == str(value).lower()]
        return [*same, *alike, value][0]
    if isinstance(value, float) and (precision := getattr(dimension, "precision", None)):
        return float(f"{value:.{precision}g}")
    return value


# ------------------------------------------------------------------ trials of an earlier experiment


def experiment_to_adopt(builder: Any, old: str, new: str, working_dir: str | None = None) -> Any:
    """Open the experiment ``old``: one of the same database, or the directory of a sweep.

    ``builder`` is Orion's builder of the experiment ``new``, or None if its database is not there yet. The
    experiment gets the directory ``working_dir``.
    """
    from orion.core.utils.exceptions import NoConfigurationError

    if old.rstrip("/") == new:
        raise UserError(f"`--from {old}` names the experiment itself. Give the new experiment another name.")
    try:
        found = open_experiment(old) if builder is None else builder.load(old, mode="r")
    except NoConfigurationError:
        found = open_experiment(old)
    if working_dir and os.path.abspath(working_dir) == os.path.abspath(found.working_dir or "."):
        raise UserError(
            f"{working_dir} has the trials of {old!r}. Give the new experiment a directory of its own, as "
            f"with --working-dir {working_dir.rstrip('/')}-{new}."
        )
    return found


def adopt(experiment: Any, space: Space, old: Any) -> str:
    """Add the completed trials of the experiment ``old`` that belong to the space; what was done, in words.

    A trial belongs to the space if a point of the space trains exactly the same. Files are copied, so that
    promotions resume. The algorithm is told the results.
    """
    from orion.core.io.database import DuplicateKeyError

    trials = sorted(completed_trials(old.fetch_trials()), key=lambda trial: asked_epochs(trial) or 0)
    before = stored_space(old.configuration)
    added, outside = [], 0
    for trial in trials:
        copy = _moved(trial, experiment, space, before)
        if copy is None:
            outside += 1
            continue
        _copy_files(trial, copy)
        with contextlib.suppress(DuplicateKeyError):  # An earlier call has added it.
            experiment.storage.register_trial(copy)
            added.append(copy)
    if added:
        with experiment.acquire_algorithm_lock() as algorithm:
            for copy in added:
                _tell(algorithm, copy)
    there = len(trials) - outside - len(added)
    return (
        f"{len(added)} of {len(trials)} completed trials of {old.name!r} were added to {experiment.name!r}"
        + f"; {there} were there already" * bool(there)
        + f"; {outside} would train otherwise in the new space" * bool(outside)
    )


def _moved(trial: Any, experiment: Any, space: Space, before: Space | None) -> Any:
    """A trial as one of another experiment; None if that does not search what the trial trained."""
    from orion.core.utils.format_trials import dict_to_trial

    config = _config_of(trial, before)
    # The hyperparameters of a fork do not say how it was trained.
    if config is None or statistics_of(trial).get("forked"):
        return None
    own = {f"{group}.{key}": value for group, key, value in flatten_params(trial.params)}
    # Its own values are not rounded, and include those that had no effect.
    point = _point(config, experiment.space) | {
        name: own[_dotted(name)]
        for name, dimension in experiment.space.items()
        if _dotted(name) in own and own[_dotted(name)] in dimension
    }
    if set(point) != set(experiment.space) or any(v not in experiment.space[k] for k, v in point.items()):
        return None
    try:
        same = TrialConfig.from_mapping(fill(space, point))
    except UserError:
        return None
    if config.identity() != same.identity() or _asked(config) != _asked(same):
        return None
    copy = dict_to_trial(point, experiment.space)
    copy.results = [type(result)(**result.to_dict()) for result in trial.results]
    copy.experiment, copy.status, copy.exp_working_dir = experiment.id, "completed", experiment.working_dir
    copy.submit_time, copy.start_time, copy.end_time = trial.submit_time, trial.start_time, trial.end_time
    return copy


def _asked(config: TrialConfig) -> tuple[int, str]:
    return config.task.epochs, config.task.aggregate


def _config_of(trial: Any, before: Space | None) -> TrialConfig | None:
    path = Path(trial.working_dir) / "config.yaml" if trial.exp_working_dir else None
    with contextlib.suppress(UserError):
        if path is not None and path.is_file():
            return TrialConfig.from_mapping(yamlio.load(path))
        if before is not None:
            return TrialConfig.from_mapping(fill(before, trial.params))
    return None


def _copy_files(trial: Any, copy: Any) -> None:
    """Copy a trial's directory, and its entries in the index of trials of one identity."""
    if not (trial.exp_working_dir and copy.exp_working_dir):
        return
    from ppo_hpo.trial.restore import INDEX  # which imports numpy

    source, target = Path(trial.working_dir), Path(copy.working_dir)
    if not source.is_dir() or target.exists():
        return
    whole = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(source, whole, symlinks=True, ignore=_NOT_COPIED)
        whole.rename(target)
        for entry in source.parent.glob(f"{INDEX}/*/{source.name}"):
            index = target.parent / INDEX / entry.parent.name
            index.mkdir(parents=True, exist_ok=True)
            (index / target.name).touch()
    except OSError as error:
        raise UserError(f"{source} cannot be copied to {target}: {error.strerror or error}.") from None


def _tell(algorithm: Any, trial: Any) -> None:
    """Tell an algorithm the result of a trial that it did not propose."""
    inner = algorithm.unwrapped
    if type(inner).__name__ in _WITH_BRACKETS:
        from orion.core.worker.algo_wrappers.space_transform import SpaceTransform

        wrapper = algorithm.unwrap(SpaceTransform)
        transformed = wrapper.transform(trial)
        transformed.status, transformed.results = trial.status, trial.results
        bracket = _bracket(inner, transformed)
        if bracket is not None:
            inner.register(transformed)
            key = inner.get_id(transformed, ignore_fidelity=True, ignore_parent=True)
            inner.trial_to_brackets.setdefault(key, bracket)
            wrapper.register(trial)
            wrapper.registry_mapping.register(trial, transformed)
    algorithm.observe([trial])


def _bracket(algorithm: Any, trial: Any) -> int | None:
    """The number of the bracket that can hold a trial: one that starts with its epochs, if there is one."""
    from orion.core.utils.flatten import flatten

    epochs = flatten(trial.params)[algorithm.fidelity_index]
    fits = [
        (bracket.rungs[0]["resources"] != epochs, number)
        for number, bracket in enumerate(algorithm.brackets)
        if any(rung["resources"] == epochs for rung in bracket.rungs)
    ]
    return min(fits)[1] if fits else None

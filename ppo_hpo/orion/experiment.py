"""Finding an experiment in Orion's database, and reading its trials.

An experiment's database is looked for in these places, and the first one counts:

1. Orion's configuration file, if the user named one (``-c FILE``);
2. ``NAME/orion.yaml``, which ``ppo-hpo sweep`` writes into a sweep's directory;
3. the environment variables ``ORION_DB_TYPE`` and ``ORION_DB_ADDRESS``;
4. Orion's own configuration files, and Orion's default.

A file that says nothing about the storage is passed over.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_hpo.orion import hunt_file
from ppo_hpo.spec.canonical import configuration_key
from ppo_hpo.spec.errors import UserError, hide_secrets
from ppo_hpo.spec.prior import highest_fidelity
from ppo_hpo.spec.settings import flatten_params

_VARIABLES = ("ORION_DB_TYPE", "ORION_DB_ADDRESS")
# How many names of experiments an error lists.
_SHOWN_NAMES = 8


@dataclass(frozen=True)
class Database:
    """A database of Orion's."""

    storage: Any  # Orion's configuration of the storage; None if Orion finds it by itself.
    named_by: str  # The place that names the database, for messages.
    place: Path | None = None  # The directory of the configuration file that names it.

    @property
    def settings(self) -> Mapping[str, Any]:
        """The database's type, host and other settings; empty if the configuration has another form."""
        import orion.core

        storage = self.storage or orion.core.config.storage.to_dict()
        database = storage.get("database") if isinstance(storage, Mapping) else None
        return database if isinstance(database, Mapping) else {}

    def __str__(self) -> str:
        words = [str(self.settings.get(key) or "") for key in ("type", "host")]
        text = hide_secrets(" ".join(word for word in words if word))
        return f"{text} (from {self.named_by})" if text else f"of {self.named_by}"

    def open(self) -> Any:
        """Open the database, and return Orion's storage. A file that does not exist raises UserError."""
        host = self.settings.get("host")
        is_file = str(self.settings.get("type")).lower() in hunt_file.FILES
        # Orion would create the file of a mistyped name, and its directories, and find nothing in it.
        # An empty host is Orion's default file, which Orion may create.
        if is_file and isinstance(host, str) and host and not Path(host).exists():
            raise UserError(
                f"The database {host} does not exist (from {self.named_by}). Name it with -c FILE, or set "
                f"ORION_DB_ADDRESS."
            )
        with warnings.catch_warnings():
            # Orion imports pkg_resources, which warns that it is deprecated.
            warnings.simplefilter("ignore")
            from orion.storage.base import setup_storage
        storage = setup_storage(self.storage)
        if self.place is not None:
            hunt_file.settle(storage, self.place)
        return storage


def find_database(config: str | None = None, name: str | None = None) -> Database:
    """Find the database of an experiment or a sweep's directory, in the order of this module's docstring."""
    file = Path(config) if config is not None else Path(name or "") / "orion.yaml"
    if config is not None or (name and file.is_file()):
        storage = hunt_file.storage_in(file)
        if storage is not None:
            return Database(storage, str(file), file.absolute().parent)
    if any(os.environ.get(variable) for variable in _VARIABLES):
        return Database(None, " and ".join(_VARIABLES))
    return Database(None, "Orion's own configuration")


def open_experiment(name: str, config: str | None = None, mode: str = "r") -> Any:
    """Open Orion's client of an experiment.

    Args:
        name: name of the experiment, or path of a sweep's directory.
        config: Orion's configuration file; None looks in the places that this module's docstring lists.
        mode: ``r`` to read, ``w`` to write as well.
    """
    database = find_database(config, name)
    try:
        storage = database.open()
        names = list(dict.fromkeys(str(each["name"]) for each in storage.fetch_experiments({})))
        from orion.client import get_experiment

        if (wanted := _name_in(names, name, database)) is not None:
            return get_experiment(wanted, storage=storage, mode=mode)
    except UserError:
        raise
    except Exception as error:
        # Orion does not check its configuration, so a mistake there can raise any error.
        raise UserError(f"The database {database} cannot be opened ({in_short(error)}).") from None
    others = ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
    hint = "" if config else " Name another one with -c FILE, or with ORION_DB_TYPE and ORION_DB_ADDRESS."
    raise UserError(
        f"There is no experiment {name!r} in the database {database}, which has {others or 'none'}.{hint}"
    )


def in_short(error: BaseException) -> str:
    """An error in one line of limited length, without passwords."""
    return hide_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:300]


def _name_in(names: list[str], name: str, database: Database) -> str | None:
    """The experiment that the user means: by its name, or by the directory of its sweep."""
    place = Path(name)
    for wanted in (name, place.resolve().name):
        if wanted in names:
            return wanted
    # A sweep's directory can have another name. Usually its database holds only this sweep.
    only_one = len(names) == 1 and database.named_by == str(place / "orion.yaml")
    return names[0] if only_one else None


def statistics_of(trial: Any) -> dict[str, float]:
    """A trial's statistics by name."""
    return {item.name: float(item.value) for item in trial.statistics}


def completed_trials(trials: Iterable[Any]) -> list[Any]:
    """The completed trials whose result is one of ppo_hpo."""
    return [trial for trial in trials if trial.status == "completed" and "epochs" in statistics_of(trial)]


def ranking_key(trial: Any) -> tuple[float, float]:
    """Sort key of completed trials, best first: lowest objective, and the longest trained among equals."""
    return (trial.objective.value, -statistics_of(trial)["epochs"])


def configuration_of(trial: Any) -> str:
    """A key that all trials of one configuration share, whatever their fidelity."""
    return configuration_key(params_of(trial))


def params_of(trial: Any) -> dict[str, Any]:
    """A trial's hyperparameters by dotted name; in `orion hunt` they have names like ``/task/epochs``."""
    return {f"{group}.{key}": value for group, key, value in flatten_params(trial.params)}


def asked_epochs(trial: Any) -> float | None:
    """The epochs that Orion asked a trial for; None if all trials train the same number.

    A trial that diverged or was stopped has trained fewer, but still counts for this rung.
    """
    epochs = params_of(trial).get("task.epochs")
    return None if epochs is None else float(epochs)


def epochs_prior(space: Mapping[str, Any]) -> str | None:
    """The prior of ``task.epochs`` in one of Orion's spaces; None if the space has no such dimension."""
    for name, dimension in space.items():
        if name.lstrip("/").replace("/", ".") == "task.epochs":
            return str(dimension.get_prior_string())
    return None


def highest_epochs(client: Any) -> int | None:
    """The highest fidelity of an experiment; None if all trials train the same number of epochs."""
    prior = epochs_prior(client.space)
    return None if prior is None else highest_fidelity(prior)

"""An experiment of Orion's that is in the database already: its client, and its trials in plain terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.canonical import configuration_key
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.space import flatten_params

#: Orion's databases, and ours, that are a file.
_FILES = ("pickleddb", "sqlitedb")


def open_experiment(name: str, config: str | None = None, mode: str = "r") -> Any:
    """Orion's client of an experiment that is in the database.

    Args:
        name: the experiment's name.
        config: Orion's configuration file of the hunt, for its storage; None uses Orion's own
            configuration, which `ORION_DB_TYPE` and `ORION_DB_ADDRESS` set, and where that has no such
            experiment, the sweep's that lies here: ``NAME/orion.yaml``.
        mode: ``r`` to read, ``w`` to write as well.

    Raises:
        UserError: there is no such experiment, or its database cannot be opened.
    """
    storage = storage_of(config)
    import warnings

    with warnings.catch_warnings():
        # pkg_resources announces its end at each import; the pin below setuptools 81 keeps it.
        warnings.simplefilter("ignore")
        from orion.client import get_experiment
        from orion.core.utils.exceptions import NoConfigurationError
    source = f"the storage in {config}" if storage else "Orion's own configuration"
    refuse_missing_file(storage, source)
    try:
        return get_experiment(name, storage=storage, mode=mode)
    except Exception as error:
        if not isinstance(error, NoConfigurationError):
            # Orion checks nothing: whatever is wrong there comes up as whatever it leads to.
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(f"The database of {source} cannot be opened ({text}).") from None
        if config is None and (beside := Path(name) / "orion.yaml").is_file():
            return open_experiment(name, str(beside), mode)
        hint = (
            "" if storage else " Name its database with -c FILE, or set ORION_DB_TYPE and ORION_DB_ADDRESS."
        )
        raise UserError(f"There is no experiment {name!r} in the database.{hint}") from None


def storage_of(config: str | None) -> dict[str, Any] | None:
    """What Orion's configuration file says of its storage; None without a file, or without a word of it."""
    if config is None:
        return None
    content = yamlio.load(Path(config))
    storage = content.get("storage") if isinstance(content, Mapping) else None
    if storage is None and isinstance(content, Mapping) and "database" in content:
        storage = {"type": "legacy", "database": content["database"]}
    return storage


def refuse_missing_file(storage: Any, source: str) -> None:
    """Orion would make the file of a mistyped name, and its directories, and find nothing in it."""
    import orion.core

    found: Any = storage or orion.core.config.storage.to_dict()
    database: Any = found.get("database") if isinstance(found, Mapping) else None
    if not isinstance(database, Mapping) or str(database.get("type")).lower() not in _FILES:
        return
    host = database.get("host")  # nothing: Orion's own file, which it may make
    if isinstance(host, str) and host and not Path(host).exists():
        raise UserError(
            f"The database {host} does not exist (from {source}). Name it with -c FILE, or set "
            f"ORION_DB_ADDRESS."
        )


def statistics_of(trial: Any) -> dict[str, float]:
    """A trial's statistics by name."""
    return {item.name: float(item.value) for item in trial.statistics}


def completed_trials(trials: Iterable[Any]) -> list[Any]:
    """The trials that are completed and have a result of ours."""
    return [trial for trial in trials if trial.status == "completed" and "epochs" in statistics_of(trial)]


def ranking_key(trial: Any) -> tuple[float, float]:
    """Sort key of completed trials, best first: lowest objective, and the longest trained among equals."""
    return (trial.objective.value, -statistics_of(trial)["epochs"])


def configuration_of(trial: Any) -> str:
    """A key that all trials of one configuration share, whatever their fidelity."""
    return configuration_key(params_of(trial))


def params_of(trial: Any) -> dict[str, Any]:
    """A trial's hyperparameters by dotted name; Orion's command line writes ``/task/epochs`` for them."""
    return {f"{group}.{key}": value for group, key, value in flatten_params(trial.params)}

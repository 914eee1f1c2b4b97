"""A sweep's plan: its name and place, its space, and the experiment of Orion's that it is.

What was begun is gone on with only as it was begun: another space, algorithm or database under the same name
is refused with the difference.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import GROUPS, check_key
from ppo_hpo.spec.errors import UserError, hide_passwords
from ppo_hpo.spec.space import MARK, Space, read_space, with_fidelities

if TYPE_CHECKING:
    from orion.client import ExperimentClient

    from ppo_hpo.trial.options import RunOptions

Document = dict[str, dict[str, Any]]

#: Trials of a new sweep for which nobody said how many.
MAX_TRIALS = 40
# What Orion's algorithms need so that they work and a sweep can be repeated:
# docs/reference/orion-algorithms.md.
_SETTINGS: dict[str, dict[str, Any]] = {
    "asha": {"seed": 1, "num_brackets": 1},
    "hyperband": {"seed": 1},
    "random": {"seed": 1},
    "tpe": {"seed": 1},
    "evolutiones": {"seed": 1, "repetitions": 1},
    "pbt": {"seed": 1},
}
# What Python says of a file that is no pickle, or not all of one.
_NO_PICKLE = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError, KeyError)


def algorithm_of(algorithm: str | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name to options, those that were given."""
    if isinstance(algorithm, str):
        name, options = algorithm, {}
    elif isinstance(algorithm, Mapping) and len(algorithm) == 1:
        ((name, given),) = algorithm.items()
        options = dict(given or {})
    else:
        raise UserError(f"An algorithm is a name or {{name: options}}, but got {algorithm!r}.")
    return {str(name): options}


def _with_settings(algorithm: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """With what a new one needs to be told."""
    return {name: {**_SETTINGS.get(name.lower(), {}), **options} for name, options in algorithm.items()}


def options_of(options: RunOptions) -> list[str]:
    """Of the command that each trial of an `orion hunt` runs."""
    store, trials = options.checkpoint_store, options.trials_per_device
    return [
        *([] if options.device == "auto" else ["--device", options.device]),
        *([] if trials is None else ["--trials-per-device", str(trials)]),
        *([] if store is None else ["--store", store, "--parent", "{trial.parent}"]),
        *(["--stop-poor"] if options.stop_poor else []),
    ]


def name_of(name: str | None, env: str | None, space: str | None, algorithm: Mapping[str, Any] | None) -> str:
    """The sweep's name, checked; from its environment or space, and its algorithm, where none is given.

    Raises:
        UserError: there is nothing to name it after, or it would not do as a file's name.
    """
    if name is None:
        if env is None and space is None:
            raise UserError("A sweep needs an environment, a space or a name. Give env='Acrobot-v1', say.")
        what = (env or Path(str(space)).stem).rpartition(":")[2]
        name = f"{what}-{next(iter(algorithm or {'asha': 0}))}"
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.").lower()
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(f"A sweep's name has letters, digits, and - _ . between them, but got {name!r}.")
    return name


def storage_of(storage: str | Mapping[str, Any] | None, place: Path) -> dict[str, Any]:
    """Orion's configuration of a storage."""
    if isinstance(storage, Mapping):
        content = dict(storage)
        return content if "database" in content else {"type": "legacy", "database": content}
    if storage is None and (place / "orion.yaml").is_file():
        content = yamlio.load(place / "orion.yaml")
        if isinstance(content, Mapping) and isinstance(content.get("storage"), Mapping):
            return dict(content["storage"])
    address = str(storage) if storage is not None else str(place / "orion.sqlite")
    scheme, separator, rest = address.partition("://")
    if scheme in ("sqlite", "sqlitedb", "pickleddb") and separator:  # a file all the same
        kind = "pickleddb" if scheme == "pickleddb" else "sqlitedb"
        return {"type": "legacy", "database": {"type": kind, "host": str(Path(rest).absolute())}}
    if separator:
        return {"type": "legacy", "database": {"type": scheme, "host": address}}
    file = Path(address).absolute()
    return {"type": "legacy", "database": {"type": _kind(file), "host": str(file)}}


def _kind(file: Path) -> str:
    """Orion's name for the database in a file: by what is in it; by its suffix where there is nothing yet."""
    try:
        with file.open("rb") as opened:
            start = opened.read(16)
    except OSError:
        start = b""
    if start:
        return "sqlitedb" if start == b"SQLite format 3\0" else "pickleddb"
    return "sqlitedb" if file.suffix == ".sqlite" else "pickleddb"


def _address(storage: Mapping[str, Any]) -> str:
    """A database's type and where it is, for messages."""
    database = storage.get("database") or {}
    return hide_passwords(f"{database.get('host') or storage} ({database.get('type')})")


@dataclass(frozen=True)
class Plan:
    """A sweep's name and place, and what the database knows of it."""

    name: str
    place: Path
    storage: dict[str, Any]
    stored: dict[str, Any] | None

    @classmethod
    def of(cls, name: str, place: Path, storage: Any, algorithm: Mapping[str, Any] | None) -> Plan:
        """Read what there is of a sweep, and make its directory.

        Args:
            name: see `name_of`.
            place: the directory.
            storage: see `storage_of`.
            algorithm: that was asked for, as `algorithm_of` has it.

        Raises:
            UserError: the directory or the database cannot be used, or the sweep has another algorithm.
        """
        from orion.core.io.database import DatabaseError
        from orion.core.io.experiment_builder import ExperimentBuilder

        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The sweep's directory {place} cannot be made: {error.strerror}.") from None
        configuration = storage_of(storage, place)
        try:
            stored = ExperimentBuilder(configuration).fetch_config_from_db(name) or None
        except NotImplementedError as error:
            raise UserError(f"Orion has no such storage: {str(error).splitlines()[0]}.") from None
        except (OSError, DatabaseError, *_NO_PICKLE) as error:
            why = hide_passwords(" ".join(str(error).split()).rstrip("."))
            raise UserError(f"The database {_address(configuration)} cannot be used: {why}.") from None
        plan = cls(name, place, configuration, stored)
        if stored is not None and algorithm is not None:
            plan._refuse_another_algorithm(algorithm)
        return plan

    def _refuse_another_algorithm(self, wanted: Mapping[str, Any]) -> None:
        assert self.stored is not None
        have = self.stored["algorithm"]
        have = {have: {}} if isinstance(have, str) else have
        ((name, options),) = wanted.items()
        ((other, settings),) = have.items()
        if name.lower() == other.lower():
            changed = [key for key in options if key in settings and settings[key] != options[key]]
            if not changed:
                return
            key = changed[0]
            name, other = f"{name} with {key} = {options[key]}", f"{other} with {key} = {settings[key]}"
        raise UserError(
            f"The sweep {self.name!r} is run by {other}, but {name} was asked for, and Orion cannot change "
            f"that under way. Give the new one a name of its own."
        )

    def document(
        self,
        env: str | None,
        space: str | None,
        seeds: int | None,
        epochs: str | int | None,
        overrides: Mapping[str, Mapping[str, Any]] | None,
    ) -> Document:
        """The space that is asked for, as a file; it must be the one that the sweep has.

        Raises:
            UserError: it is another one, or a bad one.
        """
        own = self._own_document()
        path = self.place / "space.yaml"
        there = _to_document(read_space(str(path))) if path.is_file() else None
        if own is not None and there is not None and (difference := _difference(own, there)):
            raise UserError(
                f"{path} is not the space that the sweep began with any more: {difference}. A sweep keeps "
                f"its space: put that back, or copy the file and give the new sweep a name of its own."
            )
        if space is None and own is not None:
            base = own
        else:
            base = _to_document(read_space(space or "default"))
        base = {group: dict(values) for group, values in base.items()}
        chosen: Document = {group: dict(values) for group, values in (overrides or {}).items()}
        if env is not None:
            chosen.setdefault("env", {})["id"] = env
        if seeds is not None:
            chosen.setdefault("task", {})["seeds"] = seeds
        for group, values in chosen.items():
            for key, value in values.items():
                check_key(group, key)
                base.setdefault(group, {})[key] = value
        if epochs is not None:
            base = _with_epochs(base, self.name, epochs)
        if own is not None and (difference := _difference(own, base)):
            raise UserError(
                f"The sweep {self.name!r} has another space: {difference}. Give the new one a name of its "
                f"own, or leave out what it has already."
            )
        if own is None and there is not None and (difference := _difference(there, base)):
            raise UserError(
                f"{self.place} has a sweep of another space: {difference}. Give the new one a directory of "
                f"its own."
            )
        return base

    def _own_document(self) -> Document | None:
        if self.stored is None:
            return None
        parser = self.stored.get("metadata", {}).get("parser") or {}
        content = parser.get("config_file_data")
        if not isinstance(content, Mapping) or not content or not set(content) <= set(GROUPS):
            raise UserError(
                f"There is an experiment {self.name!r} in the database already, but neither `sweep` nor "
                f"`orion hunt ... ppo-hpo run --config FILE` made it. Choose another name, or go on with it "
                f"as it was begun."
            )
        # Orion reads 1e-4 as a word.
        return {
            group: {k: yamlio.parse(v, k) if _is_word(v) else v for k, v in values.items()}
            for group, values in content.items()
        }

    def build(
        self,
        document: Document,
        algorithm: Mapping[str, Any] | None,
        max_trials: int | None,
        options: Sequence[str],
    ) -> tuple[ExperimentClient, Path]:
        """Orion's client of the experiment, and the directory with the sweep's files."""
        path = self.place / "space.yaml"
        new = not path.exists()
        try:
            return self._build(document, algorithm, max_trials, options), self.place
        except BaseException:
            if new:
                path.unlink(missing_ok=True)  # of a sweep that there is not
            raise

    def _build(
        self,
        document: Document,
        algorithm: Mapping[str, Any] | None,
        max_trials: int | None,
        options: Sequence[str],
    ) -> ExperimentClient:
        from orion.client.experiment import ExperimentClient
        from orion.core.io import resolve_config
        from orion.core.io.experiment_builder import ExperimentBuilder

        if not any(str(v).startswith(MARK) for values in document.values() for v in values.values()):
            raise UserError("Nothing is searched in this space: every value is fixed. `ppo-hpo run` runs it.")
        path = self.place / "space.yaml"
        _keep(path, f"# The space of the sweep {self.name}; its trials have it from the database.\n"
              + yamlio.dump(document))  # fmt: skip
        space = read_space(str(path))
        if self.stored is None:
            if algorithm is None:
                algorithm = algorithm_of("asha" if space.max_epochs else "random")
            algorithm = _with_settings(algorithm)
            user_args = ["ppo-hpo", "run", "--config", str(path), *options]
            metadata = resolve_config.fetch_metadata(user_args=user_args)
            settings: dict[str, Any] = {
                "space": metadata["priors"], "metadata": metadata, "algorithm": algorithm,
                "max_trials": max_trials or MAX_TRIALS, "working_dir": str(self.place / "trials"),
            }  # fmt: skip
        else:
            settings = {"max_trials": max_trials}
        try:
            experiment = ExperimentBuilder(self.storage).build(self.name, **settings)
        except NotImplementedError as error:
            raise UserError(f"Orion has no such algorithm: {str(error).splitlines()[0]}.") from None
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"Orion refuses this algorithm on this space: {' '.join(str(error).split())}"
            ) from error
        return ExperimentClient(experiment)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and not value.startswith(MARK)


def _to_document(space: Space) -> Document:
    document: Document = {group: dict(values) for group, values in space.fixed.items()}
    for group, priors in space.priors.items():
        for key, prior in priors.items():
            document.setdefault(group, {})[key] = MARK + prior
    return {group: document[group] for group in GROUPS if group in document}


def _with_epochs(document: Document, name: str, epochs: str | int) -> Document:
    fixed = {
        g: {k: v for k, v in values.items() if not str(v).startswith(MARK)} for g, values in document.items()
    }
    priors = {
        g: {k: v.removeprefix(MARK) for k, v in values.items() if str(v).startswith(MARK)}
        for g, values in document.items()
    }
    return _to_document(with_fidelities(Space(name, Path(), fixed, priors), {"epochs": epochs}))


def _difference(own: Document, other: Document) -> str | None:
    for group in GROUPS:
        ours, theirs = own.get(group, {}), other.get(group, {})
        for key in sorted({*ours, *theirs}):
            # Through YAML, in which Orion's database keeps no tuples and the like.
            if ours.get(key) != theirs.get(key):
                return f"`{group}.{key}` is {ours.get(key)}, but {theirs.get(key)} was asked for"
    return None


def _keep(path: Path, text: str) -> None:
    """Write a file in one piece, unless that is what it holds."""
    from ppo_hpo.state.files import write_atomically

    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode())


def write_files(place: Path, storage: Mapping[str, Any], n_workers: int | None) -> None:
    """Write `orion.yaml`, with which `orion hunt -c` goes on."""
    hunt = {
        "storage": dict(storage),
        # Each trial of a hunt is a process of its own: threads are enough, and leave no daemons.
        "worker": {
            "n_workers": n_workers or 1,
            "executor": "joblib",
            "executor_configuration": {"backend": "threading"},
        },
    }
    _keep(place / "orion.yaml", yamlio.dump(hunt))

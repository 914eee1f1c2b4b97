"""What a sweep is: the user's request, its name and directory, its space, and its Orion experiment.

A sweep that has begun keeps its space, its algorithm and its database. A request that differs is refused, and
the error names the difference.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.orion import hunt_file
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import GROUPS, check_key
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.space import MARK, Space, read_space, with_fidelities
from ppo_hpo.state.files import write_atomically
from ppo_hpo.trial.options import RunOptions

if TYPE_CHECKING:
    from orion.client import ExperimentClient

#: The content of a space's file: group to key to a value, or to a prior that begins with `MARK`.
Document = dict[str, dict[str, Any]]

_MAX_TRIALS = 40  # of a new sweep, if nobody says
# What Orion's algorithms need to work and to be repeatable: docs/reference/orion-algorithms.md.
_SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"seed": 1} for name in ("hyperband", "random", "tpe", "pbt")},
    "asha": {"seed": 1, "num_brackets": 1},
    "evolutiones": {"seed": 1, "repetitions": 1},
}
# What Python raises for a file that is not a pickle, or not a whole one.
_NO_PICKLE = (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError, KeyError)


@dataclass(frozen=True)
class SweepRequest:
    """The arguments of `ppo_hpo.sweep`, which describes them. ``options`` has those that each trial gets."""

    env: str | None
    space: str | None
    algorithm: str | Mapping[str, Any] | None
    max_trials: int | None
    n_workers: int | None
    seeds: int | None
    epochs: str | int | None
    overrides: Mapping[str, Mapping[str, Any]] | None
    warm_start: Any
    executor: Any
    name: str | None
    directory: str | Path | None
    storage: str | Mapping[str, Any] | None
    progress: bool
    options: RunOptions

    def __post_init__(self) -> None:
        for field in ("max_trials", "n_workers", "seeds"):
            number = getattr(self, field)
            if number is not None and (type(number) is not int or number < 1):
                raise UserError(f"`{field}` must be a whole number of at least 1, but got {number!r}.")

    def algorithm_settings(self) -> dict[str, dict[str, Any]] | None:
        """The algorithm's name with the settings that were given."""
        if self.algorithm is None:
            return None
        if isinstance(self.algorithm, str):
            return {self.algorithm: {}}
        if not isinstance(self.algorithm, Mapping) or len(self.algorithm) != 1:
            raise UserError(f"An algorithm is a name or {{name: options}}, but got {self.algorithm!r}.")
        ((name, given),) = self.algorithm.items()
        return {str(name): dict(given or {})}

    def sweep_name(self) -> str:
        """The name of the sweep: the given one, or one made of environment or space and algorithm."""
        name = self.name
        if name is None:
            if self.env is None and self.space is None:
                raise UserError("A sweep needs an environment, a space or a name. Give env='Acrobot-v1'.")
            what = (self.env or Path(str(self.space)).stem).rpartition(":")[2]
            usual = "random" if isinstance(self.epochs, int) else "asha"
            name = f"{what}-{next(iter(self.algorithm_settings() or {usual: {}}))}"
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.").lower()
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise UserError(f"A sweep's name has letters, digits, and - _ . between them, but got {name!r}.")
        return name

    def run_command(self, space: Path) -> list[str]:
        """The command that `orion hunt` runs for each trial."""
        options, trials = self.options, self.options.trials_per_device
        command = ["ppo-hpo", "run", "--config", str(space)]
        if options.device != "auto":
            command += ["--device", options.device]
        if trials is not None:
            command += ["--trials-per-device", str(trials)]
        if options.checkpoint_store is not None:
            command += ["--checkpoint-store", options.checkpoint_store, "--parent", "{trial.parent}"]
        return [*command, "--stop-poor"] if options.stop_poor else command


@dataclass(frozen=True)
class Plan:
    """A request, and what is there of the sweep already."""

    request: SweepRequest
    name: str
    place: Path  # the sweep's directory
    storage: dict[str, Any]  # Orion's configuration of its storage
    stored: dict[str, Any] | None  # Orion's record of the experiment; None for a new sweep

    @classmethod
    def of(cls, request: SweepRequest) -> Plan:
        """Make the sweep's directory, and read what the database has about the sweep."""
        name, wanted = request.sweep_name(), request.algorithm_settings()
        place = Path(request.directory or name).absolute()
        from orion.core.io.database import DatabaseError
        from orion.core.io.experiment_builder import ExperimentBuilder

        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The sweep's directory {place} cannot be made: {error.strerror}.") from None
        storage = storage_of(request.storage, place)
        try:
            builder = ExperimentBuilder(storage)
            hunt_file.settle(builder.storage, place)
            stored = builder.fetch_config_from_db(name) or None
        except NotImplementedError as error:
            raise UserError(f"Orion has no such storage: {str(error).splitlines()[0]}.") from None
        except (OSError, DatabaseError, *_NO_PICKLE) as error:
            why, database = " ".join(str(error).split()).rstrip("."), storage.get("database") or {}
            text = f"{database.get('host') or storage} ({database.get('type')}) cannot be used: {why}."
            raise UserError(f"The database {text}") from None
        plan = cls(request, name, place, storage, stored)
        if stored is not None and wanted is not None:
            plan._refuse_another_algorithm(wanted, stored["algorithm"])
        return plan

    def _refuse_another_algorithm(self, wanted: Mapping[str, Any], stored: Any) -> None:
        ((name, options),) = wanted.items()
        ((other, settings),) = ({stored: {}} if isinstance(stored, str) else stored).items()
        if name.lower() == other.lower():
            changed = [key for key in options if key in settings and settings[key] != options[key]]
            if not changed:
                return
            key = changed[0]
            name, other = f"{name} with {key} = {options[key]}", f"{other} with {key} = {settings[key]}"
        raise UserError(
            f"The sweep {self.name!r} uses {other}, but {name} was asked for. Orion cannot change the "
            f"algorithm of an experiment. Give the new sweep another name."
        )

    @property
    def space_file(self) -> Path:
        """The file that holds the sweep's space."""
        return self.place / "space.yaml"

    def document(self) -> Document:
        """The space that is asked for. A sweep that has begun must have the same one."""
        stored = self._stored_document()
        file = _to_document(read_space(str(self.space_file))) if self.space_file.is_file() else None
        if stored is not None and file is not None:
            _raise_if_different(
                stored, file, f"{self.space_file} was changed after the sweep began",
                "A sweep keeps its space. Undo the change, or copy the file and start a sweep with another "
                "name.",
            )  # fmt: skip
        asked = self._asked_document(stored)
        if stored is not None:
            _raise_if_different(
                stored, asked, f"The sweep {self.name!r} has another space",
                "Give the new sweep another name, or leave out that value.",
            )  # fmt: skip
        elif file is not None:
            _raise_if_different(
                file, asked, f"{self.place} has a sweep of another space",
                "Give the new sweep another directory.",
            )  # fmt: skip
        return asked

    def _asked_document(self, stored: Document | None) -> Document:
        request = self.request
        if request.space is not None or stored is None:
            document = _to_document(read_space(request.space or "default"))
        else:
            document = {group: dict(values) for group, values in stored.items()}
        fixed: Document = {group: dict(values) for group, values in (request.overrides or {}).items()}
        if request.env is not None:
            fixed.setdefault("env", {})["id"] = request.env
        if request.seeds is not None:
            fixed.setdefault("task", {})["seeds"] = request.seeds
        for group, values in fixed.items():
            for key, value in values.items():
                check_key(group, key)
                document.setdefault(group, {})[key] = value
        if request.epochs is None:
            return document
        # Priors may stay among the fixed values: only the epochs and `max_epochs` are touched.
        space = Space(self.name, self.space_file, document, {})
        return _to_document(with_fidelities(space, {"epochs": request.epochs}))

    def _stored_document(self) -> Document | None:
        if self.stored is None:
            return None
        parser = self.stored.get("metadata", {}).get("parser") or {}
        content = parser.get("config_file_data")
        if not isinstance(content, Mapping) or not content or not set(content) <= set(GROUPS):
            raise UserError(
                f"The database has an experiment {self.name!r} already, which neither `sweep` nor `orion "
                f"hunt ... ppo-hpo run --config FILE` made. Choose another name, or resume it as it "
                "was started."
            )
        document: Document = {group: dict(values) for group, values in content.items()}
        for values in document.values():
            for key, value in values.items():
                if isinstance(value, str) and not value.startswith(MARK):
                    values[key] = yamlio.parse(value, key)  # Orion reads 1e-4 as a text.
        return document

    def open(self, document: Document) -> ExperimentClient:
        """Write the sweep's files, and open its experiment, which is made if it is new."""
        from ppo_hpo.orion.workers import usable_cores

        if not any(str(v).startswith(MARK) for values in document.values() for v in values.values()):
            raise UserError("Nothing is searched in this space: every value is fixed. `ppo-hpo run` runs it.")
        new = not self.space_file.exists()
        try:
            about = f"# The space of the sweep {self.name}. Its trials read it from the database.\n"
            _write_if_changed(self.space_file, about + yamlio.dump(document))
            client = self._client(read_space(str(self.space_file)))
        except BaseException:
            if new:
                self.space_file.unlink(missing_ok=True)  # There is no such sweep.
            raise
        # A hunt with this file runs each trial in a process of its own. Threads are enough to wait for them.
        threads = {"executor": "joblib", "executor_configuration": {"backend": "threading"}}
        worker = {"n_workers": self.request.n_workers or usable_cores(), **threads}
        hunt_file.write(self.place, self.storage, worker)
        database = self.storage.get("database") or {}
        if str(database.get("type")).lower() in hunt_file.FILES:
            # Orion keeps the command of a trial in the database, and with it the URL of a checkpoint store.
            hunt_file.keep_private(
                Path(database["host"]), " ".join(self.request.run_command(self.space_file))
            )
        return client

    def _client(self, space: Space) -> ExperimentClient:
        from orion.client.experiment import ExperimentClient
        from orion.core.io import resolve_config
        from orion.core.io.experiment_builder import ExperimentBuilder

        of_hunts = hunt_file.settings(self.place)
        settings: dict[str, Any] = {"max_trials": self.request.max_trials}
        if self.stored is None:
            default: dict[str, dict[str, Any]] = {"asha" if space.max_epochs else "random": {}}
            ((algorithm, options),) = (self.request.algorithm_settings() or default).items()
            metadata = resolve_config.fetch_metadata(user_args=self.request.run_command(self.space_file))
            settings = {
                "space": metadata["priors"],
                "metadata": metadata,
                "algorithm": {algorithm: {**_SETTINGS.get(algorithm.lower(), {}), **options}},
                "max_trials": self.request.max_trials or _MAX_TRIALS,
                "working_dir": str(self.place / "trials"),
            }
        try:
            experiment = ExperimentBuilder(self.storage).build(
                self.name, max_broken=of_hunts.get("experiment.max_broken"), **settings
            )
        except NotImplementedError as error:
            raise UserError(f"Orion has no such algorithm: {str(error).splitlines()[0]}.") from None
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"Orion refuses this algorithm on this space: {' '.join(str(error).split())}"
            ) from error
        return ExperimentClient(experiment, heartbeat=of_hunts.get("worker.heartbeat"))


def _to_document(space: Space) -> Document:
    document: Document = {group: dict(values) for group, values in space.fixed.items()}
    for group, priors in space.priors.items():
        for key, prior in priors.items():
            document.setdefault(group, {})[key] = MARK + prior
    return {group: document[group] for group in GROUPS if group in document}


def _raise_if_different(own: Document, other: Document, rule: str, advice: str) -> None:
    for group in GROUPS:
        ours, theirs = own.get(group, {}), other.get(group, {})
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                difference = f"`{group}.{key}` is {ours.get(key)}, but {theirs.get(key)} was asked for"
                raise UserError(f"{rule}: {difference}. {advice}")


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode())


def storage_of(storage: str | Mapping[str, Any] | None, place: Path) -> dict[str, Any]:
    """Orion's configuration of a storage.

    Without one, the ``orion.yaml`` of the sweep's directory counts, then its ``orion.sqlite``.
    """
    if isinstance(storage, Mapping):
        content = dict(storage)
        return content if "database" in content else {"type": "legacy", "database": content}
    if storage is None and (place / hunt_file.NAME).is_file():
        named = hunt_file.storage_in(place / hunt_file.NAME)
        if isinstance(named, Mapping):
            return dict(named)
    address = str(storage) if storage is not None else str(place / "orion.sqlite")
    scheme, separator, rest = address.partition("://")
    if not separator:
        file = Path(address).absolute()
        database = {"type": _kind(file), "host": str(file)}
    elif scheme in ("sqlite", "sqlitedb", "pickleddb"):  # These are files, although the address is a URL.
        kind = "pickleddb" if scheme == "pickleddb" else "sqlitedb"
        database = {"type": kind, "host": str(Path(rest).absolute())}
    else:
        database = {"type": scheme, "host": address}
    return {"type": "legacy", "database": database}


def _kind(file: Path) -> str:
    """Orion's name for the database in a file, by its content; by its suffix if the file is new."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if start := opened.read(16):
            return "sqlitedb" if start == b"SQLite format 3\0" else "pickleddb"
    return "sqlitedb" if file.suffix == ".sqlite" else "pickleddb"

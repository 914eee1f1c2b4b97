"""What a sweep is: the user's request, its name and directory, its space, and its Orion experiment.

A sweep keeps its space, its algorithm and its database once a trial has trained an epoch. A request that
differs is then refused, and the error names the difference. Before that, the last request counts.
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.orion import hunt_file, hunt_space, known_trials, stored_space
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.settings import Overrides, overridden
from ppo_hpo.spec.space import Space, difference, read_space, space_of, to_document, with_fidelities
from ppo_hpo.state.files import write_atomically
from ppo_hpo.trial.options import RunOptions

if TYPE_CHECKING:
    from orion.client import ExperimentClient

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
    overrides: Overrides | None
    warm_start: Any
    start_from: str | None
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
    """A request, and what is there of the sweep already. Nothing is written before `open`."""

    request: SweepRequest
    name: str
    place: Path  # the sweep's directory
    storage: dict[str, Any]  # Orion's configuration of its storage
    stored: dict[str, Any] | None  # Orion's record of the experiment; None for a new sweep

    @classmethod
    def of(cls, request: SweepRequest) -> Plan:
        """Read what the database has about the sweep."""
        name, wanted = request.sweep_name(), request.algorithm_settings()
        place = Path(request.directory or name).absolute()
        storage = storage_of(request.storage, place)
        hunt_space.install()
        plan = cls(request, name, place, storage, _stored(storage, name, place))
        if plan.stored is not None and wanted is not None:
            plan._refuse_another_algorithm(wanted)
        return plan

    @cached_property
    def begun(self) -> str | None:
        """Why the sweep must stay what it is, in words; None if nothing was trained."""
        if self.stored is None:
            return None
        return stored_space.what_has_begun(_builder(self.storage).storage, self.stored)

    @cached_property
    def before(self) -> Space | None:
        """The space that is stored; None if there is none, or if it is not valid any more."""
        return None if self.stored is None else stored_space.stored_space(self.stored)

    def _refuse_another_algorithm(self, wanted: Mapping[str, Any]) -> None:
        difference = self._another_algorithm(wanted)
        if difference and self.begun:
            raise UserError(
                f"The sweep {self.name!r} uses {difference}. Orion cannot change the algorithm of an "
                f"experiment that has begun ({self.begun}). Give the new sweep another name. "
                f"{self._from_this}"
            )

    def _another_algorithm(self, wanted: Mapping[str, Any]) -> str | None:
        stored = (self.stored or {})["algorithm"]
        ((name, options),) = wanted.items()
        ((other, settings),) = ({stored: {}} if isinstance(stored, str) else stored).items()
        if name.lower() == other.lower():
            changed = [key for key in options if key in settings and settings[key] != options[key]]
            if not changed:
                return None
            key = changed[0]
            name, other = f"{name} with {key} = {options[key]}", f"{other} with {key} = {settings[key]}"
        return f"{other}, but {name} was asked for"

    @property
    def _from_this(self) -> str:
        return f"Add --from {self.name} to give it the trials that lie in its space."

    @property
    def space_file(self) -> Path:
        """The file that holds the sweep's space."""
        return self.place / "space.yaml"

    @cached_property
    def old(self) -> Any:
        """Orion's client of the sweep whose trials this one starts with; None if it starts with none."""
        if self.request.start_from is None:
            return None
        builder = _builder(self.storage) if _is_there(self.storage) else None
        return known_trials.experiment_to_adopt(builder, self.request.start_from, self.name)

    def space(self) -> Space:
        """The space that is asked for. A sweep that has trained must have the same one."""
        file = read_space(str(self.space_file)) if self.space_file.is_file() else None
        asked = self._asked(file)
        if self.stored is None:
            if file is not None and (text := difference(file, asked)):
                raise UserError(
                    f"{self.place} has a sweep of another space: {text}. Give the new sweep another "
                    f"directory."
                )
            return asked
        before = self.before
        edited = before and file and difference(before, file)
        if edited and self.begun:
            raise UserError(
                f"{self.space_file} was changed after the sweep began: {edited}. A sweep keeps its space. "
                f"Undo the change, or copy the file and start a sweep with another name. {self._from_this}"
            )
        if (text := self._changed(asked)) and self.begun:
            raise UserError(
                f"The sweep {self.name!r} has another space: {text}. Give the new sweep another name, or "
                f"leave out that value. {self._from_this}"
            )
        if edited and file and self.request.space is not None and (text := difference(file, asked)):
            raise UserError(
                f"{self.space_file} was changed, and would be overwritten: {text}. Remove the file, or leave "
                f"out the space."
            )
        return asked

    def _changed(self, asked: Space) -> str | None:
        """How the space differs from the stored one; None if there is no stored one, or no difference."""
        if self.stored is None:
            return None
        before = self.before
        return "its stored space is not valid" if before is None else difference(before, asked)

    def _asked(self, file: Space | None) -> Space:
        request = self.request
        if self.stored is not None and stored_space.content_of(self.stored) is None:
            raise UserError(
                f"The database has an experiment {self.name!r} already, which neither `sweep` nor `orion "
                f"hunt ... ppo-hpo run --config FILE` made. Choose another name, or resume it as it "
                "was started."
            )
        base = read_space(request.space) if request.space is not None else file or self.before
        if base is None and self.old is not None:
            base = stored_space.stored_space(self.old.configuration)
        base = base or read_space("default")
        document = overridden(to_document(base), request.overrides)
        if request.env is not None:
            document.setdefault("env", {})["id"] = request.env
        if request.seeds is not None:
            document.setdefault("task", {})["seeds"] = request.seeds
        if request.epochs is not None:
            # Priors may stay among the fixed values: only the epochs and `max_epochs` are touched.
            whole = Space(self.name, base.path, document, {})
            document = to_document(with_fidelities(whole, {"epochs": request.epochs}))
        return space_of(document, base.name, base.path)

    def check(self, space: Space, warm_start: Sequence[TrialConfig]) -> list[dict[str, Any]]:
        """Open the experiment in memory, to see that Orion takes it; the parameters of the warm start."""
        if not any(space.priors.values()):
            raise UserError("Nothing is searched in this space: every value is fixed. `ppo-hpo run` runs it.")
        _ = self.old  # `UserError` if there is no such experiment
        settings = self._settings(space)
        names = {
            f"/{group}/{key.replace('.', '/')}": prior
            for group, priors in space.priors.items()
            for key, prior in priors.items()
        }
        memory = _builder({"type": "legacy", "database": {"type": "ephemeraldb"}})
        experiment = _explained(memory, self.name, space=names, algorithm=settings["algorithm"])
        ((algorithm, _),) = experiment.algorithm.configuration.items()
        return known_trials.points_of(warm_start, experiment.space, algorithm)

    def _settings(self, space: Space) -> dict[str, Any]:
        """What Orion is asked to make of a new experiment, or of one that starts anew."""
        kept = {key: (self.stored or {}).get(key) for key in stored_space.KEPT}
        default: dict[str, dict[str, Any]] = {"asha" if space.max_epochs else "random": {}}
        asked = self.request.algorithm_settings()
        algorithm = kept["algorithm"]
        if algorithm is None or (asked is not None and self._another_algorithm(asked)):
            ((name, options),) = (asked or default).items()
            algorithm = {name: {**_SETTINGS.get(name.lower(), {}), **options}}
        max_trials = self.request.max_trials or kept["max_trials"] or _MAX_TRIALS
        return {"algorithm": algorithm, "max_trials": max_trials, "working_dir": str(self.place / "trials")}

    def open(self, space: Space) -> ExperimentClient:
        """Write the sweep's files, and open its experiment, which is made if it is new."""
        from orion.client.experiment import ExperimentClient

        from ppo_hpo.orion.workers import usable_cores

        try:
            self.place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The sweep's directory {self.place} cannot be made: {error.strerror}.") from None
        new = not self.space_file.exists()
        try:
            about = f"# The space of the sweep {self.name}. Its trials read it from the database.\n"
            _write_if_changed(self.space_file, about + yamlio.dump(to_document(space)))
            heartbeat = hunt_file.settings(self.place).get("worker.heartbeat")
            client = ExperimentClient(self._experiment(space), heartbeat=heartbeat)
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

    def _experiment(self, space: Space) -> Any:
        from orion.core.io import resolve_config

        builder, asked = _builder(self.storage), self.request.algorithm_settings()
        max_broken = hunt_file.settings(self.place).get("experiment.max_broken")
        other_algorithm = self.stored is not None and asked is not None and self._another_algorithm(asked)
        if self.stored is not None and not (other_algorithm or self._changed(space)):
            return _explained(builder, self.name, max_trials=self.request.max_trials, max_broken=max_broken)
        settings = {**self._settings(space), "max_broken": max_broken}
        if self.stored is not None:
            stored_space.discard(builder.storage, self.stored)
        metadata = resolve_config.fetch_metadata(user_args=self.request.run_command(self.space_file))
        return _explained(builder, self.name, space=metadata["priors"], metadata=metadata, **settings)


def _builder(storage: Mapping[str, Any]) -> Any:
    from orion.core.io.experiment_builder import ExperimentBuilder

    return ExperimentBuilder(dict(storage))


def _is_there(storage: Mapping[str, Any]) -> bool:
    """Whether there may be such a database. A file that does not exist would be made by Orion."""
    database = storage.get("database") or {}
    host = database.get("host")
    is_file = str(database.get("type")).lower() in hunt_file.FILES
    return not (is_file and isinstance(host, str) and host) or Path(host).exists()


def _stored(storage: dict[str, Any], name: str, place: Path) -> dict[str, Any] | None:
    """Orion's record of an experiment; None if there is none."""
    if not _is_there(storage):
        return None
    from orion.core.io.database import DatabaseError

    try:
        builder = _builder(storage)
        hunt_file.settle(builder.storage, place)
        return builder.fetch_config_from_db(name) or None
    except NotImplementedError as error:
        raise UserError(f"Orion has no such storage: {str(error).splitlines()[0]}.") from None
    except (OSError, DatabaseError, *_NO_PICKLE) as error:
        why = " ".join(str(error).split()).rstrip(".")
        database = storage.get("database") or {}
        text = f"{database.get('host') or storage} ({database.get('type')}) cannot be used: {why}."
        raise UserError(f"The database {text}") from None


def _explained(builder: Any, name: str, **settings: Any) -> Any:
    """Build an experiment; if Orion refuses it, `UserError` says so."""
    try:
        return builder.build(name, **settings)
    except NotImplementedError as error:
        raise UserError(f"Orion has no such algorithm: {str(error).splitlines()[0]}.") from None
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"Orion refuses this algorithm on this space: {' '.join(str(error).split())}"
        ) from error


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
    with contextlib.suppress(OSError, ImportError):
        if file.stat().st_size:
            return "sqlitedb" if _is_sqlite(file) else "pickleddb"
    return "sqlitedb" if file.suffix == ".sqlite" else "pickleddb"


def _is_sqlite(file: Path) -> bool:
    """Whether a file is an SQLite database, as SQLite sees it.

    This process may use the database. If we opened and closed the file here, the kernel would drop all locks
    that SQLite holds for this process.
    """
    import sqlite3

    uri = f"{file.as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.DatabaseError as error:
        return error.sqlite_errorcode != sqlite3.SQLITE_NOTADB
    return True

"""A whole sweep in one call: build the experiment or go on with it, run its trials, say what was found.

A sweep is an experiment of Orion's as `orion hunt ... ppo-hpo run --config space.yaml` makes it, so that
either goes on with what the other began. Its directory, named after it, has all there is:

| file | what it is |
|---|---|
| `space.yaml` | the space, with the environment and what else was fixed; what each trial is told |
| `orion.yaml` | where the database is, and how `orion hunt -c` goes on |
| `orion.sqlite` | Orion's database, where no other was named |
| `trials/` | the trials' directories |

Neither Orion nor torch is imported before a sweep runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo import failure, gpus, yamlio
from ppo_hpo.client import Objective, prepare_trial
from ppo_hpo.config import GROUPS, TrialConfig, check_key
from ppo_hpo.cost import Cost, cost_of, costs_of
from ppo_hpo.errors import UserError
from ppo_hpo.experiment import params_of, statistics_of
from ppo_hpo.space import MARK, Space, read_space, with_fidelities

if TYPE_CHECKING:
    import pandas
    from orion.client import ExperimentClient

    from ppo_hpo.executors import Stop

Document = dict[str, dict[str, Any]]

#: Trials of a new sweep for which nobody said how many.
MAX_TRIALS = 40
# What Orion's algorithms need to be told so that they work, and that a sweep can be repeated: docs/orion.md.
_SETTINGS: dict[str, dict[str, Any]] = {
    "asha": {"seed": 1, "num_brackets": 1},
    "hyperband": {"seed": 1},
    "random": {"seed": 1},
    "tpe": {"seed": 1},
    "evolutiones": {"seed": 1, "repetitions": 1},
    "pbt": {"seed": 1},
}
# These begin trials at the lowest fidelity.
_MULTI_FIDELITY = ("asha", "hyperband", "evolutiones", "pbt", "pb2")


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C, or SIGTERM: the trials under way are marked interrupted, and the same call goes on.

    Attributes:
        signum: the signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has found so far; `print` shows it.

    Attributes:
        name: of the experiment.
        directory: where everything of the sweep lies.
        best: Orion's record of the best trial; None where none is completed.
        trials: a pandas frame, one row for each trial: id, status, objective, parent, working_dir, then
            hyperparameters and statistics, each a column; last what it cost, failed processes included:
            ``cost_env_steps``, ``cost_eval_steps``, ``cost_wall_seconds`` and ``cost_cpu_seconds``.
        cost: of all trials, whatever became of them.
        commands: what goes on from here, in a shell.
        client: Orion's.
    """

    name: str
    directory: Path
    best: Any
    trials: pandas.DataFrame
    cost: Cost
    commands: Sequence[str]
    client: ExperimentClient

    @property
    def best_params(self) -> dict[str, Any]:
        """What was searched, of the best trial, by dotted name; empty where none is completed."""
        return {} if self.best is None else params_of(self.best)

    @property
    def best_config(self) -> Path | None:
        """The best trial's configuration, for `ppo-hpo run --config`."""
        return None if self.best is None else Path(self.best.working_dir) / "config.yaml"

    def __str__(self) -> str:
        from ppo_hpo import report

        try:
            lines = [report.to_text(report.summarise(self.client, self.client.fetch_trials()))]
        except UserError as error:
            lines = [str(error), str(self.cost)]
        return "\n".join(
            [*lines, "go on       the same call, or", *(f"            {c}" for c in self.commands)]
        )


def sweep(
    env: str | None = None,
    space: str | None = None,
    algorithm: str | Mapping[str, Any] | None = None,
    *,
    max_trials: int | None = None,
    n_workers: int | None = None,
    seeds: int | None = None,
    storage: str | Mapping[str, Any] | None = None,
    executor: Any = None,
    device: str | Sequence[int | str] = "auto",
    trials_per_device: int | None = None,
    warm_start: Any = None,
    name: str | None = None,
    epochs: str | int | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    directory: str | Path | None = None,
    store: str | None = None,
    stop_poor: bool = False,
    progress: bool = True,
) -> SweepResult:
    """Tune PPO on an environment, or go on with it.

        result = ppo_hpo.sweep("Acrobot-v1", space="classic-control", max_trials=20, n_workers=2)
        print(result)

    Calling it again goes on: with more ``max_trials``, after an interruption, beside others that work on the
    same sweep. What is left out (None) is then as it was; a new sweep has the defaults given here.

    Args:
        env: the environment's id; None is that of the space.
        space: a shipped space's name, or the path of a file; ``default``.
        algorithm: Orion's name of it, or ``{name: options}``; ``asha``, or ``random`` where the space has no
            fidelity.
        max_trials: to be completed in all, over all calls; 40.
        n_workers: trials at a time; 1, or as many as a cluster has room for.
        seeds: train each trial on so many seeds: ``task.seeds``.
        storage: a file for Orion's database (``NAME.sqlite``, else a PickledDB; one that is there is taken
            for what it is), a URL, or Orion's own configuration of one; ``orion.sqlite`` in the sweep's
            directory.
        executor: what runs the trials: None for worker processes of ours, ``single``, ``joblib``,
            ``poolexecutor``, ``dask``, ``ray``, a cluster's address (``tcp://host:8786``,
            ``ray://host:10001``), ``{name: options}``, or an executor of Orion's.
        device: ``cpu``; ``cuda``, the GPUs that can be seen are shared out among the trials; ``cuda:N``;
            ``cuda:N,M`` or a list, these are; ``auto``, as ``cuda`` for images, where there is a GPU, and
            else the CPU.
        trials_per_device: that a GPU trains at a time, of all sweeps and hunts of the user's on that machine;
            None: as many as come.
        warm_start: configurations to be tried first, in a new sweep: a preset's name or file, a nested
            mapping, or a list of these. What they leave out is PPO's default; only what is searched counts.
        name: of the sweep and its directory; from environment and algorithm.
        epochs: replaces the space's fidelity, as in ``fidelity(1, 16, base=4)``; a number fixes it.
        overrides: group to key to value: fixes what the space searches or fixes otherwise.
        directory: where everything goes; the sweep's name, in the current directory.
        store: URL of a second place for checkpoints, for workers that share no file system.
        stop_poor: stop trials between two rungs, if they are poor among the others (`ppo_hpo.stopping`).
        progress: print to standard error how far it is.

    Raises:
        UserError: bad input, another sweep of the same name, or trials that fail by what others would too.
        SweepInterrupted: a KeyboardInterrupt: it was told to stop.
    """
    wanted = None if algorithm is None else _algorithm(algorithm)
    for what, number in (("max_trials", max_trials), ("n_workers", n_workers), ("seeds", seeds)):
        if number is not None and (type(number) is not int or number < 1):
            raise UserError(f"`{what}` must be a whole number of at least 1, but got {number!r}.")
    device = gpus.device_name(device)
    gpus.check_limit(trials_per_device)
    name = _name(name, env, space, wanted)
    place = Path(directory or name).absolute()
    from ppo_hpo.executors import Stop

    with _quiet(), Stop() as stop:
        with _script_on_path():
            plan = _Plan.of(name, place, storage, wanted)
            document = plan.document(env, space, seeds, epochs, overrides)
            if stop_poor:
                from ppo_hpo import stopping

                seeds = document.get("task", {}).get("seeds", 1)
                stopping.refuse_what_does_not_fit(seeds=seeds, store=store)
            options = _options(device, trials_per_device, store, stop_poor)
            client, where = plan.build(document, wanted, max_trials, options)
            _write_files(where, plan.storage, n_workers)
        run_space = read_space(str(where / "space.yaml"))
        if warm_start is not None and not client.fetch_trials():
            _insert(client, run_space, _configurations(warm_start))
        function = Objective(
            run_space, device=device, console=False, store=store, log_stops=False,
            trials_per_device=trials_per_device, stop_poor=stop_poor,
        )  # fmt: skip
        _run(client, function, executor, n_workers, progress, where, stop)
        return _result(client, where)


# ------------------------------------------------------------------------ the experiment


def _algorithm(algorithm: str | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
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


def _options(device: str, trials_per_device: int | None, store: str | None, stop_poor: bool) -> list[str]:
    """Of the command that each trial of an `orion hunt` runs."""
    return [
        *([] if device == "auto" else ["--device", device]),
        *([] if trials_per_device is None else ["--trials-per-device", str(trials_per_device)]),
        *([] if store is None else ["--store", store, "--parent", "{trial.parent}"]),
        *(["--stop-poor"] if stop_poor else []),
    ]


def _name(name: str | None, env: str | None, space: str | None, algorithm: Mapping[str, Any] | None) -> str:
    if name is None:
        if env is None and space is None:
            raise UserError("A sweep needs an environment, a space or a name. Give env='Acrobot-v1', say.")
        what = (env or Path(str(space)).stem).rpartition(":")[2]
        name = f"{what}-{next(iter(algorithm or {'asha': 0}))}"
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.").lower()
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(f"A sweep's name has letters, digits, and - _ . between them, but got {name!r}.")
    return name


def _storage(storage: str | Mapping[str, Any] | None, place: Path) -> dict[str, Any]:
    """Orion's configuration of a storage."""
    if isinstance(storage, Mapping):
        content = dict(storage)
        return content if "database" in content else {"type": "legacy", "database": content}
    if storage is None and (place / "orion.yaml").is_file():
        content = yamlio.load(place / "orion.yaml")
        if isinstance(content, Mapping) and isinstance(content.get("storage"), Mapping):
            return dict(content["storage"])
    address = str(storage) if storage is not None else str(place / "orion.sqlite")
    scheme, separator, _ = address.partition("://")
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


@dataclass(frozen=True)
class _Plan:
    """A sweep's name and place, and what the database knows of it."""

    name: str
    place: Path
    storage: dict[str, Any]
    stored: dict[str, Any] | None

    @classmethod
    def of(cls, name: str, place: Path, storage: Any, algorithm: Mapping[str, Any] | None) -> _Plan:
        from orion.core.io.database import DatabaseError
        from orion.core.io.experiment_builder import ExperimentBuilder

        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The sweep's directory {place} cannot be made: {error.strerror}.") from None
        configuration = _storage(storage, place)
        try:
            stored = ExperimentBuilder(configuration).fetch_config_from_db(name) or None
        except NotImplementedError as error:
            raise UserError(f"Orion has no such storage: {str(error).splitlines()[0]}.") from None
        except (OSError, DatabaseError) as error:
            raise UserError(
                f"The database of {configuration} cannot be used: {' '.join(str(error).split())}."
            ) from None
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
                algorithm = _algorithm("asha" if space.max_epochs else "random")
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
    from ppo_hpo.checkpoint import write_atomically

    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text.encode())


def _write_files(place: Path, storage: Mapping[str, Any], n_workers: int | None) -> None:
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


@contextlib.contextmanager
def _script_on_path() -> Iterator[None]:
    """Orion looks for `ppo-hpo` when it opens the experiment, and Python's `bin` may not be on the path."""
    before = os.environ.get("PATH", "")
    beside = Path(sys.executable).parent
    if shutil.which("ppo-hpo") is None and (beside / "ppo-hpo").is_file():
        os.environ["PATH"] = f"{beside}{os.pathsep}{before}"
    elif shutil.which("ppo-hpo") is None:
        raise UserError("The command ppo-hpo is not on the PATH. Install the package: pip install ppo-hpo.")
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orion warns of pkg_resources and of git, and logs each failure, which is told here as well.

    Who has set up logging gets all of it.
    """
    import warnings

    # Without any handler the first warning would set one up, for the whole process.
    root, nothing = logging.getLogger(), logging.NullHandler()
    root.addHandler(nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(nothing)


# ---------------------------------------------------------------------------- warm start


def _configurations(warm_start: Any) -> list[TrialConfig]:
    if isinstance(warm_start, str | Mapping):
        warm_start = [warm_start]
    found = []
    for one in warm_start:
        if isinstance(one, str):
            space = read_space(one)
            if any(space.priors.values()):
                raise UserError(
                    f"`warm_start` takes presets and configurations, but {one!r} has priors: it is a space."
                )
            one = space.fixed
        found.append(TrialConfig.from_mapping(one))
    return found


def _insert(client: ExperimentClient, space: Space, configurations: Sequence[TrialConfig]) -> None:
    """Register trials of given hyperparameters; workers take them first."""
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
            raise UserError(f"`warm_start` must lie in the space, but {'; '.join(outside)}.")
        trial = dict_to_trial(params, client.space)
        with contextlib.suppress(DuplicateKeyError):
            client._experiment.register_trial(trial, status="new")


def _value(config: TrialConfig, group: str, key: str, dimension: Any) -> Any:
    """A value in the spelling and the form of a dimension."""
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
        # Choices may stand in words: 'none', '0.2'.
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


# --------------------------------------------------------------------------------- run


def _run(
    client: ExperimentClient,
    function: Objective,
    executor: Any,
    n_workers: int | None,
    progress: bool,
    place: Path,
    stop: Stop,
) -> None:
    """Run trials until as many as were asked for are completed."""
    from orion.core.utils.exceptions import BrokenExperiment, LazyWorkers

    from ppo_hpo import retry
    from ppo_hpo.executors import Watched, make
    from ppo_hpo.progress import Progress, default_stream

    retry.mend(client)
    if client.is_done:
        return
    threads = function.space.fixed.get("task", {}).get("threads", 1)
    completed = client.fetch_trials_by_status("completed")
    returns = [-trial.objective.value for trial in completed if trial.objective]
    shown = Progress(
        client.max_trials, len(completed), max(returns, default=None),
        function.space.max_epochs or function.space.fixed.get("task", {}).get("epochs", 0),
        default_stream() if progress else None,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.callback(shown.close)
        made = make(
            executor, n_workers, retries=failure.RETRIES, threads=threads, device=function.device,
            trials_per_device=function.trials_per_device,
        )  # fmt: skip
        watched = Watched(made, stop, shown)
        try:
            with client.tmp_executor(watched):
                while not client.is_done and not stop.signum:
                    # Not more trials than are missing: Orion would overshoot by the number of workers.
                    missing = client.max_trials - len(client.fetch_trials_by_status("completed"))
                    try:
                        client.workon(
                            function, n_workers=watched.n_workers, max_trials_per_worker=max(1, missing),
                            trial_arg="trial", on_error=_on_error, prepare_trial=prepare_trial,
                        )  # fmt: skip
                    except LazyWorkers:
                        _refuse_to_wait_in_vain(client, place)
            if stop.signum and not client.is_done:
                raise KeyboardInterrupt
        except BrokenExperiment:
            raise UserError(
                f"Too many trials failed ({len(client.fetch_trials_by_status('broken'))} are broken). "
                f"{'. '.join(shown.errors[-1:])}. Mend it, give `ppo-hpo retry {client.name} -c "
                f"{_orion_yaml(place)}`, and the same call goes on."
            ) from None
        except (KeyboardInterrupt, Exception) as error:
            if stop.signum:
                raise _interrupted(client, stop.signum) from None
            if isinstance(error, KeyboardInterrupt) and watched.reason is not None:
                raise UserError(watched.reason) from None
            raise
        except BaseException:
            if stop.signum:
                raise _interrupted(client, stop.signum) from None
            raise
        finally:
            _let_go(client)


def _on_error(*_: Any) -> bool:
    return False  # it is told by `Progress`


def _interrupted(client: ExperimentClient, signum: int) -> SweepInterrupted:
    import signal

    _let_go(client)
    waiting = len(client.fetch_trials_by_status("interrupted"))
    trials, them = (f"{waiting} trials", "them") if waiting != 1 else ("1 trial", "it")
    return SweepInterrupted(
        f"stopped by {signal.Signals(signum).name}; the sweep {client.name!r} has {trials} interrupted, and "
        f"the same command goes on{f' with {them}' if waiting else ''}",
        signum,
    )


def _let_go(client: ExperimentClient) -> None:
    """Release what is reserved still: its heartbeat would keep this process alive for ever."""
    for pacemaker in list(client._pacemakers.values()):
        with contextlib.suppress(Exception):
            client.release(pacemaker.trial, status="interrupted")
        pacemaker.stopped.set()


def _refuse_to_wait_in_vain(client: ExperimentClient, place: Path) -> None:
    from ppo_hpo import retry

    retry.mend(client)
    if any(client.fetch_trials_by_status(status) for status in ("reserved", "interrupted", "new")):
        return  # somebody else's, and the algorithm waits for it; or put back just now
    broken = len(client.fetch_trials_by_status("broken"))
    raise UserError(
        f"The algorithm has no trial to propose, and none is running: {client.name!r} is exhausted"
        + (f", or waits for its {broken} broken trials: ppo-hpo retry {client.name} -c {_orion_yaml(place)} "
           f"puts them back." if broken else ". Its space may have no other configuration.")
    )  # fmt: skip


# ------------------------------------------------------------------------------- result


def _result(client: ExperimentClient, place: Path) -> SweepResult:
    import pandas

    trials = client.fetch_trials()
    completed = [trial for trial in trials if trial.status == "completed" and statistics_of(trial)]
    best = min(
        completed, key=lambda trial: (trial.objective.value, -statistics_of(trial)["epochs"]), default=None
    )
    rows = [
        {
            "id": trial.id, "status": trial.status, "parent": trial.parent,
            "objective": trial.objective.value if trial.objective else None,
            **params_of(trial), **statistics_of(trial), "working_dir": trial.working_dir,
            "cost_env_steps": cost.env_steps, "cost_eval_steps": cost.eval_steps,
            "cost_wall_seconds": cost.wall_seconds, "cost_cpu_seconds": cost.cpu_seconds,
        }
        for trial, cost in zip(trials, costs_of(trials), strict=True)
    ]  # fmt: skip
    return SweepResult(
        name=client.name,
        directory=place,
        best=best,
        trials=pandas.DataFrame(rows, columns=None if rows else ["id", "status", "parent", "objective"]),
        cost=cost_of(trials),
        commands=_commands(client.name, place),
        client=client,
    )


def _orion_yaml(place: Path) -> Path:
    """As it is typed from here."""
    file = place / "orion.yaml"
    with contextlib.suppress(ValueError):
        return file.relative_to(Path.cwd())
    return file


def _commands(name: str, place: Path) -> tuple[str, ...]:
    prefix = ""
    if shutil.which("ppo-hpo") is None:
        prefix = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH "
    file = _orion_yaml(place)
    at = f"-n {shlex.quote(name)} -c {shlex.quote(str(file))}"
    return (
        f"{prefix}orion hunt {at}",
        f"{prefix}ppo-hpo report {shlex.quote(name)} -c {shlex.quote(str(file))} --html report.html",
    )

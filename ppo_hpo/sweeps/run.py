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
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.inspect.cost import Cost, cost_of, costs_of
from ppo_hpo.orion.experiment import completed_trials, params_of, ranking_key, statistics_of
from ppo_hpo.orion.objective import Objective, prepare_trial
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.space import read_space
from ppo_hpo.sweeps.initial_trials import configurations_of, insert
from ppo_hpo.sweeps.plan import Plan, algorithm_of, name_of, options_of, write_files
from ppo_hpo.trial.gpus import device_name
from ppo_hpo.trial.options import RETRIES, RunOptions

if TYPE_CHECKING:
    import pandas
    from orion.client import ExperimentClient

    from ppo_hpo.sweeps.executors import Stop


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
        from ppo_hpo.inspect import report

        try:
            lines = [report.to_text(report.summarise(self.client, self.client.fetch_trials()))]
        except UserError as error:
            lines = [str(error), str(self.cost)]
        call, commands = "the same call", list(self.commands)
        if self.client.is_done:  # they would do nothing
            call += " with more max_trials"
            more = {"orion hunt": " --exp-max-trials N", "ppo-hpo sweep": " --max-trials N"}
            commands = [
                command + "".join(option for name, option in more.items() if f"{name} -" in command)
                for command in commands
            ]
        return "\n".join([*lines, f"go on       {call}, or", *(f"            {c}" for c in commands)])


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
        stop_poor: stop trials between two rungs, if they are poor among the others (`trial.median_stop`).
        progress: print to standard error how far it is.

    Raises:
        UserError: bad input, another sweep of the same name, or trials that fail by what others would too.
        SweepInterrupted: a KeyboardInterrupt: it was told to stop.
    """
    wanted = None if algorithm is None else algorithm_of(algorithm)
    for what, number in (("max_trials", max_trials), ("n_workers", n_workers), ("seeds", seeds)):
        if number is not None and (type(number) is not int or number < 1):
            raise UserError(f"`{what}` must be a whole number of at least 1, but got {number!r}.")
    options = RunOptions(device_name(device), trials_per_device, store, retries=RETRIES, stop_poor=stop_poor)
    name = name_of(name, env, space, wanted)
    place = Path(directory or name).absolute()
    from ppo_hpo.sweeps.executors import Stop

    with _quiet(), Stop() as stop:
        with _script_on_path():
            plan = Plan.of(name, place, storage, wanted)
            document = plan.document(env, space, seeds, epochs, overrides)
            if stop_poor:
                from ppo_hpo.trial import median_stop

                seeds = document.get("task", {}).get("seeds", 1)
                median_stop.refuse_what_does_not_fit(seeds=seeds, store=store)
            client, where = plan.build(document, wanted, max_trials, options_of(options))
            write_files(where, plan.storage, n_workers)
        run_space = read_space(str(where / "space.yaml"))
        if warm_start is not None and not client.fetch_trials():
            insert(client, run_space, configurations_of(warm_start))
        function = Objective(run_space, options=options, console=False, log_stops=False)
        _run(client, function, executor, n_workers, progress, where, stop)
        return _result(client, where)


# ------------------------------------------------------------------------ around a run


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

    from ppo_hpo.inspect import retry
    from ppo_hpo.sweeps.executors import Watched, make
    from ppo_hpo.sweeps.progress import Progress, default_stream

    retry.repair(client)
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
            executor, n_workers, retries=RETRIES, threads=threads, device=function.options.device,
            trials_per_device=function.options.trials_per_device,
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
    from ppo_hpo.inspect import retry

    retry.repair(client)
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
    best = min(completed_trials(trials), key=ranking_key, default=None)
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
    elsewhere = "" if file.parent == Path(name) else f" --dir {shlex.quote(str(file.parent))}"
    return (
        f"{prefix}orion hunt {at}",
        f"{prefix}ppo-hpo sweep --name {shlex.quote(name)}{elsewhere}",
        f"{prefix}ppo-hpo report {shlex.quote(name)} -c {shlex.quote(str(file))} --html report.html",
    )

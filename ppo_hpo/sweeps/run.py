"""`ppo_hpo.sweep`: starts or resumes a sweep.

A sweep is an Orion experiment, made as `orion hunt ... ppo-hpo run --config space.yaml` makes it, so that
either one resumes what the other began. docs/reference/sweep.md lists the files of its directory. Neither
Orion nor torch is imported before a sweep runs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.inspect import retry
from ppo_hpo.orion import algorithm_lock, hunt_file, known_trials
from ppo_hpo.orion.experiment import configuration_of
from ppo_hpo.orion.objective import Objective, prepare_trial
from ppo_hpo.orion.quiet import quiet
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError, named_as
from ppo_hpo.spec.settings import Overrides
from ppo_hpo.spec.space import Space, read_space
from ppo_hpo.sweeps.executors import StopSignal, WatchedExecutor, make
from ppo_hpo.sweeps.plan import Plan, SweepRequest
from ppo_hpo.sweeps.progress import SweepProgress, speed_of
from ppo_hpo.sweeps.registered import with_registration
from ppo_hpo.sweeps.result import SweepResult, orion_yaml, result_of
from ppo_hpo.trial.gpu_detection import device_name
from ppo_hpo.trial.options import RETRIES, RunOptions

if TYPE_CHECKING:
    from orion.client import ExperimentClient


class SweepInterrupted(KeyboardInterrupt):
    """The signal ``signum`` stopped a sweep: SIGINT (Ctrl-C) or SIGTERM. The same call resumes its trials."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def sweep(
    env: str | None = None, space: str | None = None, algorithm: str | Mapping[str, Any] | None = None, *,
    max_trials: int | None = None, n_workers: int | None = None, seeds: int | None = None,
    epochs: str | int | None = None, overrides: Overrides | None = None, warm_start: Any = None,
    start_from: str | None = None, executor: Any = None, device: str | Sequence[int | str] = "auto",
    trials_per_device: int | None = None, stop_poor: bool = False, name: str | None = None,
    directory: str | Path | None = None, storage: str | Mapping[str, Any] | None = None,
    checkpoint_store: str | None = None, progress: bool = True,
) -> SweepResult:  # fmt: skip
    """Tune PPO on an environment, or resume a sweep.

        result = ppo_hpo.sweep("Acrobot-v1", space="classic-control", max_trials=20)
        print(result)

    The same call resumes the sweep: with more ``max_trials``, after an interruption, or beside other
    processes that work on it. An argument that is None then keeps its value; a new sweep takes the default
    below.

    Args:
        env: id of the environment. Default: the space's.
        space: name of a shipped search space, or path of a YAML file. Default: ``default``.
        algorithm: name of an Orion algorithm, or ``{name: options}``. Default: ``asha``, or ``random`` for a
            space without a fidelity.
        max_trials: how many trials to complete, over all calls. Default: 40.
        n_workers: how many trials run at a time. Default: the usable CPU cores, or all workers of a cluster.
        seeds: how many seeds each trial trains. Default: the space's ``task.seeds``, or 1.
        epochs: epochs of every trial (``--epochs``), or a range like ``fidelity(1, 16, base=4)``
            (``--fidelity``). Default: the space's.
        overrides: values to fix, like ``{"ppo": {"n_epochs": 10}}`` or ``{"ppo.n_epochs": 10}``. An argument
            of the environment is ``env.kwargs.NAME``.
        warm_start: presets (names, files or nested mappings) to try first in a new sweep. Values that they
            leave out are PPO's defaults. Values that the space does not search are ignored.
        start_from: name or directory of an earlier sweep or experiment (``--from``). Its completed trials
            that lie in the space are added, and count. Without ``space``, its space is taken.
        executor: what runs the trials; see `ppo_hpo.sweeps.executors`. Default: worker processes.
        device: ``cpu``; ``cuda``, which divides all visible GPUs among the trials; ``cuda:N,M`` or a list of
            GPUs; or ``auto``, which means ``cuda`` for images if there is a GPU, else ``cpu``.
        trials_per_device: how many trials one GPU trains at a time, counting all sweeps and hunts of the user
            on that machine. None means unlimited.
        stop_poor: whether to stop poor trials between two rungs (`ppo_hpo.trial.median_stop`).
        name: name of the sweep. Default: environment and algorithm.
        directory: directory of the sweep's files. Default: the name, in the current directory.
        storage: Orion's database: a file, a URL or Orion's own configuration. A new file is SQLite if it ends
            in ``.sqlite``, else a PickledDB. Default: ``orion.sqlite`` in the directory.
        checkpoint_store: URL of a second place for checkpoints, for workers that share no file system.
        progress: whether to print progress to standard error.

    Raises:
        UserError: an argument is wrong, the name has another sweep, or trials fail as all others would.
        SweepInterrupted: a signal came. This is a KeyboardInterrupt.
    """
    options = RunOptions(
        device_name(device), trials_per_device, checkpoint_store, retries=RETRIES, stop_poor=stop_poor
    )
    return _sweep(SweepRequest(
        env, space, algorithm, max_trials, n_workers, seeds, epochs, overrides, warm_start, start_from,
        executor, name, directory, storage, progress, options,
    ))  # fmt: skip


def _sweep(request: SweepRequest) -> SweepResult:
    names = {"--checkpoint-store": "checkpoint_store", "--stop-poor": "stop_poor"}
    with named_as(names), quiet(), StopSignal().in_charge() as stop:
        with _script_on_path():
            plan = Plan.of(request)
            space = plan.space()
            _check_stopping(request, space)
            points = plan.check(space, _configurations_of(request.warm_start))
            # Nothing is written before everything that was asked for is known to work.
            threads = space.fixed.get("task", {}).get("threads", 1)
            n_workers = request.n_workers
            if n_workers is None and request.executor is None:
                n_workers = hunt_file.settings(plan.place).get("worker.n_workers")
            executor = make(request.executor, n_workers, request.options, threads=threads)
            try:
                client = plan.open(space)
            except BaseException:
                _close(executor, request)
                raise
        if points and not client.fetch_trials():
            known_trials.insert(client, points)
        if plan.old is not None:
            adopted = known_trials.adopt(client._experiment, space, plan.old)
            if request.progress:
                print(adopted, file=sys.stderr)
        function = Objective(space, options=request.options, console=False, log_stops=False)
        _run(client, function, executor, request, plan.place, stop)
        return result_of(client, plan.place)


def _check_stopping(request: SweepRequest, space: Space) -> None:
    if request.options.stop_poor:
        from ppo_hpo.trial import median_stop

        seeds = space.fixed.get("task", {}).get("seeds", 1)
        median_stop.refuse_what_does_not_fit(seeds=seeds, store=request.options.checkpoint_store)


def _close(executor: Any, request: SweepRequest) -> None:
    """Close an executor that ran nothing, unless the caller made it."""
    if executor is not request.executor:
        executor.close()


def _configurations_of(warm_start: Any) -> list[TrialConfig]:
    """Read what `sweep` should try first: a preset's name or file, a nested mapping, or a list of these."""
    if isinstance(warm_start, str | Mapping):
        warm_start = [warm_start]
    found = []
    for one in warm_start or ():
        if isinstance(one, str):
            space = read_space(one)
            if any(space.priors.values()):
                raise UserError(
                    f"A warm start takes presets and configurations, but {one!r} is a search space."
                )
            one = space.fixed
        found.append(TrialConfig.from_mapping(one))
    return found


@contextlib.contextmanager
def _script_on_path() -> Iterator[None]:
    """Let Orion find `ppo-hpo` when it opens the experiment, even if Python's `bin` is not on the path."""
    before = os.environ.get("PATH", "")
    beside = Path(sys.executable).parent
    if shutil.which("ppo-hpo") is None:
        if not (beside / "ppo-hpo").is_file():
            raise UserError(
                "The command ppo-hpo is not on the PATH. Install the package: pip install ppo-hpo"
            )
        os.environ["PATH"] = f"{beside}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _run(
    client: ExperimentClient, function: Objective, inner: Any, request: SweepRequest, place: Path,
    stop: StopSignal,
) -> None:  # fmt: skip
    """Run trials until as many as were asked for are completed."""
    # Standard output is for the final summary.
    stream = sys.stderr if request.progress else None
    waiting = retry.Waiting(stream, lambda: _raise_if_stopped(client, stop))
    retry.repair(client, waiting)
    if client.is_done:
        _close(inner, request)
        return
    task = function.space.fixed.get("task", {})
    completed = client.fetch_trials_by_status("completed")
    best = max((-trial.objective.value for trial in completed if trial.objective), default=None)
    epochs = function.space.max_epochs or task.get("epochs", 0)
    progress = SweepProgress(client.max_trials, len(completed), best, epochs, stream)
    try:
        progress.speed_before = inner.n_workers * speed_of(completed)
        executor = WatchedExecutor(inner, stop, progress)
        with _explained_errors(client, executor, place):
            with client.tmp_executor(executor):
                _work(client, function, executor, place, waiting)
            if stop.signum and not client.is_done:
                raise KeyboardInterrupt
    finally:
        _release_reserved(client)
        progress.close()


def _work(
    client: ExperimentClient, function: Objective, executor: WatchedExecutor, place: Path,
    waiting: retry.Waiting,
) -> None:  # fmt: skip
    from orion.core.utils.exceptions import LazyWorkers

    of_hunts = hunt_file.settings(place)
    while not client.is_done and not executor.stop.signum:
        # Only as many trials as are missing: Orion would exceed them by the number of workers.
        missing = max(1, client.max_trials - len(client.fetch_trials_by_status("completed")))
        try:
            client.workon(
                with_registration(function),
                n_workers=min(executor.n_workers, missing), max_trials_per_worker=missing,
                trial_arg="trial", prepare_trial=prepare_trial,
                max_broken=of_hunts.get("worker.max_broken"),
                on_error=lambda *_: False,  # `SweepProgress` reports errors.
            )  # fmt: skip
        except LazyWorkers:
            _raise_if_exhausted(client, place, waiting)


@contextlib.contextmanager
def _explained_errors(client: ExperimentClient, executor: WatchedExecutor, place: Path) -> Iterator[None]:
    """Turn what ends a sweep early into an error that says why and what to do."""
    from orion.core.utils.exceptions import BrokenExperiment

    try:
        yield
    except BrokenExperiment:
        broken = len(client.fetch_trials_by_status("broken"))
        raise UserError(
            f"Too many trials failed ({broken} are broken). {'. '.join(executor.progress.errors[-1:])}. Fix "
            f"the cause, requeue them with `ppo-hpo retry {client.name} -c {orion_yaml(place)}`, then rerun."
        ) from None
    except BaseException as error:
        if executor.stop.signum:
            raise _interrupted(client, executor.stop.signum) from None
        if isinstance(error, KeyboardInterrupt) and executor.reason is not None:
            raise UserError(executor.reason) from None
        raise


def _interrupted(client: ExperimentClient, signum: int) -> SweepInterrupted:
    _release_reserved(client)
    waiting = len(client.fetch_trials_by_status("interrupted"))
    what, them = (f"{waiting} trials of the sweep {client.name!r} were", "them")
    if waiting < 2:
        what, them = f"{'1 trial of the' if waiting else 'the'} sweep {client.name!r} was", "it"
    text = f"{what} interrupted by {signal.Signals(signum).name}. Rerun the command to resume {them}"
    return SweepInterrupted(text, signum)


def _release_reserved(client: ExperimentClient) -> None:
    """Release trials that are still reserved. Their heartbeats would keep this process alive."""
    for pacemaker in list(client._pacemakers.values()):
        with contextlib.suppress(Exception):
            client.release(pacemaker.trial, status="interrupted")
        pacemaker.stopped.set()


def _raise_if_stopped(client: ExperimentClient, stop: StopSignal) -> None:
    if stop.signum:
        raise _interrupted(client, stop.signum)


def _raise_if_exhausted(client: ExperimentClient, place: Path, waiting: retry.Waiting) -> None:
    """Refuse to wait for trials that will never come."""
    if retry.repair(client, waiting):
        return  # The algorithm may go on with what was requeued, released or told.
    trials = client.fetch_trials()
    if any(trial.status in ("reserved", "interrupted", "new") for trial in trials):
        return  # Another process trains it.
    held = algorithm_lock.read(client.storage._db, client.id)
    if held is not None and (held.holder_runs or held.seconds < retry.PATIENCE):
        return
    ((algorithm, _),) = client.algorithm.configuration.items()
    broken = sum(trial.status == "broken" for trial in trials)
    if held is not None:
        reason = f"The algorithm has been {held}. {retry.what_to_do(client, held)}"
    elif len({configuration_of(trial) for trial in trials}) >= client.space.cardinality:
        reason = "All configurations of its space were tried."
    elif broken:
        reason = (
            f"It may wait for its {broken} broken trials: requeue them with `ppo-hpo retry {client.name} -c "
            f"{orion_yaml(place)}`."
        )
    else:
        reason = f"{algorithm} ends here. For further trials, start a sweep with another name and algorithm."
    raise UserError(
        f"The algorithm of {client.name!r} has no trial to propose, and none is running. {reason}"
    )

"""`ppo_hpo.sweep`: starts or resumes a sweep, runs its trials, and returns what was found.

A sweep is an Orion experiment, made as `orion hunt ... ppo-hpo run --config space.yaml` makes it, so that
either one resumes what the other began. Its directory holds:

| file | what it is |
|---|---|
| `space.yaml` | the search space, with the environment and all fixed values |
| `orion.yaml` | the database and the workers, for `orion hunt -c` |
| `orion.sqlite` | Orion's database, unless another one was named |
| `trials/` | the directories of the trials |

Neither Orion nor torch is imported before a sweep runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.orion.objective import Objective, prepare_trial
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.space import read_space
from ppo_hpo.sweeps.initial_trials import configurations_of, insert
from ppo_hpo.sweeps.plan import Plan, SweepRequest
from ppo_hpo.sweeps.result import SweepResult, orion_yaml, result_of
from ppo_hpo.trial.gpu_detection import device_name
from ppo_hpo.trial.options import RETRIES, RunOptions

if TYPE_CHECKING:
    from orion.client import ExperimentClient

    from ppo_hpo.sweeps.progress import SweepProgress
    from ppo_hpo.sweeps.watched_executor import StopSignal, WatchedExecutor


class SweepInterrupted(KeyboardInterrupt):
    """SIGINT (Ctrl-C) or SIGTERM stopped a sweep. The same call resumes its trials.

    Attributes:
        signum: the signal.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def sweep(
    env: str | None = None, space: str | None = None, algorithm: str | Mapping[str, Any] | None = None, *,
    max_trials: int | None = None, n_workers: int | None = None, seeds: int | None = None,
    epochs: str | int | None = None, overrides: Mapping[str, Mapping[str, Any]] | None = None,
    warm_start: Any = None, executor: Any = None, device: str | Sequence[int | str] = "auto",
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
        overrides: values to fix, by group and key, like ``{"ppo": {"n_epochs": 10}}``.
        warm_start: presets (names, files or nested mappings) to try first in a new sweep. Values that they
            leave out are PPO's defaults. Values that the space does not search are ignored.
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
        env, space, algorithm, max_trials, n_workers, seeds, epochs, overrides, warm_start, executor, name,
        directory, storage, progress, options,
    ))  # fmt: skip


def _sweep(request: SweepRequest) -> SweepResult:
    from ppo_hpo.sweeps.watched_executor import StopSignal

    with _quiet(), StopSignal() as stop:
        with _script_on_path():
            plan = Plan.of(request)
            document = plan.document()
            if request.options.stop_poor:
                from ppo_hpo.trial import median_stop

                seeds = document.get("task", {}).get("seeds", 1)
                median_stop.refuse_what_does_not_fit(seeds=seeds, store=request.options.checkpoint_store)
            client = plan.open(document)
        space = read_space(str(plan.space_file))
        if request.warm_start is not None and not client.fetch_trials():
            insert(client, space, configurations_of(request.warm_start))
        function = Objective(space, options=request.options, console=False, log_stops=False)
        _run(client, function, request, plan.place, stop)
        return result_of(client, plan.place)


# ---------------------------------------------------------------------------- surroundings


@contextlib.contextmanager
def _script_on_path() -> Iterator[None]:
    """Let Orion find `ppo-hpo` when it opens the experiment, even if Python's `bin` is not on the path."""
    before = os.environ.get("PATH", "")
    beside = Path(sys.executable).parent
    if shutil.which("ppo-hpo") is None and (beside / "ppo-hpo").is_file():
        os.environ["PATH"] = f"{beside}{os.pathsep}{before}"
    elif shutil.which("ppo-hpo") is None:
        raise UserError("The command ppo-hpo is not on the PATH. Install the package: pip install ppo-hpo")
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide Orion's warnings about pkg_resources and git, and its log of failures, which is printed here too.

    A program that has set up logging still gets all of the log.
    """
    import warnings

    # Without any handler, the first log message would install one for the whole process.
    root, nothing = logging.getLogger(), logging.NullHandler()
    root.addHandler(nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(nothing)


# ------------------------------------------------------------------------------ the trials


def _run(
    client: ExperimentClient, function: Objective, request: SweepRequest, place: Path, stop: StopSignal
) -> None:
    """Run trials until as many as were asked for are completed."""
    from ppo_hpo.inspect import retry
    from ppo_hpo.sweeps.executors import make
    from ppo_hpo.sweeps.watched_executor import WatchedExecutor

    retry.repair(client)
    if client.is_done:
        return
    task = function.space.fixed.get("task", {})
    progress = _progress_of(client, function.space.max_epochs or task.get("epochs", 0), request.progress)
    try:
        inner = make(request.executor, request.n_workers, request.options, threads=task.get("threads", 1))
        executor = WatchedExecutor(inner, stop, progress)
        with _explained_errors(client, executor, place):
            with client.tmp_executor(executor):
                _work(client, function, executor, place)
            if stop.signum and not client.is_done:
                raise KeyboardInterrupt
    finally:
        _release_reserved(client)
        progress.close()


def _progress_of(client: ExperimentClient, epochs: int, shown: bool) -> SweepProgress:
    from ppo_hpo.sweeps.progress import SweepProgress

    completed = client.fetch_trials_by_status("completed")
    returns = [-trial.objective.value for trial in completed if trial.objective]
    # Standard output is for the final summary.
    stream = sys.stderr if shown else None
    return SweepProgress(client.max_trials, len(completed), max(returns, default=None), epochs, stream)


def _work(client: ExperimentClient, function: Objective, executor: WatchedExecutor, place: Path) -> None:
    from orion.core.utils.exceptions import LazyWorkers

    while not client.is_done and not executor.stop.signum:
        # Only as many trials as are missing: Orion would exceed them by the number of workers.
        missing = max(1, client.max_trials - len(client.fetch_trials_by_status("completed")))
        try:
            client.workon(
                function,
                n_workers=min(executor.n_workers, missing),
                max_trials_per_worker=missing,
                trial_arg="trial",
                on_error=lambda *_: False,  # `SweepProgress` reports errors.
                prepare_trial=prepare_trial,
            )
        except LazyWorkers:
            _raise_if_exhausted(client, place)


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
        if signum := executor.stop.signum:
            raise _interrupted(client, signum) from None
        if isinstance(error, KeyboardInterrupt) and executor.reason is not None:
            raise UserError(executor.reason) from None
        raise


def _interrupted(client: ExperimentClient, signum: int) -> SweepInterrupted:
    import signal

    _release_reserved(client)
    waiting = len(client.fetch_trials_by_status("interrupted"))
    what, them = (f"{waiting} trials of the sweep {client.name!r} were", "them")
    if waiting < 2:
        what, them = f"{'1 trial of the' if waiting else 'the'} sweep {client.name!r} was", "it"
    return SweepInterrupted(
        f"{what} interrupted by {signal.Signals(signum).name}. Rerun the command to resume {them}", signum
    )


def _release_reserved(client: ExperimentClient) -> None:
    """Release trials that are still reserved. Their heartbeats would keep this process alive."""
    for pacemaker in list(client._pacemakers.values()):
        with contextlib.suppress(Exception):
            client.release(pacemaker.trial, status="interrupted")
        pacemaker.stopped.set()


def _raise_if_exhausted(client: ExperimentClient, place: Path) -> None:
    """Refuse to wait for trials that will never come."""
    from ppo_hpo.inspect import retry

    retry.repair(client)
    if any(client.fetch_trials_by_status(status) for status in ("reserved", "interrupted", "new")):
        return  # Another process trains it, or it was requeued just now. The algorithm waits for it.
    broken = len(client.fetch_trials_by_status("broken"))
    if broken:
        reason = (
            f"It may wait for its {broken} broken trials: requeue them with `ppo-hpo retry {client.name} -c "
            f"{orion_yaml(place)}`."
        )
    else:
        reason = "Its space may have no other configuration."
    raise UserError(
        f"The algorithm of {client.name!r} has no trial to propose, and none is running. {reason}"
    )

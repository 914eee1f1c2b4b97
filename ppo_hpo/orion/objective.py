"""Trials of an Orion experiment, run from Python: by ``client.workon`` or in a ``client.suggest`` loop.

This module imports neither Orion nor torch before a trial runs.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.orion import trial_directory
from ppo_hpo.orion.experiment import epochs_prior
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import Interrupted
from ppo_hpo.spec.settings import Overrides, overridden
from ppo_hpo.spec.space import Space, fill, read_space, with_fidelities
from ppo_hpo.trial import failure
from ppo_hpo.trial.gpu_detection import device_name
from ppo_hpo.trial.options import RETRIES, OrionContext, RunOptions

if TYPE_CHECKING:
    from orion.client import ExperimentClient
    from orion.core.worker.trial import Trial

#: Trials that run in threads of this process stop while this is set. Signals do not reach such threads.
STOPPING = threading.Event()


def _stop_if_asked() -> None:
    if STOPPING.is_set():
        raise Interrupted(signal.SIGTERM)


@dataclass(frozen=True)
class Objective:
    """A function that runs one trial and returns its results. It can be pickled."""

    space: Space  # Its fixed values complete the hyperparameters that Orion proposes.
    overrides: Overrides = field(default_factory=dict)  # They replace values of the space and of Orion.
    directory: Path | None = None  # Parent directory for trials that have no directory of Orion's.
    options: RunOptions = field(default_factory=lambda: RunOptions(retries=RETRIES))
    console: bool = True  # Whether trials log to standard error.
    # Whether to log why a hunt stops. The ExecutionError has the same text as its `reason`.
    log_stops: bool = True

    def config(self, params: Mapping[str, Any]) -> TrialConfig:
        """Make and check the configuration of one trial from the hyperparameters that Orion proposes."""
        return TrialConfig.from_mapping(fill(self.space, params, self.overrides))

    def __call__(self, trial: Trial | None = None, **params: Any) -> list[dict[str, Any]]:
        """Run one trial, or resume it.

        Args:
            trial: Orion's trial, which ``workon(..., trial_arg="trial")`` passes. Without it the trial gets a
                directory below ``directory``.
            **params: hyperparameters that Orion proposes, nested as in the space.

        Returns:
            Orion's results: the objective and the statistics.

        Raises:
            orion.core.worker.consumer.ExecutionError: other trials would fail in the same way, so the hunt
                should stop. `workon` turns this into a KeyboardInterrupt, and marks the trial interrupted.
        """
        try:
            return self.run(trial, params)
        except Exception as error:
            if trial is None or not stops_the_hunt(error, trial):
                raise
            import orion.core
            from orion.core.worker.consumer import ExecutionError

            if self.log_stops:
                logging.getLogger("ppo_hpo").error("the hunt stops: %s", error)
            stop = ExecutionError(orion.core.config.worker.interrupt_signal_code)
            # An exception that passes between processes loses its cause.
            stop.reason = str(error)
            raise stop from error

    def run(self, trial: Trial | None, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Run one trial as a call does, but raise every error as it is."""
        from ppo_hpo.trial import runner, trial_files

        config = self.config(params)
        orion = OrionContext()
        if trial is not None:
            place = Path(trial.working_dir)
            orion = OrionContext(str(trial.id), siblings=place.parent, parent=trial.parent)
        elif self.directory is not None:
            place = self.directory / config.identity()[:16]
        else:
            place = trial_files.default_directory(config)
        outcome = runner.run(config, place, self.options, orion, console=self.console, tick=_stop_if_asked)
        return outcome.entries


def stops_the_hunt(error: Exception, trial: Trial) -> bool:
    """Whether an error should stop the hunt and leave the trial interrupted; see `ppo_hpo.trial.failure`."""
    place = Path(trial.working_dir)
    return failure.stops_the_hunt(error, place, place.parent)


def objective(
    space_or_config: str | Mapping[str, Any] = "default",
    *,
    env: str | None = None,
    overrides: Overrides | None = None,
    directory: str | Path | None = None,
    device: str | Sequence[int | str] = "auto",
    trials_per_device: int | None = None,
    console: bool = True,
    checkpoint_store: str | None = None,
    retries: int = RETRIES,
    stop_poor: bool = False,
    **fidelities: Any,
) -> Objective:
    """Make the function that Orion's ``client.workon`` calls for each trial.

        space = get_space("classic-control", epochs="fidelity(1, 4, base=4)")
        function = objective("classic-control", env="Acrobot-v1", epochs="fidelity(1, 4, base=4)")
        client = build_experiment("acrobot", space=space, working_dir="/somewhere", ...)
        client.workon(function, trial_arg="trial", max_trials=20)

    Args:
        space_or_config: name of a shipped space, path of a space file, or a nested mapping of fixed values.
        env: id of the environment. The same as ``overrides={"env.id": env}``.
        overrides: values that replace those of the space and of Orion, as ``{"ppo": {"n_epochs": 10}}`` or
            ``{"ppo.n_epochs": 10, "env.kwargs.NAME": 0.5}``.
        directory: parent directory for trials that are called without a ``trial`` argument.
        device: ``cpu``; ``cuda`` for all visible GPUs, shared out among trials; ``cuda:N``, ``cuda:N,M`` or a
            list for these GPUs; ``auto`` for the GPUs if observations are images, else the CPU.
        trials_per_device: number of trials that one GPU trains at a time. None means unlimited.
        console: whether trials log to standard error. Each trial also writes ``log.txt``.
        checkpoint_store: URL of a second place for checkpoints, for workers that share no file system. None
            means the environment variable ``PPO_HPO_STORE``, and '' means no store.
        retries: number of times for each epoch that a trial resumes from its latest checkpoint after an error
            that may not repeat, such as a lack of memory.
        stop_poor: whether to stop a trial between two rungs if it is poor among those of the experiment.
        **fidelities: the fidelities that were given to `get_space`.

    Raises:
        UserError: the space does not exist, a value breaks a rule, or the space has no such fidelity.
    """
    if isinstance(space_or_config, str):
        space = read_space(space_or_config)
    else:
        horizon = TrialConfig.from_mapping(space_or_config).max_epochs
        fixed = overridden(space_or_config, {"task.max_epochs": horizon})
        space = Space("configuration", Path(), fixed, {})
    space = with_fidelities(space, fidelities)
    options = RunOptions(
        device_name(device), trials_per_device, checkpoint_store, retries=retries, stop_poor=stop_poor
    )
    chosen = {**(overrides or {}), **({} if env is None else {"env.id": env})}
    overridden({}, chosen)  # An unknown key is an error now, and not in the first trial.
    parent = None if directory is None else Path(directory).absolute()
    return Objective(space, chosen, parent, options, console)


def prepare_trial(client: ExperimentClient, trial: Trial) -> None:
    """Make a trial's working directory, even if its parent's directory is on another machine.

    Orion copies the parent's directory, and fails if it is not there. Workers that share only the database
    and a checkpoint store use ``client.workon(..., prepare_trial=prepare_trial)``. The trial then resumes
    from the store.
    """
    from orion.client.runner import prepare_trial_working_dir

    trial_directory.make_or_stop(client, trial)
    prepare_trial_working_dir(client, trial)


def run_trial(
    client: ExperimentClient,
    trial: Trial,
    space_or_config: str | Mapping[str, Any] = "default",
    **options: Any,
) -> list[dict[str, Any]]:
    """Run a trial of ``client.suggest()``, and let the client observe its results.

    Schedules end at the highest fidelity of the client's space. A trial that fails is released as broken. It
    is released as interrupted if it was interrupted, or if other trials would fail in the same way. When
    Orion suggests the trial again, it resumes from its checkpoint.

    Args:
        client: Orion's client of the experiment, which needs a permanent ``working_dir``.
        trial: Orion's trial, which ``client.suggest()`` reserved.
        space_or_config: as for `objective`.
        **options: as for `objective`.

    Returns:
        The results that the client observed.

    Raises:
        UserError: as for `objective`.
    """
    try:
        if "epochs" not in options and (fidelity := epochs_prior(client.space)):
            options["epochs"] = fidelity
        function = objective(space_or_config, **options)
        prepare_trial(client, trial)  # `suggest` does not make the directory.
        found = function.run(trial, trial.params)
    except Exception as error:
        client.release(trial, status="interrupted" if stops_the_hunt(error, trial) else "broken")
        raise
    except BaseException:
        client.release(trial, status="interrupted")
        raise
    client.observe(trial, found)
    return found

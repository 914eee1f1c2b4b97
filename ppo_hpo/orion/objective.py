"""The Orion edge in Python: an objective for `workon`, and a trial for `suggest`/`observe` loops.

Neither Orion nor torch is imported before a trial runs.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.orion import fixes
from ppo_hpo.orion.experiment import epochs_prior
from ppo_hpo.ppo.components import merge
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import Interrupted
from ppo_hpo.spec.space import Space, fill, read_space, with_fidelities
from ppo_hpo.trial import failure
from ppo_hpo.trial.gpus import device_name
from ppo_hpo.trial.options import RETRIES, OrionContext, RunOptions

if TYPE_CHECKING:
    from orion.client import ExperimentClient
    from orion.core.worker.trial import Trial

Overrides = Mapping[str, Mapping[str, Any]]

#: While it is set, trials that run in threads of this process stop: nothing else reaches a thread.
STOPPING = threading.Event()


def _stop_if_asked() -> None:
    if STOPPING.is_set():
        raise Interrupted(signal.SIGTERM)


@dataclass(frozen=True)
class Objective:
    """A function that runs one trial and returns its results; it can be pickled.

    Attributes:
        space: the space, whose fixed values complete what Orion proposes.
        overrides: group to key to value, which win over both.
        directory: where trials go that come without a directory of their own.
        options: what is asked of each trial.
        console: whether trials log to standard error.
        log_stops: log why a hunt is stopped; whoever catches the ExecutionError has it as its ``reason``.
    """

    space: Space
    overrides: Overrides = field(default_factory=dict)
    directory: Path | None = None
    options: RunOptions = field(default_factory=lambda: RunOptions(retries=RETRIES))
    console: bool = True
    log_stops: bool = True

    def config(self, params: Mapping[str, Any]) -> TrialConfig:
        """The configuration of one trial, checked."""
        return TrialConfig.from_mapping(fill(self.space, params, self.overrides))

    def __call__(self, trial: Trial | None = None, **params: Any) -> list[dict[str, Any]]:
        """Run one trial, or go on with it.

        Args:
            trial: Orion's record of it; ``workon(..., trial_arg="trial")`` hands it over. Without it the
                trial has no directory of Orion's and goes below ``directory``.
            **params: what Orion proposes, nested as in the space.

        Returns:
            Orion's results: the objective and the statistics.

        Raises:
            orion.core.worker.consumer.ExecutionError: `failure` says that the hunt should stop. `workon`
                makes a KeyboardInterrupt of it, and marks the trial interrupted.
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
            # Between processes its cause is lost.
            stop.reason = str(error)
            raise stop from error

    def run(self, trial: Trial | None, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The same, but what goes wrong is raised as it is."""
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
    """Whether a failure should stop the hunt, and leave the trial interrupted; see `failure`."""
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
    """The function to pass to Orion's ``client.workon``.

        space = get_space("classic-control", epochs="fidelity(1, 4, base=4)")
        function = objective("classic-control", env="Acrobot-v1", epochs="fidelity(1, 4, base=4)")
        client = build_experiment("acrobot", space=space, working_dir="/somewhere", ...)
        client.workon(function, trial_arg="trial", max_trials=20)

    Args:
        space_or_config: a shipped space's name, a file's path, or a nested mapping of fixed values.
        env: the environment's id, the same as ``overrides={"env": {"id": env}}``.
        overrides: group to key to value, which win over the space and over Orion.
        directory: where trials go that come without ``trial_arg``.
        device: ``cpu``; ``cuda``, the GPUs that can be seen are shared out; ``cuda:N``; ``cuda:N,M`` or a
            list, these are; ``auto``, a GPU for images, where there is one, and else the CPU.
        trials_per_device: that a GPU trains at a time; None: as many as come.
        console: whether trials log to standard error; each also has its own ``log.txt``.
        checkpoint_store: URL of a second place for checkpoints, for workers that share no file system. None
            means the environment variable ``PPO_HPO_STORE``, and '' means no store.
        retries: after a fault that may pass (memory, a file system's hiccup, an error that does not come
            again), go on from the last checkpoint so often for each epoch.
        stop_poor: stop a trial in the middle of its epochs, if it is poor among those of the experiment.
        **fidelities: the same as were given to `get_space`.

    Raises:
        UserError: an unknown space, a bad value or a fidelity that the space has not.
    """
    if isinstance(space_or_config, str):
        space = read_space(space_or_config)
    else:
        horizon = TrialConfig.from_mapping(space_or_config).max_epochs
        fixed = merge(space_or_config, {"task": {"max_epochs": horizon}})
        space = Space("configuration", Path(), fixed, {})
    space = with_fidelities(space, fidelities)
    options = RunOptions(
        device_name(device), trials_per_device, checkpoint_store, retries=retries,
        stop_poor=stop_poor,
    )  # fmt: skip
    chosen = {group: dict(values) for group, values in (overrides or {}).items()}
    if env is not None:
        chosen.setdefault("env", {})["id"] = env
    return Objective(
        space,
        chosen,
        None if directory is None else Path(directory).absolute(),
        options,
        console,
    )


def prepare_trial(client: ExperimentClient, trial: Trial) -> None:
    """Make a trial's working directory as Orion does, also where its parent's lies on another machine.

    Orion copies a parent's directory, and fails where there is none. Workers that share only the database and
    a store pass this: ``client.workon(..., prepare_trial=prepare_trial)``. The state comes from the store.
    """
    from orion.client.runner import prepare_trial_working_dir

    fixes.make_directory_without_parent(client, trial)
    # This is what copies a parent's for ASHA and PBT.
    prepare_trial_working_dir(client, trial)


def run_trial(
    client: ExperimentClient,
    trial: Trial,
    space_or_config: str | Mapping[str, Any] = "default",
    **options: Any,
) -> list[dict[str, Any]]:
    """Run a trial that ``client.suggest()`` gave, and observe its results.

    Schedules end at the highest fidelity of the client's own space. A trial that fails is released as
    broken; one that is interrupted as interrupted, and so is one that fails by what other trials would fail
    by too (`failure`). All go on from their checkpoint when Orion hands them out again.

    Args:
        client: of the experiment; it needs a ``working_dir`` that lasts.
        trial: reserved by ``client.suggest()``.
        space_or_config: as for `objective`.
        **options: as for `objective`.

    Returns:
        The results that were observed.

    Raises:
        UserError: as for `objective`.
    """
    try:
        if "epochs" not in options and (fidelity := epochs_prior(client.space)):
            options["epochs"] = fidelity
        function = objective(space_or_config, **options)
        prepare_trial(client, trial)  # `suggest` makes no directory
        found = function.run(trial, trial.params)
    except Exception as error:
        client.release(trial, status="interrupted" if stops_the_hunt(error, trial) else "broken")
        raise
    except BaseException:
        client.release(trial, status="interrupted")
        raise
    client.observe(trial, found)
    return found

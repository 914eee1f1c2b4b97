"""Two records that every trial is given: what is asked of it, and which trial of Orion's it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ppo_hpo.spec.errors import UserError
from ppo_hpo.trial.gpu_detection import device_name

#: Retries where nobody watches, as under Orion, where a broken trial counts against the whole hunt.
RETRIES = 2
_MAX_RETRIES = 1000


@dataclass(frozen=True)
class RunOptions:
    """What is asked of a trial, beside its configuration. Nothing here changes what the trial computes."""

    # cpu; cuda, any GPU that the process sees; cuda:N; cuda:N,M, one of these GPUs; auto, any GPU if the
    # environment has images and there is a GPU, else the CPU
    device: str = "auto"
    # how many trials one GPU trains at a time; others wait, and None means unlimited
    trials_per_device: int | None = None
    # URL of a second place for checkpoints, which other machines reach; None means the environment variable
    # PPO_HPO_STORE, and '' means no store
    checkpoint_store: str | None = None
    takeover: bool = False  # whether to end a process that trains this trial, instead of waiting for it
    # how often the trial resumes from its last checkpoint after a failure that may pass, anew for each epoch
    retries: int = 0
    # how many fresh episodes test the policy after the last epoch (`ppo_hpo.trial.fresh_test`)
    fresh_episodes: int = 0
    stop_poor: bool = False  # whether the trial stops early if it is poor among its siblings (`median_stop`)

    def __post_init__(self) -> None:
        device_name(self.device)
        limit = self.trials_per_device
        if limit is not None and (type(limit) is not int or limit < 1):
            raise UserError(f"`trials_per_device` must be a whole number of at least 1, but got {limit!r}.")
        if not 0 <= self.retries <= _MAX_RETRIES:
            raise UserError(f"`0 <= retries <= {_MAX_RETRIES}` must hold, but got {self.retries}.")


@dataclass(frozen=True)
class OrionContext:
    """Which trial of which Orion experiment it is. A trial that is run by hand has none of these."""

    trial_id: str | None = None
    experiment: str | None = None  # name and version of the experiment, for the log
    siblings: Path | None = None  # directory that holds the directories of the experiment's other trials
    parent: str | None = None  # id of the parent trial, whose checkpoint is looked up in the store
    results_path: Path | None = None  # where Orion expects the result file

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], parent: str | None = None) -> OrionContext:
        """Read what Orion tells a script through environment variables.

        Orion writes ``parent`` as the text None for a trial that has none.
        """
        parent = None if parent in (None, "", "None") else parent
        if "ORION_TRIAL_ID" not in environ:
            return cls(parent=parent)
        try:
            name = f"{environ['ORION_EXPERIMENT_NAME']}-v{environ['ORION_EXPERIMENT_VERSION']}"
            siblings, results = Path(environ["ORION_WORKING_DIR"]).parent, Path(environ["ORION_RESULTS_PATH"])
            return cls(environ["ORION_TRIAL_ID"], name, siblings, parent, results)
        except KeyError as error:
            raise UserError(f"Orion's environment is incomplete: {error} is missing.") from None

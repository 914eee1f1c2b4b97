"""Two records that every trial is given: what is asked of it, and which trial of Orion's it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ppo_hpo.spec.errors import UserError
from ppo_hpo.trial.gpus import device_name

#: Retries where nobody watches, as under Orion, where a broken trial counts against the whole hunt.
RETRIES = 2
_MAX_RETRIES = 1000


@dataclass(frozen=True)
class RunOptions:
    """What is asked of a trial, beside its configuration. Nothing here changes what the trial computes.

    Attributes:
        device: ``cpu``; ``cuda``, any GPU that the process sees; ``cuda:N``; ``cuda:N,M``, one of these
            GPUs; ``auto``, any GPU if the environment has images and there is a GPU, else the CPU.
        trials_per_device: how many trials one GPU trains at a time. A trial waits while every GPU has as
            many. None means unlimited.
        checkpoint_store: URL of a second place for checkpoints, which other machines reach. None means the
            environment variable ``PPO_HPO_STORE``, and '' means no store.
        takeover: whether to end a process that trains this trial, instead of waiting for it.
        retries: how often the trial resumes from its last checkpoint after a failure that may pass, for each
            epoch anew.
        stop_poor: whether the trial stops early if it is poor among its siblings (`trial.median_stop`).

    Raises:
        UserError: a value is out of its bounds.
    """

    device: str = "auto"
    trials_per_device: int | None = None
    checkpoint_store: str | None = None
    takeover: bool = False
    retries: int = 0
    stop_poor: bool = False

    def __post_init__(self) -> None:
        device_name(self.device)
        limit = self.trials_per_device
        if limit is not None and (type(limit) is not int or limit < 1):
            raise UserError(f"`trials_per_device` must be a whole number of at least 1, but got {limit!r}.")
        if not 0 <= self.retries <= _MAX_RETRIES:
            raise UserError(f"`0 <= retries <= {_MAX_RETRIES}` must hold, but got {self.retries}.")


@dataclass(frozen=True)
class OrionContext:
    """Which trial of which Orion experiment it is. A trial that is run by hand has none of these.

    Attributes:
        trial_id: Orion's id of the trial.
        experiment: name and version of the experiment, for the log.
        siblings: directory that holds the directories of the experiment's other trials.
        parent: Orion's id of the parent trial, whose checkpoint is looked up in the store.
        results_path: where Orion expects the result file.
    """

    trial_id: str | None = None
    experiment: str | None = None
    siblings: Path | None = None
    parent: str | None = None
    results_path: Path | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], parent: str | None = None) -> OrionContext:
        """Read what Orion tells a script through environment variables.

        Args:
            environ: the environment variables. Without ``ORION_TRIAL_ID`` the context is empty.
            parent: as Orion writes ``{trial.parent}``, which is the text None for a trial without a parent.

        Raises:
            UserError: one of Orion's variables is missing.
        """
        parent = None if parent in (None, "", "None") else parent
        if "ORION_TRIAL_ID" not in environ:
            return cls(parent=parent)
        try:
            return cls(
                environ["ORION_TRIAL_ID"],
                f"{environ['ORION_EXPERIMENT_NAME']}-v{environ['ORION_EXPERIMENT_VERSION']}",
                Path(environ["ORION_WORKING_DIR"]).parent,
                parent,
                Path(environ["ORION_RESULTS_PATH"]),
            )
        except KeyError as error:
            raise UserError(f"Orion's environment is incomplete: {error} is missing.") from None

"""What is checked before a trial imports torch: its directory, its environment, and what was asked of it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_hpo.spec import seeds
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import CheckpointError, MachineError, UserError
from ppo_hpo.state.checkpoint import Storage
from ppo_hpo.state.remote_store import Store
from ppo_hpo.trial import median_stop, trial_files
from ppo_hpo.trial.options import OrionContext, RunOptions

if TYPE_CHECKING:
    from ppo_hpo.envs.make import EnvInfo

# How many whole episodes of each environment an epoch should hold. docs/explanation/exact-resuming.md has the
# figures.
_EPISODES_PER_EPOCH = 5


def check(
    config: TrialConfig, directory: Path, options: RunOptions, orion: OrionContext, store: Store | None
) -> EnvInfo:
    """Check everything that can be checked before torch is imported.

    The directory is made if it is missing. For the arguments see `runner.run`.

    Raises:
        UserError: the environment cannot be made or is not supported; the directory cannot be written, or it
            holds a trial with another number of seeds; the options do not fit the trial; or the store cannot
            be read.
    """
    from ppo_hpo.envs.make import check_hyperparameters_fit, probe

    if options.stop_poor:
        median_stop.refuse_what_does_not_fit(seeds=config.task.seeds, store=store)
        if orion.siblings is None:
            raise UserError(
                "`--stop-poor` compares a trial with the others of its experiment, but this one has none: it "
                "is run without Orion, or in a directory of its own. Leave the option out."
            )
    _check_directory(config, directory)
    info = probe(config.env)
    check_hyperparameters_fit(config, info)
    if store is not None:
        store.names()  # This fails if the store cannot be reached.
    return info


def _check_directory(config: TrialConfig, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The directory {directory} cannot be made: {error.strerror}.") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise MachineError(f"The directory {directory} cannot be written. Choose another one.")
    for name in (
        *trial_files.WRITTEN_IN_PLACE,
        trial_files.WRITER,
        *filter(None, seeds.split_by_seed(config)),
    ):
        # In somebody else's directory a link could lead to any other file of the user's.
        if (directory / name).is_symlink():
            raise UserError(f"{directory / name} is a link, which would be written through. Remove it.")
    for name in (*trial_files.WRITTEN_IN_PLACE, *trial_files.REPLACED):
        # A pipe would wait for a process at its other end.
        if (directory / name).exists() and not (directory / name).is_file():
            raise UserError(f"{directory / name} must be a file, but it is something else. Remove it.")
    if (directory / trial_files.WRITER).exists() and not (directory / trial_files.WRITER).is_dir():
        raise UserError(
            f"{directory / trial_files.WRITER} must be a directory, but it is not one. Remove it."
        )
    one = config.task.seeds == 1
    if Storage(directory / "seed-1" if one else directory).paths():
        raise CheckpointError(
            f"{directory} has the checkpoints of a trial of {'several seeds' if one else 'one seed'}, but "
            f"`task.seeds` is {config.task.seeds}. Use another directory."
        )


def warn_of_short_epochs(config: TrialConfig, info: EnvInfo, log: logging.Logger) -> None:
    """Warn if epochs are short. Environments are reset at each epoch, and that hurts if epochs are short."""
    limit = info.time_limit
    if limit is None:
        log.warning(
            "%s has no time limit: evaluation episodes are cut after %d steps; set env.max_episode_steps to "
            "choose another limit",
            info.id, config.task.steps_per_epoch,
        )  # fmt: skip
        return
    n_envs, steps = config.env.n_envs, config.task.steps_per_epoch
    needed = _EPISODES_PER_EPOCH * n_envs * limit
    if steps < needed:
        log.warning(
            "task.steps_per_epoch is %d, but %d x env.n_envs x time limit = %d x %d x %d = %d is advised: "
            "environments are reset at each epoch, and episodes that are often cut teach less",
            steps, _EPISODES_PER_EPOCH, _EPISODES_PER_EPOCH, n_envs, limit, needed,
        )  # fmt: skip

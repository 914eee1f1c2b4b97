"""Running one trial: checks, lock, log, GPU, then each of its seeds, then its result.

Where a trial's state comes from is one rule for every algorithm. `ppo_hpo.trial.restore` states it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_hpo.spec import results, trial_seeds
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import CheckpointError, LostLock, MachineError, UserError
from ppo_hpo.state import lock
from ppo_hpo.state.checkpoint import Storage
from ppo_hpo.state.claim import Claim
from ppo_hpo.state.files import remove_temporary_files, write_atomically
from ppo_hpo.state.remote_store import open_store
from ppo_hpo.trial import failure, gpu_slots, median_stop, trial_files
from ppo_hpo.trial.options import OrionContext, RunOptions
from ppo_hpo.trial.retries import Work, retrying_write, with_retries
from ppo_hpo.trial.training import Outcome, SeedTraining, Trial, combined

if TYPE_CHECKING:
    from ppo_hpo.envs.make import EnvInfo

# Whole episodes of each environment in an epoch. docs/explanation/exact-resuming.md has the figures.
_EPISODES_PER_EPOCH = 5
_DEFAULTS, _BY_HAND = RunOptions(), OrionContext()


def run(
    config: TrialConfig, directory: Path, options: RunOptions = _DEFAULTS, orion: OrionContext = _BY_HAND, *,
    console: bool = True, tick: Callable[[], None] = lambda: None,
) -> Outcome:  # fmt: skip
    """Run one trial to its last epoch, from whatever is there. The outcome is also in ``results.json``.

    The directory is made if it is missing. With ``console`` the trial logs to standard error, beside its own
    ``log.txt``. ``tick`` is called before each environment step, and what it raises stops the trial there.
    """
    trial = Trial(config, directory, options, orion, open_store(options.checkpoint_store))
    _check(trial)
    with _recording(trial):
        earlier = failure.read_record(directory)
        place = None if earlier is None else earlier.place
        info = with_retries(lambda: _look(trial), Work(), options.retries, place)
    # A small network on vectors is trained faster by the CPU (`ppo_hpo.ppo.numpy_engine`).
    device = "cpu" if options.device == "auto" and not info.images else options.device
    works = {part: Work(part) for part in trial_seeds.split_by_seed(config)}
    lost: LostLock | None = None
    while True:
        try:
            takeover = options.takeover and lost is None
            with (
                lock.hold(directory, takeover=takeover, lost=lost) as claim,
                trial_files.logging_to(directory, orion.trial_id, console) as log,
            ):
                if lost is not None:
                    log.warning("%s; resumes from what is there", lost)
                remove_temporary_files(directory)
                _warn(config, info, log)
                return _run_as_writer(trial, device, works, claim, tick, log)
        except LostLock as error:
            # The process must not end: Orion would stop the hunt, or call a trial broken that is alive.
            lost = error
            logging.getLogger("ppo_hpo").warning("%s; waits for the trial to be free again", error)


def _check(trial: Trial) -> None:
    """Check the options and the directory, which is made if it is missing."""
    config, store = trial.config, trial.store
    if trial.options.stop_poor:
        median_stop.refuse_what_does_not_fit(seeds=config.task.seeds, store=store)
        if trial.orion.siblings is None:
            raise UserError(
                "`--stop-poor` compares a trial with the others of its experiment, but this one has none: it "
                "is run without Orion, or in a directory of its own. Leave the option out."
            )
    _check_directory(config, trial.directory)


def _look(trial: Trial) -> EnvInfo:
    """Look at the environment, and at the store: everything that can be checked before torch is imported."""
    from ppo_hpo.envs.make import check_hyperparameters_fit, probe

    info = probe(trial.config.env)
    check_hyperparameters_fit(trial.config, info)
    if trial.store is not None:
        trial.store.names()  # This fails if the store cannot be reached.
    return info


def _check_directory(config: TrialConfig, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The directory {directory} cannot be made: {error.strerror}.") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise MachineError(f"The directory {directory} cannot be written. Choose another one.")
    in_place, writer = trial_files.WRITTEN_IN_PLACE, directory / trial_files.WRITER
    for name in (*in_place, trial_files.WRITER, *filter(None, trial_seeds.split_by_seed(config))):
        # In somebody else's directory a link could lead to any other file of the user's.
        if (directory / name).is_symlink():
            raise UserError(f"{directory / name} is a link, which would be written through. Remove it.")
    for name in (*in_place, *trial_files.REPLACED):
        # A pipe would wait for a process at its other end.
        if (directory / name).exists() and not (directory / name).is_file():
            raise UserError(f"{directory / name} must be a file, but it is something else. Remove it.")
    if writer.exists() and not writer.is_dir():
        raise UserError(f"{writer} must be a directory, but it is not one. Remove it.")
    one = config.task.seeds == 1
    if Storage(directory / "seed-1" if one else directory).paths():
        raise CheckpointError(
            f"{directory} has the checkpoints of a trial of {'several seeds' if one else 'one seed'}, but "
            f"`task.seeds` is {config.task.seeds}. Use another directory."
        )


def _warn(config: TrialConfig, info: EnvInfo, log: logging.Logger) -> None:
    """Warn if epochs are short, since environments are reset at each epoch, or actions out of reach."""
    from ppo_hpo.envs.make import narrow_reach

    if text := narrow_reach(config, info):
        log.warning("%s", text)
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


def _run_as_writer(
    trial: Trial, asked_device: str, works: dict[str, Work], claim: Claim, tick: Callable[[], None],
    log: logging.Logger,
) -> Outcome:  # fmt: skip
    """Train all seeds of a trial, and write its result. This process holds the trial's lock."""
    config, directory = trial.config, trial.directory
    earlier = failure.read_record(directory)
    write = retrying_write(claim.write, trial.options.retries, log)

    def tick_of_writer() -> None:
        claim.raise_if_lost()
        tick()

    with (
        _recording(trial),
        gpu_slots.taken(
            asked_device, trial.options.trials_per_device, count=_count_gpus, log=log, tick=tick_of_writer
        ) as device,
    ):
        done = [
            SeedTraining(trial, own, works[part], device, write, tick_of_writer, log).run(
                None if earlier is None else earlier.place
            )
            for part, own in trial_seeds.split_by_seed(config).items()
        ]
    outcome = done[0][0]
    if config.task.seeds > 1:
        outcome = combined([own for own, _ in done], config.task.aggregate, directory)
        trial_files.write_curve(directory, results.combine_curves([curve for _, curve in done]), write)
    # This is still done under the lock: a worker that waits for it cleans up the directory once it has it.
    failure.remove_record(directory)
    claim.write(directory / trial_files.RESULTS, outcome.to_bytes())
    if trial.orion.results_path is not None:
        write_atomically(trial.orion.results_path, outcome.to_bytes())
    log.info(
        "done: return %.1f +- %.1f after epoch %d; %s",
        -outcome.objective, outcome.statistics["return_std"], outcome.statistics["epochs"], directory,
    )  # fmt: skip
    return outcome


@contextlib.contextmanager
def _recording(trial: Trial) -> Iterator[None]:
    """Record a failure. Under Orion that is done with what Orion is told."""
    try:
        yield
    except Exception as error:
        # What belongs to another trial is left as it is.
        if trial.orion.trial_id is None and not isinstance(error, CheckpointError):
            failure.record_failure(trial.directory, error)
        raise


def _count_gpus() -> int:
    from ppo_hpo.ppo.device import count_gpus  # which imports torch

    return count_gpus()

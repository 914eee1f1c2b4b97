"""Running one trial: checks, lock, log, GPU, then each of its seeds, then its result.

Where a trial's state comes from is one rule for every algorithm. `ppo_hpo.trial.restore` states it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from ppo_hpo.spec import results, seeds
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import CheckpointError, LostLock
from ppo_hpo.state import lock
from ppo_hpo.state.claim import Claim
from ppo_hpo.state.files import remove_temporary_files, write_atomically
from ppo_hpo.state.remote_store import open_store
from ppo_hpo.trial import failure, gpu_slots, trial_files
from ppo_hpo.trial.checks import check, warn_of_short_epochs
from ppo_hpo.trial.options import OrionContext, RunOptions
from ppo_hpo.trial.outcome import Outcome, combined
from ppo_hpo.trial.retries import retrying_write
from ppo_hpo.trial.training import SeedTraining, Trial
from ppo_hpo.trial.work import Work

_DEFAULTS, _BY_HAND = RunOptions(), OrionContext()


def run(
    config: TrialConfig,
    directory: Path,
    options: RunOptions = _DEFAULTS,
    orion: OrionContext = _BY_HAND,
    *,
    console: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run one trial to its last epoch. It resumes from whatever is there.

    Args:
        config: the trial.
        directory: directory of the trial's files. It is made if it is missing.
        options: what is asked of the trial.
        orion: which trial of which experiment it is.
        console: whether to log to standard error, beside the trial's own ``log.txt``.
        tick: called before each environment step. What it raises stops the trial there.

    Returns:
        The objective and the statistics. They are also written to ``results.json``.

    Raises:
        UserError: the input is bad, a file cannot be written, or the store cannot be reached.
    """
    store = open_store(options.checkpoint_store)
    trial = Trial(config, directory, options, orion, store)
    info = check(config, directory, options, orion, store)
    # A small network on vectors is trained faster by the CPU (`ppo_hpo.ppo.numpy_engine`).
    device = "cpu" if options.device == "auto" and not info.images else options.device
    works = {part: Work(part) for part in seeds.split_by_seed(config)}
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
                warn_of_short_epochs(config, info, log)
                return _run_as_writer(trial, device, works, claim, tick, log)
        except LostLock as error:
            # The process must not end: Orion would stop the hunt, or call a trial broken that is alive.
            lost = error
            logging.getLogger("ppo_hpo").warning("%s; waits for the trial to be free again", error)


def _run_as_writer(
    trial: Trial,
    asked_device: str,
    works: dict[str, Work],
    claim: Claim,
    tick: Callable[[], None],
    log: logging.Logger,
) -> Outcome:
    """Train all seeds of a trial, and write its result. This process holds the trial's lock."""
    config, directory = trial.config, trial.directory
    earlier = failure.read_record(directory)
    write = retrying_write(claim.write, trial.options.retries, log)

    def tick_of_writer() -> None:
        claim.raise_if_lost()
        tick()

    try:
        with gpu_slots.taken(
            asked_device, trial.options.trials_per_device, count=_count_gpus, log=log, tick=tick_of_writer
        ) as device:
            done = [
                SeedTraining(trial, own, works[part], device, write, tick_of_writer, log).run(
                    None if earlier is None else earlier.place
                )
                for part, own in seeds.split_by_seed(config).items()
            ]
    except Exception as error:
        # Under Orion it is recorded with what Orion is told. What belongs to another trial is left as it is.
        if trial.orion.trial_id is None and not isinstance(error, CheckpointError):
            failure.record_failure(directory, error)
        raise
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


def _count_gpus() -> int:
    from ppo_hpo.ppo.device import count_gpus  # which imports torch

    return count_gpus()

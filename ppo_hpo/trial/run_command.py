"""The command ``ppo-hpo run``, behind its options: it runs one trial in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ppo_hpo.spec.errors import UserError, named_as
from ppo_hpo.trial import process


@dataclass(frozen=True)
class RunRequest:
    """What the user asks of ``ppo-hpo run``, in types that JSON knows. `RunOptions` explains the last six."""

    config: str  # path of a YAML file, or the name of a shipped preset
    settings: Sequence[str] = ()  # texts GROUP.KEY=VALUE, each of which replaces one value of the file
    seed: int | None = None  # replaces task.seed
    epochs: int | None = None  # replaces task.epochs
    dir: str | None = None  # of the trial's files; None means Orion's, or `trial_files.default_directory`
    parent: str | None = None  # Orion's id of the parent trial
    device: str = "auto"
    trials_per_device: int | None = None
    checkpoint_store: str | None = None
    takeover: bool = False
    retries: int | None = None  # None means 2 under Orion, else 0
    stop_poor: bool = False


def run_and_exit_code(request: RunRequest, refuse: Callable[[int], None] = lambda threads: None) -> int:
    """Run a trial and return the exit code of ``ppo-hpo run``.

    ``refuse`` is called with the trial's number of threads before anything is imported for it.
    """
    return process.exit_code(
        lambda: _run(request, refuse),
        lambda error: "ORION_TRIAL_ID" in os.environ and _stops_the_hunt(error, request),
    )


def _run(request: RunRequest, refuse: Callable[[int], None]) -> int:
    given = {"task.epochs": request.epochs, "task.seed": request.seed, "retries": request.retries}
    with named_as(
        {name: f"--{name[name.find('.') + 1 :]}" for name, value in given.items() if value is not None}
    ):
        return _run_as_asked(request, refuse)


def _run_as_asked(request: RunRequest, refuse: Callable[[int], None]) -> int:
    process.raise_on_signals()
    from ppo_hpo.spec.config import TrialConfig

    config = TrialConfig.from_mapping(configuration_of(request, under_orion="ORION_TRIAL_ID" in os.environ))
    refuse(config.task.threads)
    # This comes before the next line imports numpy: threads that never start need no limit.
    process.set_thread_variables(config.task.threads)
    from ppo_hpo.trial import gpu_slots, runner, trial_files
    from ppo_hpo.trial.options import RETRIES, OrionContext, RunOptions

    gpu_slots.own_process()
    orion = OrionContext.from_environ(os.environ, request.parent)
    under_orion = orion.trial_id is not None
    # A test on fresh episodes is for `ppo-hpo best`.
    names = {field.name for field in fields(RunOptions)} - {"fresh_episodes"}
    asked = {name: getattr(request, name) for name in names}
    if request.retries is None:
        asked["retries"] = RETRIES if under_orion else 0
    options = RunOptions(**asked)
    process.find_modules_here()
    if request.dir == "":
        raise UserError("`--dir` must name a directory, but got ''. Write . for the current one.")
    if request.dir is not None:
        directory, orion = Path(request.dir), replace(orion, siblings=None)
    else:
        own = trial_files.default_directory(config)
        directory = Path(os.environ["ORION_WORKING_DIR"]) if under_orion else own
    try:
        outcome = runner.run(config, directory, options, orion, tick=process.raise_if_stopped)
    except Exception as error:
        if under_orion and not isinstance(error, UserError):
            _stops_the_hunt(error, request)  # This only records the failure: another exception stops no hunt.
        raise
    if not under_orion:
        print(_outcome_text(outcome))
    return 0


def _stops_the_hunt(error: Exception, request: RunRequest) -> bool:
    from ppo_hpo.trial import failure

    place = os.environ.get("ORION_WORKING_DIR")
    if place is None:
        return False
    return failure.stops_the_hunt(error, Path(request.dir or place), Path(place).parent)


def configuration_of(request: RunRequest, *, under_orion: bool) -> dict[str, dict[str, Any]]:
    """Read the file's groups, and apply the values of the command line to them."""
    from ppo_hpo.spec.space import read_configuration

    return read_configuration(
        request.config, request.settings, request.seed, request.epochs, under_orion=under_orion
    )


def _outcome_text(outcome: Any) -> str:
    from ppo_hpo.spec.results import seeds_text

    stats = outcome.statistics
    seeds = f"            {text}\n" if (text := seeds_text(stats)) else ""
    how = (
        "; the trial diverged"
        if stats["diverged"]
        else "; the trial stopped early"
        if stats["stopped"]
        else ""
    )
    return (
        f"return      {stats['return_mean']:.2f} +- {stats['return_std']:.2f} "
        f"(median {stats['return_median']:.2f}), mean episode length {stats['episode_length']:.0f}\n"
        f"{seeds}objective   {outcome.objective:.6g} (the negated return, which Orion minimizes{how})\n"
        f"trained     {stats['env_steps']:,.0f} steps ({stats['env_steps_here']:,.0f} in this run) "
        f"at {stats['steps_per_second']:,.0f} steps/s\n"
        f"directory   {outcome.directory}"
    )

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
    from ppo_hpo.spec import space, yamlio
    from ppo_hpo.spec.config import GROUPS, TaskConfig, without_effectless

    path = space.space_path(request.config)
    content = yamlio.load(path)
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise UserError(f"{path} must map groups ({', '.join(GROUPS)}) to hyperparameters.")
    mapping: dict[str, dict[str, Any]] = content
    for setting in request.settings:
        _apply(setting, mapping)
    task = mapping.setdefault("task", {})
    if task.get("max_epochs") in (None, "none"):
        task.pop("max_epochs", None)
    if under_orion and "max_epochs" not in task:
        raise UserError(
            f"{path} has no `task.max_epochs`. Under Orion this value says where schedules end. Set it to "
            f"the highest fidelity, or to the epochs of every trial if the space has no fidelity."
        )
    if "max_epochs" not in task and not isinstance(task.get("epochs"), str):
        task["max_epochs"] = task.get("epochs", TaskConfig().epochs)
    if request.epochs is not None:
        task["epochs"] = request.epochs
    if request.seed is not None:
        task["seed"] = request.seed
    # Orion has filled in what was searched, which may have no effect beside the other values.
    return without_effectless(mapping) if under_orion else mapping


def _apply(setting: str, mapping: dict[str, dict[str, Any]]) -> None:
    """Apply one ``--set``. ``env.kwargs.NAME`` sets an argument of the environment."""
    group, key, value = parse_setting(setting)
    target = mapping.setdefault(group, {})
    if group == "env" and key.startswith("kwargs."):
        if target.get("kwargs") is None:
            target["kwargs"] = {}
        target, key = target["kwargs"], key.removeprefix("kwargs.")
        if not isinstance(target, dict):
            raise UserError(f"`env.kwargs` must map argument names to values, but got {target!r}.")
    target[key] = value


def parse_setting(setting: str) -> tuple[str, str, Any]:
    """Split one ``--set GROUP.KEY=VALUE`` into group, key and value."""
    from ppo_hpo.spec import yamlio

    name, equals, text = setting.partition("=")
    group, dot, key = name.partition(".")
    if not (equals and dot and key):
        raise UserError(f"--set takes GROUP.KEY=VALUE, as in --set optimizer.lr=3e-4, but got {setting!r}.")
    return group, key, yamlio.parse(text, f"--set {group}.{key}")


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

"""``ppo-hpo sweep``, which tunes PPO on an environment."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ppo_hpo.cli import common
from ppo_hpo.spec.errors import UserError, named_as
from ppo_hpo.trial import process


def add_commands(commands: common.Commands) -> None:
    """Add ``sweep``."""
    sweep = commands.add_parser("sweep", command=_sweep, help="tune PPO on an environment, in one command",
        description="Tune PPO on an environment. The sweep's files go to a directory named after it. Rerun "
        "the command to resume. Raise --max-trials to add trials.")  # fmt: skip
    sweep.add_argument("what", nargs="?", metavar="ENV|FILE",
        help="an environment's id (then --space chooses the space), or a space's YAML file, which names the "
        "environment; not needed to resume a sweep by its --name")  # fmt: skip
    # A second spelling of the positional argument, as in other tools.
    sweep.add_argument("--env", metavar="ENV", help=argparse.SUPPRESS)
    _add_search(sweep.add_argument_group("what is searched"))
    _add_execution(sweep.add_argument_group("how trials run"))
    _add_files(sweep.add_argument_group("where files go"))
    sweep.add_argument("--quiet", action="store_true", help="hide progress and print only the final summary")


def _add_search(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--space", metavar="NAME",
        help="a shipped space (see `ppo-hpo space list`) or a YAML file (default: the space named "
        "`default`)")  # fmt: skip
    group.add_argument("--algorithm", metavar="NAME",
        help="Orion's algorithm, or its name with options: '{asha: {seed: 2, num_rungs: 3}}' (default: asha, "
        "or random if every trial has equally many epochs). See "
        "docs/reference/orion-algorithms.md.")  # fmt: skip
    trials = group.add_argument("--max-trials", type=common.positive, metavar="N",
        help="how many trials to complete in all; a promotion counts as a trial (default: 40); also "
        "--n-trials")  # fmt: skip
    common.also(group, trials, "--n-trials")
    group.add_argument("--seeds", type=common.positive, metavar="N",
        help="train each trial with this many seeds, and score it by the mean over them, unless "
        "task.aggregate names another statistic (default: the space's task.seeds, or 1)")  # fmt: skip
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", metavar="N", type=_epochs,
        help="train every trial for N epochs of task.steps_per_epoch environment steps")  # fmt: skip
    length.add_argument("--fidelity", metavar="RANGE", dest="epochs",
        help="let the algorithm choose the epochs: 'fidelity(1, 16, base=4)' promotes good trials from 1 to "
        "4 to 16 epochs (default: the range in the space)")  # fmt: skip
    group.add_argument("--set", action="append", default=[], metavar="GROUP.KEY=VALUE", dest="settings",
        help="give one hyperparameter a fixed value, as in --set env.n_envs=4; repeatable")  # fmt: skip
    group.add_argument("--warm-start", action="append", metavar="PRESET",
        help="a preset (shipped) or a trial's YAML file, whose values a new sweep tries first; "
        "repeatable")  # fmt: skip
    group.add_argument("--from", metavar="NAME", dest="start_from",
        help="name or directory of an earlier sweep or experiment: its completed trials that lie in the "
        "space are added to this one, and count (default space: that of NAME)")  # fmt: skip


def _add_execution(group: argparse._ArgumentGroup) -> None:
    workers = group.add_argument("--workers", type=common.positive, metavar="N",
        help="how many trials run at a time (default: the number of usable CPU cores, or the cluster's "
        "capacity); also --n-jobs")  # fmt: skip
    common.also(group, workers, "--n-jobs")
    group.add_argument("--executor", metavar="NAME|ADDRESS",
        help="what runs the trials: workers (processes of this machine, the default), single, joblib, "
        "poolexecutor, dask, ray, or a cluster's address such as tcp://HOST:8786; options as in '{ray: "
        "{num_gpus: 0.5}}'. See docs/how-to/many-machines.md.")  # fmt: skip
    common.add_devices(group, trials_per_device=True)
    common.add_stop_poor(group)


def _add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--name", metavar="NAME", type=common.experiment_name,
        help="name of the sweep (default: ENV-ALGORITHM, or FILE-ALGORITHM if you gave a space's file), "
        "as in cartpole-v1-asha")  # fmt: skip
    group.add_argument("--dir", metavar="DIR", type=common.directory,
        help="directory for the sweep's output (default: the sweep's name)")  # fmt: skip
    group.add_argument("--storage", metavar="FILE|URL",
        help="Orion's database (default: orion.sqlite in the sweep's directory)")  # fmt: skip
    common.add_checkpoint_store(group)


def _epochs(text: str) -> int | str:
    """A number of epochs, or the prior of a fidelity."""
    return text if "(" in text else common.positive(text)


def _sweep(arguments: argparse.Namespace) -> int:
    process.find_modules_here()
    with named_as(_typed(arguments)):
        return _run(arguments)


def _typed(arguments: argparse.Namespace) -> dict[str, str]:
    """The options of the arguments of `ppo_hpo.sweep`, and of hyperparameters that have an option here."""
    names = {
        name: f"--{name.replace('_', '-')}"
        for name in ("env", "space", "algorithm", "max_trials", "seeds", "warm_start", "executor", "device",
                     "trials_per_device", "stop_poor", "name", "storage", "checkpoint_store")
    }  # fmt: skip
    names["start_from"] = "--from"
    names |= {"n_workers": "--workers", "overrides": "--set", "directory": "--dir", "progress": "--quiet"}
    names["epochs"] = "--fidelity" if isinstance(arguments.epochs, str) else "--epochs"
    given = {"task.seeds": arguments.seeds, "task.epochs": arguments.epochs}
    return names | {name: names[name[5:]] for name, value in given.items() if value is not None}


def _run(arguments: argparse.Namespace) -> int:
    from ppo_hpo.spec.settings import parse_setting
    from ppo_hpo.sweeps.run import SweepInterrupted, sweep

    env, space = _env_and_space(arguments)
    overrides: dict[str, Any] = {}
    for setting in arguments.settings:
        group, key, value = parse_setting(setting)
        overrides[f"{group}.{key}"] = value
    try:
        result = sweep(
            env, space, _with_options(arguments.algorithm, "--algorithm"), max_trials=arguments.max_trials,
            n_workers=arguments.workers, seeds=arguments.seeds, epochs=arguments.epochs, overrides=overrides,
            warm_start=arguments.warm_start, start_from=arguments.start_from,
            executor=_with_options(arguments.executor, "--executor"),
            device=arguments.device, trials_per_device=arguments.trials_per_device,
            stop_poor=arguments.stop_poor, name=arguments.name, directory=arguments.dir,
            storage=arguments.storage, checkpoint_store=arguments.checkpoint_store,
            progress=not arguments.quiet,
        )  # fmt: skip
    except SweepInterrupted as stop:
        code = 128 + stop.signum
        print(f"ppo-hpo: {stop} (exit code {code})", file=sys.stderr)
        return code
    print(result)
    return 0


def _env_and_space(arguments: argparse.Namespace) -> tuple[str | None, str | None]:
    """The environment and the space, either of which the positional argument may name."""
    env, space = arguments.env, arguments.space
    if arguments.what is None:
        if env is None and space is None and arguments.name is None:
            raise UserError(
                "Name an environment, as in: ppo-hpo sweep CartPole-v1. See ppo-hpo sweep --help."
            )
    elif arguments.what.endswith((".yaml", ".yml")):
        if space is not None:
            raise UserError(f"Two spaces were given, {arguments.what} and {space}. Leave one out.")
        space = arguments.what
    elif env not in (None, arguments.what):
        raise UserError(f"Two environments were given, {arguments.what} and {env}. Leave one out.")
    else:
        env = arguments.what
    return env, space


def _with_options(text: str | None, option: str) -> Any:
    """A name, or the mapping of a name to options that the text holds."""
    from ppo_hpo.spec import yamlio

    # An address is a name, although YAML would take its colon for a key's.
    return text if text is None or "{" not in text else yamlio.parse(text, option)

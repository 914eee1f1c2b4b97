"""The command ``ppo-hpo``. Each subcommand imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ppo_hpo import __version__
from ppo_hpo.spec.errors import UserError
from ppo_hpo.trial import process

_DEVICE = (
    "auto (default): a GPU for images, if there is one, else the CPU; cpu; cuda: the GPUs here are shared "
    "out; cuda:N or cuda:N,M: these (docs/devices.md)"
)
_CONFIG = "Orion's configuration file of the hunt (of a sweep here: NAME/orion.yaml, needs not be given)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and what to do, as for every other bad input."""
        self.exit(2, f"ppo-hpo: error: {message}. See {self.prog} --help.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code. Without ``argv`` it is the process's, which ends with it."""
    parser = _build_parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "command"):
        parser.print_help()
        return 2
    code = process.exit_code(lambda: int(arguments.command(arguments)))
    if argv is None:
        process.leave(code)
    return code


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ppo-hpo", description="Tune PPO with Orion: trials that never get lost.")
    parser.add_argument("--version", action="version", version=f"ppo-hpo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="run one trial: what `orion hunt` calls, and as useful by hand",
        description="Run one trial, or go on with it. Under `orion hunt` the trial's directory and its "
        "result file come from Orion; by hand, the same command always finds the same trial again.",
    )
    run.add_argument("--config", required=True, metavar="FILE", help="YAML file, or a shipped preset's name")
    run.add_argument("--set", action="append", default=[], metavar="GROUP.KEY=VALUE", dest="settings",
                     help="replace one value of the file; may be given many times")  # fmt: skip
    run.add_argument("--device", default="auto", help=_DEVICE)
    _add_trials_per_device(run)
    run.add_argument("--seed", type=int, metavar="N", help="the same as --set task.seed=N")
    run.add_argument("--epochs", type=int, metavar="N",
                     help="epochs to train in all, at most the file's task.max_epochs")  # fmt: skip
    run.add_argument("--dir", metavar="DIR", help="the trial's directory (default: from Orion, else "
                     "ppo-hpo-runs/ENV-HASH)")  # fmt: skip
    run.add_argument("--warm", action="store_true", help="let a process of yours that has torch imported "
                     "run it, started where there is none (docs/warm.md)")  # fmt: skip
    run.add_argument("--takeover", action="store_true",
                     help="end a process that trains this trial, instead of waiting for it")  # fmt: skip
    run.add_argument("--checkpoint-store", "--store", metavar="URL", help="keep checkpoints there too, for "
                     "workers that share no file system: s3://..., sftp://..., a directory (default: "
                     "$PPO_HPO_STORE)")  # fmt: skip
    run.add_argument("--parent", metavar="ID", help="the trial that this one comes from, to be found in the "
                     "store; under orion hunt: --parent '{trial.parent}'")  # fmt: skip
    run.add_argument("--retries", type=int, metavar="N",
                     help="after a fault that may pass, go on from the last checkpoint, up to N times for "
                     "each epoch (default: 2 under Orion, else 0)")  # fmt: skip
    _add_stop_poor(run)
    run.set_defaults(command=_run)

    _add_sweep(commands)

    warm = commands.add_parser("warm", help="list or stop the processes that `run --warm` has started")
    warm.add_argument("--stop", action="store_true", help="end each when its trials have ended")
    warm.set_defaults(command=_warm)

    space = commands.add_parser("space", help="list, show or copy the shipped search spaces and presets")
    actions = space.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="names, and how many hyperparameters each searches")
    listing.set_defaults(command=_space_list)
    show = actions.add_parser("show", help="print one")
    show.add_argument("name", metavar="NAME")
    show.set_defaults(command=_space_show)
    check = actions.add_parser("check", help="check one, running nothing of it; before orion hunt reads it")
    check.add_argument("name", metavar="NAME", help="a file, or a shipped name")
    check.set_defaults(command=_space_check)
    copy = actions.add_parser("copy", help="copy one, to change it")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("destination", metavar="DEST", help="a file, or a directory")
    copy.set_defaults(command=_space_copy)

    report = commands.add_parser(
        "report",
        help="what an experiment found: best trial, steps, what early stopping saved",
        description="Summarise an experiment of Orion's.",
    )
    report.add_argument("name", metavar="NAME", help="the experiment's name")
    report.add_argument("-c", "--config", metavar="FILE", help=_CONFIG)
    report.add_argument("--html", metavar="FILE", help="also write a page with pictures")
    report.set_defaults(command=_report)

    best = commands.add_parser(
        "best",
        help="the best trials: again on fresh seeds, as a preset, as a policy",
        description="Print the best trials of an experiment of Orion's. With --test-seeds each is trained "
        "again from scratch on fresh seeds, beside the environment's preset or the default, and what is left "
        "of its score is told. Stopped, the same command goes on where it was.",
    )
    best.add_argument("name", metavar="NAME", help="the experiment's name")
    best.add_argument("-c", "--config", metavar="FILE", help=_CONFIG)
    best.add_argument("--top", type=int, default=3, metavar="K", help="so many configurations (default: 3)")
    best.add_argument("--test-seeds", type=int, default=0, metavar="N",
                      help="train each from scratch on N fresh seeds; 10 are a good number")  # fmt: skip
    best.add_argument("--workers", type=int, default=2, metavar="N",
                      help="processes that train (default: 2)")  # fmt: skip
    best.add_argument("--device", default="auto", help=_DEVICE)
    best.add_argument("--dir", metavar="DIR", help="where test trials go (default: best in the experiment's "
                      "working directory)")  # fmt: skip
    best.add_argument("--against", metavar="PRESET", help="what is trained beside them: a preset, a file, "
                      "default or none (default: the environment's preset, else default)")  # fmt: skip
    best.add_argument("--html", metavar="FILE", help="also write a page with a picture of the test scores")
    best.add_argument("--export", metavar="FILE", help="write the best configuration as a preset")
    best.add_argument("--policy", metavar="FILE",
                      help="write the best trial's policy; ONNX if FILE ends in .onnx")  # fmt: skip
    best.set_defaults(command=_best)

    clean = commands.add_parser(
        "clean",
        help="remove checkpoints of trials that can no longer be promoted",
        description="Remove the checkpoints of completed trials that Orion can no longer promote: of the "
        "highest fidelity, or promoted already. The best keeps its newest; curves, logs and results stay.",
    )
    clean.add_argument("name", metavar="NAME", help="the experiment's name")
    clean.add_argument("-c", "--config", metavar="FILE", help=_CONFIG)
    clean.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    clean.add_argument("--finished", action="store_true",
                       help="all others too: max_trials is reached, and nobody will raise it")  # fmt: skip
    clean.add_argument("--keep", type=int, default=1, metavar="N",
                       help="so many of the best trials keep their newest (default: 1)")  # fmt: skip
    clean.add_argument("--store", metavar="URL", help="clean there too (default: $PPO_HPO_STORE)")
    clean.set_defaults(command=_clean)

    lineage = commands.add_parser(
        "lineage",
        help="who came from whom: promotions and forks as a tree",
        description="Print the trials of an experiment of Orion's, each below the one it came from.",
    )
    lineage.add_argument("name", metavar="NAME", help="the experiment's name")
    lineage.add_argument("-c", "--config", metavar="FILE", help=_CONFIG)
    lineage.set_defaults(command=_lineage)

    retry = commands.add_parser(
        "retry",
        help="put failed or stuck trials back: the next worker goes on with them",
        description="Put broken trials of an experiment of Orion's back, and reserved ones that nobody "
        "trains any more: the next worker goes on with them from their checkpoint. What a killed worker left "
        "behind for the experiment's algorithm, its lock and a result that was not told, is mended too.",
    )
    retry.add_argument("name", metavar="NAME", help="the experiment's name")
    retry.add_argument("-c", "--config", metavar="FILE", help=_CONFIG)
    retry.add_argument("--trial", metavar="ID", help="only this one, by its id or the beginning of it")
    retry.add_argument("--status", choices=["broken", "reserved"], help="only those of this status")
    retry.set_defaults(command=_retry)

    doctor = commands.add_parser(
        "doctor",
        help="what is installed here, how a database is, and what is wrong with it",
        description="Versions, devices, extras, and the state of a database: broken and stuck trials, locks "
        "that a killed worker left. Each thing that needs doing is one sentence that says how. Exit code 1 "
        "if there is one.",
    )
    doctor.add_argument("-c", "--config", metavar="FILE", help="Orion's configuration file, for its database")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_trials_per_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials-per-device", type=int, metavar="N", help="trials that one GPU trains at a "
                        "time, of all sweeps and hunts of yours here (default: as many as come)")  # fmt: skip


def _add_stop_poor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stop-poor",
        action="store_true",
        help="stop a trial between two rungs, if its best return is below the median of the experiment's "
        "others (docs/sweeps.md)",
    )


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="tune PPO on an environment, or go on with it: the whole sweep in one command",
        description="Tune PPO on an environment with Orion, or go on with that. Everything lies in a "
        "directory named after the sweep; the same command goes on, and so does `orion hunt`, as it says in "
        "the end.",
    )
    sweep.add_argument("what", nargs="?", metavar="FILE|ENV", help="a space's file (ending in .yaml), or an "
                       "environment's id; left out, --name says which sweep goes on")  # fmt: skip
    sweep.add_argument("--space", metavar="NAME", help="a shipped space or a file (default: default)")
    sweep.add_argument("--algorithm", metavar="NAME", help="Orion's name of it, or with its options: "
                       "'{asha: {seed: 2, num_rungs: 3}}' (default: asha)")  # fmt: skip
    sweep.add_argument("--max-trials", type=int, metavar="N", help="to be completed in all (default: 40)")
    sweep.add_argument("--workers", type=int, metavar="N", help="trials at a time (default: 1)")
    sweep.add_argument("--seeds", type=int, metavar="N", help="seeds that each trial trains")
    sweep.add_argument("--name", metavar="NAME", help="of the sweep (default: environment and algorithm)")
    sweep.add_argument("--dir", metavar="DIR", help="where everything goes (default: the sweep's name)")
    sweep.add_argument("--storage", metavar="FILE|URL",
                       help="Orion's database (default: orion.sqlite in the sweep's directory)")  # fmt: skip
    sweep.add_argument("--executor", metavar="NAME|ADDRESS", help="what runs the trials: workers, single, "
                       "joblib, poolexecutor, dask, ray, tcp://..., ray://..., with options as "
                       "{ray: {num_gpus: 0.5}} (default: workers; docs/distributed.md)")  # fmt: skip
    sweep.add_argument("--device", default="auto", metavar="NAME", help=_DEVICE)
    _add_trials_per_device(sweep)
    sweep.add_argument("--warm-start", action="append", metavar="PRESET",
                       help="a preset or a configuration's file, to be tried first; repeatable")  # fmt: skip
    sweep.add_argument("--epochs", metavar="PRIOR",
                       help="replaces the space's fidelity: 'fidelity(1, 16, base=4)', or a number"
                       )  # fmt: skip
    sweep.add_argument("--set", action="append", default=[], metavar="GROUP.KEY=VALUE",
                       dest="settings", help="fix a value; repeatable")  # fmt: skip
    sweep.add_argument("--store", metavar="URL", help="keep checkpoints there too, for workers that share no "
                       "file system")  # fmt: skip
    _add_stop_poor(sweep)
    sweep.add_argument("--quiet", action="store_true", help="print only what was found")
    sweep.set_defaults(command=_sweep)


# ------------------------------------------------------------------------------ run


def _run(arguments: argparse.Namespace) -> int:
    from ppo_hpo.trial import run_command

    fields = run_command.RunRequest.__dataclass_fields__
    request = run_command.RunRequest(**{name: getattr(arguments, name) for name in fields})
    if arguments.warm or os.environ.get("PPO_HPO_WARM") == "1":
        process.raise_on_signals()
        from ppo_hpo.trial import preload_client

        code = preload_client.run(vars(request))
        if code is not None:
            return code
    return run_command.run_and_exit_code(request)


def _warm(arguments: argparse.Namespace) -> int:
    from ppo_hpo.trial import preload_client

    try:
        for process in preload_client.servers():
            if arguments.stop:
                os.kill(process, signal.SIGTERM)
            print(f"process {process}{': asked to stop' if arguments.stop else ''}")
    except OSError as error:
        raise UserError(f"Warm servers cannot be listed: {error}.") from None
    return 0


# ---------------------------------------------------------------------------- sweep


def _sweep(arguments: argparse.Namespace) -> int:
    from ppo_hpo.spec import yamlio
    from ppo_hpo.sweeps.run import SweepInterrupted, sweep
    from ppo_hpo.trial.run_command import parse_setting

    env, space = arguments.what, arguments.space
    if env is not None and env.endswith((".yaml", ".yml")):
        if space is not None:
            raise UserError(f"Two spaces were given, {env} and {space}. Leave one out.")
        env, space = None, env
    overrides: dict[str, dict[str, Any]] = {}
    for setting in arguments.settings:
        group, key, value = parse_setting(setting)
        overrides.setdefault(group, {})[key] = value

    def parsed(name: str) -> Any:
        text = getattr(arguments, name)
        # An address is a word, though YAML would take its colon for a key's.
        return text if text is None or "{" not in text else yamlio.parse(text, f"--{name}")

    epochs = arguments.epochs
    try:
        result = sweep(
            env, space, parsed("algorithm"), name=arguments.name, max_trials=arguments.max_trials,
            n_workers=arguments.workers, seeds=arguments.seeds, storage=arguments.storage,
            executor=parsed("executor"), device=arguments.device,
            trials_per_device=arguments.trials_per_device, warm_start=arguments.warm_start,
            epochs=int(epochs) if epochs is not None and epochs.isdigit() else epochs,
            overrides=overrides, directory=arguments.dir, store=arguments.store,
            stop_poor=arguments.stop_poor, progress=not arguments.quiet,
        )  # fmt: skip
    except SweepInterrupted as stop:
        code = 128 + stop.signum
        print(f"ppo-hpo: {stop} (exit code {code})", file=sys.stderr)
        return code
    print(result)
    return 0


# ---------------------------------------------------------------------------- space


def _space_list(arguments: argparse.Namespace) -> int:
    from ppo_hpo.spec.space import list_spaces, read_space

    for name in list_spaces():
        space = read_space(name)
        searched = sum(len(values) for values in space.priors.values())
        kind = f"{searched} searched" if searched else "preset"
        print(f"{name:24} {kind:14} {space.fixed.get('env', {}).get('id', '')}")
    return 0


def _space_show(arguments: argparse.Namespace) -> int:
    from ppo_hpo.spec.space import space_path

    try:
        text = space_path(arguments.name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{arguments.name} cannot be read: {getattr(error, 'strerror', None) or error}."
        ) from None
    print(text, end="")
    return 0


def _space_check(arguments: argparse.Namespace) -> int:
    from ppo_hpo.spec.space import read_space

    space = read_space(arguments.name)
    searched = sum(len(values) for values in space.priors.values())
    env = str(space.fixed.get("env", {}).get("id", "the default environment"))
    module, colon, _ = env.rpartition(":")
    print(f"{space.path}: {searched} searched, all priors are plain values; trains {env}"
          f"{f', which imports the module {module}' if colon else ''}")  # fmt: skip
    return 0


def _space_copy(arguments: argparse.Namespace) -> int:
    from ppo_hpo.spec.space import copy_space

    print(copy_space(arguments.name, arguments.destination))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ppo_hpo.inspect.report import report

    print(report(arguments.name, arguments.config, html=arguments.html))
    return 0


def _best(arguments: argparse.Namespace) -> int:
    # `python -m` would find the modules of environments beside the user; a console script has to be told.
    if "" not in sys.path:
        sys.path.insert(0, "")
    if arguments.test_seeds:
        process.raise_on_signals()
    from ppo_hpo.sweeps.best import best

    print(best(
        arguments.name, arguments.config, top=arguments.top, test_seeds=arguments.test_seeds,
        workers=arguments.workers, device=arguments.device, directory=arguments.dir,
        against=arguments.against, export=arguments.export, policy=arguments.policy, html=arguments.html,
        progress=sys.stderr,
    ))  # fmt: skip
    return 0


def _clean(arguments: argparse.Namespace) -> int:
    from ppo_hpo.inspect.clean import clean
    from ppo_hpo.state.remote_store import open_store

    print(clean(arguments.name, arguments.config, dry_run=arguments.dry_run, finished=arguments.finished,
                keep=arguments.keep, store=open_store(arguments.store)))  # fmt: skip
    return 0


def _lineage(arguments: argparse.Namespace) -> int:
    from ppo_hpo.inspect.lineage import lineage

    print(lineage(arguments.name, arguments.config))
    return 0


def _retry(arguments: argparse.Namespace) -> int:
    from ppo_hpo.inspect.retry import retry

    print(retry(arguments.name, arguments.config, trial=arguments.trial, status=arguments.status))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from ppo_hpo.inspect.doctor import examine, to_json

    report = examine(arguments.config, progress=sys.stderr)
    print(to_json(report) if arguments.json else report)
    return 1 if report.findings else 0

"""Commands on experiments: ``report``, ``best``, ``lineage``, ``retry``, ``clean`` and ``doctor``."""

from __future__ import annotations

import argparse
import sys

from ppo_hpo.cli import common
from ppo_hpo.spec.errors import UserError
from ppo_hpo.trial import process


def add_commands(commands: common.Commands) -> None:
    """Add all of them, in the order of the help."""
    for add in (_add_report, _add_best, _add_lineage, _add_retry, _add_clean, _add_doctor):
        add(commands)


def _add_report(commands: common.Commands) -> None:
    report = commands.add_parser("report", command=_report,
        help="summarize an experiment: best trial, cost, steps avoided",
        description="Summarize an experiment: its best trial, its cost, and how many steps it avoided by "
        "stopping and resuming trials.")  # fmt: skip
    common.add_experiment(report)
    report.add_argument("--html", metavar="FILE", help="also write a web page with plots")


@common.quietly
def _report(arguments: argparse.Namespace) -> int:
    from ppo_hpo.inspect.report import report

    print(report(arguments.name, arguments.orion_config, html=arguments.html))
    return 0


def _add_best(commands: common.Commands) -> None:
    best = commands.add_parser("best", command=_best,
        help="print, retrain or export the best trials",
        description="Print the best trials of an experiment. With --test-seeds, retrain each one from "
        "scratch on fresh seeds (seeds that no trial has trained), and compare the scores with those of a "
        "preset or the defaults of ppo_hpo. Rerun a command to resume interrupted trials.")  # fmt: skip
    common.add_experiment(best)
    best.add_argument("--top", type=common.positive, default=3, metavar="K",
        help="how many of the best configurations to print and retrain (default: 3)")  # fmt: skip
    best.add_argument("--export", metavar="FILE",
        help="write the configuration with the best score in the experiment as a trial file")  # fmt: skip
    best.add_argument("--policy", metavar="FILE",
        help="write the policy of the experiment's best trial, as it was trained there (safetensors; ONNX if "
        "FILE ends in .onnx, which needs ppo-hpo[onnx])")  # fmt: skip
    test = best.add_argument_group("retraining on fresh seeds")
    test.add_argument("--test-seeds", type=common.non_negative, default=0, metavar="N",
        help="retrain each configuration on N fresh seeds; 10 is a good choice (default: 0, which retrains "
        "nothing)")  # fmt: skip
    test.add_argument("--test-episodes", type=common.positive, default=100, metavar="N",
        help="evaluate each retrained policy on N fresh episodes, which no trial was evaluated on (default: "
        "100)")  # fmt: skip
    test.add_argument("--against", metavar="PRESET",
        help="what to compare with: a preset (shipped), a trial file, `default` (the defaults of ppo_hpo) or "
        "`none` (default: the environment's preset, else `default`)")  # fmt: skip
    workers = test.add_argument("--workers", type=common.positive, metavar="N",
        help="how many trials run at a time (default: the number of usable CPU cores); also "
        "--n-jobs")  # fmt: skip
    common.also(test, workers, "--n-jobs")
    common.add_devices(test)
    place = test.add_argument("--test-dir", metavar="DIR", type=common.directory,
        help="directory for the retrained trials (default: best, in the experiment's working "
        "directory)")  # fmt: skip
    common.also(test, place, "--dir")
    test.add_argument("--html", metavar="FILE", help="also write a web page with a plot of the test scores")


@common.quietly
def _best(arguments: argparse.Namespace) -> int:
    process.find_modules_here()
    from ppo_hpo.sweeps.best import best
    from ppo_hpo.sweeps.retrain import Retraining

    retraining = None
    if arguments.test_seeds:
        process.raise_on_signals()
        retraining = Retraining(
            arguments.test_seeds, arguments.test_episodes, arguments.against, arguments.workers,
            arguments.device, arguments.test_dir, arguments.html, progress=sys.stderr,
        )  # fmt: skip
    elif arguments.html is not None:
        raise UserError("`--html` draws test scores. Add --test-seeds N.")
    print(best(arguments.name, arguments.orion_config, top=arguments.top, retraining=retraining,
               export=arguments.export, policy=arguments.policy))  # fmt: skip
    return 0


def _add_lineage(commands: common.Commands) -> None:
    lineage = commands.add_parser("lineage", command=_lineage,
        help="show promotions and forks of trials as a tree",
        description="Print the trials of an experiment as a tree: each one below the trial it resumed "
        "from.")  # fmt: skip
    common.add_experiment(lineage)


@common.quietly
def _lineage(arguments: argparse.Namespace) -> int:
    from ppo_hpo.inspect.lineage import lineage

    print(lineage(arguments.name, arguments.orion_config))
    return 0


def _add_retry(commands: common.Commands) -> None:
    retry = commands.add_parser("retry", command=_retry,
        help="requeue failed or stuck trials",
        description="Requeue broken (failed) trials, and stuck ones: reserved trials that no worker trains "
        "any more. A reserved trial with a heartbeat in the last two minutes is skipped, unless --trial "
        "names it. The next worker resumes trials from their latest checkpoint. This also repairs what a "
        "killed worker left behind: the algorithm's lock, and results that were "
        "stored, but that the algorithm never received.")  # fmt: skip
    common.add_experiment(retry)
    retry.add_argument("--trial", metavar="ID", help="only this trial; the beginning of its id is enough")
    retry.add_argument("--status", choices=["broken", "reserved"], help="only trials of this status")


@common.quietly
def _retry(arguments: argparse.Namespace) -> int:
    from ppo_hpo.inspect.retry import retry

    print(retry(arguments.name, arguments.orion_config, trial=arguments.trial, status=arguments.status))
    return 0


def _add_clean(commands: common.Commands) -> None:
    clean = commands.add_parser("clean", command=_clean,
        help="remove checkpoints that no trial needs any more",
        description="Remove checkpoints of completed trials that were already promoted, or that reached "
        "the highest number of epochs in the space. Curves, logs and results stay.")  # fmt: skip
    common.add_experiment(clean)
    clean.add_argument("--dry-run", action="store_true", help="only print what would be removed")
    clean.add_argument("--finished", action="store_true",
        help="promise that nobody will raise max_trials; this also cleans trials that could still be "
        "promoted")  # fmt: skip
    clean.add_argument("--keep", type=common.non_negative, default=1, metavar="N",
        help="keep the latest checkpoint of the N best trials (default: 1)")  # fmt: skip
    common.add_checkpoint_store(clean, "also clean this checkpoint store")


@common.quietly
def _clean(arguments: argparse.Namespace) -> int:
    from ppo_hpo.inspect.clean import clean
    from ppo_hpo.state.remote_store import open_store

    print(clean(arguments.name, arguments.orion_config, dry_run=arguments.dry_run,
                finished=arguments.finished, keep=arguments.keep,
                store=open_store(arguments.checkpoint_store)))  # fmt: skip
    return 0


def _add_doctor(commands: common.Commands) -> None:
    doctor = commands.add_parser("doctor", command=_doctor,
        help="check the installation and a database, and say what to fix",
        description="Print versions, devices and extras, and check a database for broken trials, stuck "
        "trials and locks that a killed worker left. Each problem comes with its fix if one is known. "
        "The exit code is 1 if there is a problem.")  # fmt: skip
    common.add_orion_config(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON, for other programs")


@common.quietly
def _doctor(arguments: argparse.Namespace) -> int:
    from ppo_hpo.inspect.doctor import examine, to_json

    report = examine(arguments.orion_config, progress=sys.stderr)
    print(to_json(report) if arguments.json else report)
    return 1 if report.findings else 0

"""``ppo-hpo run``, which trains one trial, and ``ppo-hpo preload``, which manages preloaded processes."""

from __future__ import annotations

import argparse
import os
import signal

from ppo_hpo.cli import common
from ppo_hpo.spec.errors import UserError
from ppo_hpo.trial import process


def add_commands(commands: common.Commands) -> None:
    """Add ``run`` and ``preload``."""
    _add_run(commands)
    preload = commands.add_parser("preload", command=_preload,
        help="list or stop the processes that `run --preload` uses",
        description="List your preloaded processes on this machine. `ppo-hpo run --preload` starts one on "
        "demand. A preloaded process has already imported torch, so trials start faster. See "
        "docs/how-to/preload.md.")  # fmt: skip
    preload.add_argument("--stop", action="store_true", help="stop each process after its running trials")
    # The former name. `--help` does not list it.
    commands.add_parser("warm", parents=[preload], add_help=False)


def _add_run(commands: common.Commands) -> None:
    run = commands.add_parser("run", command=_run, help="train one trial; `orion hunt` calls this too",
        description="Train one trial, or resume it: rerun the same command to resume. Under `orion hunt`, "
        "Orion chooses the trial's directory and receives its result.")  # fmt: skip
    run.add_argument("--config", required=True, metavar="FILE",
        help="a trial file (YAML) or a preset (shipped); under `orion hunt`, a space's YAML "
        "file")  # fmt: skip
    run.add_argument("--set", action="append", default=[], metavar="GROUP.KEY=VALUE", dest="settings",
        help="give one hyperparameter a fixed value, as in --set optimizer.lr=3e-4; repeatable")  # fmt: skip
    run.add_argument("--epochs", type=int, metavar="N",
        help="stop after epoch N (at most task.max_epochs); an epoch is task.steps_per_epoch environment "
        "steps")  # fmt: skip
    run.add_argument("--seed", type=int, metavar="N", help="the same as --set task.seed=N")
    run.add_argument("--dir", metavar="DIR", type=common.directory,
        help="directory for the trial's output (default: under Orion the trial's directory, else "
        "ppo-hpo-runs/ENV-HASH)")  # fmt: skip
    common.add_devices(run, trials_per_device=True)
    preload = run.add_argument("--preload", action="store_true",
        help="run in a preloaded background process, started on demand. See "
        "docs/how-to/preload.md.")  # fmt: skip
    common.also(run, preload, "--warm")
    run.add_argument("--takeover", action="store_true",
        help="stop another process that trains this trial, instead of waiting for it")  # fmt: skip
    run.add_argument("--retries", type=int, metavar="N",
        help="after a failure that may be temporary, resume from the latest checkpoint, up to N times for "
        "each epoch (default: 2 under Orion, else 0)")  # fmt: skip
    common.add_stop_poor(run, "; this works only under `orion hunt`")
    common.add_checkpoint_store(run)
    run.add_argument("--from", metavar="NAME", dest="start_from",
        help="only under orion hunt: start a new experiment with the completed trials of experiment NAME "
        "that lie in the space; NAME may be the directory of a sweep")  # fmt: skip
    run.add_argument("--parent", metavar="ID",
        help="id of the trial that this one resumes from, only needed with --checkpoint-store; under orion "
        "hunt, write --parent '{trial.parent}'")  # fmt: skip


def _run(arguments: argparse.Namespace) -> int:
    from ppo_hpo.trial import run_command

    if arguments.start_from is not None and "ORION_TRIAL_ID" not in os.environ:
        raise UserError("`--from` is for `orion hunt`: a trial that is run by hand has no experiment.")
    fields = run_command.RunRequest.__dataclass_fields__
    request = run_command.RunRequest(**{name: getattr(arguments, name) for name in fields})
    if arguments.preload or "1" in (os.environ.get("PPO_HPO_PRELOAD"), os.environ.get("PPO_HPO_WARM")):
        process.raise_on_signals()
        from ppo_hpo.trial import preload_client

        code = preload_client.run(vars(request))
        if code is not None:
            return code
    return run_command.run_and_exit_code(request)


def _preload(arguments: argparse.Namespace) -> int:
    from ppo_hpo.trial import preload_client

    try:
        for server in preload_client.servers():
            if server.is_running() is None:
                print(f"{server}: cannot be seen from here. It ends by itself when it is idle.")
                continue
            with server.handle() as handle:
                if handle is not None and arguments.stop:
                    signal.pidfd_send_signal(handle, signal.SIGTERM)
                if handle is not None:
                    print(f"process {server.pid}{': asked to stop' if arguments.stop else ''}")
    except OSError as error:
        raise UserError(f"Preloaded processes cannot be listed: {error}.") from None
    return 0

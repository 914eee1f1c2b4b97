"""What subcommands share: a parser whose errors take one line, and options that several of them have."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from ppo_hpo.spec.errors import UserError

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line and names the command's ``--help``.

    ``command`` is the function that runs the subcommand.
    """

    def __init__(self, command: Callable[[argparse.Namespace], int] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if command is not None:
            self.set_defaults(command=command)

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` instead of ending the process."""
        raise UserError(f"{message.rstrip('.')}. See {self.prog} --help.")


def non_negative(text: str) -> int:
    """A whole number of at least 0."""
    return positive(text, 0)


def positive(text: str, low: int = 1) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = low - 1
    if number < low:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}, but got {text!r}")
    return number


def _device(text: str) -> str:
    """The name of a device, which is checked before anything is done with it."""
    if text == "auto":  # This is the default, which argparse sends through here too. It needs no import.
        return text
    from ppo_hpo.trial.gpu_detection import device_name

    try:
        return device_name(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("`device` ")) from None


def directory(text: str) -> str:
    """The path of a directory."""
    if not text:
        raise argparse.ArgumentTypeError("must name a directory, but got ''. Write . for the current one")
    return text


def experiment_name(text: str) -> str:
    """An experiment's name. A shell that completes the name of its directory appends a slash."""
    return text.rstrip("/") or text


def also(parser: argparse._ActionsContainer, action: argparse.Action, *names: str) -> None:
    """Accept more names for an option, which ``--help`` does not list."""
    other = copy.copy(action)
    other.option_strings, other.help, other.required = list(names), argparse.SUPPRESS, False
    parser._add_action(other)


def quietly(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """A command without Orion's warnings."""

    def hushed(arguments: argparse.Namespace) -> int:
        from ppo_hpo.orion.quiet import quiet

        with quiet():
            return command(arguments)

    return hushed


def add_experiment(parser: Parser) -> None:
    """Add the experiment's name, and the file that says where its database is."""
    parser.add_argument("name", metavar="NAME", type=experiment_name,
        help="name of a sweep or of an `orion hunt` experiment, or a sweep's directory")  # fmt: skip
    add_orion_config(parser, "NAME/orion.yaml (which `ppo-hpo sweep` writes), then ")


def add_orion_config(parser: Parser, tried_first: str = "") -> None:
    """Add Orion's configuration file; ``tried_first`` is what counts first without it."""
    action = parser.add_argument("-c", "--orion-config", metavar="FILE",
        help="Orion's configuration file, which says where the database is. Without it, ppo-hpo tries "
        f"{tried_first}the environment variables ORION_DB_TYPE and ORION_DB_ADDRESS, then the database in "
        "Orion's own configuration.")  # fmt: skip
    also(parser, action, "--config")


def add_devices(parser: argparse._ActionsContainer, *, trials_per_device: bool = False) -> None:
    """Add ``--device``, and ``--trials-per-device`` if the command has it."""
    parser.add_argument("--device", default="auto", metavar="NAME", type=_device,
        help="where to train: cpu; cuda (all GPUs, divided among the trials); cuda:N or cuda:N,M (only "
        "these); auto (the default: the GPUs if observations are images, else the CPU). See "
        "docs/how-to/gpus.md.")  # fmt: skip
    if trials_per_device:
        parser.add_argument("--trials-per-device", type=positive, metavar="N",
            help="how many trials one GPU trains at a time, counting all of your sweeps and `orion hunt` "
            "commands on this machine (default: unlimited)")  # fmt: skip


def add_stop_poor(parser: argparse._ActionsContainer, where: str = "") -> None:
    """Add the stopping of poor trials; ``where`` says where it works, if not everywhere."""
    parser.add_argument("--stop-poor", action="store_true",
        help="stop a trial early if its best return so far is below the median of the other trials' "
        f"mean returns up to the same epoch{where}. See docs/explanation/early-stopping.md.")  # fmt: skip


def add_checkpoint_store(parser: argparse._ActionsContainer, what: str = "") -> None:
    """Add a second place for checkpoints."""
    what = what or "also keep checkpoints at this URL, for workers that share no file system"
    text = f"{what}: s3://..., sftp://... or a directory (default: $PPO_HPO_STORE)"
    also(parser, parser.add_argument("--checkpoint-store", metavar="URL", help=text), "--store")

"""The command ``ppo-hpo``: its parser, and the call of the subcommand that the user typed."""

from __future__ import annotations

from collections.abc import Sequence

from ppo_hpo import __version__
from ppo_hpo.cli import completion, experiment, run, space, sweep
from ppo_hpo.cli.common import Parser
from ppo_hpo.trial import process


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments. None means those of this process, which then ends with the exit code.

    Returns:
        The exit code.
    """
    code = process.exit_code(lambda: _run(argv))
    if argv is None:
        process.leave(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if not hasattr(arguments, "command"):
        parser.print_help()
        return 2
    return int(arguments.command(arguments))


def build_parser() -> Parser:
    """The parser of the whole command. Each subcommand imports what it needs when it runs."""
    parser = Parser(
        prog="ppo-hpo",
        description="Tune Proximal Policy Optimization (PPO) with Orion. Interrupted trials resume.",
        epilog="Words: a space says what is searched; a preset is a space in which nothing is searched. "
        "Trials are compared at rungs, which are numbers of epochs. A promotion resumes a good trial up to "
        "the next rung. A fork resumes it with changed hyperparameters (PBT). To begin, run 40 trials: "
        "ppo-hpo sweep CartPole-v1. Help on one command: ppo-hpo COMMAND --help.",
    )
    parser.add_argument("--version", action="version", version=f"ppo-hpo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    # The help lists them in this order.
    for module in (sweep, run, experiment, space):
        module.add_commands(commands)
    completion.add_commands(commands, parser)
    return parser

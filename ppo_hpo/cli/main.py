"""The command ``ppo-hpo``: its parser, the call of a subcommand, and shell completion."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ppo_hpo import __version__
from ppo_hpo.cli import common, experiment, run, space, sweep
from ppo_hpo.cli.common import Parser
from ppo_hpo.spec.errors import UserError
from ppo_hpo.trial import process


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Without ``argv``, the arguments are those of this process, which then ends with that code.
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
        epilog="Words: an experiment is a sweep, or what `orion hunt` made. A space says what is searched; a "
        "preset is a space in which nothing is searched. "
        "Trials are compared at rungs, which are numbers of epochs. A promotion resumes a good trial up to "
        "the next rung. A fork resumes it with changed hyperparameters (PBT). To begin, run 40 trials: "
        "ppo-hpo sweep CartPole-v1. Help on one command: ppo-hpo COMMAND --help.",
    )
    parser.add_argument("--version", action="version", version=f"ppo-hpo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    # The help lists them in this order.
    for module in (sweep, run, experiment, space):
        module.add_commands(commands)
    _add_completion(commands, parser)
    return parser


def _add_completion(commands: common.Commands, parser: Parser) -> None:
    completion = commands.add_parser(
        "completion", help="print a shell completion script",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print a script that lets a shell complete commands, options and file names.\n"
        "Needs: pip install 'ppo-hpo[completion]'.",
        epilog="For bash:\n"
        "  ppo-hpo completion bash > ~/.local/share/bash-completion/completions/ppo-hpo\n"
        "For zsh, from a directory in $fpath:\n"
        "  ppo-hpo completion zsh > _ppo-hpo",
    )  # fmt: skip
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")
    completion.set_defaults(command=lambda arguments: _completion(parser, arguments.shell))


def _completion(parser: Parser, shell: str) -> int:
    try:
        import shtab
    except ImportError:
        raise UserError(
            "Shell completion needs shtab. Install it: pip install 'ppo-hpo[completion]'"
        ) from None
    _complete_files(parser, {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY})
    print(shtab.complete(parser, shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser, kinds: dict[str, Any]) -> None:
    """Let every argument complete paths whose metavar, or a part of it, is a key of ``kinds``."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command, kinds)
        elif isinstance(action.metavar, str):
            for part in action.metavar.split("|"):
                if part in kinds:
                    action.complete = kinds[part]  # type: ignore[attr-defined]

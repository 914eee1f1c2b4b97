"""``ppo-hpo completion``, which prints a script that lets a shell complete ``ppo-hpo`` commands."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ppo_hpo.spec.errors import UserError

if TYPE_CHECKING:
    from ppo_hpo.cli.common import Commands, Parser

_SHELLS = ("bash", "zsh", "tcsh")


def add_commands(commands: Commands, parser: Parser) -> None:
    """Add ``completion``, which describes the arguments of ``parser``."""
    completion = commands.add_parser(
        "completion",
        help="print a shell completion script",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Print a script that lets a shell complete commands, options and file names.\n"
        "Needs: pip install 'ppo-hpo[completion]'.",
        epilog="For bash:\n"
        "  ppo-hpo completion bash > ~/.local/share/bash-completion/completions/ppo-hpo\n"
        "For zsh, from a directory in $fpath:\n"
        "  ppo-hpo completion zsh > _ppo-hpo",
    )
    completion.add_argument("shell", choices=_SHELLS, help="the shell")
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

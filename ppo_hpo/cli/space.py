"""``ppo-hpo space``, which lists, prints, checks and copies search spaces."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ppo_hpo.spec.errors import UserError

if TYPE_CHECKING:
    from ppo_hpo.cli.common import Commands


def add_commands(commands: Commands) -> None:
    """Add ``space`` with its actions."""
    text = "list, print, check or copy search spaces and presets"
    space = commands.add_parser("space", help=text, description=f"{text.capitalize()}.")
    actions = space.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list the shipped ones")
    listing.set_defaults(command=_list)
    show = actions.add_parser("show", help="print one")
    show.add_argument("name", metavar="NAME", help="a shipped name, or a YAML file")
    show.set_defaults(command=_show)
    check = actions.add_parser("check", help="check one without training, before `orion hunt` reads it")
    check.add_argument("name", metavar="NAME", help="a shipped name, or a YAML file")
    check.set_defaults(command=_check)
    copy = actions.add_parser("copy", help="copy one, to edit it")
    copy.add_argument("name", metavar="NAME", help="a shipped name, or a YAML file")
    copy.add_argument("destination", metavar="DEST", help="a file or a directory")
    copy.set_defaults(command=_copy)


def _list(arguments: argparse.Namespace) -> int:
    from ppo_hpo.spec.space import list_spaces, read_space

    for name in list_spaces():
        space = read_space(name)
        searched = sum(len(values) for values in space.priors.values())
        kind = f"{searched} searched" if searched else "preset"
        print(f"{name:24} {kind:14} {space.fixed.get('env', {}).get('id', '')}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from ppo_hpo.spec.space import space_path

    try:
        text = space_path(arguments.name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{arguments.name} cannot be read: {reason}.") from None
    print(text, end="")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from ppo_hpo.spec.space import read_space

    space = read_space(arguments.name)
    searched = sum(len(values) for values in space.priors.values())
    env = str(space.fixed.get("env", {}).get("id", "the default environment"))
    module, colon, _ = env.rpartition(":")
    print(f"{space.path}: {searched} searched, all priors are plain values; trains {env}"
          f"{f', which imports the module {module}' if colon else ''}")  # fmt: skip
    return 0


def _copy(arguments: argparse.Namespace) -> int:
    from ppo_hpo.spec.space import copy_space

    print(copy_space(arguments.name, arguments.destination))
    return 0

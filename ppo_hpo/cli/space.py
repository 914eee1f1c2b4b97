"""``ppo-hpo space``, which lists, prints, checks and copies search spaces."""

from __future__ import annotations

import argparse
from typing import Any

from ppo_hpo.cli import common
from ppo_hpo.spec.errors import UserError


def add_commands(commands: common.Commands) -> None:
    """Add ``space`` with its actions."""
    text = "list, print, check or copy search spaces and presets"
    space = commands.add_parser("space", help=text, description=f"{text.capitalize()}.")
    actions = space.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, command, text in (
        ("list", _list, "list the shipped spaces and presets"),
        ("show", _show, "print a space or preset"),
        ("check", _check, "check that a space is valid; its priors are parsed, and no code in them runs"),
        ("copy", _copy, "copy a space or preset to a file, to edit it"),
    ):
        action = actions.add_parser(name, command=command, help=text, description=f"{text.capitalize()}.")
        if name != "list":
            described = "name of a shipped space or preset, or a YAML file"
            action.add_argument("name", metavar="NAME", help=described)
        if name == "copy":
            action.add_argument("destination", metavar="DEST", help="a new file, or an existing directory")


def _list(arguments: argparse.Namespace) -> int:
    from ppo_hpo.spec.space import list_spaces, read_space

    for name in list_spaces():
        space = read_space(name)
        kind = _searched(space) or "preset"
        print(f"{name:24} {kind:32} {space.fixed.get('env', {}).get('id', '')}")
    return 0


def _searched(space: Any) -> str:
    """What a space searches, in words; empty for a preset."""
    epochs = "epochs" in space.priors.get("task", {})
    number = sum(map(len, space.priors.values())) - epochs
    hyperparameters = f"{number} hyperparameter{'s' * (number != 1)}" if number else ""
    return ", and ".join(filter(None, [hyperparameters, "epochs" if epochs else ""]))


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
    searched = _searched(space)
    what = f"searches {searched}. All priors are valid and run no code" if searched else "nothing is searched"
    env = str(space.fixed.get("env", {}).get("id", "the default environment"))
    module, colon, _ = env.rpartition(":")
    imports = f", which imports the module {module}" if colon else ""
    print(f"{space.path}: {what}. Trials train on {env}{imports}.")
    return 0


def _copy(arguments: argparse.Namespace) -> int:
    from ppo_hpo.spec.space import copy_space

    print(copy_space(arguments.name, arguments.destination))
    return 0

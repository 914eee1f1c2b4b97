"""The file of `orion hunt ... ppo-hpo run --config FILE`, as `ppo-hpo` reads it.

Orion reads the file with a YAML reader of its own, evaluates its priors, and merges its content with that of
the file that the experiment was started with, so that a line that was removed stays in force. Here, before
Orion does any of this:

- The file is read and checked as by `ppo-hpo space check`. The options `--set`, `--seed` and `--epochs` of
  the command are applied to it.
- The result replaces what Orion has stored, or the hunt is refused if trials of another space were trained.
- With `--from OLD` a new experiment starts with the trials of another one that lie in its space.

Commands other than `ppo-hpo` are left alone. ``PPO_HPO_FIXES=0`` turns these patches off, and those of
`fixes`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ppo_hpo.orion import tested_version
from ppo_hpo.orion.hunt import runs_our_command

VARIABLE = "PPO_HPO_FIXES"


def install() -> bool:
    """Patch Orion in this process; whether it is patched."""
    return tested_version.install_once(VARIABLE, "Orion's reading of space files", _apply)


def install_quietly() -> None:
    """Patch Orion if that is possible. Orion works without the patches."""
    try:
        install()
    except Exception:
        logging.getLogger("ppo_hpo").warning("ppo_hpo could not install its hunt_space", exc_info=True)


def _apply() -> None:
    from orion.core.io.experiment_builder import ExperimentBuilder
    from orion.core.io.orion_cmdline_parser import OrionCmdlineParser

    build = _build(ExperimentBuilder.build)
    consolidate = _consolidate_config(ExperimentBuilder.consolidate_config)
    set_state = _set_state_dict(OrionCmdlineParser.set_state_dict)
    ExperimentBuilder.build = build
    ExperimentBuilder.consolidate_config = consolidate
    OrionCmdlineParser.set_state_dict = set_state


class SpaceConverter:
    """What Orion writes the file of each trial with. It has the methods of Orion's converters."""

    def get_state_dict(self) -> dict[str, Any]:
        """Nothing is stored."""
        return {}

    def set_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is restored."""

    def parse(self, filepath: str) -> Any:
        """Read a file."""
        from ppo_hpo.spec import yamlio

        return yamlio.load(Path(filepath))

    def generate(self, filepath: str, data: Any) -> None:
        """Write a file that `parse` reads as ``data``."""
        from ppo_hpo.spec import yamlio

        Path(filepath).write_text(yamlio.dump(data), encoding="utf-8")


def _set_state_dict(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def set_state_dict(self: Any, state: dict[str, Any]) -> None:
        from ppo_hpo.orion.stored_space import READER

        original(self, state)
        if READER.items() <= state.items():
            self.converter = SpaceConverter()

    return set_state_dict


def _consolidate_config(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Replace what Orion has stored of our file, instead of merging with it."""

    @functools.wraps(original)
    def consolidate_config(
        self: Any, name: str, version: int | None, config: dict[str, Any]
    ) -> dict[str, Any]:
        metadata = config.get("metadata") or {}
        own = {key: copy.deepcopy(metadata[key]) for key in ("parser", "priors") if key in metadata}
        found = original(self, name, version, config)
        if runs_our_command(metadata):
            found["metadata"].update(own)
        return found

    return consolidate_config


def _build(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def build(self: Any, name: str, version: int | None = None, branching: Any = None, **config: Any) -> Any:
        with _one_sentence():
            hunt = _hunt_of(self, name, version, config)
            if hunt is not None:
                config = hunt.prepare(config)
        experiment = original(self, name, version=version, branching=branching, **config)
        if hunt is not None and hunt.old is not None:
            from ppo_hpo.orion import known_trials

            with _one_sentence():
                print(known_trials.adopt(experiment, hunt.space, hunt.old), file=sys.stderr)
        return experiment

    return build


@contextlib.contextmanager
def _one_sentence() -> Iterator[None]:
    """Let `orion` print a `UserError` without a traceback, as it does with some exceptions of its own."""
    from orion.core.utils.exceptions import BranchingEvent

    from ppo_hpo.spec.errors import UserError

    class Refused(UserError, BranchingEvent):  # type: ignore[misc]
        pass

    try:
        yield
    except UserError as error:
        raise Refused(str(error)) from None


@dataclass(frozen=True)
class _Hunt:
    """A hunt of `ppo-hpo run`, before Orion opens its experiment."""

    builder: Any
    name: str
    stored: Mapping[str, Any] | None  # Orion's record of the experiment; None if it is new
    metadata: dict[str, Any]  # of the command
    space: Any  # of the file as it stands, with the options of the command
    path: str
    old: Any  # client of the experiment whose trials are taken over, or None

    def prepare(self, config: dict[str, Any]) -> dict[str, Any]:
        """Orion's configuration of the experiment, with the file as it stands."""
        from ppo_hpo.orion import stored_space
        from ppo_hpo.spec.errors import UserError
        from ppo_hpo.spec.space import to_document

        if self.stored is not None:
            config = self._refuse_or_start_anew(config, self.stored)
        parser, priors = self.metadata["parser"], self._priors()
        if not priors:
            raise UserError(
                f"Nothing is searched in {self.path}: every value is fixed. `ppo-hpo run` runs it."
            )
        parser.update(stored_space.READER)
        parser["config_file_data"] = to_document(self.space)
        parser["file_priors"] = [list(item) for item in priors.items()]
        self.metadata["priors"] = {**priors, **dict(parser.get("cmd_priors") or [])}
        return {**config, "metadata": self.metadata, "space": dict(self.metadata["priors"])}

    def _priors(self) -> dict[str, str]:
        """The searched hyperparameters by the names that Orion gives them, in the order of the file."""
        return {
            f"/{group}/{key.replace('.', '/')}": prior
            for group, priors in self.space.priors.items()
            for key, prior in priors.items()
        }

    def _refuse_or_start_anew(self, config: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
        from ppo_hpo.orion import stored_space
        from ppo_hpo.spec.errors import UserError
        from ppo_hpo.spec.space import difference

        content, before = stored_space.content_of(stored), stored_space.stored_space(stored)
        if content is None:
            return config
        changed = "its stored space is not valid" if before is None else difference(before, self.space)
        if changed is None:
            return config
        storage = self.builder.storage
        begun = stored_space.what_has_begun(storage, stored)
        if begun is None and len(storage.fetch_experiments({"name": self.name})) == 1:
            stored_space.discard(storage, stored)
            logging.getLogger("ppo_hpo").warning(
                "the experiment %r starts anew with %s: nothing was trained yet", self.name, self.path
            )
            kept = {key: stored[key] for key in stored_space.KEPT if stored.get(key) is not None}
            return {**kept, **{key: value for key, value in config.items() if value is not None}}
        raise UserError(
            f"The experiment {self.name!r} has another space: {changed}, and {begun or 'it has versions'}. "
            f"Undo the change in {self.path}, or start a new experiment with the trials that lie in the new "
            f"space: orion hunt -n NEW-NAME --working-dir NEW-DIR ... ppo-hpo run --config {self.path} "
            f"--from {self.name}"
        )


def _hunt_of(builder: Any, name: str, version: int | None, config: Mapping[str, Any]) -> _Hunt | None:
    """The hunt that Orion is about to open; None if it is none of `ppo-hpo run` with a file."""
    metadata = config.get("metadata") or {}
    # Orion's command line says so in its configuration.
    resumed = not metadata.get("user_args") and "user_script_config" in config
    if not resumed and not runs_our_command(metadata):
        return None
    stored = builder.fetch_config_from_db(name, version) or None
    if resumed:
        metadata = (stored or {}).get("metadata") or {}
    path = (metadata.get("parser") or {}).get("file_config_path")
    if not runs_our_command(metadata) or not path or (resumed and not Path(path).exists()):
        return None
    options = _options_of(metadata["user_args"])
    space = _space(options, path)
    old = None if options.start_from is None else _old(builder, options.start_from, config, name)
    return _Hunt(builder, name, stored, copy.deepcopy(dict(metadata)), space, path, old)


def _old(builder: Any, old: str, config: Mapping[str, Any], name: str) -> Any:
    from ppo_hpo.orion import known_trials

    return known_trials.experiment_to_adopt(builder, old, name, config.get("working_dir"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from ppo_hpo.spec.errors import UserError

        raise UserError(f"{message.rstrip('.')}. See ppo-hpo run --help.")


def _options_of(command: Sequence[str]) -> argparse.Namespace:
    """The options of `ppo-hpo run` that change what is trained."""
    parser = _Parser(add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--set", action="extend", nargs="+", default=[], dest="settings")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--from", dest="start_from")
    return parser.parse_known_args([str(word) for word in command])[0]


def _space(options: argparse.Namespace, path: str) -> Any:
    from ppo_hpo.spec.space import read_configuration, space_of

    content = read_configuration(path, options.settings, options.seed, options.epochs)
    if options.epochs is not None:
        content["task"].setdefault("max_epochs", options.epochs)
    return space_of(content, path, Path(path))

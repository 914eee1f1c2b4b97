"""Search spaces: YAML files with fixed values, and with Orion priors for what is searched.

Three readers use the same file. `orion hunt --config` replaces its priors by values, `get_space` returns it
for ``build_experiment(space=...)``, and `ppo-hpo run --config` trains it once it has no priors. A file
without priors is a preset.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.combinations import check_combinations
from ppo_hpo.spec.config import GROUPS, check_group, check_key, check_value, without_effectless
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.prior import check_prior, highest_fidelity

#: Begins a value that is a prior.
MARK = "orion~"


@dataclass(frozen=True)
class Space:
    """The checked content of one space file: group to key to what it gives."""

    name: str  # of the space, or the path as it was given
    path: Path
    fixed: Mapping[str, Mapping[str, Any]]  # values that are not searched
    priors: Mapping[str, Mapping[str, str]]  # without `MARK`, for hyperparameters that are searched

    @property
    def max_epochs(self) -> int | None:
        """The highest fidelity; None if the number of epochs is fixed."""
        prior = self.priors.get("task", {}).get("epochs")
        return None if prior is None else highest_fidelity(prior)


def spaces_directory() -> Path:
    """Directory of the shipped files: beside the code when installed, else at the root of the source tree.

    It is found by its path, because `importlib.resources` does not find a package that `package_dir` maps
    from elsewhere when the code runs from an uninstalled or editable tree.
    """
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "spaces", package.parent / "spaces"):
        if candidate.is_dir():
            return candidate
    raise UserError(f"The shipped spaces are missing: neither {package} nor {package.parent} has spaces/.")


def list_spaces() -> list[str]:
    """Names of the shipped spaces and presets."""
    return sorted(path.stem for path in spaces_directory().glob("*.yaml"))


def space_path(name: str) -> Path:
    """The file of the shipped space or preset ``name``. The path of a file is returned as it is."""
    if name.endswith((".yaml", ".yml", ".conf", ".json")) or "/" in name:
        return Path(name)
    path = spaces_directory() / f"{name}.yaml"
    if not path.is_file():
        raise UserError(
            f"No space is called {name!r}. Shipped are {', '.join(list_spaces())}. "
            "To use a file of your own, give its path, ending in .yaml."
        )
    return path


def read_space(name: str = "default") -> Space:
    """Read and check a shipped space or preset, or a file; `UserError` says what is wrong with it."""
    path = space_path(name)
    content = yamlio.load(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must map groups ({', '.join(GROUPS)}) to hyperparameters.")
    try:
        fixed, priors = _checked(content)
        space = Space(name, path, fixed, priors)
        horizon = fixed.get("task", {}).get("max_epochs")
        if space.max_epochs is not None and horizon != space.max_epochs:
            raise UserError(
                f"`task.max_epochs` must equal the highest fidelity, {space.max_epochs}, but got {horizon}. "
                f"Schedules end there, in every rung: write max_epochs: {space.max_epochs}."
            )
        check_combinations(fixed, priors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return space


def _checked(content: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    """The fixed values and the priors of a file."""
    fixed: dict[str, dict[str, Any]] = {}
    priors: dict[str, dict[str, str]] = {}
    for group, values in content.items():
        check_group(group, values)
        for key, value in values.items():
            check_key(group, key)
            if isinstance(value, str) and value.startswith(MARK):
                prior = value.removeprefix(MARK)
                check_prior(group, key, prior)
                priors.setdefault(group, {})[key] = prior
            else:
                check_value(group, key, value)
                fixed.setdefault(group, {})[key] = value
    return fixed, priors


def with_fidelities(space: Space, fidelities: Mapping[str, Any]) -> Space:
    """A copy with other fidelities: ``{"epochs": "fidelity(1, 16, base=4)"}``, or ``{"epochs": 16}``."""
    if not fidelities:
        return space
    fixed = {group: dict(values) for group, values in space.fixed.items()}
    priors = {group: dict(values) for group, values in space.priors.items()}
    for name, value in fidelities.items():
        if name not in ("epochs", "task.epochs"):
            raise UserError(
                f"The space {space.name!r} has no fidelity {name!r}. It has `epochs`, "
                f'as in `epochs="fidelity(1, 16, base=4)"`.'
            )
        fixed.get("task", {}).pop("epochs", None)
        priors.get("task", {}).pop("epochs", None)
        if isinstance(value, str):
            prior = value.removeprefix(MARK)
            if not prior.startswith("fidelity"):
                raise UserError(
                    f"`epochs` must be a fidelity or a whole number, but got {value!r}. "
                    f'Write it as `epochs="fidelity(1, 16, base=4)"`.'
                )
            check_prior("task", "epochs", prior)
            priors.setdefault("task", {})["epochs"] = prior
            highest = highest_fidelity(prior)
        else:
            highest = check_value("task", "epochs", value)
            fixed.setdefault("task", {})["epochs"] = highest
        # Schedules end at the highest fidelity.
        fixed.setdefault("task", {})["max_epochs"] = highest
    return Space(space.name, space.path, fixed, priors)


def get_space(name: str = "default", **fidelities: Any) -> dict[str, dict[str, str]]:
    """A search space in the form that Orion's ``build_experiment(space=...)`` takes.

    Args:
        name: name of a shipped space (see `list_spaces`), or the path of a file.
        **fidelities: ``epochs="fidelity(1, 64, base=4)"`` replaces the file's fidelity; ``epochs=16`` trains
            every trial for 16 epochs.

    Returns:
        Group to key to prior. Fixed values are left out, because Orion takes no constants: `objective` and
        `ppo-hpo run` read them from the same file.

    Raises:
        UserError: if there is no such space or fidelity, or if a value or prior is illegal.
    """
    space = with_fidelities(read_space(name), fidelities)
    return {group: dict(values) for group, values in space.priors.items() if values}


def fill(
    space: Space, params: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """The configuration of one trial, for `TrialConfig.from_mapping`.

    The space's fixed values, the ``params`` that Orion proposed and the ``overrides`` (group to key to value)
    each replace those before them. `UserError` is raised if a searched hyperparameter has no value.
    """
    config: dict[str, dict[str, Any]] = {group: dict(values) for group, values in space.fixed.items()}
    for group, key, value in flatten_params(params):
        config.setdefault(group, {})[key] = value
    for group, values in (overrides or {}).items():
        config.setdefault(group, {}).update(values)
    for group, priors in space.priors.items():
        for key in priors:
            if key not in config.get(group, {}):
                raise UserError(
                    f"The space {space.name!r} searches `{group}.{key}`, but no value was proposed for it. "
                    f"Build the experiment with get_space({space.name!r})."
                )
    return without_effectless(config, space.priors)


def flatten_params(params: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Split a trial's parameters into (group, key, value).

    They are nested, or have dotted names, or names like ``/ppo/gamma`` of Orion's command line.
    """
    found: list[tuple[str, str, Any]] = []
    for name, value in params.items():
        if isinstance(value, Mapping):
            found += [(name, str(key), item) for key, item in value.items()]
        else:
            group, _, key = name.lstrip("/").replace("/", ".").partition(".")
            found.append((group, key, value))
    return found


def copy_space(name: str, destination: str) -> Path:
    """Copy a space to a new file or into a directory, without overwriting a file. Returns the new file."""
    source, target = space_path(name), Path(destination)
    if not source.is_file():
        raise UserError(f"{source} cannot be copied: there is no such file.")
    if target.is_dir() or destination.endswith("/"):
        target = target / source.name
    if target.exists():
        raise UserError(f"{target} is there already. Choose another name, or remove it.")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}.") from None
    return target

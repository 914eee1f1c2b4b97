"""Search spaces: YAML files with fixed values, and with Orion priors for what is searched.

Three readers use the same file. `orion hunt --config` replaces its priors by values, `get_space` returns it
for ``build_experiment(space=...)``, and `ppo-hpo run --config` trains it once it has no priors. A file
without priors is a preset.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.combinations import check_combinations
from ppo_hpo.spec.config import GROUPS, TaskConfig, check_group, check_key, check_value, without_effectless
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.prior import check_prior, highest_fidelity, parse_prior
from ppo_hpo.spec.rules import MARK, leaves
from ppo_hpo.spec.settings import Overrides, flatten_params, get, parse_setting, put, settings_of

#: The content of a file of a space: group to key to a value, or to a prior that begins with `MARK`.
Document = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Space:
    """The checked content of one space file: group to key to what it gives."""

    name: str  # of the space, or the path as it was given
    path: Path
    fixed: Mapping[str, Mapping[str, Any]]  # values that are not searched
    # Without `MARK`, for what is searched. The key of an argument of the environment is kwargs.NAME.
    priors: Mapping[str, Mapping[str, str]]

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
    return space_of(yamlio.load(path), name, path)


def space_of(content: Any, name: str, path: Path) -> Space:
    """Check the content of the file at ``path``, and return its space. It is named ``name`` in messages.

    Schedules end at the highest fidelity, so the file may leave `task.max_epochs` out.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must map groups ({', '.join(GROUPS)}) to hyperparameters.")
    try:
        fixed, priors = _checked(content)
        space = Space(name, path, fixed, priors)
        if space.max_epochs is not None:
            horizon = fixed.setdefault("task", {}).get("max_epochs")
            if horizon not in (None, space.max_epochs):
                raise UserError(
                    f"`task.max_epochs` must equal the highest fidelity, {space.max_epochs}, but got "
                    f"{horizon}. Schedules end there, in every rung: write max_epochs: {space.max_epochs}, "
                    "or leave the line out."
                )
            fixed["task"]["max_epochs"] = space.max_epochs
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
                continue
            if (group, key) == ("env", "kwargs") and isinstance(value, Mapping):
                value, searched = _without_priors(value, key)
                priors.setdefault(group, {}).update(searched)
            fixed.setdefault(group, {})[key] = check_value(group, key, value)
    return fixed, {group: values for group, values in priors.items() if values}


def _without_priors(arguments: Mapping[str, Any], path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The fixed arguments of an environment, and the priors of the others by their key."""
    fixed: dict[str, Any] = {}
    priors: dict[str, str] = {}
    for name, value in arguments.items():
        key = f"{path}.{name}"
        if isinstance(value, Mapping):
            fixed[name], inner = _without_priors(value, key)
            priors |= inner
        elif isinstance(value, str) and value.startswith(MARK):
            if not all(part.isidentifier() for part in key.split(".")):
                raise UserError(
                    f"`env.{key}` cannot be searched: its name must be that of a Python variable."
                )
            priors[key] = value.removeprefix(MARK)
            check_prior("env", key, priors[key])
        elif any(isinstance(leaf, str) and leaf.startswith(MARK) for _, leaf in leaves(value)):
            raise UserError(
                f"`env.{key}` has a prior inside a list, {value!r}. Make it an argument of its own."
            )
        else:
            fixed[name] = value
    return fixed, priors


def to_document(space: Space) -> Document:
    """The content of a file of this space. The inverse of `space_of`."""
    document: Document = {group: dict(values) for group, values in space.fixed.items()}
    for group, priors in space.priors.items():
        for key, prior in priors.items():
            put(document, group, key, MARK + prior)
    return {group: document[group] for group in GROUPS if group in document}


def difference(own: Space, other: Space) -> str | None:
    """The first difference of two spaces in words, or None if they search and train the same.

    Values that change no result, such as the number of threads, are no difference.
    """
    ours, theirs = _values(own), _values(other)
    groups = list(GROUPS)
    for name in sorted({*ours, *theirs}, key=lambda name: (groups.index(name.partition(".")[0]), name)):
        one, two = (side.get(name) or _default(name) for side in (ours, theirs))
        if one.meaning != two.meaning:
            return f"`{name}` is {one.text}, but {two.text} was asked for"
    return None


_NOTHING = object()


class _Value(NamedTuple):
    """A value or a prior, as it is compared and as it is shown."""

    meaning: Any
    text: str


def _values(space: Space) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    for group, values in space.fixed.items():
        for key, value in values.items():
            if (group, key) == ("env", "kwargs"):
                found |= {f"env.kwargs.{path}": _Value(leaf, str(leaf)) for path, leaf in leaves(value)}
            elif (group, key) == ("env", "vectorization") and value in ("auto", "sync", "async"):
                found["env.vectorization"] = _Value("auto", value)
            elif (group, key) != ("task", "threads"):
                found[f"{group}.{key}"] = _Value(value, str(value))
    for group, priors in space.priors.items():
        for key, prior in priors.items():
            found[f"{group}.{key}"] = _Value(parse_prior(f"{group}.{key}", prior), MARK + prior)
    return found


def _default(name: str) -> _Value:
    group, _, key = name.partition(".")
    field = GROUPS[group].__dataclass_fields__.get(key)
    return (
        _Value(_NOTHING, "not given")
        if field is None
        else _Value(field.default, f"{field.default} (the default)")
    )


def read_configuration(
    name: str, settings: Sequence[str] = (), seed: int | None = None, epochs: int | None = None, *,
    under_orion: bool = False,
) -> Document:  # fmt: skip
    """The groups of a trial's file, with the values of the command line. A setting is ``GROUP.KEY=VALUE``.

    Schedules end at the file's epochs if it does not say otherwise. Under Orion it has to, because its epochs
    are those of a rung.
    """
    path = space_path(name)
    content = yamlio.load(path)
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise UserError(f"{path} must map groups ({', '.join(GROUPS)}) to hyperparameters.")
    mapping: Document = content
    for setting in settings:
        put(mapping, *parse_setting(setting))
    task = mapping.setdefault("task", {})
    if task.get("max_epochs") in (None, "none"):
        task.pop("max_epochs", None)
    if under_orion and "max_epochs" not in task:
        raise UserError(
            f"{path} has no `task.max_epochs`. Under Orion this value says where schedules end. Set it to "
            f"the highest fidelity, or to the epochs of every trial if the space has no fidelity."
        )
    if "max_epochs" not in task and not isinstance(task.get("epochs"), str):
        task["max_epochs"] = task.get("epochs", TaskConfig.epochs)
    if epochs is not None:
        task["epochs"] = epochs
    if seed is not None:
        task["seed"] = seed
    # Orion has filled in what was searched, which may have no effect beside the other values.
    return without_effectless(mapping) if under_orion else mapping


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
    space: Space, params: Mapping[str, Any], overrides: Overrides | None = None
) -> dict[str, dict[str, Any]]:
    """The configuration of one trial, for `TrialConfig.from_mapping`.

    The space's fixed values, the ``params`` that Orion proposed and the ``overrides`` each replace those
    before them. `UserError` is raised if a searched hyperparameter has no value.
    """
    config: Document = {group: dict(values) for group, values in space.fixed.items()}
    for group, key, value in flatten_params(params):
        put(config, group, key, value)
    for group, key, value in settings_of(overrides):
        put(config, group, key, value)
    for group, priors in space.priors.items():
        for key in priors:
            try:
                get(config, group, key)
            except KeyError:
                raise UserError(
                    f"The space {space.name!r} searches `{group}.{key}`, but no value was proposed for it. "
                    f"Build the experiment with get_space({space.name!r})."
                ) from None
    return without_effectless(config, space.priors)


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

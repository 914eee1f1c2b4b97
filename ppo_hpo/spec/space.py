"""Search spaces: YAML files in which fixed values stand plain and searched ones as Orion priors.

The same file serves three readers: `orion hunt --config` fills in its holes, `get_space` gives it
to `build_experiment(space=...)`, and `ppo-hpo run --config` runs it once its holes are filled. A
file without holes is a preset.
"""

from __future__ import annotations

import ast
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import GROUPS, check_key, check_value
from ppo_hpo.spec.errors import UserError

MARK = "orion~"
_PRIORS = ("uniform", "loguniform", "choices", "fidelity", "normal")
# Tried in Orion 0.2.7. `low=`/`high=` are lost when it saves a space, so they have to stand in order.
_OPTIONS = ("discrete", "precision", "default_value")
# Python's parser recurses; nobody lists more choices than fit in here.
_MAX_PRIOR = 4000


@dataclass(frozen=True)
class Space:
    """One space file, checked.

    Attributes:
        name: its name, or the path it was read from.
        path: the file.
        fixed: group to key to value, for what is fixed.
        priors: group to key to prior (without the mark), for what is searched.
    """

    name: str
    path: Path
    fixed: Mapping[str, Mapping[str, Any]]
    priors: Mapping[str, Mapping[str, str]]

    @property
    def max_epochs(self) -> int | None:
        """The highest fidelity, or None where the number of epochs is fixed."""
        prior = self.priors.get("task", {}).get("epochs")
        return None if prior is None else int(parse_prior("task.epochs", prior).arguments[1])


@dataclass(frozen=True)
class Prior:
    """The parts of one prior, such as ``loguniform(1e-5, 1e-2, precision=4)``."""

    name: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


def spaces_directory() -> Path:
    """Where the shipped files lie: beside the code when installed, else in the source tree.

    The directory is found by file because `importlib.resources` does not find a package that
    `package_dir` maps from elsewhere when the code runs from an uninstalled or editable tree.
    """
    here = Path(__file__).resolve().parent.parent
    for candidate in (here / "spaces", here.parent / "spaces"):
        if candidate.is_dir():
            return candidate
    raise UserError(f"The shipped spaces are missing: neither {here}/spaces nor its parent has them.")


def list_spaces() -> list[str]:
    """Names of the shipped spaces and presets."""
    return sorted(path.stem for path in spaces_directory().glob("*.yaml"))


def space_path(name: str) -> Path:
    """The file of a shipped name, or the file itself where ``name`` is a path.

    Raises:
        UserError: there is no such space or file.
    """
    if name.endswith((".yaml", ".yml", ".conf", ".json")) or "/" in name:
        return Path(name)
    path = spaces_directory() / f"{name}.yaml"
    if not path.is_file():
        raise UserError(
            f"No space is called {name!r}. Shipped are {', '.join(list_spaces())}; "
            f"a file of your own is named by its path, ending in .yaml."
        )
    return path


def read_space(name: str = "default") -> Space:
    """Read and check a space by its shipped name or its path.

    Raises:
        UserError: no such space, an unknown group or key, a bad prior, or a prior that could draw
            a value that PPO does not take.
    """
    path = space_path(name)
    content = yamlio.load(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} must map groups ({', '.join(GROUPS)}) to hyperparameters.")
    fixed: dict[str, dict[str, Any]] = {}
    priors: dict[str, dict[str, str]] = {}
    try:
        for group, values in content.items():
            if group in GROUPS and not isinstance(values, Mapping):
                raise UserError(f"Group `{group}` must map hyperparameters to values.")
            for key, value in (values if isinstance(values, Mapping) else {"": None}).items():
                check_key(group, key)
                if isinstance(value, str) and value.startswith(MARK):
                    prior = value[len(MARK) :]
                    _check_prior(group, key, prior)
                    priors.setdefault(group, {})[key] = prior
                else:
                    check_value(group, key, value)
                    fixed.setdefault(group, {})[key] = value
        space = Space(name, path, fixed, priors)
        _check_horizon(space)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return space


def with_fidelities(space: Space, fidelities: Mapping[str, Any]) -> Space:
    """A space whose fidelities are replaced.

    Args:
        space: the space.
        fidelities: ``{"epochs": "fidelity(1, 16, base=4)"}``, or a whole number to fix it.

    Raises:
        UserError: a fidelity that the space has not, or a bad prior.
    """
    if not fidelities:
        return space
    fixed = {group: dict(values) for group, values in space.fixed.items()}
    priors = {group: dict(values) for group, values in space.priors.items()}
    for name, value in fidelities.items():
        if name not in ("epochs", "task.epochs"):
            raise UserError(
                f"The space {space.name!r} has no fidelity {name!r}. It has `epochs`, "
                f'as in epochs="fidelity(1, 16, base=4)".'
            )
        fixed.get("task", {}).pop("epochs", None)
        priors.get("task", {}).pop("epochs", None)
        if isinstance(value, str):
            prior = value.removeprefix(MARK)
            if not prior.startswith("fidelity"):
                raise UserError(
                    f"`epochs` must be a fidelity or a whole number, but got {value!r}. "
                    f'Write it as epochs="fidelity(1, 16, base=4)".'
                )
            _check_prior("task", "epochs", prior)
            priors.setdefault("task", {})["epochs"] = prior
            highest = int(parse_prior("task.epochs", prior).arguments[1])
        else:
            highest = check_value("task", "epochs", value)
            fixed.setdefault("task", {})["epochs"] = highest
        # Schedules end where the highest fidelity ends, so the horizon follows it.
        fixed.setdefault("task", {})["max_epochs"] = highest
    return Space(space.name, space.path, fixed, priors)


def get_space(name: str = "default", **fidelities: Any) -> dict[str, dict[str, str]]:
    """A search space in the form that Orion's ``build_experiment(space=...)`` takes.

    Args:
        name: a shipped space (see `list_spaces`) or the path of a file.
        **fidelities: ``epochs="fidelity(1, 64, base=4)"`` replaces the file's fidelity;
            ``epochs=16`` fixes it and takes it out of the space.

    Returns:
        Group to key to prior. Fixed values are not in it, because Orion takes no constants:
        `objective` and `ppo-hpo run` read them from the same file.

    Raises:
        UserError: an unknown space, a bad prior, or a fidelity that the space has not.
    """
    space = with_fidelities(read_space(name), fidelities)
    return {group: dict(values) for group, values in space.priors.items() if values}


def fill(
    space: Space, params: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """The configuration of one trial: the space's fixed values and what Orion proposed.

    Args:
        space: the space.
        params: what Orion proposed, nested or with dotted names.
        overrides: group to key to value, which win over both.

    Raises:
        UserError: Orion's parameters leave a hole of the space open.
    """
    config: dict[str, dict[str, Any]] = {group: dict(v) for group, v in space.fixed.items()}
    for group, key, value in flatten_params(params):
        config.setdefault(group, {})[key] = value
    for group, values in (overrides or {}).items():
        for key, value in values.items():
            config.setdefault(group, {})[key] = value
    for group, holes in space.priors.items():
        for key in holes:
            if key not in config.get(group, {}):
                raise UserError(
                    f"The space {space.name!r} searches `{group}.{key}`, but no value was proposed "
                    f"for it. Build the experiment on get_space({space.name!r})."
                )
    return config


def copy_space(name: str, destination: str) -> Path:
    """Copy a shipped space to a file or into a directory, never over a file that is there."""
    source, target = space_path(name), Path(destination)
    if not source.is_file():
        raise UserError(f"{source} cannot be copied: there is no such file.")
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise UserError(f"{target} is there already. Choose another name, or remove it.")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}.") from None
    return target


def parse_prior(name: str, text: str) -> Prior:
    """Take a prior apart without running it.

    Raises:
        UserError: it is not a call of a known prior on plain values.
    """
    if len(text) > _MAX_PRIOR:
        raise UserError(f"`{name}` has a prior of {len(text)} characters; {_MAX_PRIOR} are read.")
    form = "Write it as loguniform(1e-5, 1e-2), uniform(0, 1), choices([a, b]) or fidelity(1, 16)."
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError
        arguments = tuple(ast.literal_eval(argument) for argument in call.args)
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise UserError(f"`{name}` has a bad prior, {text!r}. {form}") from None
    if call.func.id not in _PRIORS:
        raise UserError(f"`{name}` has an unknown prior, {text!r}. Known are {', '.join(_PRIORS)}. {form}")
    return Prior(call.func.id, arguments, options)


def flatten_params(params: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Group, key and value of a trial's parameters, nested or with the names of Orion's command line."""
    found: list[tuple[str, str, Any]] = []
    for name, value in params.items():
        if isinstance(value, Mapping):
            found += [(name, str(key), item) for key, item in value.items()]
        else:
            group, _, key = name.lstrip("/").replace("/", ".").partition(".")
            found.append((group, key, value))
    return found


def _check_prior(group: str, key: str, text: str) -> None:
    """Refuse a prior that is malformed or whose extremes break the hyperparameter's rule."""
    name = f"{group}.{key}"
    prior = parse_prior(name, text)
    if prior.name == "fidelity":
        if name != "task.epochs":
            raise UserError(f"Only `task.epochs` can be a fidelity, but `{name}` is {text!r}.")
        _check_fidelity(text, prior)
        return
    if name == "task.epochs":
        raise UserError(
            f"`task.epochs` is the fidelity and not searched otherwise, but got {text!r}. "
            f"Write orion~fidelity(1, 16, base=4) or a number."
        )
    if group == "task" and key in ("seed", "seeds", "aggregate", "max_epochs", "steps_per_epoch", "threads"):
        raise UserError(f"`{name}` must be the same for every trial, but got the prior {text!r}.")
    for option in prior.options:
        if option not in _OPTIONS:
            raise UserError(
                f"`{name}` has a prior with an unknown option {option!r}: {text!r}. "
                f"Known are {', '.join(_OPTIONS)}; bounds stand without a name."
            )
    if prior.name == "choices":
        # Orion takes anything but a list or a dict for one single choice.
        if (
            len(prior.arguments) != 1
            or not isinstance(prior.arguments[0], (list, dict))
            or not prior.arguments[0]
        ):
            raise UserError(f"`{name}` needs a list of choices, choices([a, b]), but got {text!r}.")
        choices = prior.arguments[0]
        if isinstance(choices, dict) and not _sum_to_one(choices.values()):
            raise UserError(f"The probabilities in the prior of `{name}` must add up to 1, but got {text!r}.")
        for choice in choices:
            check_value(group, key, choice)
        if prior.options.get("default_value", next(iter(choices))) not in list(choices):
            raise UserError(f"`default_value` in the prior of `{name}` must be a choice, but got {text!r}.")
        return
    numbers = prior.arguments
    if len(numbers) != 2 or not all(_is_number(number) for number in numbers):
        raise UserError(f"`{name}` needs two finite numbers in its prior, but got {text!r}.")
    low, high = numbers
    if prior.name == "normal":
        raise UserError(
            f"`{name}` has an unbounded prior, {text!r}, which can draw values that PPO does not "
            f"take. Use uniform or loguniform."
        )
    if low >= high:
        raise UserError(f"`low < high` must hold in the prior of `{name}`, but got {text!r}.")
    if prior.name == "loguniform" and low <= 0:
        raise UserError(f"`low > 0` must hold in the loguniform of `{name}`, but got {text!r}.")
    discrete = prior.options.get("discrete", False)
    if not isinstance(discrete, bool):
        raise UserError(f"`discrete` in the prior of `{name}` must be True or False, but got {text!r}.")
    if discrete and not (float(low).is_integer() and float(high).is_integer()):
        # Orion rounds what it draws down: loguniform(0.5, 3, discrete=True) draws 0.
        raise UserError(f"`{name}` is discrete and needs whole bounds in its prior, but got {text!r}.")
    for bound in (low, high):
        check_value(group, key, bound if discrete else float(bound))
    precision = prior.options.get("precision", 4)
    if precision is not None and not (type(precision) is int and 1 <= precision <= 17):
        raise UserError(f"`precision` in the prior of `{name}` must be digits, 1 to 17, but got {text!r}.")
    default = prior.options.get("default_value", low)
    if not (_is_number(default) and low <= default <= high):
        raise UserError(
            f"`low <= default_value <= high` must hold in the prior of `{name}`, but got {text!r}."
        )
    if not discrete and not _takes_fractions(group, key, low, high):
        raise UserError(
            f"`{name}` must be a whole number, but the prior {text!r} draws fractions. "
            f"Add discrete=True, or list the choices."
        )


def _check_fidelity(text: str, prior: Prior) -> None:
    good = (
        len(prior.arguments) in (2, 3)
        and all(isinstance(n, int) and not isinstance(n, bool) for n in prior.arguments)
        and set(prior.options) <= {"base"}
    )
    if good:
        low, high = prior.arguments[:2]
        base = prior.options.get("base", prior.arguments[2] if len(prior.arguments) == 3 else 2)
        if 1 <= low < high and _is_number(base) and base > 1:
            check_value("task", "epochs", high)
            return
    raise UserError(
        f"`task.epochs` needs fidelity(low, high, base=b) with whole numbers 1 <= low < high and "
        f"b > 1 (Orion's Hyperband and ASHA fail on b = 1), but got {text!r}."
    )


def _check_horizon(space: Space) -> None:
    highest, horizon = space.max_epochs, space.fixed.get("task", {}).get("max_epochs")
    if highest is not None and horizon != highest:
        raise UserError(
            f"`task.max_epochs` must equal the highest fidelity, {highest}, but got {horizon}. "
            f"Schedules end there, in every rung: write max_epochs: {highest}."
        )


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False


def _sum_to_one(probabilities: Iterable[Any]) -> bool:
    numbers = list(probabilities)
    return all(_is_number(number) and number >= 0 for number in numbers) and math.isclose(sum(numbers), 1.0)


def _takes_fractions(group: str, key: str, low: float, high: float) -> bool:
    middle = low + (high - low) * 0.3819660112501051  # irrational: whole for no pair of bounds
    try:
        check_value(group, key, middle)
    except UserError:
        return False
    return True

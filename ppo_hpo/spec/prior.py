"""Orion's priors, such as ``loguniform(1e-5, 1e-2)``: parsed without running them, and checked.

A prior is refused if it is malformed, if Orion would misread it, or if it could draw an illegal value.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ppo_hpo.spec.config import check_value, is_environment_argument, rule_of
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.rules import Integer, is_number

_NAMES = ("uniform", "loguniform", "choices", "fidelity", "normal")
# Tried in Orion 0.2.7. Orion loses `low=` and `high=` when it saves a space, so bounds must have no names.
_OPTIONS = ("discrete", "precision", "default_value")
# Python's parser is recursive, so its input must be short. No list of choices is longer than this.
_MAX_LENGTH = 4000
# Orion does not evaluate a prior with one of these, because they could lead to code.
_REFUSED_BY_ORION = ("__", ";")
# Whole numbers beyond this are no longer exact as floats, as which Orion draws them.
_MAX_WHOLE = 1 << 53
_SAME_FOR_EVERY_TRIAL = ("seed", "seeds", "aggregate", "max_epochs", "steps_per_epoch", "threads")


class Prior(NamedTuple):
    """The parts of a prior, such as ``loguniform(1e-5, 1e-2, precision=4)``."""

    name: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


def parse_prior(name: str, text: str) -> Prior:
    """Parse the prior ``text`` (without ``orion~``) of the hyperparameter ``name``, without running it."""
    if len(text) > _MAX_LENGTH:
        raise UserError(f"`{name}` has a prior of {len(text)} characters; {_MAX_LENGTH} are read.")
    for part in _REFUSED_BY_ORION:
        if part in text:
            raise UserError(f"`{name}` has the bad prior {text!r}: Orion takes none with {part!r} in it.")
    form = "Write it as loguniform(1e-5, 1e-2), uniform(0, 1), choices([a, b]) or fidelity(1, 16)."
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError
        arguments = tuple(ast.literal_eval(argument) for argument in call.args)
        options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        raise UserError(f"`{name}` has a bad prior, {text!r}. {form}") from None
    if call.func.id not in _NAMES:
        raise UserError(f"`{name}` has an unknown prior, {text!r}. Known are {', '.join(_NAMES)}. {form}")
    return Prior(call.func.id, arguments, options)


def highest_fidelity(text: str) -> int:
    """The upper bound of the prior of `task.epochs`, such as 16 for ``fidelity(1, 16, base=4)``."""
    return int(parse_prior("task.epochs", text).arguments[1])


def check_prior(group: str, key: str, text: str) -> None:
    """Refuse a prior that is malformed or could draw a value that breaks the hyperparameter's rule."""
    name = f"{group}.{key}"
    prior = parse_prior(name, text)
    if name == "task.epochs":
        _check_fidelity(prior, text)
        return
    if prior.name == "fidelity":
        raise UserError(f"Only `task.epochs` can be a fidelity, but `{name}` is {text!r}.")
    if group == "task" and key in _SAME_FOR_EVERY_TRIAL:
        raise UserError(f"`{name}` must be the same for every trial, but got the prior {text!r}.")
    if prior.name == "normal":
        raise UserError(
            f"`{name}` has an unbounded prior, {text!r}, which can draw values that PPO does not take. "
            "Use uniform or loguniform."
        )
    for option in prior.options:
        if option not in _OPTIONS:
            raise UserError(
                f"`{name}` has a prior with an unknown option {option!r}: {text!r}. "
                f"Known are {', '.join(_OPTIONS)}. Give bounds without a name."
            )
    if prior.name == "choices":
        _check_choices(group, key, prior, text)
    else:
        _check_range(group, key, prior, text)


def _check_fidelity(prior: Prior, text: str) -> None:
    if prior.name != "fidelity":
        raise UserError(
            f"`task.epochs` is the fidelity and not searched otherwise, but got {text!r}. "
            f"Write orion~fidelity(1, 16, base=4) or a number."
        )
    if len(prior.arguments) in (2, 3) and set(prior.options) <= {"base"}:
        low, high, base = (*prior.arguments, 2)[:3]
        base = prior.options.get("base", base)
        if type(low) is type(high) is int and 1 <= low < high and is_number(base) and base > 1:
            check_value("task", "epochs", high)
            return
    raise UserError(
        f"`task.epochs` needs fidelity(low, high, base=b) with whole numbers 1 <= low < high and "
        f"b > 1 (Orion's Hyperband and ASHA fail on b = 1), but got {text!r}."
    )


def _check_choices(group: str, key: str, prior: Prior, text: str) -> None:
    name = f"{group}.{key}"
    choices = prior.arguments[0] if len(prior.arguments) == 1 else None
    # Orion takes anything but a list or a dict for one single choice.
    if not isinstance(choices, (list, dict)) or not choices:
        raise UserError(f"`{name}` needs a list of choices, choices([a, b]), but got {text!r}.")
    if isinstance(choices, dict):
        chances = choices.values()
        if not all(is_number(chance) and chance >= 0 for chance in chances) or not math.isclose(
            sum(chances), 1
        ):
            raise UserError(f"The probabilities in the prior of `{name}` must add up to 1, but got {text!r}.")
    for choice in choices:
        if is_environment_argument(group, key) and isinstance(choice, (list, tuple, dict, set, bytes)):
            raise UserError(f"`{name}` needs words, numbers or true and false for choices, but got {text!r}.")
        check_value(group, key, choice)
    if prior.options.get("default_value", next(iter(choices))) not in list(choices):
        raise UserError(f"`default_value` in the prior of `{name}` must be a choice, but got {text!r}.")


def _check_range(group: str, key: str, prior: Prior, text: str) -> None:
    name = f"{group}.{key}"
    if len(prior.arguments) != 2 or not all(is_number(bound) for bound in prior.arguments):
        raise UserError(f"`{name}` needs two finite numbers in its prior, but got {text!r}.")
    low, high = prior.arguments
    if low >= high:
        raise UserError(f"`low < high` must hold in the prior of `{name}`, but got {text!r}.")
    if prior.name == "loguniform" and low <= 0:
        raise UserError(f"`low > 0` must hold in the loguniform of `{name}`, but got {text!r}.")
    _check_range_options(name, prior, text)
    discrete = prior.options.get("discrete", False)
    for bound in (low, high):
        check_value(group, key, bound if discrete else float(bound))
    if not discrete and isinstance(rule_of(group, key), Integer):
        raise UserError(
            f"`{name}` must be a whole number, but the prior {text!r} draws fractions. "
            "Add discrete=True, or list the choices."
        )


def _check_range_options(name: str, prior: Prior, text: str) -> None:
    low, high = prior.arguments
    discrete = prior.options.get("discrete", False)
    if not isinstance(discrete, bool):
        raise UserError(f"`discrete` in the prior of `{name}` must be True or False, but got {text!r}.")
    if discrete and not (float(low).is_integer() and float(high).is_integer()):
        # Orion rounds down what it draws, so loguniform(0.5, 3, discrete=True) can draw 0.
        raise UserError(f"`{name}` is discrete and needs whole bounds in its prior, but got {text!r}.")
    if discrete and max(abs(low), abs(high)) > _MAX_WHOLE:
        raise UserError(f"`{name}` needs bounds between -2^53 and 2^53 in its prior, but got {text!r}.")
    precision = prior.options.get("precision", 4)
    if precision is not None and not (type(precision) is int and 1 <= precision <= 17):
        raise UserError(f"`precision` in the prior of `{name}` must be digits, 1 to 17, but got {text!r}.")
    default = prior.options.get("default_value", low)
    if not (is_number(default) and low <= default <= high):
        raise UserError(
            f"`low <= default_value <= high` must hold in the prior of `{name}`, but got {text!r}."
        )

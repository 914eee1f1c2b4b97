"""Rules for single hyperparameters: which values are legal, and what an error says.

A rule is called with the dotted name of a hyperparameter, for messages, and with the value. It returns the
value in its own type, or raises a `UserError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ppo_hpo.spec.errors import UserError

Rule = Callable[[str, Any], Any]

#: Begins a value that is a prior.
MARK = "orion~"


def field(default: Any, rule: Rule, doc: str) -> Any:
    """A field of a `Checked` record; ``doc`` says what the hyperparameter is, for readers of the code."""
    return dataclasses.field(default=default, metadata={"rule": rule, "doc": doc})


class Checked:
    """Base of the records. It applies the rule of each field whenever a record is made."""

    group: ClassVar[str]  # its name in a configuration

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = item.metadata["rule"](f"{self.group}.{item.name}", getattr(self, item.name))
            object.__setattr__(self, item.name, value)


@dataclass(frozen=True)
class Integer:
    """A whole number from ``low`` to ``high``.

    The upper bounds are far above any useful value. A file from somebody else cannot ask for memory or
    processes that no machine has.
    """

    low: int
    high: int
    optional: bool = False  # whether none is legal, too

    def __call__(self, name: str, value: Any) -> int | None:
        """Apply the rule."""
        value = plain_number(value)
        if self.optional and _is_none(value):
            return None
        # Orion's PBT computes fidelities by powers, so that 45 arrives as 44.99999999999997.
        if is_number(value) and abs(value - round(value)) <= 1e-12 * abs(value):
            value = round(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"`{name}` must be a whole number{self._or_none}, but got {value!r}.")
        if value < self.low:
            raise UserError(f"`{name} >= {self.low}` must hold, but got {_shown(value)}.")
        if value > self.high:
            raise UserError(f"`{name} <= {self.high}` must hold, but got {_shown(value)}.")
        return int(value)

    @property
    def _or_none(self) -> str:
        return " or none" if self.optional else ""


@dataclass(frozen=True)
class Real:
    """A finite number from ``low`` to ``high``. If none is legal, it means no bound, as infinity does."""

    low: float
    high: float  # infinity for no bound
    open_low: bool = False  # whether `low` itself is not legal
    optional: bool = False  # whether none is legal, too

    def __call__(self, name: str, value: Any) -> float | None:
        """Apply the rule."""
        value = plain_number(value)
        if self.optional and isinstance(value, str):
            # Choices that mix 'none' and numbers must all be strings: Orion's EvolutionES turns numbers into
            # strings, and then does not find them among its choices.
            with contextlib.suppress(ValueError):
                value = float(value)
        if self.optional and (_is_none(value) or (isinstance(value, float) and value == math.inf)):
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            or_none = " or none" if self.optional else ""
            raise UserError(f"`{name}` must be a number{or_none}, but got {value!r}.")
        if not is_number(value):
            raise UserError(f"`{name}` must be finite, but got {_shown(value)}.")
        if value > self.high or value < self.low or (self.open_low and value == self.low):
            relation = "<" if self.open_low else "<="
            upper = "" if math.isinf(self.high) else f" <= {self.high:g}"
            raise UserError(f"`{self.low:g} {relation} {name}{upper}` must hold, but got {value!r}.")
        return float(value)


def flag(name: str, value: Any) -> bool:
    """True or false."""
    value = plain_number(value)
    if not isinstance(value, bool):
        raise UserError(f"`{name}` must be true or false, but got {value!r}.")
    return value


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: tuple[str, ...]

    def __call__(self, name: str, value: Any) -> str:
        """Apply the rule."""
        if not isinstance(value, str) or value not in self.words:
            raise UserError(f"`{name}` must be one of {', '.join(self.words)}, but got {value!r}.")
        return str(value)


def environment_id(name: str, value: Any) -> str:
    """The id of a gymnasium environment, with or without the module that registers it."""
    if not isinstance(value, str) or not value:
        example = "the id of a gymnasium environment, such as CartPole-v1"
        raise UserError(f"`{name}` must be {example}, but got {value!r}.")
    module, colon, rest = value.rpartition(":")
    if (module or rest).endswith(".py"):
        named = (module or rest).removesuffix(".py").replace("/", ".").strip(".")
        raise UserError(
            f"`{name}` must name a module as `import` does, without .py, but got {value!r}. "
            f"Write {named}:{rest if module else 'EnvId'}."
        )
    # The module is named as in an absolute import statement. Paths and relative names are not legal.
    if not rest or (colon and not all(part.isidentifier() for part in module.split("."))):
        raise UserError(f"`{name}` must be EnvId or module:EnvId, but got {value!r}.")
    return str(value)


def environment_kwargs(name: str, value: Any) -> Mapping[str, Any]:
    """Keyword arguments of an environment, as plain data."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"`{name}` must map argument names to values, but got {value!r}.")
    if "max_episode_steps" in value:
        raise UserError(f"The time limit must be `env.max_episode_steps`, but `{name}` has it: {value!r}.")
    found: Mapping[str, Any] = _checked_plain(name, value)
    for path, leaf in leaves(found):
        if isinstance(leaf, str) and leaf.startswith(MARK):
            raise still_a_prior(f"{name}.{path}", leaf)
    return found


def environment_argument(name: str, value: Any) -> Any:
    """One keyword argument of an environment, as plain data."""
    if name == "env.kwargs.max_episode_steps":
        raise UserError(f"The time limit must be `env.max_episode_steps`, but got `{name}`: {value!r}.")
    return _checked_plain(name, value)


def _checked_plain(name: str, value: Any) -> Any:
    # They are part of config.yaml, of checkpoints and of the trial's identity.
    plain = _plain_data(value)
    if plain is _NOT_PLAIN:
        legal = "plain data (words, finite numbers, lists, mappings)"
        raise UserError(f"`{name}` must be {legal}, but got {value!r}.")
    return plain


_NOT_PLAIN = object()


def _plain_data(value: Any) -> Any:
    """A copy as JSON and YAML give it back, or `_NOT_PLAIN`: lists for tuples, and plain numbers."""
    value = plain_number(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _NOT_PLAIN
    if isinstance(value, list | tuple):
        items = [_plain_data(item) for item in value]
        return items if all(item is not _NOT_PLAIN for item in items) else _NOT_PLAIN
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        pairs = {str(key): _plain_data(item) for key, item in value.items()}
        return pairs if all(item is not _NOT_PLAIN for item in pairs.values()) else _NOT_PLAIN
    return _NOT_PLAIN


def plain_number(value: Any) -> Any:
    """A number of numpy's as one of Python's, which can be written down; anything else as it is."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()  # numpy itself is not imported here
    return value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values inside nested mappings and lists, each with its dotted path."""
    if not isinstance(value, Mapping | list):
        yield path, value
        return
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from leaves(item, f"{path}.{key}" if path else str(key))


def still_a_prior(name: str, value: Any) -> UserError:
    """The error of a trial whose hyperparameter has a prior instead of a value."""
    return UserError(
        f"`{name}` is still a prior, {value!r}. Let `orion hunt` fill it in, or give a value, as with --set "
        f"{name}=VALUE."
    )


def is_number(value: Any) -> bool:
    """Whether this is a finite number. Booleans are not, nor are integers beyond the range of a float."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: float) -> str:
    """A number for a message. Python refuses to print the longest integers."""
    return f"{value.__class__.__name__} beyond 2^64" if 1 << 64 <= abs(value) < math.inf else repr(value)


def _is_none(value: Any) -> bool:
    # In Orion only strings are safe categories, so the string "none" must mean the same as null.
    return value is None or (isinstance(value, str) and value == "none")

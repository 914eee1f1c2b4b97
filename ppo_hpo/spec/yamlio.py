"""Reading and writing YAML: plain data only, `1e-4` is a number, and no key may be given twice.

Files may come from anybody. So tags and aliases are refused, and sizes are limited.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.rules import plain_number

# Far above any configuration, which is about a page long.
_MAX_BYTES = 1 << 20
_MAX_VALUES = 10_000
_MAX_DEPTH = 30
_MAX_DIGITS = 100


def _refused(where: Any, reason: str) -> UserError:
    """An error at a node or an event of the text."""
    return UserError(f"Line {where.start_mark.line + 1}: {reason}")


class _Loader(yaml.SafeLoader):
    """YAML 1.1's safe loader with the number syntax of YAML 1.2.

    PyYAML reads `1e-4` as a string, because YAML 1.1 requires `1.0e-4`, but people mean a number. Dates stay
    strings, because no hyperparameter is a date.
    """

    values = depth = 0

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen: set[str] = set()
        for key in keys:
            if not isinstance(key, str):
                advice = "Put quotes around a value that has commas, such as a prior."
                raise _refused(node, f"keys must be strings, but got {key!r}. {advice}")
            if key in seen:
                raise _refused(node, f"key `{key}` is given twice.")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        # With aliases a kilobyte can stand for gigabytes. Configurations do not need them.
        if isinstance(event, yaml.AliasEvent):
            raise _refused(event, "YAML aliases (*name) are not read. Write the value out.")
        if event.tag is not None:
            raise _refused(event, f"YAML tags ({event.tag}) are not read. Write the plain value.")
        self.values += 1
        if self.values > _MAX_VALUES:
            raise _refused(event, f"a configuration has at most {_MAX_VALUES} values.")
        if self.depth >= _MAX_DEPTH:
            raise _refused(event, f"values are nested more than {_MAX_DEPTH} deep.")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader` would read as numbers, and writes numbers of numpy's as Python's."""


def _represent_other(dumper: yaml.SafeDumper, value: Any) -> yaml.Node:
    plain = plain_number(value)
    if plain is value:
        return dumper.represent_undefined(value)  # raises
    return dumper.represent_data(plain)


_Dumper.add_representer(None, _represent_other)  # type: ignore[arg-type]

for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        # This form reads a long row of digits once only, and not once from each digit.
        re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    digits = text.lstrip("+-")
    if not digits.isdigit() or (digits.startswith("0") and digits != "0"):
        form = "in decimal digits, without leading zeros, underscores or colons"
        raise _refused(node, f"write whole numbers {form}, but got {text!r}.")
    if len(digits) > _MAX_DIGITS:
        raise _refused(node, f"a number of {len(digits)} digits is too long. At most {_MAX_DIGITS} are read.")
    return int(text)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).lower()
    if text.lstrip("+-") in (".inf", ".nan"):
        return float(text.replace(".", ""))
    if "_" in text or ":" in text:
        raise _refused(node, f"write numbers without underscores or colons, but got {text!r}.")
    return float(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def parse(text: str, source: str) -> Any:
    """Parse YAML text; ``source`` names it in messages, in a `UserError` if it is invalid or too large."""
    try:
        return yaml.load(text, Loader=_Loader)  # `_Loader` is a safe loader.
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source} is not valid YAML: {reason}") from None


def load(path: Path) -> Any:
    """Read one YAML file; `UserError` if it cannot be read or parsed."""
    try:
        # Pipes and devices have no size, so only reading shows how much they hold.
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UserError(f"{path} is larger than {_MAX_BYTES} bytes: a configuration is smaller.")
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read: {reason}.") from None
    return parse(text, str(path))


def dump(value: Any) -> str:
    """Plain data as YAML text, with keys in the given order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False)

"""Single values in nested configurations, by dotted names such as ``optimizer.lr`` or ``env.kwargs.NAME``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import check_key, is_environment_argument
from ppo_hpo.spec.errors import UserError

#: Values that replace others: group to key to value, or dotted name to value, or both.
Overrides = Mapping[str, Any]


def put(config: dict[str, dict[str, Any]], group: str, key: str, value: Any) -> None:
    """Set one value in place. The key ``kwargs.NAME`` of ``env`` is an argument of the environment."""
    if not is_environment_argument(group, key):
        check_key(group, key)
        config.setdefault(group, {})[key] = value
        return
    target, path = config.setdefault(group, {}), key.split(".")
    for number, part in enumerate(path[:-1], 1):
        inner = target.get(part)
        if inner is not None and not isinstance(inner, Mapping):
            above = ".".join(path[:number])
            raise UserError(f"`{group}.{above}` must map argument names to values, but got {inner!r}.")
        target[part] = dict(inner or {})  # What was given may be somebody else's, or frozen.
        target = target[part]
    target[path[-1]] = value


def settings_of(overrides: Overrides | None) -> list[tuple[str, str, Any]]:
    """Group, key and value of each override, which are given as for `ppo_hpo.sweep`."""
    found: list[tuple[str, str, Any]] = []
    for name, value in (overrides or {}).items():
        group, dot, key = str(name).partition(".")
        if dot:
            found.append((group, key, value))
        elif isinstance(value, Mapping):
            found += [(group, str(key), item) for key, item in value.items()]
        else:
            raise UserError(
                f"Overrides are given as {{group: {{key: value}}}} or {{'group.key': value}}, but `{name}` "
                f"is {value!r}."
            )
    return found


def overridden(
    config: Mapping[str, Mapping[str, Any]], overrides: Overrides | None
) -> dict[str, dict[str, Any]]:
    """A copy of a configuration, with other values."""
    copy = {group: dict(values) for group, values in config.items()}
    for group, key, value in settings_of(overrides):
        put(copy, group, key, value)
    return copy


def flatten_params(params: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Split a trial's parameters into (group, key, value).

    They are nested, or have dotted names, or names like ``/ppo/gamma`` of Orion's command line.
    """
    found: list[tuple[str, str, Any]] = []
    for name, value in params.items():
        group, _, key = name.lstrip("/").replace("/", ".").partition(".")
        found += [(group, path, leaf) for path, leaf in _inner(key, value)]
    return found


def _inner(key: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(key, value)]
    return [found for name, item in value.items() for found in _inner(f"{key}.{name}".lstrip("."), item)]


def get(config: Mapping[str, Mapping[str, Any]], group: str, key: str) -> Any:
    """One value, which may be one argument of the environment. KeyError if it is not there."""
    found: Any = config[group]
    for part in key.split(".") if is_environment_argument(group, key) else [key]:
        if not isinstance(found, Mapping):
            raise KeyError(key)
        found = found[part]
    return found


def parse_setting(setting: str) -> tuple[str, str, Any]:
    """Split one ``--set GROUP.KEY=VALUE`` into group, key and value."""
    name, equals, text = setting.partition("=")
    group, dot, key = name.partition(".")
    if not (equals and dot and key):
        raise UserError(f"--set takes GROUP.KEY=VALUE, as in --set optimizer.lr=3e-4, but got {setting!r}.")
    return group, key, yamlio.parse(text, f"--set {group}.{key}")

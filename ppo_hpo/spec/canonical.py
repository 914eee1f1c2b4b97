"""One text for equal configurations, so that they can be hashed, grouped and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """JSON text that ignores the order of keys. A trial's identity is its hash, so it must never change."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def configuration_key(params: Mapping[str, Any]) -> str:
    """One text for trials whose ``params``, by dotted name, differ only in `task.epochs`, the fidelity."""
    return canonical_json({name: value for name, value in params.items() if name != "task.epochs"})


def as_read_from_json(value: Any) -> Any:
    """Plain data as it is after being written to JSON and read again, to compare it with a file's."""
    return json.loads(json.dumps(value, default=str))

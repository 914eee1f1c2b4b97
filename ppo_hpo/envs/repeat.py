"""Whether environments repeat themselves, on which resumed and promoted trials rely."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from ppo_hpo.envs.make import EnvInfo
from ppo_hpo.envs.step import VectorEnv

# What is looked at, of each environment. Slow ones are looked at for a shorter time.
_STEPS, _SECONDS = 10, 1.0


def first_difference(envs: VectorEnv, info: EnvInfo, n_envs: int) -> str | None:
    """Reset environments twice with the same seeds, take the same actions, and say what differs first."""
    first: list[tuple[str, Any]] = []
    until = time.perf_counter() + _SECONDS
    for seen in _play(envs, info, n_envs):
        first.append(seen)
        if time.perf_counter() > until:
            break
    for (what, one), (_, other) in zip(first, _play(envs, info, n_envs), strict=False):
        if not np.array_equal(one, other, equal_nan=True):
            return what
    return None


def _play(envs: VectorEnv, info: EnvInfo, n_envs: int) -> Iterator[tuple[str, Any]]:
    """Everything that the environments return, in order, by name."""
    rng = np.random.default_rng(0)
    yield "the observation of reset", np.array(envs.reset(list(range(1, n_envs + 1))))
    for number in range(1, _STEPS + 1):
        step = envs.step(_actions(info, n_envs, rng))
        for name, value in (
            ("the observation", step.obs), ("the reward", step.reward),
            ("`terminated`", step.terminated), ("`truncated`", step.truncated),
        ):  # fmt: skip
            yield f"{name} of step {number}", np.array(value)


def _actions(info: EnvInfo, n_envs: int, rng: np.random.Generator) -> Any:
    if info.continuous:
        return rng.standard_normal((n_envs, info.action_dim)).astype(np.float32)
    return rng.integers(0, info.action_dim, n_envs)

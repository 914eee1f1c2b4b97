"""Which seeds a trial trains, and which seeds are kept for testing it.

All derive from `task.seed`. The first tuning seed is `task.seed` itself, so a trial of several seeds begins
with the seed of a trial of one. The other tuning seeds are random numbers below a bound and test seeds are
random numbers above it, so no number is both. `task.seed` itself is never drawn. A longer list begins like a
shorter one, and no hyperparameter changes a list: configurations are compared on equal seeds.
"""

from __future__ import annotations

from typing import Literal

from ppo_hpo.spec import randomness
from ppo_hpo.spec.config import TrialConfig

# The lowest tuning seed and the lowest test seed. Each kind has as many numbers as lie between the two.
_TUNING_FROM, _TEST_FROM = 2**31, 2**32


def tuning_seeds(config: TrialConfig) -> list[int]:
    """The `task.seeds` seeds that a trial trains, in this order. The first is `task.seed`."""
    seed = config.task.seed
    return [seed, *_draw(seed, "tune", _TUNING_FROM, config.task.seeds - 1)]


def fresh_seeds(config: TrialConfig, n: int) -> list[int]:
    """``n`` seeds for testing, which no trial of this configuration trains, whatever `task.seeds` is."""
    return _draw(config.task.seed, "test", _TEST_FROM, n)


def split_by_seed(config: TrialConfig) -> dict[str, TrialConfig]:
    """Split a trial of several seeds into trials of one seed, in the order of training.

    The keys are directories in the trial's directory: ``seed-1``, ``seed-2``, ..., or ``""`` for a trial of
    one seed, which means the trial's own directory.
    """
    if config.task.seeds == 1:
        return {"": config}
    return {
        f"seed-{number}": config.replace(task={"seed": seed, "seeds": 1})
        for number, seed in enumerate(tuning_seeds(config), 1)
    }


def _draw(seed: int, purpose: Literal["tune", "test"], low: int, n: int) -> list[int]:
    """``n`` different numbers from ``low`` to below ``low + 2**31``, without ``seed``."""
    found: dict[int, None] = {}
    index = 0
    while len(found) < n:
        number = low + randomness.integer_seed(seed, purpose, index) % 2**31
        if number != seed:
            found[number] = None
        index += 1
    return list(found)

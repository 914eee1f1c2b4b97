"""Which seeds a trial trains, and which ones are kept back to test it.

Everything derives from `task.seed`. The first tuning seed is `task.seed` itself, so that a trial of one seed
is what it always was, and is the first seed of a trial of several. The others are random numbers below a
bound, and test seeds are random numbers above it, so that no number is both; one that is `task.seed` is left
out. Both lists begin the same however long they are, and neither depends on a hyperparameter: configurations
are compared on equal seeds.
"""

from __future__ import annotations

from typing import Literal

from ppo_hpo.spec import randomness
from ppo_hpo.spec.config import TrialConfig

# Where they begin; each kind has as many numbers as lie between the two.
_TUNING_FROM, _TEST_FROM = 2**31, 2**32


def tuning_seeds(config: TrialConfig) -> list[int]:
    """The `task.seeds` seeds that a trial trains, in their order; the first is `task.seed`."""
    seed = config.task.seed
    return [seed, *_draw(seed, "tune", _TUNING_FROM, config.task.seeds - 1)]


def fresh_seeds(config: TrialConfig, n: int) -> list[int]:
    """``n`` seeds that no trial of this configuration trains, however many `task.seeds` are."""
    return _draw(config.task.seed, "test", _TEST_FROM, n)


def split_by_seed(config: TrialConfig) -> dict[str, TrialConfig]:
    """The trials of one seed that a trial consists of, by the folder in its directory that is theirs.

    Returns:
        ``seed-1``, ``seed-2``, ... in the order in which they are trained; of a trial of one seed itself, as
        ``""``: its own directory.
    """
    if config.task.seeds == 1:
        return {"": config}
    return {
        f"seed-{number}": config.replace(task={"seed": seed, "seeds": 1})
        for number, seed in enumerate(tuning_seeds(config), 1)
    }


def _draw(seed: int, purpose: Literal["tune", "test"], low: int, n: int) -> list[int]:
    """``n`` different numbers from ``low`` to below ``low + 2**31``, none of them ``seed``."""
    found: dict[int, None] = {}
    index = 0
    while len(found) < n:
        number = low + randomness.integer_seed(seed, purpose, index) % 2**31
        if number != seed:
            found[number] = None
        index += 1
    return list(found)

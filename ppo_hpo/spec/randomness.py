"""Random streams as functions of (seed, purpose, epoch).

No random state is ever saved: what a stream yields follows from where it is asked for, which is
why a continued trial draws what an undisturbed one draws. Streams come from
`numpy.random.SeedSequence`, whose children are independent by construction.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Purpose = Literal["init", "train", "action", "shuffle", "eval", "tune", "test"]

# The numbers are part of every result: a changed number changes every trial.
_PURPOSES: dict[Purpose, int] = {
    "init": 0, "train": 1, "action": 2, "shuffle": 3, "eval": 4, "tune": 5, "test": 6,
}  # fmt: skip

# Environments take one integer. Training seeds lie below this bound and evaluation seeds above it,
# so that no trial can ever be judged on an episode it was trained on.
_EVALUATION_SEEDS_FROM = 2**30


def _sequence(seed: int, purpose: Purpose, epoch: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(entropy=seed, spawn_key=(_PURPOSES[purpose], epoch))


def make_rng(seed: int, purpose: Purpose, epoch: int = 0) -> np.random.Generator:
    """The generator for one purpose in one epoch."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, epoch)))


def integer_seed(seed: int, purpose: Purpose, epoch: int = 0) -> int:
    """One 63-bit integer for libraries that seed themselves."""
    return int(_sequence(seed, purpose, epoch).generate_state(1, np.uint64)[0] >> 1)


def training_seeds(seed: int, epoch: int, n: int) -> list[int]:
    """Seeds in ``[0, 2**30)`` for the ``n`` training environments of one epoch."""
    words = _sequence(seed, "train", epoch).generate_state(n, np.uint32)
    return [int(word) % _EVALUATION_SEEDS_FROM for word in words]


def evaluation_seeds(n: int) -> list[int]:
    """Seeds in ``[2**30, 2**31)`` for ``n`` evaluation episodes: the same for every trial and epoch.

    Trials are compared on the same episodes (common random numbers), which takes the luck of the
    starting states out of the comparison.
    """
    words = _sequence(0, "eval", 0).generate_state(n, np.uint32)
    return [_EVALUATION_SEEDS_FROM + int(word) % _EVALUATION_SEEDS_FROM for word in words]

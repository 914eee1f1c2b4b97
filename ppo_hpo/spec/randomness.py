"""Every rng and seed of a trial, as a function of (seed, purpose, epoch).

No rng state is ever saved. What an rng draws follows from its seed, purpose and epoch, so a resumed trial
draws the same numbers as one that never stopped. `numpy.random.SeedSequence` makes these rngs independent.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ppo_hpo.spec.config import MAX_EVAL_EPISODES

Purpose = Literal["init", "train", "action", "shuffle", "eval", "tune", "test", "judge"]

# These numbers are part of every result: changing one changes every trial.
_PURPOSES: dict[Purpose, int] = {
    "init": 0, "train": 1, "action": 2, "shuffle": 3, "eval": 4, "tune": 5, "test": 6, "judge": 7,
}  # fmt: skip

# Environments take one integer as seed. Training seeds are below this bound and evaluation seeds are not, so
# no trial is ever evaluated on an episode that it was trained on.
_EVALUATION_SEEDS_FROM = 2**30


def _sequence(seed: int, purpose: Purpose, epoch: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(entropy=seed, spawn_key=(_PURPOSES[purpose], epoch))


def make_rng(seed: int, purpose: Purpose, epoch: int = 0) -> np.random.Generator:
    """The rng for one purpose in one epoch."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, epoch)))


def integer_seed(seed: int, purpose: Purpose, epoch: int = 0) -> int:
    """A seed of 63 bits, for libraries that take an integer."""
    return int(_sequence(seed, purpose, epoch).generate_state(1, np.uint64)[0] >> 1)


def training_seeds(seed: int, epoch: int, n: int) -> list[int]:
    """Seeds in ``[0, 2**30)`` for the ``n`` training environments of one epoch."""
    words = _sequence(seed, "train", epoch).generate_state(n, np.uint32)
    return [int(word) % _EVALUATION_SEEDS_FROM for word in words]


def evaluation_seeds(n: int) -> list[int]:
    """Seeds in ``[2**30, 2**31)`` for ``n`` evaluation episodes, the same for every trial and epoch.

    On common random numbers no trial is better only because of luckier initial states.
    """
    words = _sequence(0, "eval", 0).generate_state(n, np.uint32)
    return [_EVALUATION_SEEDS_FROM + int(word) % _EVALUATION_SEEDS_FROM for word in words]


def fresh_episode_seeds(seed: int, n: int) -> list[int]:
    """``n`` different seeds in ``[2**30, 2**31)``, for episodes that test what was trained with ``seed``.

    Tuning uses none of them, whatever `task.eval_episodes` is. Each training seed has episodes of its own, so
    the scores of several runs vary by their training seeds and by their episodes. All configurations have the
    same ones. A longer list begins like a shorter one.
    """
    tuning, rng = set(evaluation_seeds(MAX_EVAL_EPISODES)), make_rng(seed, "judge")
    found: dict[int, None] = {}
    while len(found) < n:
        number = int(rng.integers(_EVALUATION_SEEDS_FROM, 2 * _EVALUATION_SEEDS_FROM))
        if number not in tuning:
            found[number] = None
    return list(found)

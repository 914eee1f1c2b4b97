"""Defects of Orion 0.2.7 on today's packages that a plugin can mend, each with what shows it.

`install` is called by the entry point that Orion loads (`plugin`), and acts only for the version of Orion
that this was tried with; ``PPO_HPO_FIXES=0`` in the environment turns it off. Nothing that worked before
changes. Each has a test that fails without it (tests/test_orionfixes.py), and so tells when it is needed no
longer.
"""

from __future__ import annotations

import logging
import os
from typing import Any

VARIABLE = "PPO_HPO_FIXES"
TESTED_ORION = "0.2.7"

_log = logging.getLogger("ppo_hpo")
_installed = False


def install() -> bool:
    """Mend Orion in this process, once.

    Returns:
        Whether it is mended: not with ``PPO_HPO_FIXES=0``, nor with a version of Orion that was not tried.
    """
    global _installed
    from importlib.metadata import version

    if os.environ.get(VARIABLE, "1") == "0" or version("orion") != TESTED_ORION:
        return False
    if not _installed:
        _hyperband_without_a_seed()
        _one_hot_with_numpy_2()
        _installed = True
    return True


def _hyperband_without_a_seed() -> None:
    """`'Hyperband' object has no attribute 'rng'` (https://github.com/Epistimio/orion/issues/1002).

    Its generator is only made where a seed is given, and asked for in any case.
    """
    from orion.algo.hyperband.hyperband import Hyperband

    plain = Hyperband.__init__

    def made(self: Any, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        # No seed, as it was asked for; the state that Orion stores has the generator and what was drawn.
        if not hasattr(self, "rng"):
            self.seed_rng(None)

    Hyperband.__init__ = made


def _one_hot_with_numpy_2() -> None:
    """`can only concatenate tuple (not "list") to tuple` for choices of three values or more.

    numpy.meshgrid gives a tuple since numpy 2, and Orion adds a list to it. PB2 and others that work on real
    numbers need it.
    """
    import numpy as np
    from orion.core.worker.transformer import OneHotEncode

    plain = OneHotEncode.transform

    def transform(self: Any, point: Any) -> Any:
        if self.num_cats <= 2:
            return plain(self, point)
        indices = np.asarray(point)
        assert np.all((indices >= 0) & (indices < self.num_cats) & (indices % 1 == 0))
        return np.eye(self.num_cats)[indices.astype(int)]

    OneHotEncode.transform = transform

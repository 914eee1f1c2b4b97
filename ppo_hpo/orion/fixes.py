"""Mistakes of Orion 0.2.7 that stop a sweep, worked round from our side until a release repairs them.

Each of the functions below `_install` mends one, says where it is known, and acts only where Orion fails,
waits for ever or sorts by NaN: a sweep that went well without it gets the very same suggestions. What a
plugin cannot mend is in docs/how-to/orion-hunt.md, with what to do.

Like `lean`, all this is for the version of Orion that it was tested with, and ``PPO_HPO_FIXES=0`` in the
environment turns it off. ``tests/orion/test_fixes.py`` shows each mistake in Orion as it is, and fails once
it is gone.
"""

from __future__ import annotations

import builtins
import functools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

VARIABLE = "PPO_HPO_FIXES"
TESTED_ORION = "0.2.7"

_log = logging.getLogger("ppo_hpo")
_installed = threading.Lock()
_answer: bool | None = None


def install() -> bool:
    """Mend Orion in this process, once; see the module.

    Returns:
        Whether it is done: not with ``PPO_HPO_FIXES=0``, nor with a version of Orion that was not tested.
    """
    global _answer
    with _installed:
        if _answer is None:
            _answer = _install()
        return _answer


def _install() -> bool:
    if os.environ.get(VARIABLE, "1") == "0":
        return False
    from importlib import import_module
    from importlib.metadata import version

    found = version("orion")
    if found != TESTED_ORION:
        _log.warning(
            "Orion's mistakes are left as they are: it is %s, and ppo_hpo.orion.fixes was tested with %s",
            found,
            TESTED_ORION,
        )
        return False
    # All that can fail comes first, so that it is done wholly or not at all.
    from orion.algo.asha.asha import ASHABracket
    from orion.algo.evolution_es import mutate_functions
    from orion.algo.hyperband.hyperband import Hyperband, HyperbandBracket
    from orion.algo.pbt import pbt
    from orion.algo.pbt.exploit import TruncateExploit
    from orion.core.worker.transformer import OneHotEncode

    sorting = [import_module(name) for name in ("orion.algo.pbt.exploit", "orion.algo.tpe.tpe")]
    register = _register(HyperbandBracket.register, ASHABracket)
    init = _init(pbt.PBT.__init__, TruncateExploit)
    objective = _objective(pbt.get_objective)
    transform = _transform(OneHotEncode.transform)
    mutate = _mutate(mutate_functions.default_mutate)

    Hyperband.rng = _Generator()
    HyperbandBracket.register = register
    pbt.PBT.__init__ = init
    pbt.get_objective = objective
    for module in sorting:
        module.sorted = _sorted  # type: ignore[attr-defined]
    OneHotEncode.transform = transform
    mutate_functions.default_mutate = mutate
    return True


class _Generator:
    """The generator of a Hyperband that was given no seed, made when it is first asked for.

    Without it the first `state_dict` ends in ``'Hyperband' object has no attribute 'rng'``:
    https://github.com/Epistimio/orion/issues/1002. One that was seeded has its own, which comes first.
    """

    def __get__(self, algorithm: Any, owner: type) -> Any:
        import numpy

        if algorithm is None:
            return self
        algorithm.rng = numpy.random.RandomState()
        return algorithm.rng


def _register(plain: Callable[..., Any], asha: type) -> Callable[..., Any]:
    """A broken trial, and one whose objective is NaN, is the worst of its rung.

    A rung of Hyperband or EvolutionES waits until each trial has an objective; a broken one never gets any:
    https://github.com/Epistimio/orion/issues/757, 691 and 858. ASHA leaves broken trials out, as before.
    Among floats NaN is neither less nor more, so that a sorted rung is in no order, and NaN was promoted.
    When a broken trial was put back and completes, its result takes the place of this one.
    """

    @functools.wraps(plain)
    def register(self: Any, trial: Any) -> None:
        plain(self, trial)
        results = self._get_results(trial)
        key = self.owner.get_id(trial, ignore_fidelity=True, ignore_parent=True)
        objective, kept = results[key]
        broken = objective is None and trial.status == "broken" and not isinstance(self, asha)
        if broken or _is_nan(objective):
            results[key] = (math.inf, kept)

    return register


def _mutate(plain: Callable[..., Any]) -> Callable[..., Any]:
    """EvolutionES's mutations stay between the bounds of a real number.

    One that would leave them is put up to 0.001 inside the bound, which is beyond the other bound of a short
    interval: between 1e-8 and 1e-4 it was -2.6e-4, and the sweep ended in ``ValueError: Trial ... not
    contained in space``.
    """

    @functools.wraps(plain)
    def mutate(search_space: Any, rng: Any, old_value: Any, **kwargs: Any) -> Any:
        value = plain(search_space, rng, old_value, **kwargs)
        if search_space.type != "real":
            return value
        low, high = search_space.interval()
        return min(max(value, low), high)

    return mutate


def _init(plain: Callable[..., Any], truncate: type) -> Callable[..., Any]:
    """PBT begins at the lowest fidelity, and with a population smaller than its rules ask for.

    Its fidelities are powers: from 3 with the base 5 they begin with 3.0000000000000004, the trials with
    3, and the first promotion ends in ``KeyError: 3`` (so with 51 of the 180 pairs of a ``low`` from 1 to 20
    and a ``base`` from 2 to 10). And its rules decide on nothing before five trials of a generation are
    completed, nor where a fifth of them is less than one: with ``population_size`` below five none is ever
    continued, and `suggest` waits for ever. What is stored of the configuration stays what it was.
    """

    @functools.wraps(plain)  # Orion reads the names of what it stores from the signature
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        low = self.fidelity_dim.low
        if self.fidelities[0] != low and math.isclose(self.fidelities[0], low):
            self.fidelities[0] = low
            self.fidelity_upgrades = dict(zip(self.fidelities, self.fidelities[1:], strict=False))
        size = max(int(self.population_size), 1)
        for rule in getattr(self.exploit_func, "pipeline", [self.exploit_func]):
            if isinstance(rule, truncate) and size < getattr(rule, "min_forking_population", 0):
                ratio = getattr(rule, "candidate_pool_ratio", 0.0)
                # A little more than one's share, which could come out as 0.99 of a trial.
                vars(rule).update(min_forking_population=size, candidate_pool_ratio=max(ratio, 1.001 / size))

    return init


def _transform(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Categories as rows of a unit matrix.

    Orion adds a list to what `numpy.meshgrid` returns, which is a tuple since numpy 2: ``choices`` of three
    options or more end in ``TypeError: can only concatenate tuple (not "list") to tuple`` for all
    algorithms that want numbers, such as PB2.
    """

    @functools.wraps(plain)
    def transform(self: Any, point: Any) -> Any:
        import numpy

        if self.num_cats <= 2:
            return plain(self, point)
        found = numpy.asarray(point)
        assert numpy.all((found >= 0) & (found < self.num_cats) & (found % 1 == 0))
        return numpy.eye(self.num_cats)[found.astype(int)]

    return transform


def _objective(plain: Callable[[Any], float]) -> Callable[[Any], float]:
    """As `_register`: NaN is the worst, for PBT's choice of the best trial of a lineage."""

    @functools.wraps(plain)
    def get_objective(trial: Any) -> float:
        found = plain(trial)
        return math.inf if _is_nan(found) else found

    return get_objective


def _sorted(
    values: Iterable[Any], *, key: Callable[[Any], Any] | None = None, reverse: bool = False
) -> list[Any]:
    """In place of `sorted` where PBT and TPE sort by objectives: NaN is the worst."""
    if key is None:
        return builtins.sorted(values, reverse=reverse)

    def worth(value: Any) -> Any:
        found = key(value)
        return math.inf if _is_nan(found) else found

    return builtins.sorted(values, key=worth, reverse=reverse)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)

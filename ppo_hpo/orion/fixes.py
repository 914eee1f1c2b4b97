"""Patches for defects of Orion 0.2.7 that stop a sweep.

Each function below `_apply` fixes one defect and says where the defect is known. It acts only where Orion
fails, waits for ever or sorts by NaN. A sweep that went well without it gets the same suggestions.
docs/how-to/orion-hunt.md lists the defects that a plugin cannot fix.

The patches are for the version of Orion that they were tested with. ``PPO_HPO_FIXES=0`` in the environment
turns them off. ``tests/orion/test_fixes.py`` shows each defect in unpatched Orion, and fails once it is gone.
"""

from __future__ import annotations

import builtins
import copy
import functools
import math
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from ppo_hpo.orion import algorithm_lock, full_disk, hunt, tested_version, trial_directory, waiting

VARIABLE = "PPO_HPO_FIXES"


def install() -> bool:
    """Fix Orion in this process; whether it is fixed."""
    # It installs patches of its own. Imported below, it could make two threads wait for each other.
    import_module("ppo_hpo.orion.sqlitedb")
    return tested_version.install_once(VARIABLE, "The fixes of Orion", _apply)


def _apply() -> None:
    # Whatever can fail comes first, so that either all patches are applied or none.
    from orion.algo.asha.asha import ASHABracket
    from orion.algo.evolution_es import mutate_functions
    from orion.algo.hyperband.hyperband import Hyperband, HyperbandBracket
    from orion.algo.pbt import pbt
    from orion.algo.pbt.exploit import TruncateExploit
    from orion.core.utils import backward
    from orion.core.worker.transformer import OneHotEncode
    from orion.storage.legacy import Legacy

    sorting = [import_module(name) for name in ("orion.algo.pbt.exploit", "orion.algo.tpe.tpe")]
    register = _hyperband_register(HyperbandBracket.register, ASHABracket)
    candidates = _asha_candidates(ASHABracket.get_candidates)
    get_sample = _get_sample(HyperbandBracket.get_sample)
    seed_brackets = _seed_brackets(Hyperband.seed_brackets)
    acquire_lock = algorithm_lock.make_acquire()
    init = _pbt_init(pbt.PBT.__init__, TruncateExploit)
    offspring = _pbt_offspring(pbt.PBT._generate_offspring)
    objective = _pbt_objective(pbt.get_objective)
    transform = _one_hot_transform(OneHotEncode.transform)
    mutate = _mutate(mutate_functions.default_mutate)
    ensure_directory = _ensure_trial_working_dir(backward.ensure_trial_working_dir)

    Hyperband.rng = _UnseededGenerator()
    HyperbandBracket.register = register
    HyperbandBracket.get_sample = get_sample
    Hyperband.seed_brackets = seed_brackets
    ASHABracket.get_candidates = candidates
    pbt.PBT.__init__ = init
    pbt.PBT._generate_offspring = offspring
    pbt.get_objective = objective
    for module in sorting:
        module.sorted = _sorted  # type: ignore[attr-defined]
    OneHotEncode.transform = transform
    mutate_functions.default_mutate = mutate
    backward.ensure_trial_working_dir = ensure_directory
    Legacy.acquire_algorithm_lock = acquire_lock
    for module in (hunt, full_disk, waiting):
        module.apply()


class _UnseededGenerator:
    """The rng of a Hyperband that has no seed. It is made when it is first needed.

    Without it the first `state_dict` fails with ``'Hyperband' object has no attribute 'rng'``:
    https://github.com/Epistimio/orion/issues/1002. A seeded Hyperband has an attribute of its own, which
    Python finds first.
    """

    def __get__(self, algorithm: Any, owner: type) -> Any:
        import numpy

        if algorithm is None:
            return self
        algorithm.rng = numpy.random.RandomState()
        return algorithm.rng


def _hyperband_register(original: Callable[..., Any], asha: type) -> Callable[..., Any]:
    """Rank a broken trial, and one whose objective is NaN, last in its rung.

    A rung of Hyperband or EvolutionES waits until each trial has an objective, and a broken trial never gets
    one: https://github.com/Epistimio/orion/issues/757, 691 and 858. For ASHA see
    `_asha_candidates`. NaN is neither less nor more than any float, so a rung that contains it is not sorted,
    and NaN was promoted. If a broken trial is requeued and completes, its result replaces the last rank.
    """

    @functools.wraps(original)
    def register(self: Any, trial: Any) -> None:
        original(self, trial)
        results = self._get_results(trial)
        key = self.owner.get_id(trial, ignore_fidelity=True, ignore_parent=True)
        objective, kept = results[key]
        broken = objective is None and trial.status == "broken" and not isinstance(self, asha)
        if broken or _is_nan(objective):
            results[key] = (math.inf, kept)

    return register


def _asha_candidates(original: Callable[..., Any]) -> Callable[..., Any]:
    """Rank a broken trial of ASHA last in its rung, like one whose objective is infinite.

    ASHA leaves broken trials out and so promotes too few trials to fill the next rung. It adds no further
    trials to a rung, so after one broken trial it proposes nothing more. A broken trial is promoted only if
    its rung is complete and has too few others.
    """

    @functools.wraps(original)
    def get_candidates(self: Any, rung_id: int) -> Any:
        results = self.rungs[rung_id]["results"]
        for key, (objective, trial) in results.items():
            if objective is None and trial.status == "broken":
                results[key] = (math.inf, trial)
        found = original(self, rung_id)
        if self.has_rung_filled(rung_id) and all(objective is not None for objective, _ in results.values()):
            return found
        last = [trial for objective, trial in results.values() if objective == math.inf]
        return [trial for trial in found if trial not in last]

    return get_candidates


def _get_sample(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let Hyperband and ASHA draw new configurations where they drew the same ones again.

    A bracket draws ten times as many configurations as it needs, and draws them again when they are used up.
    So does each further execution of the algorithm, with the seeds of the first one. With a seed these are
    the same configurations, which are left out because they were suggested before: ASHA with
    ``fidelity(1, 4, base=2)`` had 40 for ever. Seeds that follow the first ones come from the algorithm's
    rng, whose state is stored. So a sweep repeats with its seed.
    """

    @functools.wraps(original)
    def get_sample(self: Any) -> Any:
        owner, before = self.owner, self._samples
        is_first = before is None and owner.brackets.index(self) < len(owner.budgets)
        if before or is_first:
            return original(self)
        seed = tuple(owner.rng.randint(0, 1_000_000, size=3))
        count = int(self.rungs[0]["n_trials"] * self.buffer)
        self._samples = owner.space.sample(count, seed=seed)
        # None ends this attempt. Without it, a space that has no other configuration would be sampled for
        # ever. Orion makes 100 attempts.
        return self._samples.pop(0) if before is None else None

    return get_sample


def _seed_brackets(original: Callable[..., Any]) -> Callable[..., Any]:
    """Seed only the brackets of the first execution; see `_get_sample`.

    Orion seeds all brackets again for each execution that it appends, and it appends all of them whenever it
    reads its state. With 1,000 trials that took a quarter of a second.
    """

    @functools.wraps(original)
    def seed_brackets(self: Any, seed: Any) -> None:
        if len(self.brackets) <= len(self.budgets):
            original(self, seed)
            return
        for bracket in self.brackets:
            bracket.seed = None  # This also forgets what an earlier bracket has left.

    return seed_brackets


def _mutate(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the mutations of EvolutionES between the bounds of a real dimension.

    Orion moves a mutation that leaves the interval to up to 0.001 inside the bound. In a short interval this
    is beyond the other bound: between 1e-8 and 1e-4 it gave -2.6e-4, and the sweep failed with
    ``ValueError: Trial ... not contained in space``.
    """

    @functools.wraps(original)
    def mutate(search_space: Any, rng: Any, old_value: Any, **kwargs: Any) -> Any:
        value = original(search_space, rng, old_value, **kwargs)
        if search_space.type != "real":
            return value
        low, high = search_space.interval()
        return min(max(value, low), high)

    return mutate


def _pbt_init(original: Callable[..., Any], truncate: type) -> Callable[..., Any]:
    """Let PBT begin at exactly the lowest fidelity, and let its rules work for a small population.

    PBT computes its fidelities as powers. From 3 with base 5 they begin with 3.0000000000000004 while the
    trials have 3, and the first promotion fails with ``KeyError: 3``. This happens for 51 of the 180 pairs of
    a ``low`` from 1 to 20 and a ``base`` from 2 to 10.

    PBT's rules also wait for five completed trials of a generation, and for a fifth of them to be at least
    one. With ``population_size`` below five no trial is ever continued, and `suggest` waits for ever. The
    configuration that Orion stores stays as it was.
    """

    @functools.wraps(original)  # Orion reads the names of what it stores from the signature.
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        low = self.fidelity_dim.low
        if self.fidelities[0] != low and math.isclose(self.fidelities[0], low):
            self.fidelities[0] = low
            self.fidelity_upgrades = dict(zip(self.fidelities, self.fidelities[1:], strict=False))
        size = max(int(self.population_size), 1)
        for rule in getattr(self.exploit_func, "pipeline", [self.exploit_func]):
            if isinstance(rule, truncate) and size < getattr(rule, "min_forking_population", 0):
                ratio = getattr(rule, "candidate_pool_ratio", 0.0)
                # Slightly more than 1 / size, because the product could come out as 0.99 trials.
                vars(rule).update(min_forking_population=size, candidate_pool_ratio=max(ratio, 1.001 / size))

    return init


def _pbt_offspring(original: Callable[..., Any]) -> Callable[..., Any]:
    """Fork a trial of PBT with new hyperparameters if it was promoted before, and the promoted trial broke.

    PBT would promote it again, to the same trial. It looks for another one until its ``fork_timeout`` of 60 s
    is over, at each suggestion, while it holds the lock of the algorithm.
    """

    @functools.wraps(original)
    def generate_offspring(self: Any, trial: Any) -> Any:
        from orion.core.utils.flatten import flatten

        fidelity, exploit = self.fidelity_index, self.exploit_func
        following = self.fidelity_upgrades[flatten(trial.params)[fidelity]]
        if not self.has_suggested(trial.branch(params={fidelity: following})):
            return original(self, trial)
        # PBT keeps the hyperparameters of the very object that it asked about, and changes those of others.
        other = copy.deepcopy(trial)

        def exploit_or_change(rng: Any, asked: Any, lineages: Any) -> Any:
            found = exploit(rng, asked, lineages)
            return other if found is asked else found

        self.exploit_func = exploit_or_change
        try:
            return original(self, trial)
        finally:
            self.exploit_func = exploit

    return generate_offspring


def _one_hot_transform(original: Callable[..., Any]) -> Callable[..., Any]:
    """Encode categories as rows of a unit matrix.

    Orion adds a list to the result of `numpy.meshgrid`, which is a tuple since numpy 2. So ``choices`` of
    three options or more fail with ``TypeError: can only concatenate tuple (not "list") to tuple`` for all
    algorithms that need numbers, such as PB2.
    """

    @functools.wraps(original)
    def transform(self: Any, point: Any) -> Any:
        import numpy

        if self.num_cats <= 2:
            return original(self, point)
        found = numpy.asarray(point)
        assert numpy.all((found >= 0) & (found < self.num_cats) & (found % 1 == 0))
        return numpy.eye(self.num_cats)[found.astype(int)]

    return transform


def _pbt_objective(original: Callable[[Any], float]) -> Callable[[Any], float]:
    """Rank NaN last where PBT chooses the best trial of a lineage; see `_hyperband_register`."""

    @functools.wraps(original)
    def get_objective(trial: Any) -> float:
        found = original(trial)
        return math.inf if _is_nan(found) else found

    return get_objective


def _sorted(
    values: Iterable[Any], *, key: Callable[[Any], Any] | None = None, reverse: bool = False
) -> list[Any]:
    """Replace `sorted` where PBT and TPE sort by objectives, and rank NaN last."""
    if key is None:
        return builtins.sorted(values, reverse=reverse)

    def nan_last(value: Any) -> Any:
        found = key(value)
        return math.inf if _is_nan(found) else found

    return builtins.sorted(values, key=nan_last, reverse=reverse)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _ensure_trial_working_dir(original: Callable[..., None]) -> Callable[..., None]:
    """Copy the directory of a parent whole or not at all; see `ppo_hpo.orion.trial_directory`.

    Orion calls this function just before it copies (`prepare_trial_working_dir` in orion/client/runner.py).
    If the parent's directory is on another machine, the whole hunt fails, as tests/end_to_end/test_hosts.py
    shows. In a hunt of `ppo-hpo run` the trial then gets an empty directory. From Python,
    `ppo_hpo.orion.objective.prepare_trial` does the same.
    """

    @functools.wraps(original)
    def ensure_trial_working_dir(experiment: Any, trial: Any) -> None:
        original(experiment, trial)
        if hunt.is_ours(experiment):
            trial_directory.make_or_stop(experiment, trial)
        else:
            trial_directory.make(experiment, trial, without_parent=False)

    return ensure_trial_working_dir

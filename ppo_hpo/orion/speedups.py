"""Patches that remove the copies which make Orion slower with every trial.

Each worker reads and writes the state of the algorithm twice for every trial. On the way, each wrapper
around the algorithm copies the state by `copy.deepcopy`, and all trials in it are unpickled and pickled
again, although few of them have changed. At 500 trials this is most of the time that Orion takes.

`install` replaces the following parts of Orion and nothing else. The suggestions stay the same. The stored
state stays a plain pickle, which Orion can read without ppo_hpo.

- `copy` in the modules that handle the state of an algorithm. While a worker reads or writes the state, no
  other code holds it, so the copy is left out.
- `pickle` in `orion.storage.legacy`. Each trial is pickled once, and its bytes are used again until the trial
  changes. When a state is read, trials are recognised by their bytes.
- `Experiment.acquire_algorithm_lock`, which tells the two replacements above when a state is read or written.
- `Experiment.is_done` and the two properties behind `BaseAlgorithm.is_done`, which loop over all trials.

The patches are for the version of Orion, the storage and the algorithms that they were tested with. In all
other cases Orion runs its own code. ``PPO_HPO_LEAN=0`` in the environment turns the patches off.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from ppo_hpo.orion import tested_version

VARIABLE = "PPO_HPO_LEAN"
# Class names of Orion's algorithms. For each of them, the code that handles its state was read and is tested.
TESTED_ALGORITHMS = {
    "orion.algo.random.random.Random",
    "orion.algo.gridsearch.gridsearch.GridSearch",
    "orion.algo.tpe.tpe.TPE",
    "orion.algo.asha.asha.ASHA",
    "orion.algo.hyperband.hyperband.Hyperband",
    "orion.algo.evolution_es.evolution_es.EvolutionES",
    "orion.algo.pbt.pbt.PBT",
}
# Modules that copy the state of an algorithm by `copy.deepcopy`.
_COPYING_MODULES = (
    "orion.algo.base.registry",
    "orion.core.worker.algo_wrappers.algo_wrapper",
    "orion.core.worker.algo_wrappers.insist_suggest",
    "orion.algo.hyperband.hyperband",
    "orion.algo.evolution_es.evolution_es",
    "orion.algo.pbt.pbt",
)
# Modules that look up single parameters of many trials.
_FLATTENING_MODULES = ("orion.algo.tpe.tpe", "orion.algo.asha.asha", "orion.algo.hyperband.hyperband")


def install() -> bool:
    """Remove the copies from Orion in this process; whether they are removed."""
    return tested_version.install_once(VARIABLE, "The speed-ups of Orion", _apply)


def _apply() -> None:
    from importlib import import_module

    # Whatever can fail comes first, so that either all patches are applied or none.
    from orion.algo.base import BaseAlgorithm
    from orion.core.worker.algo_wrappers.insist_suggest import AlgoWrapper, InsistSuggest
    from orion.core.worker.experiment import Experiment
    from orion.core.worker.trial import Trial
    from orion.storage import legacy

    copying = [import_module(name) for name in _COPYING_MODULES]
    flattening = [import_module(name) for name in _FLATTENING_MODULES]
    state_pickle = _StatePickle(Trial)
    acquire = _acquire_algorithm_lock(Experiment.acquire_algorithm_lock, legacy.Legacy)
    done = property(_is_done(Experiment.is_done.fget, legacy.Legacy), doc=Experiment.is_done.__doc__)
    suggested = _has_suggested_all(BaseAlgorithm.has_suggested_all_possible_values)
    completed = property(_has_completed(BaseAlgorithm.has_completed_max_trials.fget))
    suggest = _suggest(InsistSuggest.suggest, AlgoWrapper.suggest)
    hyperband = import_module("orion.algo.hyperband.hyperband")
    tabulate = _tabulate_status(hyperband.tabulate_status, hyperband.logger)

    for module in copying:
        module.copy = _StateCopy()  # type: ignore[attr-defined]
    for module in flattening:
        module.flatten = _flatten  # type: ignore[attr-defined]
    legacy.pickle = state_pickle
    Experiment.acquire_algorithm_lock = acquire
    Experiment.is_done = done
    BaseAlgorithm.has_suggested_all_possible_values = suggested
    BaseAlgorithm.has_completed_max_trials = completed
    InsistSuggest.suggest = suggest
    hyperband.tabulate_status = tabulate  # type: ignore[attr-defined]


class _StateAccess(threading.local):
    active = False  # Whether this thread is reading or writing a state at this moment.
    state: Any = None  # The state that was read since the algorithm was locked.
    pickled = b""  # The bytes of that state.

    def forget_state(self) -> None:
        self.state, self.pickled = None, b""


_access = _StateAccess()


class _StateCopy:
    """Replaces the module `copy`, and leaves out the copies of a state."""

    def __getattr__(self, name: str) -> Any:
        return getattr(copy, name)

    @staticmethod
    def deepcopy(value: Any, memo: Any = None) -> Any:
        if not _access.active:
            return copy.deepcopy(value, memo)
        # `InsistSuggest` changes the dictionary that it gets from the wrapper below it, so it needs its own.
        return value.copy() if isinstance(value, dict) else value


class _StatePickle:
    """Replaces the module `pickle`, and remembers the trials of the last state that it read or wrote."""

    def __init__(self, trial_class: type) -> None:
        self.trials = _TrialPickles(trial_class)

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)

    def loads(self, pickled: bytes) -> Any:
        if not _access.active:
            return pickle.loads(pickled)
        _access.state, _access.pickled = self.trials.loads(pickled), pickled
        return _access.state

    def dumps(self, state: Any) -> bytes:
        if not _access.active:
            return pickle.dumps(state)
        if state is _access.state:
            # After a failure Orion stores the state that it has read. The algorithm, which holds the same
            # object, may have changed it since.
            return _access.pickled
        return self.trials.dumps(state)


class _PickledTrial(NamedTuple):
    trial: Any
    content: Any  # What the trial contained when it was pickled.
    pickled: bytes


class _TrialPickles:
    """Pickles and unpickles states in which most trials are known already.

    In the pickle of a state each trial is a call of `pickle.loads` on the trial's own pickle. So the pickle
    of a trial that has not changed can be used again, and plain `pickle` reads the whole.
    """

    def __init__(self, trial_class: Any) -> None:
        self.trial_class = trial_class
        slots = [name for name in trial_class.__slots__ if name not in ("_params", "_results")]
        self._fields, self._value = attrgetter(*slots), attrgetter("value")
        self._result = attrgetter("name", "_type", "value")
        self._forget()
        # A child that is forked while another thread holds the lock would wait for it for ever.
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._remember([])

    def _remember(self, known: Sequence[_PickledTrial]) -> None:
        """Keep the trials of the last state. Trials that are equal are numbered in the order of the state."""
        self.by_id = {id(entry.trial): entry for entry in known}
        self.by_pickle: dict[tuple[bytes, int], _PickledTrial] = {}
        counts: dict[bytes, int] = {}
        for entry in known:
            number = counts[entry.pickled] = counts.get(entry.pickled, 0) + 1
            self.by_pickle[entry.pickled, number] = entry

    def content(self, trial: Any) -> tuple[Any, list[Any], list[Any]]:
        """Everything in a trial that can change: all but the names and types of its parameters."""
        return (self._fields(trial), [*map(self._value, trial._params)], [*map(self._result, trial._results)])

    def entry(self, trial: Any, pickled: bytes) -> _PickledTrial:
        content = self.content(trial)
        if any(type(value) is list for value in content[1]):
            # The value of a dimension with a shape is a list, which can be changed in place.
            content = copy.deepcopy(content)
        return _PickledTrial(trial, content, pickled)

    def is_unchanged(self, entry: _PickledTrial) -> bool:
        return bool(entry.content == self.content(entry.trial))

    def dumps(self, state: Any) -> bytes:
        buffer = io.BytesIO()
        with self._lock, _without_garbage_collection():
            pickler = _StatePickler(buffer, self)
            pickler.dump(state)
            self._remember(pickler.found)
        return buffer.getvalue()

    def loads(self, pickled: bytes) -> Any:
        """Unpickle a state. Trials that are known and have not changed are the same objects as before."""
        with self._lock, _without_garbage_collection():
            unpickler = _StateUnpickler(pickled, self)
            state = unpickler.load()
            self._remember(unpickler.found)
        return state


class _StatePickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, trials: _TrialPickles) -> None:
        super().__init__(buffer, 4)
        self.trials, self.found = trials, list[_PickledTrial]()

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not self.trials.trial_class:
            return NotImplemented
        entry = self.trials.by_id.get(id(value))
        if entry is None or not self.trials.is_unchanged(entry):
            entry = self.trials.entry(value, pickle.dumps(value, 4))
        self.found.append(entry)
        return pickle.loads, (entry.pickled,)


class _StateUnpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, trials: _TrialPickles) -> None:
        super().__init__(io.BytesIO(pickled))
        self.trials, self.found = trials, list[_PickledTrial]()
        self.counts: dict[bytes, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return self.trial if found is pickle.loads else found

    def trial(self, pickled: bytes) -> Any:
        number = self.counts[pickled] = self.counts.get(pickled, 0) + 1
        entry = self.trials.by_pickle.get((pickled, number))
        if entry is None or not self.trials.is_unchanged(entry):
            entry = self.trials.entry(pickle.loads(pickled), pickled)
        self.found.append(entry)
        return entry.trial


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector, which would visit all trials again and again and free nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _acquire_algorithm_lock(original: Callable[..., Any], legacy: type) -> Callable[..., Any]:
    @contextlib.contextmanager
    def acquire_algorithm_lock(self: Any, timeout: float = 60, retry_interval: float = 1) -> Iterator[Any]:
        lock = original(self, timeout, retry_interval)
        tested = _is_tested(self.algorithm.unwrapped)
        if type(self.storage) is not legacy or not tested or self.knowledge_base is not None:
            with lock as algorithm:
                yield algorithm
            return
        _access.forget_state()
        # Orion reads the state when it enters the lock, and writes it when it leaves the lock.
        _access.active = True
        try:
            with lock as algorithm:
                _access.active = False
                try:
                    yield algorithm
                finally:
                    _access.active = True
        finally:
            _access.active = False
            _access.forget_state()

    return acquire_algorithm_lock


def _is_tested(algorithm: Any) -> bool:
    return f"{type(algorithm).__module__}.{type(algorithm).__qualname__}" in TESTED_ALGORITHMS


def _suggest(original: Callable[..., Any], attempt: Callable[..., Any]) -> Callable[..., Any]:
    """Ask an algorithm only once if it waits for results. Orion asks it 100 times, to find a new trial.

    An algorithm that drew no random number will not find one in the next attempt either.
    """

    def suggest(self: Any, num: int = 1) -> Any:
        rng = getattr(self.unwrapped, "rng", None)
        if rng is None or not _is_tested(self.unwrapped):
            return original(self, num)
        for _ in range(self.max_suggest_attempts):
            before = pickle.dumps(rng.get_state())
            found = attempt(self, num)
            if found or pickle.dumps(rng.get_state()) == before or self.is_done:
                return found
        return []

    return suggest


def _tabulate_status(original: Callable[..., Any], logger: logging.Logger) -> Callable[..., Any]:
    """Leave out the table of all rungs that Hyperband and ASHA log at each suggestion, if nobody reads it."""

    def tabulate_status(brackets: Any) -> None:
        if logger.isEnabledFor(logging.INFO):
            original(brackets)

    return tabulate_status


def _is_done(original: Callable[[Any], Any], legacy: type) -> Callable[[Any], Any]:
    def is_done(self: Any) -> Any:
        # Orion reads all trials to count them, and with a parent or child experiment it counts theirs too.
        node = self._node
        if type(self.storage) is not legacy or node is None or node.parent is not None or node.children:
            return original(self)

        def count(status: Any) -> int:
            return int(self.storage._db.count("trials", {"experiment": self.id, "status": status}))

        if count("completed") >= self.max_trials:
            return True
        return self.algorithm.is_done and count({"$in": ["new", "reserved", "interrupted"]}) == 0

    return is_done


def _has_suggested_all(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def has_suggested_all_possible_values(self: Any) -> Any:
        if (fidelity := self.fidelity_index) is None:
            return original(self)
        _, highest = self.space[fidelity].interval()
        found = sum(_parameter(trial, fidelity) >= highest for trial in self.registry)
        return found >= self.space.cardinality

    return has_suggested_all_possible_values


def _has_completed(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def has_completed_max_trials(self: Any) -> Any:
        if self.max_trials is None or (fidelity := self.fidelity_index) is None:
            return original(self)
        _, highest = self.space[fidelity].interval()
        found = sum(t.status == "completed" and _parameter(t, fidelity) >= highest for t in self.registry)
        return found >= self.max_trials

    return has_completed_max_trials


def _parameter(trial: Any, name: str) -> Any:
    """The value of one parameter of a trial."""
    for param in trial._params:
        if param.name == name:
            return param.value
    return _flatten(trial.params)[name]


def _flatten(dictionary: dict[str, Any], sep: str = ".") -> dict[str, Any]:
    """Do the same as Orion's `flatten`, which copies the whole dictionary once for each of its keys."""
    flat: dict[str, Any] = {}
    for key, value in dictionary.items():
        if isinstance(value, dict) and value:
            flat.update((key + sep + inner, found) for inner, found in _flatten(value, sep).items())
        else:
            flat[key] = value
    return flat

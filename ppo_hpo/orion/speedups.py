"""Orion without the copies that make it slower with every trial.

Orion keeps the state of an algorithm in its database, and each worker reads and writes it twice for every
trial. On the way it is copied by `copy.deepcopy` once for each wrapper around the algorithm, and all trials
in it are unpickled and pickled again, though at most a few have changed: at 500 trials that is most of what
Orion costs.

`install` replaces the following, and nothing else of Orion. What is stored stays a plain pickle that Orion
reads without us, and the suggestions are the same.

- `copy` in the modules that hold the state of an algorithm. While a worker has just read the state, or is
  about to write it, nobody else holds it: a copy of it is made for nothing, and is not made.
- `pickle` in `orion.storage.legacy`, which uses it for the state alone. Each trial is pickled once, and its
  bytes are used again for as long as it does not change; what is read again is recognised by its bytes.
- `Experiment.acquire_algorithm_lock`, only to say when the two above are to act, and
- `Experiment.is_done` and the two questions behind `BaseAlgorithm.is_done`, which go through all trials.

All this is for the version of Orion, the storage and the algorithms that it was tested with; for any other,
Orion does what it always did. ``PPO_HPO_LEAN=0`` in the environment turns it off.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import datetime
import gc
import io
import logging
import os
import pickle
import struct
import threading
from array import array
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

VARIABLE = "PPO_HPO_LEAN"
TESTED_ORION = "0.2.7"
# By class, all of Orion's own: what an algorithm does with its state was read for each, and is tested.
TESTED_ALGORITHMS = {
    "orion.algo.random.random.Random",
    "orion.algo.gridsearch.gridsearch.GridSearch",
    "orion.algo.tpe.tpe.TPE",
    "orion.algo.asha.asha.ASHA",
    "orion.algo.hyperband.hyperband.Hyperband",
    "orion.algo.evolution_es.evolution_es.EvolutionES",
    "orion.algo.pbt.pbt.PBT",
}
# Those whose state passes through `copy.deepcopy`.
_COPYING = (
    "orion.algo.base.registry",
    "orion.core.worker.algo_wrappers.algo_wrapper",
    "orion.core.worker.algo_wrappers.insist_suggest",
    "orion.algo.hyperband.hyperband",
    "orion.algo.evolution_es.evolution_es",
    "orion.algo.pbt.pbt",
)
# Those that ask single values of the parameters of many trials.
_FLATTENING = ("orion.algo.tpe.tpe", "orion.algo.asha.asha", "orion.algo.hyperband.hyperband")

_log = logging.getLogger("ppo_hpo")
_installed = threading.Lock()
_answer: bool | None = None


class _Moment(threading.local):
    """Whether this thread is just reading or writing a state."""

    active = False
    state: Any = None
    blob = b""


_moment = _Moment()


@contextlib.contextmanager
def _reading_or_writing() -> Iterator[None]:
    _moment.active = True
    try:
        yield
    finally:
        _moment.active = False


class _Copy:
    """In place of the module `copy`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(copy, name)

    @staticmethod
    def deepcopy(value: Any, memo: Any = None) -> Any:
        if not _moment.active:
            return copy.deepcopy(value, memo)
        # `InsistSuggest` takes over the dictionary of the wrapper below it, which must not be the same one.
        return value.copy() if isinstance(value, dict) else value


def _flatten(dictionary: dict[str, Any], sep: str = ".") -> dict[str, Any]:
    """As Orion's `flatten`, which copies the whole dictionary once for each of its keys."""
    flat: dict[str, Any] = {}
    for key, value in dictionary.items():
        if isinstance(value, dict) and value:
            flat.update((key + sep + inner, found) for inner, found in _flatten(value, sep).items())
        else:
            flat[key] = value
    return flat


def _value(trial: Any, name: str) -> Any:
    """One parameter of a trial."""
    for param in trial._params:
        if param.name == name:
            return param.value
    return _flatten(trial.params)[name]


# Pickles of trials. A pickle is a program for a stack machine with numbered registers ("memo"). Ours is
#     what trials have in common: registers 0 to n - 1
#     each trial in turn, put into the next register and dropped from the stack
#     the state, which refers to the trials by their registers
# and after the STOP, where `pickle.loads` has ended, the lengths of the parts, from which we find them again.
_PROTO, _KEEP = b"\x80\x04", b"\x940"  # MEMOIZE, POP
_CALL = b"NQ" + _KEEP  # NONE, BINPERSID
_MAGIC = b"ppo_hpo trials 1"
_TAIL = struct.Struct("<QQ16s")


class _Trials:
    """Pickles and unpickles states, and knows the trials that it has seen."""

    def __init__(self) -> None:
        from orion.core.worker.trial import Trial

        self.trial = Trial
        classes = (Trial, Trial.Param, Trial.Result)
        # The very strings that `pickle` meets: it goes by identity.
        names = [name for cls in classes for name in copyreg._slotnames(cls)]  # type: ignore[attr-defined]
        self.common: list[Any] = [*classes, datetime.datetime, *dict.fromkeys(names)]
        preamble = []
        for item in self.common:
            if isinstance(item, str):
                preamble.append(_short(item))
            else:
                preamble.append(_short(item.__module__) + _short(item.__qualname__) + b"\x93")
        self.preamble = b"".join(part + _KEEP for part in preamble)
        self.registers = {id(item): (index, item) for index, item in enumerate(self.common)}
        slots = [name for name in Trial.__slots__ if name not in ("_results", "_params")]
        self.plain = attrgetter(*slots)
        self.param = attrgetter("value")
        self.result = attrgetter("name", "_type", "value")
        # Of each trial that is in the last states: itself, its looks when it was pickled, its pickle.
        self.known: dict[int, tuple[Any, Any, bytes]] = {}
        self.by_bytes: dict[tuple[bytes, int], Any] = {}
        self.lock = threading.Lock()
        # A child forked while another thread is in here would wait for ever.
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self.lock = threading.Lock()
        self.known, self.by_bytes = {}, {}

    def looks(self, trial: Any) -> tuple[Any, list[Any], list[Any]]:
        """All of a trial but the names and types of its parameters, to see whether it has changed."""
        return self.plain(trial), [*map(self.param, trial._params)], [*map(self.result, trial._results)]

    def dumps(self, state: Any) -> bytes:
        found: dict[int, Any] = {}
        _Finder(self.trial, found).dump(state)
        registers = dict(self.registers)
        parts: list[bytes] = []
        known: dict[int, tuple[Any, Any, bytes]] = {}
        for key, trial in found.items():
            registers[key] = (len(registers), trial)
            entry = self.known.get(key)
            if entry is None or entry[1] != self.looks(trial):
                entry = (trial, _own(self.looks(trial)), self.pickled(trial))
            known[key] = entry
            parts.append(entry[2])
        self.remember(known)
        body = io.BytesIO()
        pickler = pickle.Pickler(body, 4)
        pickler.memo = registers
        pickler.dump(state)
        rest = body.getvalue()[2:]
        lengths = array("I", map(len, parts))
        return b"".join(
            (
                _PROTO,
                self.preamble,
                *parts,
                rest,
                lengths.tobytes(),
                _TAIL.pack(len(parts), len(rest), _MAGIC),
            )
        )

    def pickled(self, trial: Any) -> bytes:
        buffer = io.BytesIO()
        # Of protocol 3, because 4 puts its parts into frames, of which this cannot be one.
        pickler = pickle.Pickler(buffer, 3)
        pickler.fast = True  # no registers of its own
        pickler.memo = self.registers
        pickler.dump(trial)
        return buffer.getvalue()[2:-1] + _KEEP

    def loads(self, blob: bytes) -> Any:
        if blob[-16:] != _MAGIC:
            return pickle.loads(blob)
        count, size, _ = _TAIL.unpack(blob[-_TAIL.size :])
        lengths = array("I", blob[-_TAIL.size - 4 * count : -_TAIL.size])
        at = len(_PROTO) + len(self.preamble)
        if blob[len(_PROTO) : at] != self.preamble:
            return pickle.loads(blob)
        # What is known stands in the stream as a call of `persistent_load`, the rest as it is.
        stream = [_PROTO, self.preamble]
        parts: list[tuple[Any, bytes]] = []
        times: dict[bytes, int] = {}
        for length in lengths:
            part = blob[at : at + length]
            at += length
            times[part] = seen = times.get(part, 0) + 1
            trial = self.by_bytes.get((part, seen))
            if trial is not None and self.known[id(trial)][1] != self.looks(trial):
                trial = None
            stream.append(part if trial is None else _CALL)
            parts.append((trial, part))
        stream.append(blob[at : at + size])
        unpickler = pickle.Unpickler(io.BytesIO(b"".join(stream)))
        again = iter([trial for trial, _ in parts if trial is not None])
        unpickler.persistent_load = lambda _: next(again)  # type: ignore[method-assign]
        state = unpickler.load()
        if len(parts) == len(self.known) and all(trial is not None for trial, _ in parts):
            return state  # nothing new, and nothing gone
        registers = unpickler.memo.copy()
        known: dict[int, tuple[Any, Any, bytes]] = {}
        for index, (trial, part) in enumerate(parts, len(self.common)):
            if trial is None:
                new = registers[index]
                known[id(new)] = (new, _own(self.looks(new)), part)
            else:
                known[id(trial)] = self.known[id(trial)]
        self.remember(known)
        return state

    def remember(self, known: dict[int, tuple[Any, Any, bytes]]) -> None:
        self.known = known
        times: dict[bytes, int] = {}
        self.by_bytes = {}
        for trial, _, part in known.values():
            times[part] = seen = times.get(part, 0) + 1
            self.by_bytes[part, seen] = trial


def _own(looks: Any) -> Any:
    """The looks of a trial for keeping: a list in it (a dimension with a shape) could be changed in place."""
    return copy.deepcopy(looks) if any(type(value) is list for value in looks[1]) else looks


class _Finder(pickle.Pickler):
    """Finds the trials of a state."""

    def __init__(self, trial: type, found: dict[int, Any]) -> None:
        super().__init__(io.BytesIO(), 4)
        self.trial = trial
        self.found = found

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is self.trial:
            self.found[id(obj)] = obj
            return 0
        return None


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Without the garbage collector, which would go through all trials again and again and find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _short(text: str) -> bytes:
    raw = text.encode()
    return b"\x8c" + bytes((len(raw),)) + raw


class _Pickle:
    """In place of the module `pickle`."""

    def __init__(self) -> None:
        self.trials = _Trials()

    def __getattr__(self, name: str) -> Any:
        return getattr(pickle, name)

    def loads(self, blob: bytes) -> Any:
        if not _moment.active:
            return pickle.loads(blob)
        with self.trials.lock, _without_collection():
            state = self.trials.loads(blob)
        _moment.state, _moment.blob = state, blob
        return state

    def dumps(self, state: Any) -> bytes:
        if not _moment.active:
            return pickle.dumps(state)
        if state is _moment.state:
            # Something failed, and Orion puts back what it has read. The algorithm may have changed it since.
            return _moment.blob
        with self.trials.lock, _without_collection():
            return self.trials.dumps(state)


def install() -> bool:
    """Take the copies out of Orion in this process, once; see the module.

    Returns:
        Whether it is done: not with ``PPO_HPO_LEAN=0``, nor with a version of Orion that was not tested.
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
            "Orion is left as it is: it is %s, and ppo_hpo.orion.speedups was tested with %s",
            found,
            TESTED_ORION,
        )
        return False
    # All that can fail comes first, so that it is done wholly or not at all.
    from orion.algo.base import BaseAlgorithm
    from orion.core.worker.experiment import Experiment
    from orion.storage import legacy

    copying = [import_module(name) for name in _COPYING]
    flattening = [import_module(name) for name in _FLATTENING]
    replacement = _Pickle()
    acquire = _acquire_algorithm_lock(Experiment.acquire_algorithm_lock, legacy.Legacy)
    done = property(_is_done(Experiment.is_done.fget, legacy.Legacy), doc=Experiment.is_done.__doc__)
    suggested = _has_suggested_all(BaseAlgorithm.has_suggested_all_possible_values)
    completed = property(_has_completed(BaseAlgorithm.has_completed_max_trials.fget))

    for module in copying:
        module.copy = _Copy()  # type: ignore[attr-defined]
    for module in flattening:
        module.flatten = _flatten  # type: ignore[attr-defined]
    legacy.pickle = replacement
    Experiment.acquire_algorithm_lock = acquire
    Experiment.is_done = done
    BaseAlgorithm.has_suggested_all_possible_values = suggested
    BaseAlgorithm.has_completed_max_trials = completed
    return True


def _acquire_algorithm_lock(plain: Callable[..., Any], legacy: type) -> Callable[..., Any]:
    @contextlib.contextmanager
    def acquire_algorithm_lock(self: Any, timeout: float = 60, retry_interval: float = 1) -> Iterator[Any]:
        lock = plain(self, timeout, retry_interval)
        own = type(self.algorithm.unwrapped)
        tested = f"{own.__module__}.{own.__qualname__}" in TESTED_ALGORITHMS
        if type(self.storage) is not legacy or not tested or self.knowledge_base is not None:
            with lock as algorithm:
                yield algorithm
            return
        # The state is read as the lock is entered, and written as it is left.
        _moment.state, _moment.blob = None, b""
        with _reading_or_writing():
            algorithm = lock.__enter__()
        try:
            yield algorithm
        except BaseException as error:
            with _reading_or_writing():
                if not lock.__exit__(type(error), error, error.__traceback__):
                    raise
        else:
            with _reading_or_writing():
                lock.__exit__(None, None, None)
        finally:
            _moment.state, _moment.blob = None, b""

    return acquire_algorithm_lock


def _is_done(plain: Callable[[Any], Any], legacy: type) -> Callable[[Any], Any]:
    def is_done(self: Any) -> Any:
        # Orion reads all trials, to count them; with a parent or child experiment it takes theirs too.
        node = self._node
        if type(self.storage) is not legacy or node is None or node.parent is not None or node.children:
            return plain(self)

        def count(status: Any) -> int:
            return int(self.storage._db.count("trials", {"experiment": self.id, "status": status}))

        if count("completed") >= self.max_trials:
            return True
        return self.algorithm.is_done and count({"$in": ["new", "reserved", "interrupted"]}) == 0

    return is_done


def _has_suggested_all(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def has_suggested_all_possible_values(self: Any) -> Any:
        if (fidelity := self.fidelity_index) is None:
            return plain(self)
        _, highest = self.space[fidelity].interval()
        found = sum(_value(trial, fidelity) >= highest for trial in self.registry)
        return found >= self.space.cardinality

    return has_suggested_all_possible_values


def _has_completed(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def has_completed_max_trials(self: Any) -> Any:
        if self.max_trials is None or (fidelity := self.fidelity_index) is None:
            return plain(self)
        _, highest = self.space[fidelity].interval()
        found = sum(t.status == "completed" and _value(t, fidelity) >= highest for t in self.registry)
        return found >= self.max_trials

    return has_completed_max_trials

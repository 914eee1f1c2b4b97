"""Where a trial resumes from: its own directory, its siblings' directories, or a store.

This is the rule, for every algorithm of Orion's:

1. The trial's own working directory, or its own objects in the store, whichever is further. A retried trial
   finds there what it left. For ASHA and population-based training Orion has copied the parent's directory.
   That copy may be older than what the parent has done since on another machine. If the store has a newer
   checkpoint of the parent, it is taken. For a fork that needs the parent's id (``--parent``).
2. If neither holds a whole checkpoint, the parent's in the store, if its id is given (``--parent``). After
   that, a checkpoint of a trial with the same identity (hyperparameters and seed): the most advanced one that
   is not beyond the trial's epochs. Hyperband and EvolutionES promote into new, empty directories, and this
   finds the lower rung.

Siblings are found through `<Orion's working directory>/.ppo_hpo/<identity>/`, which holds one empty file for
each trial directory of that identity. In the store they are found through `identities/<identity>/`. A forked
trial is listed in neither, because its hyperparameters do not tell its history. The identity is ours and not
Orion's `hash_params`, because it also covers what the space file fixes.

If a trial has several seeds, the rule holds for each seed. Each is a trial of one seed with an identity of
its own, in the folder `seed-N` of the trial's directory, and in the store under `ID-seed-N`.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import CheckpointError, TornCheckpoint, UserError
from ppo_hpo.state.checkpoint import MAX_BYTES, Checkpoint, Storage, epoch_of, from_bytes, read
from ppo_hpo.state.files import explain_write_errors, read_bytes
from ppo_hpo.state.remote_store import Store, StoreError
from ppo_hpo.trial.options import OrionContext

TRIALS, IDENTITIES = "trials", "identities"  # folders of a store: checkpoints by trial, trials by identity
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", re.ASCII)
INDEX = ".ppo_hpo"
_IDENTITY_LENGTH = 32  # characters of an identity that name an index, and one of the store's identities


def part_key(key: str, part: str) -> str:
    """The name in the store of one seed of the trial ``key``. If ``part`` is empty, it is the trial's."""
    return f"{key}-{part}" if part else key


class _Acceptance(NamedTuple):
    """Which checkpoints may be used: the arguments of `Storage.load`."""

    check: Callable[[Checkpoint], None]
    on_refused: Callable[[CheckpointError], None]
    max_bytes: int


class MirroredStorage(Storage):
    """Checkpoints in a directory, and the same ones in a store.

    A checkpoint that cannot be put into the store is only a warning, because the directory has it. The next
    epoch tries again, and `finish` tries for the last time.
    """

    def __init__(
        self, directory: Path, store: Store | None, key: str,
        write: Callable[[Path, bytes], None] | None = None, log: logging.Logger | None = None,
    ) -> None:  # fmt: skip
        """Checkpoints in ``directory`` and, unless it is None, in ``store`` under ``key``."""
        super().__init__(directory, write)
        if not _KEY.fullmatch(key):
            raise UserError(f"A trial's id must be letters, digits, _ and -, but got {key!r}.")
        self.store, self.key = store, key
        self._log = log or logging.getLogger("ppo_hpo")
        self._behind = False  # whether the newest checkpoint is not in the store yet

    def put(self, epoch: int, content: bytes) -> Path:
        """Write a serialised checkpoint whole, or not at all, into the directory and then into the store."""
        path = super().put(epoch, content)
        try:
            # While the store cannot be reached, each epoch tries once and does not wait.
            self._upload(path, content, **({"tries": 1} if self._behind else {}))
            self._behind = False
        except StoreError as error:
            self._behind = True
            self._log.warning("epoch %d is here, but not in the store yet: %s", epoch, error)
        return path

    def load(
        self,
        check: Callable[[Checkpoint], None] = lambda checkpoint: None,
        on_refused: Callable[[CheckpointError], None] = lambda error: None,
        max_bytes: int = MAX_BYTES,
    ) -> Checkpoint | None:
        """The newest whole checkpoint of the directory and the store. For the arguments see `Storage.load`.

        A checkpoint from the store is written into the directory. One that only the directory has is put into
        the store. A store that cannot be read raises, because it may have a newer one.
        """
        if self.store is None:
            return super().load(check, on_refused, max_bytes)
        found, newer, failure = None, None, None
        try:
            found = super().load(check, on_refused, max_bytes)
        except CheckpointError as error:
            failure = error
        accept = _Acceptance(check, on_refused, max_bytes)
        try:
            newer = self._newest_in_store(self.key, accept, above=found.epoch if found else -1)
        except CheckpointError as error:
            if found is not None:
                on_refused(error)
            failure = failure or error
        if newer is not None:
            checkpoint, content = newer
            super().put(checkpoint.epoch, content)
            self._log.info("found epoch %d in %s", checkpoint.epoch, self.store.path(TRIALS, self.key))
            return checkpoint
        if found and self.path_of(found.epoch).name not in self.store.names(TRIALS, self.key):
            self.put(found.epoch, read_bytes(self.path_of(found.epoch), max_bytes))
        if found is None and failure:
            raise failure
        return found

    def finish(self) -> None:
        """Put the newest checkpoint into the store if it is not there yet."""
        if self._behind and (paths := self.paths()):
            try:
                self._upload(paths[0], read_bytes(paths[0], MAX_BYTES))
            except StoreError as error:
                raise StoreError(
                    f"{error} What was trained is whole in {self.directory}. Rerun the trial there to put it "
                    f"into the store."
                ) from None
            self._behind = False

    def _upload(self, path: Path, content: bytes, **options: int) -> None:
        if self.store is None:
            return
        self.store.put(TRIALS, self.key, path.name, content=content, **options)
        older = [name for name in self._names(self.key) if name < path.name]
        for name in older[1:]:
            self.store.remove(TRIALS, self.key, name)

    def _names(self, key: str) -> list[str]:
        """Names of a trial's checkpoints in the store, newest first."""
        assert self.store is not None
        return [n for n in reversed(self.store.names(TRIALS, key)) if epoch_of(n) is not None]

    def _fetch(self, key: str, name: str, max_bytes: int) -> tuple[Checkpoint, bytes]:
        assert self.store is not None
        content = self.store.get(TRIALS, key, name, max_bytes=max_bytes)
        return from_bytes(content, self.store.path(TRIALS, key, name), epoch_of(name)), content

    def _newest_in_store(
        self, key: str, accept: _Acceptance, *, above: int = -1, up_to: float = math.inf
    ) -> tuple[Checkpoint, bytes] | None:
        """The newest whole checkpoint of a trial in the store, and its bytes; ``above < epoch <= up_to``.

        It is an error if there are some, but none can be used.
        """
        refused: list[CheckpointError] = []
        for name in self._names(key):
            if not above < (epoch_of(name) or 0) <= up_to:
                continue
            try:
                checkpoint, content = self._fetch(key, name, accept.max_bytes)
                accept.check(checkpoint)
            except CheckpointError as error:
                refused.append(error)
                continue
            for reason in refused:
                accept.on_refused(reason)
            return checkpoint, content
        if refused:
            raise refused[0]
        return None


class _Candidate(NamedTuple):
    """A checkpoint of a trial with the same identity, in a directory or under a key of the store."""

    epoch: int
    in_store: bool
    place: str
    name: str


class TrialStorage(MirroredStorage):
    """The checkpoints of one seed of a trial, from wherever the rule at the top of this module finds them."""

    def __init__(
        self, config: TrialConfig, directory: Path, part: str, orion: OrionContext, *, store: Store | None,
        write: Callable[[Path, bytes], None], log: logging.Logger,
    ) -> None:  # fmt: skip
        """``part`` is the seed's folder in the trial's ``directory``."""
        uid, parent = orion.trial_id, orion.parent
        self._identity = config.identity()
        self._short_identity = self._identity[:_IDENTITY_LENGTH]
        key = part_key(uid, part) if uid else self._short_identity
        super().__init__(directory / part, store, key, write, log)
        if parent is not None and not _KEY.fullmatch(parent):
            raise UserError(f"`--parent` must be the id of a trial, but got {parent!r}.")
        self._last_epoch = config.task.epochs
        self._part, self._siblings = part, orion.siblings
        # The file by which trials of the same identity find this one, if they are looked for here.
        index = directory.parent / INDEX / self._short_identity
        self._entry = index / directory.name if directory.parent == orion.siblings else None
        self._parent = parent and part_key(parent, part)
        self._uid = uid

    def load(
        self,
        check: Callable[[Checkpoint], None] = lambda checkpoint: None,
        on_refused: Callable[[CheckpointError], None] = lambda error: None,
        max_bytes: int = MAX_BYTES,
    ) -> Checkpoint | None:
        """The checkpoint to resume from. For the arguments see `Storage.load`."""
        accept = _Acceptance(check, on_refused, max_bytes)
        found_whole = False

        def check_own(checkpoint: Checkpoint) -> None:
            nonlocal found_whole
            found_whole = True
            check(checkpoint)

        failure: CheckpointError | None = None
        try:
            if (own := super().load(check_own, on_refused, max_bytes)) is not None:
                if self._uid is None or own.meta.get("uid") == self._uid:
                    return own
                return self._newer_than_copy(own, accept) or own
        except CheckpointError as error:
            # A whole checkpoint of other hyperparameters is a mistake that the user should hear of.
            if found_whole:
                raise
            failure = error
        found = self._from_parent(accept) or self._from_siblings(accept)
        if found is not None:
            check(found)
            if failure is not None:
                on_refused(failure)
        elif failure is not None and not self._set_torn_aside(on_refused):
            if isinstance(failure, TornCheckpoint):
                raise TornCheckpoint(f"{failure} No earlier one is whole. Remove them to start again.")
            raise failure
        return found

    def register(self) -> None:
        """Let trials of the same identity find this one."""
        if self._entry is not None:
            try:
                self._entry.parent.mkdir(parents=True, exist_ok=True)
                self._entry.touch()
            except OSError as error:
                raise UserError(f"{self._entry.parent} cannot be written: {error.strerror}.") from None
        if self.store is not None and not self._is_listed_in(self.store):
            self.store.put(IDENTITIES, self._short_identity, self.key, content=self.key.encode())

    def _is_listed_in(self, store: Store) -> bool:
        return self.key in store.names(IDENTITIES, self._short_identity)

    def _newer_than_copy(self, copy: Checkpoint, accept: _Acceptance) -> Checkpoint | None:
        """A newer checkpoint, in the store, of the parent whose directory was copied to here."""
        if self.store is None:
            return None
        try:
            if found := self._from_parent(accept, above=copy.epoch):
                return found
        except CheckpointError as error:
            accept.on_refused(error)
        if copy.meta.get("identity") != self._identity or copy.meta.get("lineage"):
            return None  # For a fork, trials of the same hyperparameters have another history.
        return self._from_siblings(accept, above=copy.epoch)

    def _from_parent(self, accept: _Acceptance, above: int = -1) -> Checkpoint | None:
        if self.store is None or self._parent is None:
            return None
        found = self._newest_in_store(self._parent, accept, above=above, up_to=self._last_epoch)
        if found is None:
            if above < 0:
                message = "the parent %s has no checkpoint in %s: looks for others"
                self._log.warning(message, self._parent, self.store.name)
            return None
        checkpoint, content = found
        self.put(checkpoint.epoch, content)
        self._log.info("found epoch %d of the parent %s in the store", checkpoint.epoch, self._parent)
        return checkpoint

    def _from_siblings(self, accept: _Acceptance, above: int = -1) -> Checkpoint | None:
        """The most advanced checkpoint of the same identity, above an epoch. It is copied to here."""
        for found in sorted(self._candidates(), key=lambda found: (-found.epoch, *found[1:])):
            if not above < found.epoch <= self._last_epoch:
                continue
            try:
                if found.in_store:
                    checkpoint, _ = self._fetch(found.place, found.name, accept.max_bytes)
                else:
                    checkpoint = read(Path(found.place) / found.name, accept.max_bytes)
            except CheckpointError as error:
                accept.on_refused(error)
                continue
            if checkpoint.meta.get("identity") == self._identity and not checkpoint.meta.get("lineage"):
                self.save(checkpoint)
                self._log.info("found epoch %d of the same trial in %s", found.epoch, found.place)
                return checkpoint
        return None

    def _candidates(self) -> list[_Candidate]:
        found: list[_Candidate] = []
        for trial in _trials_of(self._siblings, self._short_identity) if self._siblings else ():
            directory = trial / self._part
            if directory.is_dir() and not directory.is_symlink():
                names = [path.name for path in Storage(directory).paths()]
                found += [_Candidate(epoch_of(n) or 0, False, str(directory), n) for n in names]
        if self.store is not None:
            for key in self.store.names(IDENTITIES, self._short_identity):
                if key != self.key:
                    found += [_Candidate(epoch_of(n) or 0, True, key, n) for n in self._names(key)]
        return found

    def _set_torn_aside(self, on_refused: Callable[[CheckpointError], None]) -> bool:
        """If all that is left of a trial is torn, let it start again, and return whether it may.

        It computes the same numbers. A fork, which began as its parent, would not, but is not in the index.
        """
        listed = self._entry is not None and self._entry.exists()
        if not listed and (self.store is None or not self._is_listed_in(self.store)):
            return False
        torn: list[tuple[Path, TornCheckpoint]] = []
        for path in self.paths():
            try:
                read(path)
            except TornCheckpoint as error:
                torn.append((path, error))
            except CheckpointError:
                return False
        for path, reason in torn:
            on_refused(reason)
            with explain_write_errors(path):
                path.replace(path.with_name(f"{path.name}.torn"))
        self._log.warning("no checkpoint is whole: starts again. Torn checkpoints here are kept as *.torn")
        return True


def listed_trials(siblings: Path, n_max: int) -> dict[str, list[Path]]:
    """Directories of an experiment's trials that are no forks, by the first characters of their identity.

    There are at most ``n_max`` identities, the first in the order of their names.
    """
    found: dict[str, list[Path]] = {}
    try:
        for identity in sorted(os.listdir(siblings / INDEX)):
            if len(found) < n_max and (trials := _trials_of(siblings, identity)):
                found[identity] = trials
    except OSError:
        return {}
    return found


def _trials_of(siblings: Path, identity: str) -> list[Path]:
    """Directories of the trials of one identity. Links could lead elsewhere, so they are not followed."""
    index = siblings / INDEX / identity
    if not index.is_dir() or index.is_symlink() or index.parent.is_symlink():
        return []
    trials = [siblings / entry.name for entry in index.iterdir()]
    return [trial for trial in trials if not trial.is_symlink()]

"""Where a trial resumes from: its own directory, its siblings' directories, or a store.

This is the rule, for every algorithm of Orion's:

1. The trial's own working directory, or its own objects in the store, whichever is further. A retried trial
   finds there what it left. For ASHA and population-based training Orion has copied the parent's directory.
   That copy may be older than what the parent has done since on another machine. Or Orion may have been
   killed while it copied. If the parent's directory or the store has a newer one of the parent, it is taken.
   For a fork that needs the parent's id (``--parent``).
2. If neither holds a whole checkpoint, the parent's in its directory or in the store, if its id is given
   (``--parent``). After that, a checkpoint of a trial with the same identity (hyperparameters and seed): the
   most advanced one that is not beyond the trial's epochs. Hyperband and EvolutionES promote into new, empty
   directories, and this finds the lower rung.
3. If there is none, the trial starts from scratch, unless a note in its directory says that it is a fork.

Siblings are found through `<Orion's working directory>/.ppo_hpo/<identity>/`, which holds one empty file for
each trial directory of that identity. In the store they are found through `identities/<identity>/`. A forked
trial is listed in neither, because its hyperparameters do not tell its history. The identity is ours and not
Orion's `hash_params`, because it also covers what the space file fixes.

If a trial has several seeds, the rule holds for each seed. Each is a trial of one seed with an identity of
its own, in the folder `seed-N` of the trial's directory, and in the store under `ID-seed-N`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import CheckpointError, MachineError, TornCheckpoint, UserError
from ppo_hpo.state.checkpoint import (
    MAX_BYTES,
    Acceptance,
    Checkpoint,
    Found,
    Storage,
    epoch_of,
    from_bytes,
    newest_whole,
    read,
)
from ppo_hpo.state.files import explain_write_errors, read_bytes
from ppo_hpo.state.mirror import KEY, MirroredStorage, part_key
from ppo_hpo.state.remote_store import Store
from ppo_hpo.trial.options import OrionContext

IDENTITIES = "identities"  # folder of a store: trials by identity
INDEX = ".ppo_hpo"
# File in the directory of a fork whose parent is not on its machine: the parent's id.
_FORK_NOTE = "fork_of"
_IDENTITY_LENGTH = 32  # characters of an identity that name an index, and one of the store's identities


def note_fork(directory: Path, parent: str) -> None:
    """Make a trial's directory, with a note that it forks ``parent`` and must not start from scratch."""
    directory.mkdir(parents=True)
    (directory / _FORK_NOTE).write_text(parent)


def _fork_of(directory: Path) -> str | None:
    try:
        parent = read_bytes(directory / _FORK_NOTE, 100).decode()
    except (CheckpointError, UnicodeDecodeError):
        return None
    return parent if KEY.fullmatch(parent) else None


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
        self._fork_of = _fork_of(directory)
        parent = parent or self._fork_of
        self._identity = config.identity()
        self._short_identity = self._identity[:_IDENTITY_LENGTH]
        key = part_key(uid, part) if uid else self._short_identity
        super().__init__(directory / part, store, key, write, log)
        if parent is not None and not KEY.fullmatch(parent):
            raise UserError(f"`--parent` must be the id of a trial, but got {parent!r}.")
        self._last_epoch = config.task.epochs
        self._part, self._siblings = part, orion.siblings
        # The file by which trials of the same identity find this one, if they are looked for here.
        index = directory.parent / INDEX / self._short_identity
        self._entry = index / directory.name if directory.parent == orion.siblings else None
        self._parent = parent
        self._uid = uid

    def load(
        self,
        check: Callable[[Checkpoint], None] = lambda checkpoint: None,
        on_refused: Callable[[CheckpointError], None] = lambda error: None,
        max_bytes: int = MAX_BYTES,
    ) -> Checkpoint | None:
        """The checkpoint to resume from. For the arguments see `Storage.load`."""
        accept = Acceptance(check, on_refused, max_bytes)
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
        elif failure is None:
            self._refuse_to_start_a_fork()
        elif not self._set_torn_aside(on_refused):
            raise _with_advice(failure)
        return found

    def _refuse_to_start_a_fork(self) -> None:
        if self._fork_of is not None:
            raise MachineError(
                f"The trial is a fork of {self._fork_of}, whose checkpoint is neither on this machine nor in "
                f"a store (`--checkpoint-store`). It must not start from scratch. Make the directory of that "
                f"trial or the store available here."
            )

    def register(self) -> None:
        """Let trials of the same identity find this one."""
        if self._entry is not None:
            try:
                self._entry.parent.mkdir(parents=True, exist_ok=True)
                self._entry.touch()
            except OSError as error:
                raise UserError(f"{self._entry.parent} cannot be written: {error.strerror}.") from None
        if self.store is not None and not self._is_listed_in(self.store):
            self.store.remove_leftovers(IDENTITIES, self._short_identity)
            self.store.put(IDENTITIES, self._short_identity, self.key, content=self.key.encode())

    def _is_listed_in(self, store: Store) -> bool:
        return self.key in store.names(IDENTITIES, self._short_identity)

    def _newer_than_copy(self, copy: Checkpoint, accept: Acceptance) -> Checkpoint | None:
        """A newer checkpoint of the parent whose directory was copied to here."""
        try:
            if found := self._from_parent(accept, above=copy.epoch):
                return found
        except CheckpointError as error:
            accept.on_refused(error)
        if self.store is None:
            return None
        if copy.meta.get("identity") != self._identity or copy.meta.get("lineage"):
            return None  # For a fork, trials of the same hyperparameters have another history.
        return self._from_siblings(accept, above=copy.epoch)

    def _from_parent(self, accept: Acceptance, above: int = -1) -> Checkpoint | None:
        """The parent's latest checkpoint, above an epoch, from its directory or from the store."""
        if self._parent is None:
            return None
        found = self._parents_newest_here(self._parent, accept, above)
        if self.store is not None:
            key, newest = part_key(self._parent, self._part), found[0].epoch if found else above
            try:
                found = self.newest_in_store(key, accept, above=newest, up_to=self._last_epoch) or found
            except CheckpointError as error:
                if found is None:
                    raise
                accept.on_refused(error)
        if found is None:
            if above < 0:
                where = "here" if self.store is None else f"in {self.store.name}"
                self._log.warning("the parent %s has no checkpoint %s: looks for others", self._parent, where)
            return None
        checkpoint, content = found
        self.put(checkpoint.epoch, content)
        self._log.info("found epoch %d of the parent %s", checkpoint.epoch, self._parent)
        return checkpoint

    def _parents_newest_here(self, parent: str, accept: Acceptance, above: int) -> Found | None:
        if self._siblings is None or (self._siblings / parent).is_symlink():
            return None
        directory = self._siblings / parent / self._part
        if not directory.is_dir() or directory.is_symlink():
            return None

        def fetch(name: str) -> Found:
            content = read_bytes(directory / name, accept.max_bytes)
            return from_bytes(content, str(directory / name), epoch_of(name)), content

        names = [path.name for path in Storage(directory).paths()]
        names = [name for name in names if above < (epoch_of(name) or 0) <= self._last_epoch]
        return newest_whole(names, fetch, accept)

    def _from_siblings(self, accept: Acceptance, above: int = -1) -> Checkpoint | None:
        """The most advanced checkpoint of the same identity, above an epoch. It is copied to here."""
        for found in sorted(self._candidates(), key=lambda found: (-found.epoch, *found[1:])):
            if not above < found.epoch <= self._last_epoch:
                continue
            try:
                if found.in_store:
                    checkpoint, _ = self.fetch(found.place, found.name, accept.max_bytes)
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
                    found += [_Candidate(epoch_of(n) or 0, True, key, n) for n in self.names_in_store(key)]
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


def _with_advice(failure: CheckpointError) -> CheckpointError:
    if isinstance(failure, TornCheckpoint):
        return TornCheckpoint(f"{failure} No earlier one is whole. Remove them to start again.")
    return failure


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

"""Where a trial's state comes from: its own directory, its siblings', and a store.

The rule, for every algorithm of Orion's:

1. The trial's own working directory, or its own objects in the store: whichever is further. A retried
   trial finds there what it left; for ASHA and population-based training Orion has copied the
   parent's directory.
   The copy may be older than what the parent did on another machine since: if the store has more of it,
   that is taken; of a fork's parent where it is told (``--parent``).
2. Where neither holds a whole checkpoint: the parent's in the store, where the parent is told
   (``--parent``); then one of the same identity (hyperparameters and seed), the most advanced that is not
   beyond the trial's epochs. Hyperband and EvolutionES promote into new, empty directories; this finds
   the lower rung.

Siblings are found through `<Orion's working directory>/.ppo_hpo/<identity>/`, which holds one empty file
for each trial directory of that identity, and in the store through `identities/<identity>/`. A forked
trial is listed in neither: its hyperparameters do not tell its history. The identity is ours and not
Orion's `hash_params`, because it also covers what the space file fixes.

Where a trial has several seeds, the rule holds for each of them: they are trials of one seed with an identity
of their own, in the folder `seed-N` of the trial's directory, and in the store under `ID-seed-N`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path

from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import CheckpointError, TornCheckpoint, UserError
from ppo_hpo.state.checkpoint import MAX_BYTES, Checkpoint, Storage, epoch_of, from_bytes, read
from ppo_hpo.state.files import explain_write_errors, read_bytes
from ppo_hpo.state.remote_store import Store, StoreError
from ppo_hpo.trial.options import OrionContext

INDEX = ".ppo_hpo"
TRIALS, IDENTITIES = "trials", "identities"
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", re.ASCII)


def listed_trials(siblings: Path, n_max: int) -> dict[str, list[Path]]:
    """Directories of the trials of an experiment that are no forks, by the first digits of their identity.

    Args:
        siblings: the directory in which they lie.
        n_max: so many identities, in the order of their names; links, which would lead elsewhere, are not
            followed.
    """
    index = siblings / INDEX
    try:
        if index.is_symlink():
            return {}
        names = [path.name for path in index.iterdir() if path.is_dir() and not path.is_symlink()]
        return {
            name: [
                siblings / entry.name
                for entry in (index / name).iterdir()
                if not (siblings / entry.name).is_symlink()
            ]
            for name in sorted(names)[:n_max]
        }
    except OSError:
        return {}


def part_key(key: str, part: str) -> str:
    """The name in the store of a part of the trial ``key``; of the trial itself, where the part is ``""``."""
    return f"{key}-{part}" if part else key


class MirroredStorage(Storage):
    """Checkpoints in a directory, and the same ones in a store.

    A checkpoint that cannot be put into the store is a warning: the directory has it, and the next epoch
    tries again. `finish` tries for the last time.
    """

    def __init__(
        self,
        directory: Path,
        store: Store | None,
        key: str,
        write: Callable[[Path, bytes], None] | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        """Checkpoints in ``directory`` and, unless it is None, in ``store`` under ``key``.

        Raises:
            UserError: ``key`` cannot be a name there.
        """
        super().__init__(directory, write)
        if not _KEY.fullmatch(key):
            raise UserError(f"A trial's id must be letters, digits, _ and -, but got {key!r}.")
        self.store, self.key = store, key
        self._log = log or logging.getLogger("ppo_hpo")
        self._behind = False

    def put(self, epoch: int, content: bytes) -> Path:
        """Write a serialised checkpoint whole, or not at all, here and then into the store."""
        path = super().put(epoch, content)
        try:
            # While the store is away each epoch asks once, and does not wait.
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
        """The newest checkpoint that is whole, of the directory's and the store's.

        What comes from the store is written into the directory; what only the directory has goes into
        the store.

        Raises:
            CheckpointError: there are checkpoints, but none that can be used.
            StoreError: the store cannot be read, so that nobody knows whether it is further.
        """
        found: Checkpoint | None = None
        failure: CheckpointError | None = None
        try:
            found = super().load(check, on_refused, max_bytes)
        except CheckpointError as error:
            failure = error
        if self.store is None:
            if failure:
                raise failure
            return found
        try:
            newer = self._newest_of(
                self.key, check, on_refused, max_bytes, above=found.epoch if found else -1
            )
        except CheckpointError as error:
            newer = None
            if found is not None:
                on_refused(error)
            failure = failure or error
        if newer is not None:
            checkpoint, content = newer
            super().put(checkpoint.epoch, content)
            self._log.info("found epoch %d in %s", checkpoint.epoch, self.store.path(TRIALS, self.key))
            return checkpoint
        if found is None:
            if failure:
                raise failure
            return None
        if self.path_of(found.epoch).name not in self.store.names(TRIALS, self.key):
            self.put(found.epoch, read_bytes(self.path_of(found.epoch), max_bytes))
        return found

    def finish(self) -> None:
        """Put into the store what is missing there.

        Raises:
            StoreError: it cannot be written; the directory is whole.
        """
        if self._behind and (paths := self.paths()):
            try:
                self._upload(paths[0], read_bytes(paths[0], MAX_BYTES))
            except StoreError as error:
                raise StoreError(
                    f"{error} What was trained is whole in {self.directory}; run the trial again there, and "
                    f"it goes into the store."
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

    def _newest_of(
        self,
        key: str,
        check: Callable[[Checkpoint], None],
        on_refused: Callable[[CheckpointError], None],
        max_bytes: int,
        above: int = -1,
        up_to: int | None = None,
    ) -> tuple[Checkpoint, bytes] | None:
        """The newest whole checkpoint of a trial in the store, between two epochs, and its bytes.

        Raises:
            CheckpointError: there are some, but none that can be used.
        """
        assert self.store is not None
        refused: list[CheckpointError] = []
        for name in self._names(key):
            epoch = epoch_of(name)
            if epoch is None or epoch <= above or (up_to is not None and epoch > up_to):
                continue
            try:
                content = self.store.get(TRIALS, key, name, max_bytes=max_bytes)
                checkpoint = from_bytes(content, self.store.path(TRIALS, key, name), epoch)
                check(checkpoint)
            except CheckpointError as error:
                refused.append(error)
                continue
            for reason in refused:
                on_refused(reason)
            return checkpoint, content
        if refused:
            raise refused[0]
        return None


class TrialStorage(MirroredStorage):
    """The checkpoints of one trial, from wherever the rule at the top of this module finds them."""

    def __init__(
        self,
        config: TrialConfig,
        directory: Path,
        part: str,
        orion: OrionContext,
        *,
        store: Store | None = None,
        write: Callable[[Path, bytes], None] | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        """Checkpoints of the trial ``config`` in ``directory``.

        Args:
            config: the trial, of one seed.
            directory: its own; of a trial of several seeds, theirs.
            part: the folder in there that is this seed's.
            orion: which trial of which experiment it is.
            store: a second place for checkpoints, which other machines reach.
            write: `write_atomically`, or as good.
            log: gets what was found where.
        """
        uid, parent = orion.trial_id, orion.parent
        key = part_key(uid, part) if uid else config.identity()[:32]
        super().__init__(directory / part, store, key, write, log)
        if parent is not None and not _KEY.fullmatch(parent):
            raise UserError(f"`--parent` must be the id of a trial, but got {parent!r}.")
        self._config, self._siblings, self._trial, self._part = config, orion.siblings, directory, part
        self._parent = parent and part_key(parent, part)
        self._uid = uid

    def load(
        self,
        check: Callable[[Checkpoint], None] = lambda checkpoint: None,
        on_refused: Callable[[CheckpointError], None] = lambda error: None,
        max_bytes: int = MAX_BYTES,
    ) -> Checkpoint | None:
        """The checkpoint to go on from; for the arguments see `Storage.load`."""
        whole = False

        def look(checkpoint: Checkpoint) -> None:
            nonlocal whole
            whole = True
            check(checkpoint)

        failure: CheckpointError | None = None
        try:
            if (own := super().load(look, on_refused, max_bytes)) is not None:
                if self._uid is None or own.meta.get("uid") == self._uid:
                    return own
                return self._newer_than(own, check, on_refused, max_bytes) or own
        except CheckpointError as error:
            # One that is whole, but of other hyperparameters, is a mistake that somebody should hear of.
            if whole:
                raise
            failure = error
        found = self._from_parent(check, on_refused, max_bytes) or self._from_siblings(on_refused, max_bytes)
        if found is None and failure is not None and not self._set_torn_aside(on_refused):
            if isinstance(failure, TornCheckpoint):
                raise TornCheckpoint(f"{failure} None before it is whole: remove them to begin again.")
            raise failure
        if found is not None:
            check(found)
            if failure is not None:
                on_refused(failure)
        return found

    def _newer_than(
        self,
        copy: Checkpoint,
        check: Callable[[Checkpoint], None],
        on_refused: Callable[[CheckpointError], None],
        max_bytes: int,
    ) -> Checkpoint | None:
        """What the store has of a parent that went on elsewhere after it left here what was copied."""
        if self.store is None:
            return None
        try:
            if found := self._from_parent(check, on_refused, max_bytes, above=copy.epoch):
                return found
        except CheckpointError as error:
            on_refused(error)
        if copy.meta.get("identity") != self._config.identity() or copy.meta.get("lineage"):
            return None  # of a fork: those of its hyperparameters have another history
        return self._from_siblings(on_refused, max_bytes, above=copy.epoch)

    def register(self) -> None:
        """Let trials of the same identity find this one.

        Raises:
            UserError: the index cannot be written.
        """
        identity = self._config.identity()[:32]
        if self._siblings is not None and self._trial.parent == self._siblings:
            index = self._siblings / INDEX / identity
            try:
                index.mkdir(parents=True, exist_ok=True)
                (index / self._trial.name).touch()
            except OSError as error:
                raise UserError(f"{index} cannot be written: {error.strerror}.") from None
        if self.store is not None and self.key not in self.store.names(IDENTITIES, identity):
            self.store.put(IDENTITIES, identity, self.key, content=self.key.encode())

    def _from_parent(
        self,
        check: Callable[[Checkpoint], None],
        on_refused: Callable[[CheckpointError], None],
        max_bytes: int,
        above: int = -1,
    ) -> Checkpoint | None:
        if self.store is None or self._parent is None:
            return None
        found = self._newest_of(
            self._parent, check, on_refused, max_bytes, above=above, up_to=self._config.task.epochs
        )
        if found is None and above >= 0:
            return None
        if found is None:
            self._log.warning(
                "the parent %s has no checkpoint in %s: looks for others", self._parent, self.store.name
            )
            return None
        checkpoint, content = found
        self.put(checkpoint.epoch, content)
        self._log.info("found epoch %d of the parent %s in the store", checkpoint.epoch, self._parent)
        return checkpoint

    def _set_torn_aside(self, on_refused: Callable[[CheckpointError], None]) -> bool:
        """Where all that is left of a trial is torn, let it start again: it comes to the same numbers.

        A fork would not, since it began as its parent; only trials that are none are in the index.

        Returns:
            Whether that is so.
        """
        identity = self._config.identity()[:32]
        index = None if self._siblings is None else self._siblings / INDEX / identity / self._trial.name
        listed = index is not None and index.exists()
        if not listed and (self.store is None or self.key not in self.store.names(IDENTITIES, identity)):
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
        self._log.warning("no checkpoint is whole: starts again; torn ones that lie here are kept as *.torn")
        return True

    def _from_siblings(
        self, on_refused: Callable[[CheckpointError], None], max_bytes: int, above: int = -1
    ) -> Checkpoint | None:
        """The most advanced checkpoint of the same identity between two epochs, copied to here."""
        identity, places = self._config.identity(), list[tuple[int, int, str, str]]()
        if self._siblings is not None:
            for directory in self._listed(self._siblings, identity, self._part):
                for path in Storage(directory).paths():
                    places.append((epoch_of(path.name) or 0, 0, str(directory), path.name))
        if self.store is not None:
            for key in self.store.names(IDENTITIES, identity[:32]):
                places += [(epoch_of(n) or 0, 1, key, n) for n in self._names(key) if key != self.key]
        for epoch, remote, place, name in sorted(places, key=lambda p: (-p[0], p[1:])):
            if not above < epoch <= self._config.task.epochs:
                continue
            try:
                if remote:
                    assert self.store is not None
                    content = self.store.get(TRIALS, place, name, max_bytes=max_bytes)
                    checkpoint = from_bytes(content, self.store.path(TRIALS, place, name), epoch)
                else:
                    checkpoint = read(Path(place) / name, max_bytes)
            except CheckpointError as error:
                on_refused(error)
                continue
            if checkpoint.meta.get("identity") == identity and not checkpoint.meta.get("lineage"):
                self.save(checkpoint)
                self._log.info("found epoch %d of the same trial in %s", epoch, place)
                return checkpoint
        return None

    @staticmethod
    def _listed(siblings: Path, identity: str, part: str) -> list[Path]:
        """Directories of trials of one identity; links, which would lead elsewhere, are not followed."""
        index = siblings / INDEX / identity[:32]
        if not index.is_dir() or index.is_symlink() or index.parent.is_symlink():
            return []
        trials = [siblings / entry.name for entry in index.iterdir()]
        found = [path / part for path in trials if not path.is_symlink()]
        return [path for path in found if path.is_dir() and not path.is_symlink()]

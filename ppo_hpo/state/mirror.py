"""The checkpoints of a trial in two places: in its directory, and in a store that other machines reach."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

from ppo_hpo.spec.errors import CheckpointError, UserError
from ppo_hpo.state.checkpoint import (
    MAX_BYTES,
    Acceptance,
    Checkpoint,
    Found,
    Storage,
    epoch_of,
    from_bytes,
    newest_whole,
)
from ppo_hpo.state.files import explain_write_errors, read_bytes
from ppo_hpo.state.remote_store import MARK, Store, StoreError

TRIALS = "trials"  # folder of a store, with a folder for each trial
#: What an id of a trial looks like.
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", re.ASCII)
_NOTE = "store"  # file in a trial's directory that names the store in which it was kept


def part_key(key: str, part: str) -> str:
    """The name in the store of one seed of the trial ``key``. If ``part`` is empty, it is the trial's."""
    return f"{key}-{part}" if part else key


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
        if not KEY.fullmatch(key):
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
        self._recognise(self.store)
        found, newer, failure = None, None, None
        try:
            found = super().load(check, on_refused, max_bytes)
        except CheckpointError as error:
            failure = error
        accept = Acceptance(check, on_refused, max_bytes)
        try:
            newer = self.newest_in_store(self.key, accept, above=found.epoch if found else -1)
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

    def _recognise(self, store: Store) -> None:
        """Refuse a store that looks empty although the trial was kept in it, as an unmounted one does."""
        note = self.directory / _NOTE
        known = note.is_file() and read_bytes(note, 1 << 16) == store.name.encode()
        if store.is_new():
            if known:
                raise StoreError(
                    f"The store {store.name} is empty, but this trial was kept in it. Mount it. If you "
                    f"emptied it, make an empty file {MARK} in it."
                )
            store.mark()
        if not known:
            with explain_write_errors(note):
                self.directory.mkdir(parents=True, exist_ok=True)
            self._write(note, store.name.encode())
        store.remove_leftovers(TRIALS, self.key)

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
        older = [name for name in self.names_in_store(self.key) if name < path.name]
        for name in older[1:]:
            self.store.remove(TRIALS, self.key, name)

    def names_in_store(self, key: str) -> list[str]:
        """Names of a trial's checkpoints in the store, newest first."""
        assert self.store is not None
        return [n for n in reversed(self.store.names(TRIALS, key)) if epoch_of(n) is not None]

    def fetch(self, key: str, name: str, max_bytes: int) -> Found:
        """A checkpoint of a trial in the store."""
        assert self.store is not None
        content = self.store.get(TRIALS, key, name, max_bytes=max_bytes)
        return from_bytes(content, self.store.path(TRIALS, key, name), epoch_of(name)), content

    def newest_in_store(
        self, key: str, accept: Acceptance, *, above: int = -1, up_to: float = math.inf
    ) -> Found | None:
        """The newest whole checkpoint of a trial in the store, and its bytes; see `newest_whole`."""
        names = [name for name in self.names_in_store(key) if above < (epoch_of(name) or 0) <= up_to]
        return newest_whole(names, lambda name: self.fetch(key, name, accept.max_bytes), accept)

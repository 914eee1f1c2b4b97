"""A store for checkpoints beside the trial's directory, for workers that share no file system.

A store is a directory, or whatever `fsspec` reaches by a URL: ``s3://bucket/path``, ``gs://``,
``az://``, ``sftp://host/path``, ``memory://``. It holds small trees of whole objects:

    trials/KEY/checkpoint-NNNNNN.safetensors    of a trial: the newest and the one before
    identities/IDENTITY/KEY                     which trials have these hyperparameters and this seed

Object stores have no rename, and need none: what is put appears whole or not at all. Elsewhere an object
is written under another name and renamed. There is no lock. What two writers of one trial put under
one name is the same state, because a trial's epoch follows from its hyperparameters alone.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ppo_hpo.spec.errors import CheckpointError, MachineError, UserError, hide_passwords
from ppo_hpo.state.files import read_bytes, write_atomically

#: The store's URL where no other is given.
VARIABLE = "PPO_HPO_STORE"
# In these an object that is written appears at once and whole.
_OBJECT_STORES = {
    "abfs", "abfss", "adl", "az", "gcs", "gs", "memory", "oci", "oss", "r2", "s3", "s3a", "tos",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.ASCII)
# Seconds before the second and the third try: long enough for a network that stumbles.
_PAUSES = (0.5, 2.0)

_Result = TypeVar("_Result")


class StoreError(MachineError):
    """A store that cannot be reached, or does not do what it is asked."""


class Store:
    """Whole objects below one URL, each named by words joined by slashes.

    Attributes:
        name: the URL without a user's name and password, for messages.
    """

    def __init__(self, url: str) -> None:
        """Open the store at ``url``, a directory or a URL of `fsspec`'s; nothing is read yet.

        Raises:
            StoreError: nothing that `fsspec` knows, or a package that it needs is missing.
        """
        self.name = hide_passwords(url)
        scheme = _SCHEME.match(url)
        self._directory: Path | None = None
        if "::" in url:
            raise StoreError(f"`--store` must be one URL without ::, but got {self.name!r}.")
        if scheme is None or scheme[1] in ("file", "local"):
            self._directory = Path(url[scheme.end() :] if scheme else url).absolute()
            return
        try:
            import fsspec
        except ImportError:
            raise StoreError(f"`--store {self.name}` needs fsspec: pip install 'ppo-hpo[remote]'.") from None
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except Exception as error:  # each file system has errors of its own
            raise StoreError(f"The store {self.name} cannot be opened: {_reason(error)}.") from None
        self._appears_whole = scheme[1] in _OBJECT_STORES

    def __repr__(self) -> str:
        return f"Store({self.name!r})"

    def names(self, *place: str) -> list[str]:
        """Names of the objects directly below a place, sorted; none where the place is not there.

        Names that no trial of ours has are left out.

        Raises:
            StoreError: it cannot be read.
        """

        def look() -> list[str]:
            try:
                if self._directory is not None:
                    return os.listdir(self._directory.joinpath(*_checked(place)))
                # Other workers write here too.
                self._fs.invalidate_cache()
                found = self._fs.ls("/".join((self._root.rstrip("/"), *_checked(place))), detail=False)
                return [str(path).rstrip("/").rpartition("/")[2] for path in found]
            except (FileNotFoundError, NotADirectoryError):
                return []

        return sorted(name for name in self._try(look, "be read") if _NAME.fullmatch(name))

    def get(self, *place: str, max_bytes: int) -> bytes:
        """The content of an object.

        Raises:
            CheckpointError: it is gone, or larger than ``max_bytes`` bytes: it is not read then.
            StoreError: it cannot be read.
        """
        name = self.path(*place)
        if self._directory is not None:
            return read_bytes(self._directory.joinpath(*_checked(place)), max_bytes)
        path = "/".join((self._root.rstrip("/"), *_checked(place)))

        def fetch() -> bytes | None:
            try:
                size = int(self._fs.info(path)["size"])
                if size > max_bytes:
                    raise CheckpointError(f"{name} is larger than {max_bytes} bytes: it is not read.")
                return bytes(self._fs.cat_file(path, start=0, end=size)) if size else b""
            except FileNotFoundError:
                return None

        content = self._try(fetch, "be read")
        if content is None:
            raise CheckpointError(f"{name} cannot be read: it is not there.")
        return content

    def put(self, *place: str, content: bytes, tries: int = 1 + len(_PAUSES)) -> None:
        """Put an object there, whole or not at all; one of that name is replaced.

        Raises:
            StoreError: it cannot be written.
        """
        parts = _checked(place)

        def write() -> None:
            if self._directory is not None:
                path = self._directory.joinpath(*parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, content)
                return
            folder = "/".join((self._root.rstrip("/"), *parts[:-1]))
            if self._appears_whole:
                self._fs.pipe_file(f"{folder}/{parts[-1]}", content)
                return
            self._fs.makedirs(folder, exist_ok=True)
            temporary = f"{folder}/.{secrets.token_hex(8)}.tmp"
            try:
                self._fs.pipe_file(temporary, content)
                self._fs.mv(temporary, f"{folder}/{parts[-1]}")
            except BaseException:
                if self._fs.exists(temporary):
                    self._fs.rm_file(temporary)
                raise

        self._try(write, "be written", tries)

    def remove(self, *place: str) -> None:
        """Remove an object; one that is gone already is no error.

        Raises:
            StoreError: it cannot be removed.
        """
        parts = _checked(place)

        def unlink() -> None:
            try:
                if self._directory is not None:
                    self._directory.joinpath(*parts).unlink(missing_ok=True)
                else:
                    self._fs.rm_file("/".join((self._root.rstrip("/"), *parts)))
            except FileNotFoundError:
                pass

        self._try(unlink, "be written")

    def size(self, *place: str) -> int:
        """Bytes of an object; 0 where it is gone.

        Raises:
            StoreError: it cannot be read.
        """
        parts = _checked(place)

        def look() -> int:
            try:
                if self._directory is not None:
                    return self._directory.joinpath(*parts).stat().st_size
                return int(self._fs.info("/".join((self._root.rstrip("/"), *parts)))["size"])
            except FileNotFoundError:
                return 0

        return self._try(look, "be read")

    def path(self, *place: str) -> str:
        """An object's place in words, for messages."""
        return "/".join((self.name.rstrip("/"), *place))

    def _try(self, do: Callable[[], _Result], what: str, tries: int = 1 + len(_PAUSES)) -> _Result:
        """Do something with the store, again after a pause where it fails."""
        for pause in (*_PAUSES[: tries - 1], None):
            try:
                return do()
            except CheckpointError:
                raise
            except Exception as error:  # each file system has errors of its own
                if pause is None:
                    raise StoreError(f"The store {self.name} cannot {what}: {_reason(error)}.") from None
                time.sleep(pause)
        raise AssertionError("unreachable")


def open_store(url: str | None) -> Store | None:
    """The store of a URL; None asks the environment variable `VARIABLE`, and '' is no store.

    Raises:
        StoreError: see `Store`.
    """
    url = os.environ.get(VARIABLE, "") if url is None else url
    return Store(url) if url else None


def _checked(place: tuple[str, ...]) -> tuple[str, ...]:
    """The parts of a place; none of them can lead out of the store."""
    for part in place:
        if not _NAME.fullmatch(part):
            raise UserError(f"A name in a store must be letters, digits and . _ -, but got {part!r}.")
    return place


def _reason(error: Any) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return f"{type(error).__name__}: {text}".rstrip(": ").rstrip(".")

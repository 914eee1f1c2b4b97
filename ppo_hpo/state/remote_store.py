"""A store keeps copies of checkpoints for workers that share no file system.

A store is a directory, or a URL that `fsspec` can open: ``s3://bucket/path``, ``gs://``, ``az://``,
``sftp://host/path``, ``memory://``. It holds whole objects in small trees:

    trials/KEY/checkpoint-NNNNNN.safetensors    the latest checkpoint of a trial and the one before it
    identities/IDENTITY/KEY                     the trials with these hyperparameters and this seed
    ppo-hpo-store                               tells a store from an empty or unmounted directory

There is no lock. Two writers of one trial write the same state under the same name, because the state of an
epoch follows from the hyperparameters alone.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ppo_hpo.spec.errors import CheckpointError, MachineError, UserError, hide_secrets
from ppo_hpo.state.files import read_bytes, write_atomically

#: Environment variable that holds the store's URL if no other is given.
VARIABLE = "PPO_HPO_STORE"
# In these file systems a new object appears at once and complete. They have no rename, and need none.
_OBJECT_STORES = {
    "abfs", "abfss", "adl", "az", "gcs", "gs", "memory", "oci", "oss", "r2", "s3", "s3a", "tos",
}  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.ASCII)
# Seconds before the second and the third attempt, long enough for a short failure of the network.
_PAUSES = (0.5, 2.0)
# Seconds that one operation may take, and bytes for which it may take another second.
_LIMIT, _BYTES_PER_SECOND = 120.0, 100_000
#: Object that the first trial makes.
MARK = "ppo-hpo-store"

_FAIL = object()  # as ``missing``: a missing object is an error like any other
_Result = TypeVar("_Result")


class StoreError(MachineError):
    """A store cannot be reached, or failed to do what it was asked."""


class _TooLong(StoreError):
    """An operation takes too long. It may still come to its end, which does no harm."""


class Store:
    """Whole objects below one URL. The parts of an object's name are given as separate arguments.

    Every method raises `StoreError` if the store cannot be reached, after some attempts.
    """

    def __init__(self, url: str) -> None:
        """Open a store: a directory, or a URL that `fsspec` can open. Nothing is read yet."""
        self.name = hide_secrets(url)
        self._overdue: Future[Any] | None = None  # an operation that took too long
        scheme = _SCHEME.match(url)
        if "::" in url:
            raise StoreError(f"`--checkpoint-store` must be one URL without ::, but got {self.name!r}.")
        self._objects: _Directory | _FileSystem
        if scheme is None or scheme[1] in ("file", "local"):
            self._objects = _Directory(Path(url[scheme.end() :] if scheme else url).absolute())
            return
        try:
            import fsspec
        except ImportError:
            advice = "pip install 'ppo-hpo[remote]'"
            raise StoreError(f"`--checkpoint-store {self.name}` needs fsspec: {advice}.") from None
        try:
            fs, root = self._within(_LIMIT, lambda: fsspec.core.url_to_fs(url))  # Some connect at once.
        except _TooLong:
            raise
        except Exception as error:  # Each file system has its own error types.
            raise StoreError(f"The store {self.name} cannot be opened: {_reason(error)}.") from None
        self._objects = _FileSystem(fs, root, scheme[1] in _OBJECT_STORES)

    def __repr__(self) -> str:
        return f"Store({self.name!r})"

    def names(self, *parts: str) -> list[str]:
        """Names directly below a place, sorted, without those that no trial of ours can have."""
        place = _place(parts)
        found = self._try(lambda: self._objects.names(place), "be read", missing=[])
        return sorted(name for name in found if _NAME.fullmatch(name))

    def get(self, *parts: str, max_bytes: int) -> bytes:
        """Read an object; `CheckpointError` if it does not exist, or is larger than ``max_bytes``."""
        place, name = _place(parts), self.path(*parts)
        size = self._try(lambda: self._objects.size(place), "be read", missing=None)
        if size is not None and size > max_bytes:
            raise CheckpointError(f"{name} is larger than {max_bytes} bytes: it is not read.")
        content = None
        if size is not None:
            read = partial(self._objects.read, place, size)
            content = self._try(read, "be read", size=size, missing=None)
        if content is None:
            raise CheckpointError(f"{name} cannot be read: it is not there.")
        return content

    def put(self, *parts: str, content: bytes, tries: int = 1 + len(_PAUSES)) -> None:
        """Write an object as a whole, or not at all. An object of the same name is replaced."""
        place = _place(parts)
        write = partial(self._objects.write, place, content)
        self._try(write, "be written", size=len(content), tries=tries)

    def remove(self, *parts: str) -> None:
        """Remove an object, if it exists."""
        place = _place(parts)
        self._try(lambda: self._objects.remove(place), "be written", missing=None)

    def size(self, *parts: str) -> int:
        """Size of an object in bytes; 0 if it does not exist."""
        place = _place(parts)
        return self._try(lambda: self._objects.size(place), "be read", missing=0)

    def remove_leftovers(self, *parts: str) -> None:
        """Remove what killed writers left directly below a place.

        A writer that still lives writes its object again.
        """
        place = _place(parts)
        names = self._try(lambda: self._objects.names(place), "be read", missing=[])
        for path in [f"{place}/{name}" for name in names if name.startswith(".") and name.endswith(".tmp")]:
            self._try(partial(self._objects.remove, path), "be written", missing=None)

    def is_new(self) -> bool:
        """Whether no trial was ever kept in it. An unmounted directory looks the same."""
        return MARK not in self.names()

    def mark(self) -> None:
        """Make it a store that is not new."""
        self.put(MARK, content=b"")

    def path(self, *parts: str) -> str:
        """The full name of an object, for messages."""
        return "/".join((self.name.rstrip("/"), *parts))

    def _try(
        self, do: Callable[[], _Result], what: str, *, size: int = 0, missing: Any = _FAIL,
        tries: int = 1 + len(_PAUSES),
    ) -> _Result:  # fmt: skip
        """Call ``do``, and again after a pause if it fails; return ``missing`` if there is no object.

        ``size`` is the number of bytes that it moves. A call that takes too long is not repeated.
        """
        for pause in (*_PAUSES[: tries - 1], None):
            try:
                return self._within(_LIMIT + size / _BYTES_PER_SECOND, do)
            except (CheckpointError, _TooLong):
                raise
            except Exception as error:  # Each file system has its own error types.
                if missing is not _FAIL and isinstance(error, (FileNotFoundError, NotADirectoryError)):
                    return missing  # type: ignore[no-any-return]
                if pause is None:
                    raise StoreError(f"The store {self.name} cannot {what}: {_reason(error)}.") from None
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _within(self, seconds: float, do: Callable[[], _Result]) -> _Result:
        """Call ``do`` in a thread, and give up on it after some time. Some file systems wait for ever."""
        if self._overdue is not None and not self._overdue.done():
            raise _TooLong(f"The store {self.name} has still not answered.")
        outcome: Future[_Result] = Future()

        def call() -> None:
            try:
                outcome.set_result(do())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=call, name="ppo_hpo.state.remote_store", daemon=True).start()
        if wait([outcome], seconds).not_done:
            self._overdue = outcome
            raise _TooLong(f"The store {self.name} has not answered for {seconds:.0f} seconds.")
        return outcome.result()


class _Directory:
    """The objects of a store that is a directory. It needs no fsspec, and follows no links."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self, place: str) -> list[str]:
        return os.listdir(self._root / place)

    def read(self, place: str, size: int) -> bytes:
        return read_bytes(self._root / place, size)

    def write(self, place: str, content: bytes) -> None:
        path = self._root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)

    def remove(self, place: str) -> None:
        (self._root / place).unlink()

    def size(self, place: str) -> int:
        return (self._root / place).stat().st_size


class _FileSystem:
    """The objects of a store that `fsspec` reaches."""

    def __init__(self, fs: Any, root: str, appears_whole: bool) -> None:
        self._fs, self._root, self._appears_whole = fs, root.rstrip("/"), appears_whole

    def names(self, place: str) -> list[str]:
        # Other workers write here, too.
        self._fs.invalidate_cache()
        found = self._fs.ls(f"{self._root}/{place}".rstrip("/"), detail=False)
        return [str(path).rstrip("/").rpartition("/")[2] for path in found]

    def read(self, place: str, size: int) -> bytes:
        return bytes(self._fs.cat_file(f"{self._root}/{place}", start=0, end=size)) if size else b""

    def write(self, place: str, content: bytes) -> None:
        path = f"{self._root}/{place}"
        if self._appears_whole:
            self._fs.pipe_file(path, content)
            return
        folder = path.rpartition("/")[0]
        self._fs.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{secrets.token_hex(8)}.tmp"
        try:
            self._fs.pipe_file(temporary, content)
            self._fs.mv(temporary, path)
        except BaseException:
            if self._fs.exists(temporary):
                self._fs.rm_file(temporary)
            raise

    def remove(self, place: str) -> None:
        self._fs.rm_file(f"{self._root}/{place}")

    def size(self, place: str) -> int:
        return int(self._fs.info(f"{self._root}/{place}")["size"])


def open_store(url: str | None) -> Store | None:
    """Open a store; None means the one in the environment variable `VARIABLE`, and empty means no store."""
    url = os.environ.get(VARIABLE, "") if url is None else url
    return Store(url) if url else None


def _place(parts: tuple[str, ...]) -> str:
    """The parts of a name joined by slashes. None of them can lead out of the store."""
    for part in parts:
        if not _NAME.fullmatch(part):
            raise UserError(f"A name in a store must be letters, digits and . _ -, but got {part!r}.")
    return "/".join(parts)


def _reason(error: Any) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return f"{type(error).__name__}: {text}".rstrip(": ").rstrip(".")

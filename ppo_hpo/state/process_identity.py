"""Identifying a process, so that another process, also on another machine, can tell whether it still runs."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ppo_hpo.spec.errors import UserError

#: Environment variable that names this machine where host names are not unique, as in some containers.
HOST_VARIABLE = "PPO_HPO_HOST"

_HOST = re.compile(r"[\w.:-]{1,255}", re.ASCII)


@dataclass(frozen=True)
class Process:
    """A process with everything that tells it from others. A pid alone is not enough: pids are reused."""

    host: str  # name of its machine
    boot: str  # the kernel's id of the current boot of that machine; empty if it has none
    namespace: str  # of pids; containers have their own
    pid: int
    started: int  # in kernel ticks since the boot; 0 if this cannot be read
    uid: int

    @classmethod
    def current(cls) -> Process:
        """The calling process."""
        host = os.environ.get(HOST_VARIABLE) or socket.gethostname()
        if not _HOST.fullmatch(host):
            raise UserError(
                f"`{HOST_VARIABLE}` must be letters, digits and any of . : _ -, at most 255 of them, but got "
                f"{host!r}. Set it to a valid name of this machine."
            )
        boot = namespace = ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        with contextlib.suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid")
        return cls(host, boot, namespace, os.getpid(), _own_start_time(), os.getuid())

    @classmethod
    def of_child(cls, pid: int) -> Process:
        """A child of the calling process that it has not waited for."""
        here = cls.current()
        return replace(here, pid=pid, started=(start_time(pid) or 0) if here.started else 0)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Process:
        """Read a process from a file's record; `ValueError`, `KeyError` or `TypeError` if it is invalid."""
        process = cls(**{field.name: record[field.name] for field in fields(cls)})
        texts = (process.host, process.boot, process.namespace)
        numbers = (process.pid, process.started, process.uid)
        if not all(type(text) is str for text in texts) or not _HOST.fullmatch(process.host):
            raise ValueError
        # To the kernel, zero and negative pids mean groups of processes.
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers) or not 0 < process.pid < 1 << 31:
            raise ValueError
        return process

    def shares_kernel(self) -> bool:
        """Whether it runs, or ran, under the same boot of the same machine as the calling process.

        The boot's id says so, because host names change, and several machines may have the same one. Who sets
        `HOST_VARIABLE` has the last word.
        """
        here, named = Process.current(), HOST_VARIABLE in os.environ
        return bool(self.boot) and self.boot == here.boot and (self.host == here.host or not named)

    def is_running(self) -> bool | None:
        """Whether it still runs; None if that cannot be seen from here."""
        here = Process.current()
        same_pids = self.shares_kernel() and bool(self.namespace) and self.namespace == here.namespace
        if not (same_pids and self.started and here.started):
            return None
        started = start_time(self.pid)
        if started is None:
            # /proc may hide the processes of other users. Then only a signal shows that the pid exists.
            try:
                os.kill(self.pid, 0)
            except (ProcessLookupError, OverflowError):
                return False
            except PermissionError:
                return None
            started = start_time(self.pid)
        return started == self.started

    @contextlib.contextmanager
    def handle(self) -> Iterator[int | None]:
        """A file descriptor for signals, which no process that reuses the pid can get.

        None if the process does not run, or cannot be seen from here.
        """
        try:
            # The handle stands for one process, even if that ends now and its pid is used again.
            descriptor = os.pidfd_open(self.pid)
        except (OSError, AttributeError):
            yield None
            return
        try:
            yield descriptor if self.is_running() else None
        finally:
            os.close(descriptor)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _own_start_time() -> int:
    """Start time of this process; 0 if /proc belongs to another pid namespace, and shows strangers."""
    try:
        ours = os.readlink("/proc/self") == str(os.getpid())
    except OSError:
        return 0
    return (start_time(os.getpid()) or 0) if ours else 0


def start_time(pid: int) -> int | None:
    """Start time of a process in kernel ticks since the boot; None if it is hidden, dead or a zombie."""
    try:
        # The process name in the second field may contain anything, parentheses too.
        rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if rest[0] in "ZX" else int(rest[19])

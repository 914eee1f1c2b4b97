"""Trials from a warm process: the half that ``ppo-hpo run --warm`` runs, of the standard library only.

Importing torch and gymnasium costs a second or more of CPU in every trial. A server
(`ppo_hpo.trial.preload_server`) that has imported them forks a process for each trial instead. That process
inherits what the server inherited, so a server serves only clients that are equal to it in all of that: its
name is a hash of the environment variables, limits, groups, namespaces, code and so on (`_name`).
What differs from trial to trial is sent: arguments, environment, current directory, standard streams.

Whatever goes wrong before the server has begun the trial, or to the server itself later, the trial is run
here in the ordinary way: it goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

from ppo_hpo.spec.errors import Interrupted
from ppo_hpo.spec.user_dir import open_user_dir

# What the server answers where a trial does not suit it; a status of a process is never as large.
DECLINED = 1 << 16
# Orion's variables differ from trial to trial and are sent with it; all others are part of a server's name.
_SENT = "ORION_"
_PATIENCE = 120.0  # seconds that a server may take to import everything, far above what it takes
# Which of the environment say where the directory of the user's servers is.
_PLACES = ("XDG_RUNTIME_DIR", "TMPDIR")
_RETRY = 60.0  # seconds after which a server that died is started again
LENGTH = struct.Struct("!I")
STATUS = struct.Struct("!i")


class Unavailable(OSError):
    """No server can run the trial; the text says why."""


def run(arguments: dict[str, Any]) -> int | None:
    """Let a server run the trial, started where there is none; return the trial's exit code.

    Args:
        arguments: of the command, in types that JSON knows.

    Returns:
        None where the trial has to be run here.

    Raises:
        Interrupted: a signal came before the trial could handle it.
    """
    try:
        return _run(arguments)
    except (OSError, ValueError, NotImplementedError) as error:
        print(f"ppo-hpo: runs without a warm server: {error}", file=sys.stderr)
        return None


def _run(arguments: dict[str, Any]) -> int | None:
    _check(arguments)
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(_connected())
        connection.settimeout(_PATIENCE)
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, here)
        job = {"arguments": arguments, "argv": sys.argv, "path": sys.path, "environ": dict(os.environ)}
        data = json.dumps(job).encode()
        socket.send_fds(connection, [LENGTH.pack(len(data))], [0, 1, 2, here])
        connection.sendall(data)
        # A signal up to here ends this process, and with it the connection, and with that the trial.
        said, trial, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not (said and trial):
            raise Unavailable("the server went away")
        stack.callback(os.close, trial[0])
        connection.settimeout(None)
        stop = None
        try:
            status = _status(connection)
        except Interrupted as error:
            # No second one is raised. The trial decides what becomes of it, and this process waits for it.
            stop = error
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(trial[0], stop.signum)
            status = _status(connection)
        if status is None:
            # The server died, so the kernel has asked the trial to stop. It holds its directory until it has.
            select.select([trial[0]], [], [])
            if stop is None:
                raise Unavailable("the server died")
            raise stop
    if stop is not None and status in (-stop.signum, DECLINED):
        raise stop
    if status == DECLINED:
        return None
    if status < 0:
        _die_by(-status)
    return status


def _check(arguments: dict[str, Any]) -> None:
    if not (sys.platform == "linux" and hasattr(os, "pidfd_open")):
        raise Unavailable("it needs Linux")
    if str(arguments.get("config")).startswith(("/dev/", "/proc/")):
        raise Unavailable("--config names a file that only this process has open")
    for number in (0, 1, 2):
        os.fstat(number)


def _status(connection: socket.socket) -> int | None:
    """The trial's exit code, as a negative number the signal that killed it, or None where nobody knows."""
    try:
        data = connection.recv(STATUS.size, socket.MSG_WAITALL)
    except ConnectionError:
        return None
    return int(STATUS.unpack(data)[0]) if len(data) == STATUS.size else None


def _die_by(signum: int) -> None:
    """End as the trial ended, for whoever waits for this process."""
    # The trial has left its core already, if it was to leave one.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if signum != signal.SIGKILL:
        signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


# ------------------------------------------------------------------ finding a server


def is_own(connection: socket.socket) -> bool:
    """Whether the other end is a process of the same user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.geteuid())


def servers() -> Iterator[int]:
    """Process ids of the user's servers."""
    where = open_user_dir(_PLACES)
    try:
        for name in sorted(os.listdir(where)):
            if name.endswith(".lock"):
                lock = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=where)
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    with contextlib.suppress(ValueError):
                        yield int(os.read(lock, 20))
                finally:
                    os.close(lock)
    finally:
        os.close(where)


@contextlib.contextmanager
def _connected() -> Iterator[socket.socket]:
    """A connection to the server that suits this process."""
    where = open_user_dir(_PLACES)
    try:
        name = _name()
        lock = _lock(where, name)
        if lock is not None:
            try:
                _start(where, name, lock)
            finally:
                os.close(lock)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            _connect(connection, where, name)
            if not is_own(connection):
                raise Unavailable("the server is another user's")
            yield connection
    finally:
        os.close(where)


def _connect(connection: socket.socket, where: int, name: str) -> None:
    # By way of the open directory: its path may be longer than a socket's address, or be replaced meanwhile.
    address = f"/proc/self/fd/{where}/{name}.sock"
    for _ in range(20):
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            connection.connect(address)
            return
        # Whoever has the lock is about to make the socket, or its server is ending.
        time.sleep(0.01)
    raise Unavailable("there is none yet")


def _lock(where: int, name: str) -> int | None:
    """The lock of a name, or None where a server, or who is starting it, holds it."""
    while True:
        lock = os.open(f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=where)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A server that ends removes its files: a lock on a removed one is none.
            if os.fstat(lock).st_nlink:
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        os.close(lock)


def _start(where: int, name: str, lock: int) -> None:
    """Start a server, which inherits the lock, and the socket: it can be connected to at once."""
    if os.read(lock, 1) and time.time() - os.fstat(lock).st_mtime < _RETRY:
        raise Unavailable("the last one died")
    from subprocess import _args_from_interpreter_flags  # type: ignore[attr-defined]

    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{name}.sock", dir_fd=where)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"/proc/self/fd/{where}/{name}.sock")
        listener.listen(128)
        inherited = [lock, listener.fileno(), where]
        for descriptor in inherited:
            os.set_inheritable(descriptor, True)
        code = (
            "import sys, json; given = json.loads(sys.argv[1]); sys.path[:] = given.pop('path'); "
            "from ppo_hpo.trial.preload_server import serve; serve(**given)"
        )
        given = {"path": _path(), "name": name, "descriptors": inherited}
        log = f"/proc/self/fd/{where}/{name}.log"
        process = os.posix_spawn(
            sys.executable,
            [sys.executable, *_args_from_interpreter_flags(), "-P", "-c", code, json.dumps(given)],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(process).encode(), 0)
        for descriptor in inherited:
            os.set_inheritable(descriptor, False)


# ---------------------------------------------------------------------- its name


def _name() -> str:
    """Equal for processes that are equal in all that a trial inherits or imports, but for what is sent."""
    from hashlib import sha256

    state = repr((_inherited(), code_state())).encode("utf-8", "surrogateescape")
    return sha256(state).hexdigest()[:32]


def code_state() -> list[tuple[str, int, int]]:
    """Name, time and size of this package's files, and when something was last installed beside it."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = sorted(
        os.path.join(directory, name)
        for directory, _, names in os.walk(package)
        for name in names
        if name.endswith(".py")
    )
    # pip writes a directory for each package that it installs, and so changes the time of the one above.
    paths += [path for path in sys.path if path.endswith("-packages") and os.path.isdir(path)]
    found = [os.stat(path) for path in paths]
    return [(path, stat.st_mtime_ns, stat.st_size) for path, stat in zip(paths, found, strict=True)]


def _path() -> list[str]:
    # The server runs elsewhere. What is no path is a name that some importer knows.
    return [os.path.abspath(path) if os.path.exists(path or ".") else path for path in sys.path]


def _inherited() -> list[Any]:
    """Everything a process has from the one that started it, as far as the kernel tells."""
    inherited: list[Any] = [
        sorted((key, value) for key, value in os.environ.items() if not key.startswith(_SENT)),
        (sys.executable, sys.version, _path(), sys.flags, sys.warnoptions, sorted(sys._xoptions.items())),
        (os.nice(0), os.sched_getscheduler(0), os.readlink("/proc/self/root")),
        [os.readlink(f"/proc/self/ns/{name}") for name in sorted(os.listdir("/proc/self/ns"))],
    ]
    kept = (
        "Umask", "Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp:", "Cpus_allowed:", "Mems_allowed:",
        "SigBlk", "SigIgn",
    )  # fmt: skip
    for file in ("status", "limits", "cgroup", "oom_score_adj"):
        with open(f"/proc/self/{file}", encoding="utf-8", errors="surrogateescape") as lines:
            inherited.append([line for line in lines if file != "status" or line.startswith(kept)])
    return inherited

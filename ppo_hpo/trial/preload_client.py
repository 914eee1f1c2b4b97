"""The client of the preloaded process: ``ppo-hpo run --preload``. It needs the standard library only.

Importing torch and gymnasium costs a second or more of CPU time in every trial. The preloaded process
(`ppo_hpo.trial.preload_server`, "the server" in this module) has imported them, and forks a process for each
trial. The fork inherits what the server inherited. So a server serves only clients that are equal to it in
all of that. Its name is a hash of environment variables, limits, groups, namespaces, code and more (`_name`).
What differs from trial to trial is sent: arguments, environment, current directory and standard streams.

If anything goes wrong before the server has begun the trial, or the server dies later, the trial runs in this
process as usual. It resumes from its last checkpoint.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ppo_hpo.spec.errors import Interrupted
from ppo_hpo.spec.user_dir import open_user_dir
from ppo_hpo.state.process_identity import Process

STATUS = struct.Struct("!i")
DECLINED = 1 << 16  # sent by a server that cannot run a trial; the status of a process is never as large
_SENT_PREFIX = "ORION_"  # of variables that are sent with each trial; all others are in a server's name
_DIRECTORY_VARIABLES = ("XDG_RUNTIME_DIR", "TMPDIR")  # say where the directory of the user's servers is
_TIMEOUT = 120.0  # seconds that a server may take to import everything; it takes far less
_RESTART_PAUSE = 60.0  # seconds after which a server that died is started again
_MAX_RECORD = 4096


def run(arguments: dict[str, Any]) -> int | None:
    """Let a preloaded process run the trial of a `RunRequest`, whose fields are given; start it if needed.

    Returns:
        The trial's exit code, or None if the trial has to run in this process.
    """
    try:
        return _run(arguments)
    except (OSError, ValueError, NotImplementedError) as error:
        print(f"ppo-hpo: runs without a preloaded process: {error}", file=sys.stderr)
        return None


def _run(arguments: dict[str, Any]) -> int | None:
    _check(arguments)
    with contextlib.ExitStack() as stack:
        connection = _connect(stack)
        connection.settimeout(_TIMEOUT)
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, here)
        job = {"arguments": arguments, "argv": sys.argv, "path": sys.path, "environ": dict(os.environ)}
        socket.send_fds(connection, [b"+"], [0, 1, 2, here])
        connection.sendall(json.dumps(job).encode() + b"\n")
        # A signal up to here ends this process. That closes the connection, and so ends the trial.
        answer, trial, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not (answer and trial):
            raise ConnectionError("the preloaded process ended")
        stack.callback(os.close, trial[0])
        connection.settimeout(None)
        stop = None
        try:
            status = _status(connection)
        except Interrupted as error:
            # No second one is raised. The trial handles the signal, and this process waits for the trial.
            stop = error
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(trial[0], stop.signum)
            status = _status(connection)
        if status is None:
            # The server died, so the kernel has told the trial to stop. Until then it holds its lock.
            select.select([trial[0]], [], [])
            if stop is None:
                raise ConnectionError("the preloaded process died")
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
        raise NotImplementedError("it needs Linux")
    if str(arguments.get("config")).startswith(("/dev/", "/proc/")):
        raise ValueError("only this process has the file of --config open")
    for number in (0, 1, 2):
        os.fstat(number)


def _status(connection: socket.socket) -> int | None:
    """The trial's exit code. A negative number is the signal that killed it, None means unknown."""
    try:
        data = connection.recv(STATUS.size, socket.MSG_WAITALL)
    except ConnectionError:
        return None
    return int(STATUS.unpack(data)[0]) if len(data) == STATUS.size else None


def _die_by(signum: int) -> None:
    # The trial has already written its core file, if it was to write one.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if signum != signal.SIGKILL:
        signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def belongs_to_user(connection: socket.socket) -> bool:
    """Whether the other end is a process of the same user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.geteuid())


def servers() -> Iterator[Process]:
    """The user's servers. Some may run where this process cannot see them, as in another container."""
    with contextlib.ExitStack() as stack:
        where = open_user_dir(_DIRECTORY_VARIABLES)
        stack.callback(os.close, where)
        for name in sorted(name for name in os.listdir(where) if name.endswith(".lock")):
            lock = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=where)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                # A server that is just starting has not written its record yet.
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    yield Process.from_record(json.loads(os.read(lock, _MAX_RECORD)))
            finally:
                os.close(lock)


def _connect(stack: contextlib.ExitStack) -> socket.socket:
    """A connection to the server that suits this process. The server is started if there is none."""
    where = open_user_dir(_DIRECTORY_VARIABLES)
    stack.callback(os.close, where)
    name = _name()
    lock = _lock(where, name)
    if lock is not None:
        try:
            _start(where, name, lock)
        finally:
            os.close(lock)
    connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    for _ in range(20):
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            connection.connect(_address(where, name))
            break
        # The process that has the lock is about to make the socket, or its server is ending.
        time.sleep(0.01)
    else:
        raise ConnectionError("there is no such process yet")
    if not belongs_to_user(connection):
        raise PermissionError("the preloaded process is another user's")
    return connection


def _address(where: int, name: str) -> str:
    # The open directory is used because its path may be too long for a socket's address, or be replaced.
    return f"/proc/self/fd/{where}/{name}.sock"


def _lock(where: int, name: str) -> int | None:
    """The lock of a name, or None if a server holds it, or a process that is starting one."""
    while True:
        lock = os.open(f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=where)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A server that ends removes its files. A lock on a removed file is worth nothing.
            if os.fstat(lock).st_nlink:
                return lock
        except BlockingIOError:
            os.close(lock)
            return None
        os.close(lock)


def _start(where: int, name: str, lock: int) -> None:
    """Start a server. It inherits the lock and the socket, so clients can connect at once."""
    if os.read(lock, 1) and abs(time.time() - os.fstat(lock).st_mtime) < _RESTART_PAUSE:
        raise ConnectionError("the last preloaded process died")
    from subprocess import _args_from_interpreter_flags  # type: ignore[attr-defined]

    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{name}.sock", dir_fd=where)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(_address(where, name))
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
        command = [sys.executable, *_args_from_interpreter_flags(), "-P", "-c", code, json.dumps(given)]
        streams = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=streams, setsid=True)
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(asdict(Process.of_child(pid))).encode(), 0)
        for descriptor in inherited:
            os.set_inheritable(descriptor, False)


def code_state() -> list[tuple[str, int, int]]:
    """Name, time and size of the package's files, and when something was last installed beside it.

    A preloaded process must never serve stale code, so its name depends on this.
    """
    paths = sorted(Path(__file__).absolute().parents[1].rglob("*.py"))
    # pip writes a directory for each package that it installs, which changes the time of the one above.
    paths += [Path(path) for path in sys.path if path.endswith("-packages") and os.path.isdir(path)]
    return [(str(path), found.st_mtime_ns, found.st_size) for path in paths for found in [path.stat()]]


def _path() -> list[str]:
    # The server runs in another directory. An entry that is not a path is a name that some importer knows.
    return [os.path.abspath(path) if os.path.exists(path or ".") else path for path in sys.path]


def _name() -> str:
    """A hash of all that a trial imports or inherits, as far as the kernel tells, except for what is sent."""
    from hashlib import sha256

    state: list[Any] = [
        code_state(),
        sorted((key, value) for key, value in os.environ.items() if not key.startswith(_SENT_PREFIX)),
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
            state.append([line for line in lines if file != "status" or line.startswith(kept)])
    return sha256(repr(state).encode("utf-8", "surrogateescape")).hexdigest()[:32]

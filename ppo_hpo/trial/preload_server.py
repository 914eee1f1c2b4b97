"""The preloaded process: it has imported everything that a trial needs, and forks a process for each trial.

It has one thread, and neither computes nor touches a GPU before it forks. It ends if no client has asked for
`IDLE` seconds. After SIGTERM it ends once the trials that run have ended. `preload_client` starts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from ppo_hpo.spec.printing import print_anything
from ppo_hpo.trial import preload_client, process, run_command

# Seconds. The first of these environment variables that is set replaces it. The second one is the old name.
IDLE = 60.0
_IDLE_VARIABLES = ("PPO_HPO_PRELOAD_IDLE", "PPO_HPO_WARM_IDLE")
_POLL = 500  # milliseconds between two looks at the clock
_GRACE = 10.0  # seconds that a trial has to stop in after its client has ended
_STOPS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1
# What a trial imports. A test asks a trial's process what it had to import itself.
_IMPORTS = (
    "ppo_hpo.envs.atari", "ppo_hpo.spec.space", "ppo_hpo.trial.runner", "ppo_hpo.ppo.task",
    "gymnasium.envs.classic_control", "gymnasium.vector", "gymnasium.wrappers", "safetensors.numpy",
    "multiprocessing.sharedctypes", "numpy.ma", "numpy.random",
)  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class _Trial:
    """A trial's process, as the server sees it."""

    connection: socket.socket | None  # to its client; None once the client has ended
    pid: int
    pidfd: int  # readable once the process has ended
    declined: mmap.mmap  # one byte of shared memory, which is not zero if the process has declined the trial
    deadline: float = float("inf")  # when the process is killed, after its client has ended


def serve(name: str, descriptors: list[int]) -> None:
    """Serve with the descriptors of the lock, the listening socket and the directory, which are inherited."""
    for descriptor in [int(number) for number in os.listdir("/proc/self/fd")]:
        if descriptor > 2 and descriptor not in descriptors:
            with contextlib.suppress(OSError):  # the descriptor that listed them
                os.close(descriptor)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    os.chdir("/")
    code = preload_client.code_state()
    imported = preload()
    print_anything()  # Forks do too, but a pipe in the place of this process's file would refuse it.
    if code != preload_client.code_state():
        raise SystemExit("the code has changed while it was imported")
    _Server(name, imported, *descriptors).loop()
    process.leave(0)


def preload() -> dict[str, str]:
    """Import what a trial imports, for one thread; return the environment variables that this has set."""
    process.set_thread_variables(1)
    before = dict(os.environ)
    for name in _IMPORTS:
        importlib.import_module(name)
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


class _Server:
    def __init__(self, name: str, imported: dict[str, str], lock: int, listener: int, directory: int) -> None:
        self.name, self.imported = name, imported
        self.lock, self.directory = lock, directory
        self.listener = socket.socket(fileno=listener)
        self.idle = float(next(filter(None, map(os.environ.get, _IDLE_VARIABLES)), IDLE))
        self.trials: list[_Trial] = []
        self.stopping = False

    def loop(self) -> None:
        """Accept clients and watch their trials, until there is nothing to do any more."""
        signal.signal(signal.SIGTERM, self._stop)
        # What was imported never becomes garbage, and memory pages that are not looked at stay shared.
        gc.collect()
        gc.freeze()
        busy = time.monotonic()
        while True:
            if self.stopping or time.monotonic() - busy > self.idle:
                self._close()
                if not self.trials:
                    return
            ready = self._ready()
            for trial in list(self.trials):
                if trial.pidfd in ready:
                    self._report(trial)
                elif trial.connection and trial.connection.fileno() in ready:
                    self._abandon(trial)
            # This comes last, because a new connection may get the number of one that was just closed.
            if self.listener.fileno() in ready:
                self._accept()
            for trial in self.trials:
                busy = time.monotonic()
                if busy > trial.deadline:
                    os.kill(trial.pid, signal.SIGKILL)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _ready(self) -> set[int]:
        poll = select.poll()
        if not self.stopping:
            poll.register(self.listener, select.POLLIN)
        for trial in self.trials:
            poll.register(trial.pidfd, select.POLLIN)
            if trial.connection:
                poll.register(trial.connection, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(_POLL)}

    def _close(self) -> None:
        """Accept no more trials, and let the next client start another server."""
        if self.listener.fileno() < 0:
            return
        self.stopping = True
        for suffix in ("sock", "log", "lock"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.name}.{suffix}", dir_fd=self.directory)
        self.listener.close()

    def _accept(self) -> None:
        connection = None
        try:
            connection, _ = self.listener.accept()
            if len(os.listdir("/proc/self/task")) != 1:
                raise RuntimeError("this process has several threads: a fork would not be safe")
            if not preload_client.belongs_to_user(connection):
                raise PermissionError("the client is another user's")
            connection.settimeout(5)
            self._begin(connection)
        except Exception as error:
            # Whatever a client sends, the trials of other clients continue.
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            if connection:
                connection.close()

    def _begin(self, connection: socket.socket) -> None:
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 4, socket.MSG_CMSG_CLOEXEC)
        try:
            with connection.makefile("rb") as stream:
                job = json.loads(stream.readline())
            declined = mmap.mmap(-1, 1)
            server = os.getpid()
            # A signal would be lost if it came while the new process still has the handlers of this one.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
            try:
                pid = os.fork()
                if not pid:
                    for number in _STOPS:
                        signal.signal(number, signal.SIG_DFL)
                    connection.close()
                    self._become(job, descriptors, declined, server, mask)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        try:
            trial = _Trial(connection, pid, os.pidfd_open(pid), declined)
        except OSError:
            # The client runs the trial itself.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        self.trials.append(trial)
        try:
            socket.send_fds(connection, [b"+"], [trial.pidfd])
        except OSError:
            self._abandon(trial)

    def _report(self, trial: _Trial) -> None:
        """Tell the client how the trial's process has ended."""
        _, raw = os.waitpid(trial.pid, 0)
        status = preload_client.DECLINED if trial.declined[0] else os.waitstatus_to_exitcode(raw)
        self.trials.remove(trial)
        os.close(trial.pidfd)
        trial.declined.close()
        if trial.connection:
            with contextlib.suppress(OSError):
                trial.connection.sendall(preload_client.STATUS.pack(status))
            trial.connection.close()

    def _abandon(self, trial: _Trial) -> None:
        """Stop a trial whose client has ended. Its last checkpoint stays."""
        if trial.connection:
            trial.connection.close()
            trial.connection = None
        trial.deadline = time.monotonic() + _GRACE
        os.kill(trial.pid, signal.SIGTERM)

    def _become(
        self, job: dict[str, Any], descriptors: list[int], declined: mmap.mmap, server: int, mask: set[int]
    ) -> NoReturn:
        """Turn the forked process into what the client would have been, and run the trial."""
        declined[0] = 1  # until that has succeeded
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            # If the server dies, nobody sees the client end. So the trial stops, and the client runs it.
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != server:
                os._exit(1)
            self.listener.close()
            for descriptor in (self.lock, self.directory, *(trial.pidfd for trial in self.trials)):
                os.close(descriptor)
            for client in filter(None, (trial.connection for trial in self.trials)):
                client.close()
            for number, descriptor in enumerate(descriptors[:3]):
                os.dup2(descriptor, number)
            os.fchdir(descriptors[3])
            for descriptor in descriptors:
                os.close(descriptor)
            os.environ.clear()
            os.environ.update({**job["environ"], **self.imported})
            sys.argv[:] = job["argv"]
            sys.path[:] = job["path"]
            sys.stdout.reconfigure(line_buffering=sys.stdout.line_buffering or os.isatty(1))  # type: ignore[union-attr]
            # If a module draws from numpy's global rng, every process must get numbers of its own.
            import numpy

            numpy.random.seed()
            declined[0] = 0
            _execute(job["arguments"], declined)
        finally:
            os._exit(1)


def _execute(arguments: dict[str, Any], declined: mmap.mmap) -> NoReturn:
    """Run the command, and do what the interpreter does at its end."""

    def decline_other_counts(threads: int) -> None:
        if threads != 1:  # The libraries were loaded for one thread.
            declined[0] = 1
            os._exit(0)

    try:
        code = run_command.run_and_exit_code(run_command.RunRequest(**arguments), decline_other_counts)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    process.leave(code)

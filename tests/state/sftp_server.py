"""An SFTP server for the tests, on paramiko; as a program it serves a directory to every network it has."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paramiko

PASSWORD = "secret"


class _Login(paramiko.ServerInterface):
    def check_auth_password(self, username: str, password: str) -> int:
        return int(paramiko.AUTH_SUCCESSFUL if password == PASSWORD else paramiko.AUTH_FAILED)

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return int(paramiko.OPEN_SUCCEEDED)


class _File(paramiko.SFTPHandle):
    readfile: Any

    def stat(self) -> Any:
        return paramiko.SFTPAttributes.from_stat(os.fstat(self.readfile.fileno()))


def _files(root: Path, renames: list[str]) -> type:
    """What answers a client: the files below ``root``."""

    def answering(do: Any) -> Any:
        def method(self: Any, *arguments: Any) -> Any:
            try:
                return do(self, *arguments)
            except OSError as error:
                return paramiko.SFTPServer.convert_errno(error.errno or 0)

        return method

    def attributes(path: Path) -> Any:
        return paramiko.SFTPAttributes.from_stat(path.stat(), path.name)

    def opened(self: Any, path: str, flags: int, attr: Any) -> Any:
        descriptor = os.open(root / path.lstrip("/"), flags, 0o666)
        handle = _File(flags)
        mode = "wb" if flags & os.O_WRONLY else "rb+" if flags & os.O_RDWR else "rb"
        handle.filename, handle.readfile = path, os.fdopen(descriptor, mode)  # type: ignore[attr-defined]
        handle.writefile = handle.readfile  # type: ignore[attr-defined]
        return handle

    def renamed(self: Any, old: str, new: str) -> int:
        renames.append(new)
        os.replace(root / old.lstrip("/"), root / new.lstrip("/"))
        return int(paramiko.SFTP_OK)

    def done(do: Any) -> Any:
        return answering(lambda self, path, *_: (do(root / path.lstrip("/")), paramiko.SFTP_OK)[1])

    methods = {
        "open": answering(opened),
        "posix_rename": answering(renamed),
        "list_folder": answering(
            lambda self, path: [attributes(p) for p in (root / path.lstrip("/")).iterdir()]
        ),
        "stat": answering(lambda self, path: attributes(root / path.lstrip("/"))),
        "lstat": answering(lambda self, path: attributes(root / path.lstrip("/"))),
        "mkdir": done(os.mkdir),
        "remove": done(os.unlink),
    }
    return type("Files", (paramiko.SFTPServerInterface,), methods)


@contextlib.contextmanager
def serving(root: Path, address: str = "127.0.0.1") -> Iterator[tuple[int, list[str]]]:
    """Serve a directory; yields the port, and the names that files were renamed to so far."""
    renames: list[str] = []
    interface = _files(root, renames)
    listener = socket.create_server((address, 0))
    transports: list[paramiko.Transport] = []
    key = paramiko.ECDSAKey.generate()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                transport = paramiko.Transport(connection)
                transports.append(transport)
                transport.add_server_key(key)
                transport.set_subsystem_handler("sftp", paramiko.SFTPServer, interface)
                # A client that is killed while it says hello is nobody's business.
                with contextlib.suppress(paramiko.SSHException, EOFError):
                    transport.start_server(server=_Login())

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1], renames
    finally:
        listener.close()
        for transport in transports:
            transport.close()


if __name__ == "__main__":
    with serving(Path(sys.argv[1]), "0.0.0.0") as (port, _):
        print(port, flush=True)
        sys.stdin.read()

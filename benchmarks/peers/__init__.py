"""The peers' own virtual environments, made when first asked for and made anew when their pins change."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".peers"
CONSTRAINTS = HERE.parent.parent / "constraints.txt"


class PeerError(Exception):
    """A peer cannot be had here; the message says why."""


def python_of(name: str, *, constrained: bool = True) -> Path:
    """The interpreter of a peer's environment, which holds what ``<name>.txt`` pins.

    Packages of ``<name>.alone.txt`` are installed without what they declare to need. What a peer shares with
    us has the version of constraints.txt, unless that is not ``constrained``.

    Raises:
        PeerError: it does not install.
    """
    folder = CACHE / name
    python = folder / "bin" / "python"
    listed = [HERE / f"{name}.txt", HERE / f"{name}.alone.txt"]
    listed = [path for path in listed if path.exists()]
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in [*listed, CONSTRAINTS])).hexdigest()
    marker = folder / "installed"
    if marker.exists() and marker.read_text() == stamp:
        return python
    print(f"making the environment of {name}; this takes a minute", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraint = ["--constraint", str(CONSTRAINTS)] if constrained else []
    _run([*pip, *constraint, "--requirement", str(listed[0])])
    for path in listed[1:]:
        _run([*pip, "--no-deps", "--ignore-requires-python", "--requirement", str(path)])
    marker.write_text(stamp)
    return python


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise PeerError((errors or done.stderr.strip().splitlines() or ["no message"])[-1])

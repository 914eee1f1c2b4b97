"""Checks the installation: versions, commands, entry points, packages, extras and devices.

What may crash or hang when it is imported, such as torch, is imported in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.orion.patch import TESTED_ORION

if TYPE_CHECKING:
    from ppo_hpo.inspect.doctor_report import Report

PACKAGES = ("ppo_hpo", "orion", "torch", "gymnasium", "numpy", "safetensors", "setuptools", "pip")
# The modules that a trial imports.
_REQUIRED_MODULES = ("numpy", "yaml", "gymnasium", "safetensors", "threadpoolctl")
# Each extra, and a module that it installs.
EXTRAS = {
    "classic-control": "pygame", "box2d": "Box2D", "mujoco": "mujoco", "atari": "ale_py",
    "envpool": "envpool", "remote": "fsspec", "onnx": "onnx", "dask": "distributed", "ray": "ray",
    "pb2": "GPy",
}  # fmt: skip
# Extras with compiled code, which can be installed and still fail to import.
_COMPILED_EXTRAS = ("box2d", "mujoco", "atari", "envpool")
# What Orion finds of ppo_hpo by entry points.
ENTRY_POINTS = {
    "BaseAlgorithm": ["ppo_hpo_lean"],
    "BaseExecutor": ["workers", "ray"],
    "Database": ["sqlitedb"],
}
_TORCH_PROGRAM = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    cuda = torch.cuda.is_available()
print(json.dumps({
    "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "built": torch.version.cuda or torch.version.hip, "mps": torch.backends.mps.is_available(),
    "version": torch.__version__, "warnings": [str(one.message) for one in caught]}))
"""
_IMPORT_PROGRAM = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
importlib.import_module(sys.argv[1])
"""
# Time limit of an import, in seconds. On a cold network file system torch takes a minute.
_IMPORT_SECONDS = 120


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _exists(module: str) -> bool:
    """Whether there is such a module, even one that cannot be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # `find_spec` raises for some modules that are broken.
        return module in sys.modules


def _import_errors(*modules: str) -> dict[str, str]:
    """Import each module in a process of its own, all at once; the error of each, or '' if it works."""
    errors = {}
    running = {
        # -P leaves out the current directory, which `_check_copies` is about.
        module: subprocess.Popen(
            [sys.executable, "-P", "-c", _IMPORT_PROGRAM, module],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        )
        for module in modules
    }  # fmt: skip
    for module, process in running.items():
        try:
            _, output = process.communicate(timeout=_IMPORT_SECONDS)
            errors[module] = _last_line(output, process.returncode) if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            errors[module] = "its import takes more than two minutes"
    return errors


def _last_line(output: str, code: int) -> str:
    return (output.strip().splitlines() or [f"Python exited with code {code}"])[-1][:300]


def _check_versions(report: Report) -> None:
    python = sys.version.split()[0]
    report.add_fact("python", f"{python}  {sys.executable}")
    versions = {name: _version(name) for name in PACKAGES}
    for name, version in versions.items():
        report.add_fact(name, version or "not installed")
        if version is None and name not in ("setuptools", "pip"):
            report.add_finding(f"{name} is not installed: pip install 'pip<26.3', then ppo_hpo again.")
    if versions["orion"] not in (None, TESTED_ORION):
        report.add_finding(
            f"Orion is {versions['orion']}, and ppo_hpo was tested with {TESTED_ORION}: pip install "
            f"orion=={TESTED_ORION}, with a pip before 26.3."
        )
    if sys.version_info[:2] != (3, 11):
        report.add_finding(
            f"This is Python {python}, and ppo_hpo was tested on 3.11. Orion {TESTED_ORION} does not build "
            f"on 3.12 and later: create an environment with Python 3.11."
        )
    if [int(part) for part in (versions["pip"] or "0").split(".")[:2] if part.isdigit()] >= [26, 3]:
        report.add_fact(
            "", f"this pip refuses Orion {TESTED_ORION}: pip install 'pip<26.3' before you install"
        )
    # Orion imports these two without depending on them.
    if not _exists("pkg_resources"):
        report.add_finding(
            "Orion needs pkg_resources, which newer versions of setuptools lack: pip install 'setuptools<81'."
        )
    if not _exists("typing_extensions"):
        report.add_finding("Orion needs typing_extensions: pip install typing_extensions.")


def _check_commands(report: Report) -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    for command in ("orion", "ppo-hpo"):
        path = shutil.which(command)
        report.add_fact(f"`{command}`", path or "not on the PATH")
        if path is None:
            installed = (scripts / command).exists()
            fix = f"export PATH={scripts}:$PATH" if installed else "install it again with pip"
            report.add_finding(f"The command {command} is not on the PATH: {fix}.")
        elif not _is_of_this_environment(Path(path), scripts):
            report.add_finding(
                f"The command {command} is {path}, which belongs to another environment than "
                f"{sys.executable}: put {scripts} first on the PATH, so that a hunt and its trials use the "
                f"same packages."
            )


def _is_of_this_environment(script: Path, scripts: Path) -> bool:
    """Whether a command is in the directory of this interpreter's scripts, or runs this interpreter."""
    if script.parent.resolve() == scripts.resolve() or script.resolve().parent == scripts.resolve():
        return True
    try:
        first = script.read_bytes().split(b"\n", 1)[0].decode(errors="replace")
    except OSError:
        return False
    return first.removeprefix("#!").strip() == sys.executable


def _check_entry_points(report: Report) -> None:
    # In the order of sys.path, each place once. Orion uses the first.
    found = metadata.distributions(name="ppo_hpo")
    places = list(dict.fromkeys(str(Path(str(each.locate_file("")))) for each in found))
    report.add_fact("plugin in", ", ".join(places) or "no directory")
    missing = [
        f"{group}: {name}"
        for group, names in ENTRY_POINTS.items()
        for name in names
        if name not in {point.name for point in metadata.entry_points(group=group)}
    ]
    if missing:
        report.add_finding(
            f"Orion does not find these entry points of ppo_hpo: {', '.join(missing)}. An older installation "
            f"comes first, in {places[0] if places else 'no directory'}. Install ppo_hpo again, and remove "
            f"any ppo_hpo.egg-info from the directory you work in."
        )


def _check_copies(report: Report) -> None:
    """Look for packages that are installed twice, and for files in this directory that hide a package."""
    for name in ("ppo_hpo", "orion", "torch", "numpy"):
        found = {
            str(Path(str(one.locate_file(""))).resolve()): one for one in metadata.distributions(name=name)
        }
        # An egg-info beside the source is what an editable installation was built from.
        places = [place for place, one in found.items() if not _is_egg_info(one, name)]
        if len(places) > 1:
            report.add_finding(
                f"{name} is installed {len(places)} times ({', '.join(places)}), and the first is used: "
                f"run pip uninstall {name} until none is left, then install it once."
            )
    _check_old_egg_info(report)
    own = Path(__file__).parents[1]
    for name in ("torch", "orion", "ppo_hpo", *_REQUIRED_MODULES):
        for path in (Path.cwd() / f"{name}.py", Path.cwd() / name / "__init__.py"):
            if path.is_file() and not (name == "ppo_hpo" and path.parent.samefile(own)):
                report.add_finding(
                    f"{path} hides the package {name} from trials that run in this directory: rename it, or "
                    f"work in another directory."
                )


def _is_egg_info(distribution: metadata.Distribution, name: str) -> bool:
    return (Path(str(distribution.locate_file(""))) / f"{name}.egg-info").is_dir()


def _check_old_egg_info(report: Report) -> None:
    here = Path.cwd()
    egg_info = here / "ppo_hpo.egg-info"
    if not egg_info.is_dir() or str(here) in sys.path or "" in sys.path:
        return  # If this directory is on the path, `_check_entry_points` has seen the egg-info.
    points = {(point.group, point.name) for point in metadata.Distribution.at(egg_info).entry_points}
    if not {(group, name) for group, names in ENTRY_POINTS.items() for name in names} <= points:
        report.add_finding(
            f"{egg_info} is of an older build. It hides the entry points of ppo_hpo from every `python -m` "
            f"and `python -c` in this directory: remove it."
        )


def _check_packages(report: Report) -> None:
    found = [module for module in _REQUIRED_MODULES if _exists(module)]
    for module in _REQUIRED_MODULES:
        if module not in found:
            report.add_finding(f"{module} is not installed: install ppo_hpo again with pip.")
    if _exists("pkg_resources") and _version("orion"):
        # Every `orion` command imports the second one, which fails outside of `sys.prefix`.
        found += ["orion.client", "orion.core.cli.frontend"]
    for module, error in _import_errors(*found).items():
        if error:
            report.add_finding(f"{module} cannot be imported ({error}): install it again.")


def _check_extras(report: Report) -> None:
    found = [name for name, module in EXTRAS.items() if _exists(module)]
    absent = [name for name in EXTRAS if name not in found]
    errors = _import_errors(*(EXTRAS[name] for name in _COMPILED_EXTRAS if name in found))
    working = [name for name in found if not errors.get(EXTRAS[name])]
    report.add_fact("extras", ", ".join(working) or "none")
    if absent:
        report.add_fact("", f"not installed: {', '.join(absent)} (pip install 'ppo-hpo[NAME]')")
    for name in _COMPILED_EXTRAS:
        if error := errors.get(EXTRAS[name]):
            report.add_finding(
                f"{EXTRAS[name]} is installed but cannot be imported ({error}): pip install "
                f"--force-reinstall 'ppo-hpo[{name}]', or uninstall it."
            )


def _check_devices(report: Report) -> None:
    machine = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    report.add_fact("cpu", f"{cores} of {machine} cores for this process; a trial uses one (task.threads)")
    installed = _version("torch")
    torch = None if installed is None else _ask_torch(report)
    if installed is None or torch is None:
        return
    if torch["version"].partition("+")[0] != installed.partition("+")[0]:
        report.add_finding(
            f"torch reports version {torch['version']}, but pip has installed {installed}: two versions are "
            f"mixed. Run pip uninstall torch until none is left, then install it once."
        )
    report.add_fact("gpu", _gpus(report, torch))


def _ask_torch(report: Report) -> dict[str, Any] | None:
    """What torch says about itself and its devices; None, and a finding, if it cannot be imported."""
    command = [sys.executable, "-c", _TORCH_PROGRAM]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        report.add_finding("torch could not be imported within two minutes: install it again.")
        return None
    if done.returncode:
        error = _last_line(done.stderr, done.returncode)
        report.add_finding(f"torch cannot be imported ({error}): install it again.")
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _gpus(report: Report, torch: dict[str, Any]) -> str:
    """The GPUs that torch can use, or why there is none."""
    driver = any(Path(path).exists() for path in ("/dev/nvidiactl", "/proc/driver/nvidia/version"))
    if torch["cuda"]:
        text = ", ".join(f"cuda:{index} {name}" for index, name in enumerate(torch["cuda"]))
    elif torch["built"] is None:
        text = "none: this torch is built for CPUs only, which is faster for small networks"
        if driver:
            text += "; the NVIDIA driver here needs a torch built for CUDA (pytorch.org/get-started)"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        text = "none: CUDA_VISIBLE_DEVICES hides them"
    else:
        text = f"none: torch is built for CUDA {torch['built']}, but finds no driver or no device"
        if driver:
            reason = " ".join(" ".join(torch["warnings"]).split())[:300] or "torch does not say why"
            report.add_finding(
                f"There is an NVIDIA driver, but torch, which is built for CUDA {torch['built']}, cannot use "
                f"it ({reason}): install a torch for the CUDA version that nvidia-smi shows."
            )
    return text + ("; mps is available but not used" if torch["mps"] else "")


#: Each check by the word that names what it checks, in the order in which they run.
CHECKS: dict[str, Callable[[Report], None]] = {
    "versions": _check_versions,
    "commands": _check_commands,
    "plugin": _check_entry_points,
    "copies": _check_copies,
    "packages": _check_packages,
    "extras": _check_extras,
    "devices": _check_devices,
}

"""``ppo-hpo doctor``: checks the installation and a database, and says what to fix.

A check that fails becomes a finding, and the others still run. What may crash or hang when it is imported,
such as torch, is imported in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from ppo_hpo.inspect.retry import PATIENCE, seconds_since
from ppo_hpo.orion import algorithm_lock
from ppo_hpo.orion.experiment import find_database, in_short
from ppo_hpo.orion.tested_version import TESTED_ORION
from ppo_hpo.spec.errors import UserError

_PACKAGES = ("ppo_hpo", "orion", "torch", "gymnasium", "numpy", "safetensors", "setuptools", "pip")
# The modules that a trial imports.
_REQUIRED_MODULES = ("numpy", "yaml", "gymnasium", "safetensors", "threadpoolctl")
# Each extra, and a module that it installs.
_EXTRAS = {
    "classic-control": "pygame", "box2d": "Box2D", "mujoco": "mujoco", "atari": "ale_py",
    "envpool": "envpool", "remote": "fsspec", "onnx": "onnx", "dask": "distributed", "ray": "ray",
    "pb2": "GPy",
}  # fmt: skip
# Extras with compiled code, which can be installed and still fail to import.
_COMPILED_EXTRAS = ("box2d", "mujoco", "atari", "envpool")
# What Orion finds of ppo_hpo by entry points.
_ENTRY_POINTS = (
    ("BaseAlgorithm", "ppo_hpo_lean"), ("BaseExecutor", "workers"), ("BaseExecutor", "ray"),
    ("Database", "sqlitedb"),
)  # fmt: skip
_TORCH_PROGRAM = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    cuda = torch.cuda.is_available()
print(json.dumps({
    "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "built": torch.version.cuda or torch.version.hip, "warnings": [str(one.message) for one in caught]}))
"""
# Time limit of an import, in seconds. On a cold network file system torch takes a minute.
_IMPORT_SECONDS = 120


@dataclass
class Report:
    """What the checks found."""

    # Labels and texts, in the order of printing. A fact that belongs to the one before it has an empty label.
    facts: list[tuple[str, str]] = field(default_factory=list)
    # Problems, each with what to do about it, if that is known.
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{label:11} {text}".rstrip() for label, text in self.facts]
        count = len(self.findings)
        lines.append(f"\n{count} problem{'' if count == 1 else 's'} found" if count else "\nno problem found")
        return "\n".join([*lines, *(f"  {number}. {text}" for number, text in enumerate(self.findings, 1))])


def examine(config: str | None = None, progress: TextIO | None = None) -> Report:
    """Run all checks.

    Args:
        config: Orion's configuration file, which says where the database is. None uses ``ORION_DB_TYPE`` and
            ``ORION_DB_ADDRESS``, or Orion's default.
        progress: where to print what is checked; None prints nothing.
    """
    checks: dict[str, Callable[[Report], None]] = {
        "versions": _check_versions,
        "commands": _check_commands,
        "entry points": _check_entry_points,
        "packages": _check_packages,
        "devices": _check_devices,
        "database": lambda report: _check_database(report, config),
    }
    report = Report()
    for name, check in checks.items():
        if progress is not None:
            print(f"ppo-hpo: checking the {name} ...", file=progress)
        try:
            check(report)
        except UserError as error:
            report.findings.append(str(error))
        except (Exception, SystemExit) as error:
            report.findings.append(f"The {name} could not be checked ({in_short(error)}).")
    return report


def to_json(report: Report) -> str:
    """The report as JSON, for other programs."""
    return json.dumps(asdict(report), indent=1)


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


def _run_python(program: str) -> tuple[str, str]:
    """Run a program in a process of its own; its output, and its error or ''."""
    # -P leaves out the current directory.
    command = [sys.executable, "-P", "-c", program]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=_IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "", "its import takes more than two minutes"
    lines = done.stderr.strip().splitlines() or [f"Python exited with code {done.returncode}"]
    return done.stdout, lines[-1][:300] if done.returncode else ""


def _check_versions(report: Report) -> None:
    python = sys.version.split()[0]
    report.facts.append(("python", f"{python}  {sys.executable}"))
    versions = {name: _version(name) for name in _PACKAGES}
    for name, version in versions.items():
        report.facts.append((name, version or "not installed"))
        if version is None and name not in ("setuptools", "pip"):
            report.findings.append(f"{name} is not installed: pip install 'pip<26.3', then ppo_hpo again.")
    if versions["orion"] not in (None, TESTED_ORION):
        report.findings.append(
            f"Orion is {versions['orion']}, and ppo_hpo was tested with {TESTED_ORION}: pip install "
            f"orion=={TESTED_ORION}, with a pip before 26.3."
        )
    if sys.version_info[:2] != (3, 11):
        report.findings.append(
            f"This is Python {python}, and ppo_hpo was tested on 3.11. Orion {TESTED_ORION} does not build "
            f"on 3.12 and later: create an environment with Python 3.11."
        )
    if [int(part) for part in (versions["pip"] or "0").split(".")[:2] if part.isdigit()] >= [26, 3]:
        fact = f"this pip refuses Orion {TESTED_ORION}: pip install 'pip<26.3' before you install"
        report.facts.append(("", fact))


def _check_commands(report: Report) -> None:
    scripts = Path(sysconfig.get_path("scripts"))
    for command in ("orion", "ppo-hpo"):
        path = shutil.which(command)
        report.facts.append((f"`{command}`", path or "not on the PATH"))
        if path is None:
            installed = (scripts / command).exists()
            fix = f"export PATH={scripts}:$PATH" if installed else "install it again with pip"
            report.findings.append(f"The command {command} is not on the PATH: {fix}.")
        # The command can also be a link to a script of this environment, or run this interpreter.
        elif (
            scripts.resolve() not in (Path(path).parent.resolve(), Path(path).resolve().parent)
            and Path(path).read_bytes().partition(b"\n")[0].strip() != f"#!{sys.executable}".encode()
        ):
            report.findings.append(
                f"The command {command} is {path}, which belongs to another environment than "
                f"{sys.executable}: put {scripts} first on the PATH, so that a hunt and its trials use the "
                f"same packages."
            )


def _check_entry_points(report: Report) -> None:
    # In the order of sys.path, each place once. Orion uses the first.
    found = metadata.distributions(name="ppo_hpo")
    places = list(dict.fromkeys(str(each.locate_file("")) for each in found))
    report.facts.append(("plugin in", ", ".join(places) or "no directory"))
    missing = [
        f"{group}: {name}"
        for group, name in _ENTRY_POINTS
        if not metadata.entry_points(group=group, name=name)
    ]
    if missing:
        report.findings.append(
            f"Orion does not find these entry points of ppo_hpo: {', '.join(missing)}. An older installation "
            f"comes first, in {places[0] if places else 'no directory'}. Install ppo_hpo again, and remove "
            f"any ppo_hpo.egg-info from the directory you work in."
        )


def _check_packages(report: Report) -> None:
    extras = [name for name, module in _EXTRAS.items() if _exists(module)]
    report.facts.append(("extras", ", ".join(extras) or "none"))
    if absent := [name for name in _EXTRAS if name not in extras]:
        report.facts.append(("", f"not installed: {', '.join(absent)} (pip install 'ppo-hpo[NAME]')"))
    # Orion imports these two without depending on them.
    if not _exists("pkg_resources"):
        report.findings.append(
            "Orion needs pkg_resources, which newer versions of setuptools lack: pip install 'setuptools<81'."
        )
    if not _exists("typing_extensions"):
        report.findings.append("Orion needs typing_extensions: pip install typing_extensions.")
    missing = [module for module in _REQUIRED_MODULES if not _exists(module)]
    report.findings += [f"{module} is not installed: install ppo_hpo again with pip." for module in missing]
    modules = [module for module in _REQUIRED_MODULES if module not in missing]
    if _exists("pkg_resources") and _version("orion"):
        # Every `orion` command imports the second one, which fails outside of `sys.prefix`.
        modules += ["orion.client", "orion.core.cli.frontend"]
    modules += [_EXTRAS[name] for name in _COMPILED_EXTRAS if name in extras]
    programs = [f"import warnings; warnings.simplefilter('ignore'); import {module}" for module in modules]
    with ThreadPoolExecutor() as pool:
        for module, (_, error) in zip(modules, pool.map(_run_python, programs), strict=True):
            if error:
                report.findings.append(f"{module} cannot be imported ({error}): install it again.")


def _check_devices(report: Report) -> None:
    machine = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    fact = f"{cores} of {machine} cores for this process; a trial uses one core (see task.threads)"
    report.facts.append(("cpu", fact))
    if _version("torch") is None:
        return
    output, error = _run_python(_TORCH_PROGRAM)
    if error:
        report.findings.append(f"torch cannot be imported ({error}): install it again.")
    else:
        report.facts.append(("gpu", _gpus(report, json.loads(output.splitlines()[-1]))))


def _gpus(report: Report, torch: dict[str, Any]) -> str:
    """The GPUs that torch can use, or why there is none."""
    driver = any(Path(path).exists() for path in ("/dev/nvidiactl", "/proc/driver/nvidia/version"))
    if torch["cuda"]:
        return ", ".join(f"cuda:{index} {name}" for index, name in enumerate(torch["cuda"]))
    if torch["built"] is None:
        text = "none: this torch is built for CPUs only, which is faster for small networks"
        needs = "; the NVIDIA driver here needs a torch built for CUDA (pytorch.org/get-started)"
        return text + needs if driver else text
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "none: CUDA_VISIBLE_DEVICES hides them"
    if driver:
        reason = " ".join(" ".join(torch["warnings"]).split())[:300] or "torch does not say why"
        report.findings.append(
            f"There is an NVIDIA driver, but torch, which is built for CUDA {torch['built']}, cannot use "
            f"it ({reason}): install a torch for the CUDA version that nvidia-smi shows."
        )
    return f"none: torch is built for CUDA {torch['built']}, but finds no driver or no device"


def _check_database(report: Report, config: str | None) -> None:
    """Check every experiment of a database. Nothing in it is changed."""
    database = find_database(config)
    if database.storage is None and not database.settings.get("host"):
        fact = "none: name one with -c FILE, or ORION_DB_TYPE and ORION_DB_ADDRESS"
        report.facts.append(("database", fact))
        return
    storage = database.open()
    # `ppo-hpo retry` and a hunt use the newest version of an experiment, so older ones do not matter.
    documents = sorted(storage.fetch_experiments({}), key=lambda document: int(document["version"]))
    newest = {document["name"]: document for document in documents}
    report.facts.append(("database", f"{database}: {len(newest)} experiment(s)"))
    for name, document in newest.items():
        title = f"{name}-v{document['version']}"
        option = "" if config is None else f" -c {shlex.quote(config)}"
        retry = f"`ppo-hpo retry {shlex.quote(name)}{option}`"
        try:
            _check_trials(report, storage.fetch_trials(uid=document["_id"]), title, retry)
            held = algorithm_lock.read(storage._db, document["_id"])
            if held is not None:
                release = f"{retry} or `orion db release -f {shlex.quote(name)}` releases it."
                _check_lock(report, held, title, release)
        except Exception as error:
            report.findings.append(f"Experiment {title} could not be checked ({in_short(error)}).")


def _check_lock(report: Report, held: algorithm_lock.AlgorithmLock, title: str, release: str) -> None:
    report.facts.append(("", f"{title}: its algorithm has been {held}, for {held.seconds:,.0f} s"))
    if held.holder_runs is False:
        report.findings.append(f"The algorithm of {title} is locked by a process that has ended: {release}")
    if held.holder_runs is None and held.seconds >= PATIENCE:
        report.findings.append(
            f"The algorithm of {title} is locked by a process that cannot be seen from here. If it has "
            f"ended, {release}"
        )


def _check_trials(report: Report, trials: Sequence[Any], title: str, retry: str) -> None:
    from ppo_hpo.state import lock

    statuses = Counter(trial.status for trial in trials)
    text = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())) or "no trials"
    report.facts.append(("", f"{title}: {text}"))
    if count := statuses["broken"]:
        report.findings.append(f"{title} has {count} broken trial(s): {retry} prints why and requeues them.")
    silent = [t for t in trials if t.status == "reserved" and seconds_since(t.heartbeat) >= PATIENCE]
    # A trial without a directory was never begun.
    places = {trial.id: Path(trial.working_dir) for trial in silent if trial.exp_working_dir}
    writers = dict(zip(places, lock.active_writers([*places.values()]), strict=True))
    stuck = [trial.id[:8] for trial in silent if writers.get(trial.id) is None]
    if stuck:
        report.findings.append(
            f"{title} has {len(stuck)} reserved trial(s) that no worker trains any more "
            f"({', '.join(stuck)}): {retry} requeues them."
        )

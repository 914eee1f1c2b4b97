"""What is installed here, what it can run on, how a database is, and what is wrong with any of it.

Each check stands by itself: one that fails is a finding, and the others still run. Whatever may crash or hang
when it is imported, which is torch, is asked in a process of its own.
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
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from ppo_hpo.spec.errors import UserError

#: The version of Orion that all of this was tried with.
TRIED_ORION = "0.2.7"
PACKAGES = ("ppo_hpo", "orion", "torch", "gymnasium", "numpy", "safetensors", "setuptools", "pip")
# What a trial imports, by module.
_IMPORTED = ("numpy", "yaml", "gymnasium", "safetensors", "filelock", "threadpoolctl")
# Extra to a module that it brings.
EXTRAS = {
    "classic-control": "pygame", "box2d": "Box2D", "mujoco": "mujoco", "atari": "ale_py",
    "envpool": "envpool", "remote": "fsspec", "onnx": "onnx", "dask": "distributed", "ray": "ray",
    "pb2": "GPy",
}  # fmt: skip
# Those that are compiled, and can be there and fail all the same.
_TRIED = ("box2d", "mujoco", "atari", "envpool")
# What Orion finds of ours by entry points.
ENTRY_POINTS = {
    "BaseAlgorithm": ["ppo_hpo_lean"],
    "BaseExecutor": ["workers", "ray"],
    "Database": ["sqlitedb"],
}
_TORCH = """
import json, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    cuda = torch.cuda.is_available()
print(json.dumps({
    "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "built": torch.version.cuda or torch.version.hip, "mps": torch.backends.mps.is_available(),
    "version": torch.__version__, "said": [str(one.message) for one in said]}))
"""
_IMPORT = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
importlib.import_module(sys.argv[1])
"""
# Seconds; on a cold network file system torch takes a minute.
_LIMIT = 120


@dataclass
class Report:
    """What was found.

    Attributes:
        facts: what it is about, and what is so, in the order in which they are told.
        findings: one sentence each, with what to do.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{what:11} {text}".rstrip() for what, text in self.facts]
        count = len(self.findings)
        lines.append(f"\n{count} thing{'' if count == 1 else 's'} to do" if count else "\nall is well")
        return "\n".join([*lines, *(f"  {number}. {text}" for number, text in enumerate(self.findings, 1))])


def examine(config: str | None = None, progress: TextIO | None = None) -> Report:
    """Look at everything.

    Args:
        config: Orion's configuration file, for its database; None takes what ``ORION_DB_TYPE`` and
            ``ORION_DB_ADDRESS`` say, or Orion's own.
        progress: where to say what is being looked at, once that takes more than a second.
    """
    report = Report()
    checks: list[tuple[str, Callable[[], None]]] = [
        ("versions", lambda: _versions(report)),
        ("commands", lambda: _commands(report)),
        ("plugin", lambda: _entry_points(report)),
        ("copies", lambda: _copies(report)),
        ("packages", lambda: _packages(report)),
        ("extras", lambda: _extras(report)),
        ("devices", lambda: _devices(report)),
        ("database", lambda: _database(report, config)),
    ]
    for name, check in checks:
        timer = threading.Timer(1.0, print, [f"ppo-hpo: looking at the {name} ..."], {"file": progress})
        timer.daemon = True
        if progress is not None:
            timer.start()
        try:
            check()
        except UserError as error:
            report.findings.append(str(error))
        except (Exception, SystemExit) as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            report.findings.append(f"The {name} could not be looked at ({text}).")
        finally:
            timer.cancel()
    return report


def to_json(report: Report) -> str:
    """The report for programs."""
    return json.dumps(asdict(report), indent=1)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _versions(report: Report) -> None:
    report.facts.append(("python", f"{sys.version.split()[0]}  {sys.executable}"))
    found = {name: _version(name) for name in PACKAGES}
    for name, version in found.items():
        report.facts.append((name, version or "not installed"))
        if version is None and name not in ("setuptools", "pip"):
            report.findings.append(f"{name} is not installed: pip install 'pip<26.3', then ppo_hpo again.")
    if found["orion"] not in (None, TRIED_ORION):
        report.findings.append(
            f"Orion is {found['orion']}, and ppo_hpo was tried with {TRIED_ORION}: pip install "
            f"orion=={TRIED_ORION}, with a pip before 26.3."
        )
    if sys.version_info[:2] != (3, 11):
        report.findings.append(
            f"This is Python {sys.version.split()[0]}, and ppo_hpo was tried on 3.11; Orion {TRIED_ORION} "
            f"does not build on 3.12 and later: make an environment with Python 3.11."
        )
    if [int(part) for part in (found["pip"] or "0").split(".")[:2] if part.isdigit()] >= [26, 3]:
        report.facts.append(
            ("", f"this pip refuses Orion {TRIED_ORION}: pip install 'pip<26.3' before you install")
        )
    # Orion imports both without saying so.
    if not _there("pkg_resources"):
        report.findings.append(
            "Orion needs pkg_resources, which setuptools has no more: pip install 'setuptools<81'."
        )
    if not _there("typing_extensions"):
        report.findings.append("Orion needs typing_extensions: pip install typing_extensions.")


def _there(module: str) -> bool:
    """Whether there is such a module, be it whole or not; `find_spec` raises for some that are not."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return module in sys.modules


def _importing(*modules: str) -> dict[str, str]:
    """What goes wrong as each module is imported, by processes side by side; '' where nothing does."""
    pipe, found = subprocess.PIPE, {}
    running = {
        # Without the current directory, of which `_copies` tells.
        module: subprocess.Popen(
            [sys.executable, "-P", "-c", _IMPORT, module],
            stdout=subprocess.DEVNULL, stderr=pipe, text=True, errors="replace",
        )
        for module in modules
    }  # fmt: skip
    for module, process in running.items():
        try:
            _, said = process.communicate(timeout=_LIMIT)
            last = (said.strip().splitlines() or [f"Python ended with code {process.returncode}"])[-1][:300]
            found[module] = last if process.returncode else ""
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            found[module] = "no end within two minutes"
    return found


def _packages(report: Report) -> None:
    whole = [module for module in _IMPORTED if _there(module)]
    for module in _IMPORTED:
        if module not in whole:
            report.findings.append(f"{module} is not installed: pip install ppo_hpo again.")
    # The second is what each command of Orion's imports besides; it fails outside of `sys.prefix`.
    orion = (
        ["orion.client", "orion.core.cli.frontend"] if _there("pkg_resources") and _version("orion") else []
    )
    for module, wrong in _importing(*whole, *orion).items():
        if wrong:
            report.findings.append(f"{module} cannot be imported ({wrong}): install it again.")


def _copies(report: Report) -> None:
    """Distributions that are there twice, and files here that hide a package."""
    for name in ("ppo_hpo", "orion", "torch", "numpy"):
        found = {
            str(Path(str(one.locate_file(""))).resolve()): one for one in metadata.distributions(name=name)
        }
        # What lies beside the source is what an editable installation was built from.
        places = [place for place, one in found.items() if not _is_egg_info(one, name)]
        if len(places) > 1:
            report.findings.append(
                f"{name} is installed {len(places)} times ({', '.join(places)}), and the first is used: "
                f"pip uninstall {name} until none is left, then install it once."
            )
    here = Path.cwd()
    egg_info = here / "ppo_hpo.egg-info"
    if egg_info.is_dir() and str(here) not in sys.path and "" not in sys.path:
        # This command does not look here, and others do.
        points = {(point.group, point.name) for point in metadata.Distribution.at(egg_info).entry_points}
        if not {(group, name) for group, names in ENTRY_POINTS.items() for name in names} <= points:
            report.findings.append(
                f"{egg_info} is of an older build, and hides what Orion finds of ppo_hpo from every "
                f"`python -m` and `python -c` in this directory: remove it."
            )
    own = Path(__file__).parents[1]
    for name in ("torch", "orion", "ppo_hpo", *_IMPORTED):
        for path in (here / f"{name}.py", here / name / "__init__.py"):
            if path.is_file() and not (name == "ppo_hpo" and path.parent.samefile(own)):
                report.findings.append(
                    f"{path} hides the package {name} from trials that are run in this directory: rename it, "
                    f"or work in another one."
                )


def _is_egg_info(distribution: metadata.Distribution, name: str) -> bool:
    return (Path(str(distribution.locate_file(""))) / f"{name}.egg-info").is_dir()


def _of_this_environment(script: Path, own: Path) -> bool:
    """Whether a command is one of this interpreter's: by its place, or by its first line."""
    if script.parent.resolve() == own.resolve() or script.resolve().parent == own.resolve():
        return True
    try:
        first = script.read_bytes().split(b"\n", 1)[0].decode(errors="replace")
    except OSError:
        return False
    return first.removeprefix("#!").strip() == sys.executable


def _commands(report: Report) -> None:
    own = Path(sysconfig.get_path("scripts"))
    for command in ("orion", "ppo-hpo"):
        path = shutil.which(command)
        report.facts.append((f"`{command}`", path or "not on the PATH"))
        if path is None:
            where = f"export PATH={own}:$PATH" if (own / command).exists() else "install it again with pip"
            report.findings.append(f"The command {command} is not on the PATH: {where}.")
        elif not _of_this_environment(Path(path), own):
            report.findings.append(
                f"The command {command} is {path}, of another environment than {sys.executable}: put {own} "
                f"first on the PATH, so that a hunt and its trials have the same packages."
            )


def _entry_points(report: Report) -> None:
    # In the order of sys.path, each place once: the first is the one that counts.
    found = metadata.distributions(name="ppo_hpo")
    places = list(dict.fromkeys(str(Path(str(each.locate_file("")))) for each in found))
    report.facts.append(("plugin in", ", ".join(places) or "nowhere"))
    missing = [
        f"{group}: {name}"
        for group, names in ENTRY_POINTS.items()
        for name in names
        if name not in {found.name for found in metadata.entry_points(group=group)}
    ]
    if missing:
        report.findings.append(
            f"Orion does not find what ppo_hpo brings ({', '.join(missing)}): an older installation is seen "
            f"first, in {places[0] if places else 'no place'}. Install ppo_hpo again, and remove a "
            f"ppo_hpo.egg-info that lies in the directory you work in."
        )


def _extras(report: Report) -> None:
    here = [name for name, module in EXTRAS.items() if _there(module)]
    absent = [name for name in EXTRAS if name not in here]
    wrong = _importing(*(EXTRAS[name] for name in _TRIED if name in here))
    sound = [name for name in here if not wrong.get(EXTRAS[name])]
    report.facts.append(("extras", ", ".join(sound) or "none"))
    if absent:
        report.facts.append(("", f"not here: {', '.join(absent)} (pip install 'ppo-hpo[NAME]')"))
    for name in _TRIED:
        if text := wrong.get(EXTRAS[name]):
            report.findings.append(
                f"{EXTRAS[name]} is installed and cannot be imported ({text}): pip install --force-reinstall "
                f"'ppo-hpo[{name}]', or uninstall it."
            )


def _devices(report: Report) -> None:
    machine = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    report.facts.append(
        ("cpu", f"{cores} of {machine} cores for this process; a trial takes one (task.threads)")
    )
    if _version("torch") is None:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH], capture_output=True, text=True, check=False, timeout=_LIMIT
        )
    except subprocess.TimeoutExpired:
        report.findings.append("torch could not be imported within two minutes: install it again.")
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1][:300]
        report.findings.append(f"torch cannot be imported ({last}): install it again.")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    recorded = _version("torch") or ""
    if found["version"].partition("+")[0] != recorded.partition("+")[0]:
        report.findings.append(
            f"torch says that it is {found['version']}, and its installation that it is {recorded}: two "
            f"are mixed. Run pip uninstall torch until none is left, and install it once."
        )
    driver = any(Path(path).exists() for path in ("/dev/nvidiactl", "/proc/driver/nvidia/version"))
    if found["cuda"]:
        text = ", ".join(f"cuda:{index} {name}" for index, name in enumerate(found["cuda"]))
    elif found["built"] is None:
        text = "none: this torch is a build for CPUs, which is the faster one for small networks"
        if driver:
            text += "; there is an NVIDIA driver, for a build with CUDA (pytorch.org/get-started)"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        text = "none: CUDA_VISIBLE_DEVICES hides them"
    else:
        text = f"none: torch is built for CUDA {found['built']}, and finds no driver or no device"
        if driver:
            said = " ".join(" ".join(found["said"]).split())[:300]
            report.findings.append(
                f"There is an NVIDIA driver, and torch, built for CUDA {found['built']}, cannot use it "
                f"({said or 'it does not say why'}): install a torch for the CUDA that nvidia-smi names."
            )
    if found["mps"]:
        text += "; mps is there, and not used"
    report.facts.append(("gpu", text))


def _database(report: Report, config: str | None) -> None:
    import warnings

    from ppo_hpo.orion.experiment import refuse_missing_file, storage_of

    storage = storage_of(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import orion.core
        from orion.storage.base import setup_storage
    found: Any = storage or orion.core.config.storage.to_dict()
    database = found["database"]
    if storage is None and not database.get("host"):
        report.facts.append(("database", "none named: -c FILE, or ORION_DB_TYPE and ORION_DB_ADDRESS"))
        return
    refuse_missing_file(storage, config or "ORION_DB_ADDRESS")
    opened = setup_storage(storage)
    experiments = opened.fetch_experiments({})
    report.facts.append(
        ("database", f"{database['type']} {database['host']}: {len(experiments)} experiment(s)")
    )
    newest: dict[str, int] = {}
    for experiment in experiments:
        newest[experiment["name"]] = max(experiment["version"], newest.get(experiment["name"], 0))
    for experiment in experiments:
        name = experiment["name"]
        try:
            latest = experiment["version"] == newest[name]
            _experiment(
                report, opened, experiment, "" if config is None else f" -c {shlex.quote(config)}", latest
            )
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            report.findings.append(f"Experiment {name!r} could not be looked at ({text}).")


def _experiment(report: Report, storage: Any, experiment: dict[str, Any], option: str, latest: bool) -> None:
    from ppo_hpo.inspect.retry import PATIENCE, age
    from ppo_hpo.state import lock

    shown_name = f"{experiment['name']}-v{experiment['version']}"
    name = shlex.quote(experiment["name"])
    trials = storage.fetch_trials(uid=experiment["_id"])
    statuses = Counter(trial.status for trial in trials)
    shown = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())) or "no trials"
    report.facts.append(("", f"{shown_name}: {shown}"))

    def put_back(status: str) -> str:
        if latest:
            return f"`ppo-hpo retry {name}{option}`"
        # `retry` takes the newest version of an experiment.
        return f"`orion db set -f {name} -v {experiment['version']} status={status} status=interrupted`"

    if statuses["broken"]:
        says = "says why and puts them back" if latest else "puts them back"
        report.findings.append(
            f"{shown_name} has {statuses['broken']} broken trial(s): {put_back('broken')} {says}."
        )
    stuck = [
        trial
        for trial in trials
        if trial.status == "reserved"
        and age(trial.heartbeat) >= PATIENCE
        and not (trial.exp_working_dir and lock.active_writer(Path(trial.working_dir)))
    ]
    if stuck:
        text = ", ".join(trial.id[:8] for trial in stuck)
        report.findings.append(
            f"{shown_name} has {len(stuck)} reserved trial(s) that nobody trains any more ({text}): "
            f"{put_back('reserved')} puts them back."
        )
    for held in storage._db.read("algo", {"experiment": experiment["_id"], "locked": 1}):
        seconds = age(held["heartbeat"])
        report.facts.append(("", f"{shown_name}: algorithm locked for {seconds:,.0f} s"))
        if seconds >= PATIENCE:
            release = f"`orion db release -f {name}`"
            ways = (
                f"{put_back('')} releases it (so does {release})"
                if latest
                else (f"`orion db release -f {name} -v {experiment['version']}` releases it")
            )
            report.findings.append(
                f"The lock of {shown_name}'s algorithm was left by a process that is gone: {ways}."
            )

"""What is installed here, what it can run on, how a database is, and what is wrong with any of it.

Each check stands by itself: one that fails is a finding, and the others still run. Whatever may crash or hang
when it is imported, which is torch, is asked in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ppo_hpo.errors import UserError

#: The version of Orion that all of this was tried with.
TRIED_ORION = "0.2.7"
PACKAGES = ("ppo_hpo", "orion", "torch", "gymnasium", "numpy", "safetensors", "setuptools")
# Extra to a module that it brings.
EXTRAS = {
    "classic-control": "pygame", "box2d": "Box2D", "mujoco": "mujoco", "atari": "ale_py",
    "envpool": "envpool", "remote": "fsspec", "onnx": "onnx", "dask": "distributed", "ray": "ray",
    "pb2": "GPy",
}  # fmt: skip
# What Orion finds of ours by entry points.
ENTRY_POINTS = {
    "BaseAlgorithm": ["ppo_hpo_lean"],
    "BaseExecutor": ["workers", "ray"],
    "Database": ["sqlitedb"],
}
_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "built": torch.version.cuda, "mps": torch.backends.mps.is_available()}))
"""


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


def examine(config: str | None = None) -> Report:
    """Look at everything.

    Args:
        config: Orion's configuration file, for its database; None takes what ``ORION_DB_TYPE`` and
            ``ORION_DB_ADDRESS`` say, or Orion's own.
    """
    report = Report()
    checks: list[tuple[str, Callable[[], None]]] = [
        ("versions", lambda: _versions(report)),
        ("commands", lambda: _commands(report)),
        ("plugin", lambda: _entry_points(report)),
        ("extras", lambda: _extras(report)),
        ("devices", lambda: _devices(report)),
        ("database", lambda: _database(report, config)),
    ]
    for name, check in checks:
        try:
            check()
        except UserError as error:
            report.findings.append(str(error))
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            report.findings.append(f"The {name} could not be looked at ({text}).")
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
        if version is None and name != "setuptools":
            report.findings.append(f"{name} is not installed: pip install 'pip<26.3', then ppo_hpo again.")
    if found["orion"] not in (None, TRIED_ORION):
        report.findings.append(
            f"Orion is {found['orion']}, and ppo_hpo was tried with {TRIED_ORION}: pip install "
            f"orion=={TRIED_ORION}, with a pip before 26.3."
        )
    # Orion imports both without saying so.
    if importlib.util.find_spec("pkg_resources") is None:
        report.findings.append(
            "Orion needs pkg_resources, which setuptools has no more: pip install 'setuptools<81'."
        )
    if importlib.util.find_spec("typing_extensions") is None:
        report.findings.append("Orion needs typing_extensions: pip install typing_extensions.")


def _commands(report: Report) -> None:
    own = Path(sys.executable).parent
    for command in ("orion", "ppo-hpo"):
        path = shutil.which(command)
        report.facts.append((f"`{command}`", path or "not on the PATH"))
        if path is None:
            where = f"export PATH={own}:$PATH" if (own / command).exists() else "install it again with pip"
            report.findings.append(f"The command {command} is not on the PATH: {where}.")
        elif Path(path).parent.resolve() != own.resolve():
            report.findings.append(
                f"The command {command} is {path}, of another environment than {sys.executable}: put {own} "
                f"first on the PATH, so that a hunt and its trials have the same packages."
            )


def _entry_points(report: Report) -> None:
    places = {str(Path(str(found.locate_file("")))) for found in metadata.distributions(name="ppo_hpo")}
    report.facts.append(("plugin in", ", ".join(sorted(places)) or "nowhere"))
    missing = [
        f"{group}: {name}"
        for group, names in ENTRY_POINTS.items()
        for name in names
        if name not in {found.name for found in metadata.entry_points(group=group)}
    ]
    if missing:
        report.findings.append(
            f"Orion does not find what ppo_hpo brings ({', '.join(missing)}): an older installation is seen "
            f"first, in {sorted(places)[0] if places else 'no place'}. Install ppo_hpo again, and remove a "
            f"ppo_hpo.egg-info that lies in the directory you work in."
        )


def _extras(report: Report) -> None:
    here = [name for name, module in EXTRAS.items() if importlib.util.find_spec(module) is not None]
    absent = [name for name in EXTRAS if name not in here]
    report.facts.append(("extras", ", ".join(here) or "none"))
    if absent:
        report.facts.append(("", f"not here: {', '.join(absent)} (pip install 'ppo-hpo[NAME]')"))


def _devices(report: Report) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report.facts.append(("cpu", f"{cores} cores for this process; a trial takes one (task.threads)"))
    if _version("torch") is None:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TORCH], capture_output=True, text=True, check=False, timeout=120
        )
    except subprocess.TimeoutExpired:
        report.findings.append("torch could not be imported within two minutes: install it again.")
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1][:300]
        report.findings.append(f"torch cannot be imported ({last}): install it again.")
        return
    found = json.loads(done.stdout.splitlines()[-1])
    if found["cuda"]:
        text = ", ".join(f"cuda:{index} {name}" for index, name in enumerate(found["cuda"]))
    elif found["built"] is None:
        text = "none: this torch is a build for CPUs, which is the faster one for small networks"
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        text = "none: CUDA_VISIBLE_DEVICES hides them"
    else:
        text = f"none: torch is built for CUDA {found['built']}, and finds no driver or no device"
    report.facts.append(("gpu", text))


def _database(report: Report, config: str | None) -> None:
    import warnings

    from ppo_hpo.experiment import refuse_missing_file, storage_of

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
    for experiment in experiments:
        _experiment(report, opened, experiment, "" if config is None else f" -c {config}")


def _experiment(report: Report, storage: Any, experiment: dict[str, Any], option: str) -> None:
    from ppo_hpo import lock
    from ppo_hpo.retry import PATIENCE, age

    name = experiment["name"]
    trials = storage.fetch_trials(uid=experiment["_id"])
    statuses = Counter(trial.status for trial in trials)
    shown = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())) or "no trials"
    report.facts.append(("", f"{name}-v{experiment['version']}: {shown}"))
    put_back = f"`ppo-hpo retry {name}{option}`"
    if statuses["broken"]:
        report.findings.append(
            f"{name} has {statuses['broken']} broken trial(s): {put_back} says why and puts them back."
        )
    stuck = [
        trial
        for trial in trials
        if trial.status == "reserved"
        and age(trial.heartbeat) >= PATIENCE
        and not (trial.exp_working_dir and lock.living(Path(trial.working_dir)))
    ]
    if stuck:
        report.findings.append(
            f"{name} has {len(stuck)} reserved trial(s) that nobody trains any more "
            f"({', '.join(trial.id[:8] for trial in stuck)}): {put_back} puts them back."
        )
    for held in storage._db.read("algo", {"experiment": experiment["_id"], "locked": 1}):
        seconds = age(held["heartbeat"])
        report.facts.append(("", f"{name}-v{experiment['version']}: algorithm locked for {seconds:,.0f} s"))
        if seconds >= PATIENCE:
            report.findings.append(
                f"The lock of {name}'s algorithm was left by a process that is gone: {put_back} releases it "
                f"(so does `orion db release -f {name}`)."
            )

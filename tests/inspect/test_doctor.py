"""What `ppo-hpo doctor` prints about installations and databases, whole and broken."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo.cli.main import main
from ppo_hpo.inspect import doctor
from ppo_hpo.spec import yamlio

BIN = Path(sys.executable).parent


def run(
    *options: str, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("ORION_")}
    own |= {
        "PATH": f"{BIN}{os.pathsep}{own['PATH']}",
        "XDG_DATA_HOME": str(cwd / "data"),
        **(environment or {}),
    }
    return subprocess.run(
        [sys.executable, "-m", "ppo_hpo", "doctor", *options],
        cwd=cwd, env=own, capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip


def test_a_whole_installation(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert all(line.startswith("ppo-hpo: checking the ") for line in done.stderr.splitlines())
    assert done.stdout.endswith("\nno problem found\n")
    from importlib.metadata import version

    for name in ("orion", "torch", "gymnasium", "numpy"):
        assert f"{name:11} {version(name)}\n" in done.stdout
    assert "none: name one with -c FILE" in done.stdout
    assert not (tmp_path / "data").exists()


def test_what_is_wrong_with_an_installation(tmp_path: Path) -> None:
    """An older egg-info in the directory, another environment's command, a torch that does not import."""
    old = tmp_path / "ppo_hpo.egg-info"
    old.mkdir()
    (old / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: ppo_hpo\nVersion: 0.0.1\n")
    other = tmp_path / "other"
    other.mkdir()
    (other / "orion").write_text("#!/bin/sh\n")
    (other / "orion").chmod(0o755)
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open')\n")
    path = f"{other}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"
    done = run("--json", cwd=tmp_path, environment={"PATH": path, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert len(findings) == 3
    assert findings[0].startswith(f"The command orion is {other}/orion, which belongs to another environment")
    assert findings[1].startswith(
        "Orion does not find these entry points of ppo_hpo: BaseAlgorithm: ppo_hpo_lean, "
        "BaseExecutor: workers, BaseExecutor: ray, Database: sqlitedb. An older installation comes first, "
        f"in {tmp_path}"
    )
    assert findings[2] == (
        "torch cannot be imported (ImportError: libtorch_cpu.so: cannot open): install it again."
    )


def test_more_that_is_wrong(tmp_path: Path) -> None:
    """A setuptools that brings no pkg_resources, another Orion, and an extra that fails."""
    other = tmp_path / "other"
    (other / "Box2D").mkdir(parents=True)
    (other / "Box2D" / "__init__.py").write_text("import os; os.abort()\n")
    (other / "orion-0.2.6.dist-info").mkdir()
    (other / "orion-0.2.6.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: orion\nVersion: 0.2.6\n"
    )
    (other / "sitecustomize.py").write_text("import sys\nsys.modules['pkg_resources'] = None\n")
    done = run("--json", cwd=tmp_path, environment={"PYTHONPATH": str(other)})
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)["findings"]
    expected = [
        "Orion is 0.2.6, and ppo_hpo was tested with 0.2.7",
        "Orion needs pkg_resources, which newer versions of setuptools lack",
        "Box2D cannot be imported (",
    ]
    assert len(findings) == len(expected), findings
    for finding, start in zip(findings, expected, strict=True):
        assert finding.startswith(start)


def test_nothing_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    report = doctor.Report()
    doctor._check_commands(report)
    assert report.findings[0] == f"The command orion is not on the PATH: export PATH={BIN}:$PATH."


def hunted(folder: Path, kind: str) -> tuple[str, Any]:
    """An experiment with a completed, a broken and a lost trial, one under way, and a lock left long ago."""
    from orion.client import build_experiment
    from orion.client.runner import prepare_trial_working_dir

    storage = {"type": "legacy", "database": {"type": kind, "host": str(folder / "orion.db")}}
    (folder / "orion.yaml").write_text(yamlio.dump({"storage": storage}))
    client = build_experiment(
        "sick", space={"x": "uniform(0, 1)"}, algorithm={"random": {"seed": 1}}, storage=storage,
        working_dir=str(folder / "trials"), max_trials=9,
    )  # fmt: skip
    client.observe(client.suggest(), 1.0)
    client.release(client.suggest(), status="broken")
    lost, lives = client.suggest(), client.suggest()
    prepare_trial_working_dir(client, lost)
    for pacemaker in client._pacemakers.values():  # They would write to the database during a slow test.
        pacemaker.stop()
    return lost.id, (client, lives)


@pytest.mark.parametrize("kind", ["pickleddb", "sqlitedb"])
def test_a_database_with_stuck_trials_and_a_stuck_lock(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    ident, (client, lives) = hunted(tmp_path, kind)
    database = client.storage._db
    ago = datetime.datetime.now(datetime.UTC).replace(tzinfo=None) - datetime.timedelta(seconds=300)
    database.write("trials", {"heartbeat": ago}, {"id": ident})
    database.write("algo", {"locked": 1, "heartbeat": ago}, {"experiment": client.id})
    config = str(tmp_path / "orion.yaml")
    before = (tmp_path / "orion.db").read_bytes()
    report = doctor.examine(config)
    assert (tmp_path / "orion.db").read_bytes() == before  # it changes nothing
    assert ("", "sick-v1: 1 broken, 1 completed, 2 reserved") in report.facts
    retry = f"`ppo-hpo retry sick -c {config}`"
    assert report.findings == [
        f"sick-v1 has 1 broken trial(s): {retry} prints why and requeues them.",
        f"sick-v1 has 1 reserved trial(s) that no worker trains any more ({ident[:8]}): "
        f"{retry} requeues them.",
        "The algorithm of sick-v1 is locked by a process that cannot be seen from here. If it has ended, "
        f"{retry} or `orion db release -f sick` releases it.",
    ]
    # Following its advice helps.
    assert main(["retry", "sick", "-c", config]) == 0
    assert doctor.examine(config).findings == []
    client.release(lives)
    client._pacemakers.pop(ident).stop()


def test_a_database_that_is_not_there_is_a_finding_and_not_made(tmp_path: Path) -> None:
    (tmp_path / "orion.yaml").write_text("storage: {database: {type: pickleddb, host: no.pkl}}")
    done = run("-c", "orion.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 problem found\n  1. The database no.pkl does not exist (from orion.yaml)." in done.stdout
    assert not (tmp_path / "no.pkl").exists()

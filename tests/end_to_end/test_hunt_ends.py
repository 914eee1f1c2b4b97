"""How an `orion hunt` stops: by signals, on a full disk, and without its files. Nothing is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo.spec import yamlio
from tests.waiting import may_mount, wait_for

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE = 120
SPACE: dict[str, Any] = {
    "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
    "task": {"epochs": 3, "max_epochs": 3, "steps_per_epoch": 512, "eval_episodes": 2},
    "model": {"width": 8, "depth": 1},
    "optimizer": {"lr": "orion~loguniform(1e-4, 1e-2, precision=4)"},
    "ppo": {"n_steps": 64, "batch_size": 64, "n_epochs": 1},
}
# Orion's command, which waits less long for a full disk.
ORION = """
import sys
from ppo_hpo.orion import full_disk
full_disk._PAUSES = (0.5,) * int(sys.argv.pop(1))
from orion.core.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


class Hunt:
    """One experiment, whose database and trials are in `files`."""

    def __init__(
        self, home: Path, files: Path, database: str, executor: str, inside: list[str], *, epochs: int = 3,
        database_in: Path | None = None,
    ) -> None:  # fmt: skip
        self.home, self.inside = home, inside
        self.output = home / "output.txt"
        self.database = self.seen = (database_in or files) / "database" / "orion.db"
        self.database.parent.mkdir(parents=True, exist_ok=True)
        home.mkdir()
        configuration = {
            "experiment": {
                "algorithm": {"random": {"seed": 1}}, "working_dir": str(files / "trials"), "max_trials": 2,
            },
            "storage": {"type": "legacy", "database": {"type": database, "host": str(self.database)}},
            "worker": {"n_workers": 1 if executor == "singleexecutor" else 2, "executor": executor},
        }  # fmt: skip
        self.storage = configuration["storage"]
        (home / "orion.yaml").write_text(yamlio.dump(configuration))
        task = {**SPACE["task"], "epochs": epochs, "max_epochs": epochs}
        (self.home / "space.yaml").write_text(yamlio.dump({**SPACE, "task": task}))

    @contextlib.contextmanager
    def start(self, pauses: int = 40) -> Iterator[subprocess.Popen[bytes]]:
        own = {key: value for key, value in os.environ.items() if not key.startswith("ORION_")}
        command = [
            *self.inside,
            sys.executable,
            "-c",
            ORION,
            str(pauses),
            "hunt",
            "-n",
            "ends",
            "-c",
            "orion.yaml",
        ]
        command += ["ppo-hpo", "run", "--config", "space.yaml", "--device", "cpu"]
        with self.output.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=self.home, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={
                    **own, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY),
                    "PYTHONWARNINGS": "ignore",
                },
                start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def told(self) -> str:
        return self.output.read_text()

    def wait_for_text(self, text: str, process: subprocess.Popen[bytes]) -> None:
        def there() -> bool:
            assert process.poll() is None or text in self.told, self.told
            return text in self.told

        wait_for(there, PATIENCE)

    def statuses(self) -> list[str]:
        from orion.client import get_experiment

        # Orion does not open a PickledDB in the /proc of another process, so it gets a copy.
        shutil.copy(self.seen, self.home / "copy.db")
        database = {**self.storage["database"], "host": str(self.home / "copy.db")}
        client = get_experiment("ends", storage={"type": "legacy", "database": database})
        assert not client.storage.get_algorithm_lock_info(uid=client.id).locked
        return sorted(trial.status for trial in client.fetch_trials())


def group_of(process: subprocess.Popen[bytes]) -> list[str]:
    """The processes that a hunt has left in its session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[3] == str(process.pid) and fields[0] != "Z":
                found.append(path.parent.name)
    return found


@pytest.mark.parametrize(
    ("executor", "numbers", "group"),
    [
        # As a batch system does it, and as a user at a terminal who is in a hurry.
        ("singleexecutor", [signal.SIGTERM], False),
        ("poolexecutor", [signal.SIGINT, signal.SIGINT], True),
        ("poolexecutor", [signal.SIGTERM], False),
    ],
    ids=["SIGTERM", "two Ctrl-C", "SIGTERM to the leader"],
)
def test_a_signal_stops_the_trials_and_a_second_one_loses_nothing(
    executor: str, numbers: list[signal.Signals], group: bool, tmp_path: Path
) -> None:
    hunt = Hunt(tmp_path / "home", tmp_path, "sqlitedb", executor, [], epochs=5000)
    trials = 1 if executor == "singleexecutor" else 2
    with hunt.start() as process:
        wait_for(lambda: len(list(tmp_path.glob("trials/*/timing.jsonl"))) == trials, PATIENCE)
        for number in numbers:
            (os.killpg if group else os.kill)(process.pid, number)
        assert process.wait(PATIENCE) == 130, hunt.told
        wait_for(lambda: not group_of(process), PATIENCE)
    assert "Traceback" not in hunt.told
    assert hunt.told.count("the hunt stops as soon as its trials have saved their state") == 1
    assert hunt.told.count("Everything saved is whole. Rerun the command to resume") == trials
    assert hunt.statuses() == ["interrupted"] * trials


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, list[str], Path]]:
    """A small disk that only its users see: its path for them, how to get there, and its path from here."""
    if not may_mount():
        pytest.skip("this user may not mount")
    files = tmp_path / "files"
    files.mkdir()
    mount = f"mount -t tmpfs -o size=1m,nr_inodes=300 none {files} && mkdir {files}/database {files}/trials"
    holder = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"{mount} && touch {files}/ready && exec sleep infinity"]
    )
    seen = Path(f"/proc/{holder.pid}/root{files}")
    try:
        wait_for(lambda: (seen / "ready").exists(), PATIENCE)
        yield files, ["nsenter", f"--target={holder.pid}", "--mount", f"--wd={tmp_path}/home"], seen
    finally:
        holder.kill()
        holder.wait()


def fill(seen: Path) -> Path:
    """Leave no space, and return the file to remove for there to be some again."""
    with (seen / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    return seen / "ballast"


def test_a_full_disk_of_the_database_is_waited_for(
    disk: tuple[Path, list[str], Path], tmp_path: Path
) -> None:
    files, inside, seen = disk
    hunt = Hunt(tmp_path / "home", tmp_path, "pickleddb", "singleexecutor", inside, database_in=files)
    hunt.seen = seen / "database" / "orion.db"
    with hunt.start() as process:
        wait_for(lambda: list(tmp_path.glob("trials/*/checkpoint-000001*")), PATIENCE)
        ballast = fill(seen)
        hunt.wait_for_text("tries again", process)
        ballast.unlink()
        assert process.wait(PATIENCE) == 0, hunt.told
    assert hunt.statuses() == ["completed"] * 2


def test_a_disk_that_stays_full_is_one_sentence(disk: tuple[Path, list[str], Path], tmp_path: Path) -> None:
    files, inside, seen = disk
    hunt = Hunt(tmp_path / "home", tmp_path, "sqlitedb", "singleexecutor", inside, database_in=files)
    hunt.seen = seen / "database" / "orion.db"
    with hunt.start(pauses=1) as process:
        wait_for(lambda: list(tmp_path.glob("trials/*/checkpoint-000003*")), PATIENCE)
        fill(seen)
        assert process.wait(PATIENCE) == 1, hunt.told
    assert "Traceback" not in hunt.told
    assert hunt.told.count("The hunt stops") == 1
    assert "disk is full. Everything saved is whole. Fix the cause and rerun" in hunt.told
    (seen / "ballast").unlink()
    assert hunt.statuses() == ["reserved"]


@pytest.mark.parametrize("room", [0, 1], ids=["directory", "files"])
def test_a_trial_whose_files_cannot_be_made_is_not_broken(
    room: int, disk: tuple[Path, list[str], Path], tmp_path: Path
) -> None:
    """Orion makes the directory of a trial, and files in it. If it cannot, the trial has no fault."""
    files, inside, seen = disk
    hunt = Hunt(tmp_path / "home", files, "pickleddb", "singleexecutor", inside, database_in=tmp_path)
    number = 0
    with contextlib.suppress(OSError):
        while True:
            (seen / "trials" / f".{number}").touch()
            number += 1
    for each in range(room):
        (seen / "trials" / f".{each}").unlink()
    with hunt.start() as process:
        assert process.wait(PATIENCE) == 130, hunt.told
    assert "Traceback" not in hunt.told
    assert hunt.told.count("The hunt stops: ") == 1
    assert "No space left on device. Everything saved is whole. Fix the cause and rerun" in hunt.told
    assert hunt.statuses() == ["interrupted"]


def test_a_database_that_is_removed_is_one_sentence(tmp_path: Path) -> None:
    """Orion's PickledDB would go on with an empty one."""
    hunt = Hunt(tmp_path / "home", tmp_path, "pickleddb", "singleexecutor", [], epochs=200)
    with hunt.start() as process:
        hunt.wait_for_text("epoch 2/", process)
        (tmp_path / "database").rename(tmp_path / "aside")
        assert process.wait(PATIENCE) == 1, hunt.told
    assert "Traceback" not in hunt.told
    assert f"The hunt stops: {hunt.database} was removed while it is in use. Everything saved" in hunt.told
    assert not (tmp_path / "database").exists()
    (tmp_path / "aside").rename(tmp_path / "database")
    assert hunt.statuses() == ["reserved"]

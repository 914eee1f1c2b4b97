"""Every way a trial can end, as docs/reference/trial-ends.md lists them: with real `orion hunt` processes.

Trials are of environments from tests/envs.py in which nothing depends on the policy but what is learned, so
that all of one seed that end well, whatever happened to them, have the very same curve.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo.spec import yamlio
from ppo_hpo.state.checkpoint import Storage
from tests.waiting import may_mount

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE = 300
SPACE = {
    "env": {"id": "tests.envs:Fails-v0", "n_envs": 2},
    "task": {"epochs": 3, "max_epochs": 3, "steps_per_epoch": 256, "eval_episodes": 2},
    "model": {"width": 8, "depth": 1},
    "optimizer": {"lr": "orion~loguniform(1e-4, 1e-2)"},
    "ppo": {"n_steps": 32, "batch_size": 32, "n_epochs": 1},
}
_BEGAN = re.compile(r"\b(?:trains(?: for \S+)? from|has done) epoch (\d+)")


def own_environment(**extra: str) -> dict[str, str]:
    """This process's, without what Orion sets in it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ORION_")}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), **extra}


def utcnow() -> datetime.datetime:
    """In Orion's form, which does not say that it is UTC."""
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


def merged(*parts: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        for group, values in part.items():
            found[group] = {**found.get(group, {}), **values}
    return found


_STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(scope="module", autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    # Only those that nobody waited for: the number of any other may be somebody else's by now.
    for process in _STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass
class Hunt:
    """One experiment, hunted as often as it takes."""

    directory: Path
    space: dict[str, Any]
    algorithm: dict[str, Any] = field(default_factory=lambda: {"random": {"seed": 1}})
    max_trials: int = 1
    n_workers: int = 1
    working_dir: Path | None = None

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.trials_at = self.working_dir or self.directory / "trials"
        (self.directory / "space.yaml").write_text(yamlio.dump(self.space))
        (self.directory / "orion.yaml").write_text(yamlio.dump({
            "experiment": {"max_trials": self.max_trials, "max_broken": 99, "algorithm": self.algorithm,
                           "working_dir": str(self.trials_at)},
            "storage": self.storage,
            "worker": {"n_workers": self.n_workers, "max_broken": 99, "idle_timeout": 20,
                       "executor": "joblib", "executor_configuration": {"backend": "threading"}},
        }))  # fmt: skip
        self.count = 0

    @property
    def storage(self) -> dict[str, Any]:
        return {"type": "legacy", "database": {"type": "pickleddb", "host": str(self.directory / "db.pkl")}}

    def command(self, *options: str) -> list[str]:
        hunt = [str(BIN / "orion"), "hunt", "-n", "e", "-c", "orion.yaml"]
        return [*hunt, "ppo-hpo", "run", "--config", "space.yaml", *options]

    def start(self, *options: str, prefix: Sequence[str] = (), **extra: str) -> Going:
        self.count += 1
        output = self.directory / f"output-{self.count}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*prefix, *self.command(*options)], cwd=self.directory, env=own_environment(**extra),
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        _STARTED.append(process)
        return Going(self, process, output, len(self.rows()))

    def run(self, *options: str, **extra: str) -> Going:
        going = self.start(*options, **extra)
        going.end()
        return going

    def rows(self) -> list[dict[str, Any]]:
        """What the clock said of each epoch of the one trial, in all hunts."""
        lines = [
            line for path in self.trials_at.glob("*/timing.jsonl") for line in path.read_text().splitlines()
        ]
        return [json.loads(line) for line in lines]

    def take_over_the_lost(self) -> Going:
        """Hunt on as soon as Orion counts the trial as lost: five heartbeats after its worker's last one."""
        deadline = time.monotonic() + PATIENCE
        while (utcnow() - self.trials()[0].heartbeat).total_seconds() < 5.1:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        return self.start(ORION_HEARTBEAT="1")

    def trials(self) -> list[Any]:
        from orion.client import get_experiment

        return list(get_experiment("e", storage=self.storage).fetch_trials())

    def _database(self) -> Any:
        from orion.client import get_experiment

        client = get_experiment("e", storage=self.storage)
        return client.storage._db, client.id

    def get(self, collection: str) -> dict[str, Any]:
        """What Orion's database has of this experiment."""
        database, experiment = self._database()
        return dict(database.read(collection, {"experiment": experiment})[0])

    def set(self, collection: str, values: dict[str, Any]) -> None:
        """Put it into the state that a worker leaves that is killed at just that moment."""
        database, experiment = self._database()
        database.write(collection, values, {"experiment": experiment})

    def retry(self, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "ppo-hpo", "retry", "e", "-c", self.directory / "orion.yaml", *options],
            env=own_environment(), cwd=self.directory, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip


@dataclass
class Going:
    """One `orion hunt`."""

    hunt: Hunt
    process: subprocess.Popen[bytes]
    path: Path
    before: int
    status: str = ""
    trial: Any = None

    @property
    def output(self) -> str:
        return self.path.read_text()

    @property
    def code(self) -> int | None:
        return self.process.returncode

    @property
    def sentences(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("ppo-hpo: error: ")]

    @property
    def began(self) -> list[int]:
        """The epochs that were done when each trial of this hunt began, or resumed."""
        return [int(epoch) for epoch in _BEGAN.findall(self.output)]

    def wait_for(self, what: Callable[[], Any], whom: subprocess.Popen[bytes] | None = None) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (found := what()):
            assert time.monotonic() < deadline, self.output
            assert (whom or self.process).poll() is None, self.output
            time.sleep(0.02)
        return found

    def wait_for_epochs(self, more: int) -> int:
        """Wait until so many epochs were done in this hunt; return the trial's process."""
        self.wait_for(lambda: len(self.rows()) >= self.before + more)
        return int(self.rows()[-1]["pid"])

    def rows(self) -> list[dict[str, Any]]:
        return self.hunt.rows()

    def end(self) -> Going:
        """Wait for the end; keep what Orion says of the trial then."""
        try:
            self.process.wait(PATIENCE)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.hunt.max_trials == 1:
            (self.trial,) = self.hunt.trials()
            self.status = self.trial.status
        return self


def statistics(trial: Any) -> dict[str, float]:
    return {item.name: item.value for item in trial.statistics}


def undisturbed(trial: Any, tmp_path: Path, *options: str) -> bytes:
    """The curve of the same trial to which nothing happens."""
    config = Path(trial.working_dir) / "config.yaml"
    subprocess.run(
        [BIN / "ppo-hpo", "run", "--config", config, "--dir", tmp_path / "through", *options],
        check=True, capture_output=True, timeout=PATIENCE, env=own_environment(),
    )  # fmt: skip
    return (tmp_path / "through" / "curve.jsonl").read_bytes()


# ------------------------------------------------- what happens inside of a trial

# `at` lies in the second of three epochs.
HOWS = [
    "",
    "raise:1",
    "raise",
    "memory:1",
    "memory",
    "io:1",
    "pipe:1",
    "kill:1",
    "word",
    "none",
    "short",
    "nan",
]
PASSING = ["raise:1", "memory:1", "io:1", "pipe:1"]


@dataclass
class Faulty:
    """A hunt in which each trial has another fault, and a second one after its killed trial was put back."""

    first: Going
    put_back: subprocess.CompletedProcess[str]
    second: Going
    before: dict[str, Any]
    after: dict[str, Any]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    fixed = {"env": {"kwargs": {"how": f"orion~choices({HOWS})", "at": 400, "notes": "notes"}}}
    space = merged(SPACE, fixed, {"optimizer": {"lr": 1e-3}})
    hunt = Hunt(
        tmp_path_factory.mktemp("faulty"),
        space,
        {"gridsearch": {"n_values": len(HOWS)}},
        len(HOWS),
        n_workers=2,
    )

    def by_how() -> dict[str, Any]:
        return {trial.params["/env/kwargs/how"]: trial for trial in hunt.trials()}

    first = hunt.run()
    before = by_how()
    assert sorted(before) == sorted(HOWS), first.output
    put_back = hunt.retry("--trial", before["kill:1"].id[:8])
    second = hunt.run()
    return Faulty(first, put_back, second, before, by_how())


def curve(trial: Any) -> bytes:
    return (Path(trial.working_dir) / "curve.jsonl").read_bytes()


def log(trial: Any) -> str:
    return (Path(trial.working_dir) / "log.txt").read_text()


def test_a_normal_end(faulty: Faulty) -> None:
    trial = faulty.before[""]
    assert faulty.first.code == 0
    assert trial.status == "completed"
    assert statistics(trial)["env_steps_here"] == statistics(trial)["env_steps"] == 768
    assert statistics(trial)["retries"] == 0
    assert not (Path(trial.working_dir) / "failure.json").exists()


@pytest.mark.parametrize("how", PASSING)
def test_a_fault_that_passes_is_not_heard_of_by_orion(faulty: Faulty, how: str) -> None:
    trial = faulty.before[how]
    assert trial.status == "completed"
    assert curve(trial) == curve(faulty.before[""])
    stats = statistics(trial)
    assert stats["retries"] == 1
    assert stats["env_steps"] == 768
    assert 0 < stats["env_steps_here"] - 768 <= 256
    assert "resumes from the last checkpoint in 1 s" in log(trial)
    assert _BEGAN.findall(log(trial)) == ["0", "1"]
    assert not (Path(trial.working_dir) / "failure.json").exists()


def test_an_error_that_occurs_again_at_the_same_step_breaks_the_trial(faulty: Faulty) -> None:
    trial = faulty.before["raise"]
    assert trial.status == "broken"
    (sentence,) = (s for s in faulty.first.sentences if "simulator" in s)
    assert "RuntimeError: the simulator fell over: failed again at the same step (epoch 2, step " in sentence
    # The traceback shows the author where it was raised.
    assert "in _happen" in faulty.first.output
    # Others finished epochs, so it is this trial's own error, and the hunt continues.
    assert "The hunt stops" not in sentence


def test_too_little_memory_breaks_the_trial(faulty: Faulty) -> None:
    trial = faulty.before["memory"]
    assert trial.status == "broken"
    assert log(trial).count("resumes from the last checkpoint") == 2
    (sentence,) = (s for s in faulty.first.sentences if "memory" in s)
    assert "There is not enough memory (MemoryError: Unable to allocate 2.00 GiB" in sentence
    assert Storage(Path(trial.working_dir)).load().epoch == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("word", "returned the reward 'much', but it must be a number"),
        ("none", "returned the reward None, but it must be a number"),
        ("short", "returned an observation of shape (1,), but it must be float32 of shape (2,)"),
    ],
)
def test_a_malformed_answer_of_the_environment(faulty: Faulty, how: str, part: str) -> None:
    assert faulty.before[how].status == "broken"
    assert [part in sentence for sentence in faulty.first.sentences].count(True) == 1
    assert "resumes from the last checkpoint" not in log(faulty.before[how])


def test_nan_completes_with_the_worst_evaluation(faulty: Faulty) -> None:
    trial = faulty.before["nan"]
    assert trial.status == "completed"
    assert statistics(trial)["diverged"] == 1
    assert trial.objective.value == -min(json.loads(row)["return_mean"] for row in curve(trial).splitlines())


def test_a_killed_trial_is_broken_until_it_is_put_back(faulty: Faulty) -> None:
    before, after = faulty.before["kill:1"], faulty.after["kill:1"]
    assert before.status == "broken"
    assert faulty.put_back.returncode == 0
    assert f"{before.id}  broken    requeued\n1 of 1 " in faulty.put_back.stdout
    assert faulty.second.began == [1]
    assert (after.id, after.status) == (before.id, "completed")
    assert curve(after) == curve(faulty.before[""])
    # The others are as they were.
    for how in HOWS:
        assert how == "kill:1" or faulty.after[how].status == faulty.before[how].status


# --------------------------------------------------- what is done to one from outside

SLOW = {
    "env": {"id": "tests.envs:Sleeps-v0", "n_envs": 1, "kwargs": {}},
    "task": {"epochs": 10, "max_epochs": 10, "steps_per_epoch": 64},
}


@dataclass
class Life:
    """Hunts of one trial, one after another, by what ended each; and the curve that it should have."""

    ends: dict[str, Going]
    undisturbed: bytes

    @property
    def last(self) -> Going:
        return list(self.ends.values())[-1]


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> list[Life]:
    """Two trials, to which all of it happens."""
    with ThreadPoolExecutor() as pool:
        return [
            life.result()
            for life in [pool.submit(_stopped, tmp_path_factory), pool.submit(_lost, tmp_path_factory)]
        ]


def _stopped(factory: pytest.TempPathFactory) -> Life:
    """Refused, stopped by signals, orphaned."""
    place = factory.mktemp("stopped")
    hunt = Hunt(place / "hunt", merged(SPACE, SLOW))
    ends = {
        "environment missing": hunt.run("--set", "env.id=nosuchmodule:Env-v0"),
        "environment that fails": hunt.run("--set", "env.id=tests.envs:Fallible-v0"),
    }
    for name, signum, to_all in (
        ("SIGTERM to the trial", signal.SIGTERM, False),
        ("SIGINT to the group", signal.SIGINT, True),
    ):
        going = ends[name] = hunt.start()
        trial = going.wait_for_epochs(1)
        if to_all:
            os.killpg(going.process.pid, signum)
        else:
            os.kill(trial, signum)
        going.end()
    going = ends["SIGKILL to the hunt"] = hunt.start()
    orphan = going.wait_for_epochs(1)
    going.process.kill()
    going.end()
    # Held up, so that it is not done before its successor is there.
    os.kill(orphan, signal.SIGSTOP)
    try:
        after = ends["after it"] = hunt.take_over_the_lost()
        after.wait_for(lambda: "is in use by writer" in after.output)
    finally:
        os.kill(orphan, signal.SIGCONT)
    after.end()
    return Life(ends, undisturbed(ends["after it"].trial, place))


def _lost(factory: pytest.TempPathFactory) -> Life:
    """Lost with its machine; its worker stopped; stuck, and put back."""
    place = factory.mktemp("lost")
    hunt = Hunt(place / "hunt", merged(SPACE, SLOW))
    going = hunt.start()
    going.wait_for_epochs(1)
    os.killpg(going.process.pid, signal.SIGKILL)
    ends = {"all killed": going.end()}
    going = ends["SIGTERM to the hunt"] = hunt.take_over_the_lost()
    going.wait_for_epochs(1)
    going.process.terminate()
    going.end()
    ends["after it"] = hunt.run()
    return Life(ends, undisturbed(ends["after it"].trial, place))


def test_all_of_it_to_the_same_end(lives: list[Life]) -> None:
    for life in lives:
        assert life.last.code == 0, life.last.output
        assert life.last.status == "completed"
        assert len({going.trial.id for going in life.ends.values()}) == 1
        assert curve(life.last.trial) == life.undisturbed
        assert not list(Path(life.last.trial.working_dir).rglob(".ppo-hpo-*"))
        # Each process resumed from the last epoch that was saved before it.
        done = -1
        for name, going in life.ends.items():
            for began in going.began:
                assert began >= done, name
            finished = re.findall(r"\] epoch (\d+)/", going.output)
            done = int(finished[-1]) if finished else done


def test_a_configuration_that_is_illegal_is_refused_before_the_hunt_begins(tmp_path: Path) -> None:
    hunt = Hunt(tmp_path / "hunt", merged(SPACE, SLOW))
    going = hunt.start("--set", "ppo.n_steps=7")
    going.process.wait(PATIENCE)
    assert going.code == 1
    assert "space.yaml: Rollouts must fill an epoch: env.n_envs * ppo.n_steps = 1 * 7 = 7" in going.output
    assert not hunt.trials_at.exists()


def test_a_mistake_that_others_would_share_stops_the_hunt(lives: list[Life]) -> None:
    going = lives[0].ends["environment missing"]
    assert going.code == 130
    assert going.status == "interrupted"
    (sentence,) = going.sentences
    assert "'nosuchmodule'" in sentence
    assert "The hunt stops here (exit code 130)" in sentence
    assert f'File "{REPOSITORY / "ppo_hpo"}' not in going.output


def test_an_environment_that_fails_before_the_first_step_stops_the_hunt(lives: list[Life]) -> None:
    going = lives[0].ends["environment that fails"]
    assert (going.code, going.status) == (130, "interrupted")
    (sentence,) = going.sentences
    assert "TypeError: of its own" in sentence
    assert "failed again at the same step (first look at the environment" in sentence
    assert "The hunt stops here (exit code 130)" in sentence
    assert "in _fail" in going.output


@pytest.mark.parametrize("name", ["SIGTERM to the trial", "SIGINT to the group"])
def test_a_stopped_trial_is_interrupted_and_resumes(lives: list[Life], name: str) -> None:
    going = lives[0].ends[name]
    assert going.code == 130, going.output
    assert going.status == "interrupted"
    assert "Everything saved is whole" in going.output


def test_a_killed_hunt_leaves_an_orphan_that_its_successor_waits_for(lives: list[Life]) -> None:
    killed, after = lives[0].ends["SIGKILL to the hunt"], lives[0].ends["after it"]
    assert killed.code == -signal.SIGKILL
    assert killed.status == "reserved"
    # The orphan trained to the end. The successor trained nothing.
    assert re.findall(r"\] epoch (\d+)/", killed.output)[-1] == "10"
    assert "is in use by writer" in after.output
    assert "has done epoch 10 of e-v1 already: nothing to train" in after.output
    assert statistics(after.trial)["env_steps_here"] == 0


def test_a_trial_whose_machine_is_gone_is_handed_out_again(lives: list[Life]) -> None:
    killed, after = lives[1].ends["all killed"], lives[1].ends["SIGTERM to the hunt"]
    assert killed.status == "reserved"
    done = int(re.findall(r"\] epoch (\d+)/", killed.output)[-1])
    # The checkpoint comes before the line that tells of it.
    assert after.began[0] in (done, done + 1)


def test_a_hunt_that_is_stopped_alone_stops_its_trial(lives: list[Life]) -> None:
    stopped, after = lives[1].ends["SIGTERM to the hunt"], lives[1].ends["after it"]
    assert stopped.code == 130
    assert stopped.status == "interrupted"
    assert "the hunt stops as soon as its trials have saved their state" in stopped.output
    assert "stopped by SIGTERM. Everything saved is whole" in stopped.output
    assert "done: return" not in stopped.output
    assert "resumes, and trains" in after.output


def test_a_hunt_that_is_stopped_beyond_its_heartbeat_and_resumes(tmp_path: Path) -> None:
    hunt = Hunt(tmp_path / "hunt", merged(SPACE, SLOW))
    first = hunt.start()
    first.wait_for_epochs(1)
    os.killpg(first.process.pid, signal.SIGSTOP)
    second = hunt.take_over_the_lost()
    try:
        second.wait_for(lambda: "is in use by writer 1, process" in second.output)
    finally:
        os.killpg(first.process.pid, signal.SIGCONT)
    first.end()
    second.end()
    assert first.code == 0, first.output
    assert second.status == "completed"
    # One of them trained, and each epoch once.
    assert [row["epoch"] for row in first.rows()] == list(range(1, 11))
    assert len({row["pid"] for row in first.rows()}) == 1
    assert "has done epoch 10 of e-v1 already: nothing to train" in second.output
    assert curve(second.trial) == undisturbed(second.trial, tmp_path)
    # The second worker finds that its reservation is gone. Orion alone would end with a traceback.
    assert second.code == 0
    assert "was given to another worker, which reports its result" in second.output


# ------------------------------------------------------------------- its files


def test_a_directory_that_is_removed_is_begun_again(tmp_path: Path) -> None:
    hunt = Hunt(tmp_path / "hunt", merged(SPACE, SLOW, {"task": {"epochs": 3, "max_epochs": 3}}))
    going = hunt.start()
    going.wait_for_epochs(1)
    (directory,) = hunt.trials_at.glob("*/timing.jsonl")
    shutil.rmtree(directory.parent)
    going.end()
    assert going.code == 0, going.output
    assert going.status == "completed"
    assert going.began == [0, 0]
    assert curve(going.trial) == undisturbed(going.trial, tmp_path)


# A network whose checkpoint takes 105 kB: two of them fit beside the ballast, and a third does not.
FULL = """
mount -t tmpfs -o size=600k none "$1" || exit 99
head -c 300000 /dev/zero > "$1/ballast"
shift
"$@" > full.txt 2>&1; echo $? > full-code.txt
cp -a trials left
rm trials/ballast
"$@" > after.txt 2>&1; echo $? > after-code.txt
cp -a trials kept
"""


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a small disk, which is root's")
def test_a_full_disk_stops_the_hunt(tmp_path: Path) -> None:
    hunt = Hunt(tmp_path / "hunt", merged(SPACE, {"model": {"width": 64, "depth": 2}}))
    hunt.trials_at.mkdir()
    subprocess.run(
        ["unshare", "-m", "sh", "-c", FULL, "sh", str(hunt.trials_at), *hunt.command()],
        cwd=hunt.directory, env=own_environment(), check=True, timeout=PATIENCE,
    )  # fmt: skip
    full = (hunt.directory / "full.txt").read_text()
    # Written again twice, and then left interrupted: a full disk would break all trials.
    assert (hunt.directory / "full-code.txt").read_text() == "130\n", full
    assert re.findall(r"No space left on device\. .*: tries again in (\d) s", full) == ["1", "2"]
    assert "resumes from the last checkpoint" not in full
    (sentence,) = (line for line in full.splitlines() if line.startswith("ppo-hpo: error: "))
    assert "cannot be written: No space left on device. What was saved before is whole" in sentence
    assert "The hunt stops here (exit code 130)" in sentence
    (left,) = hunt.directory.glob("left/*/lock")
    saved = Storage(left.parent).load(on_refused=lambda error: pytest.fail(str(error)))
    assert saved is not None
    after = (hunt.directory / "after.txt").read_text()
    assert (hunt.directory / "after-code.txt").read_text() == "0\n", after
    assert [int(epoch) for epoch in _BEGAN.findall(after)] == [saved.epoch]
    (trial,) = hunt.trials()
    assert trial.status == "completed"
    kept = hunt.directory / "kept" / Path(trial.working_dir).name
    shutil.copytree(kept, trial.working_dir)
    assert (kept / "curve.jsonl").read_bytes() == undisturbed(trial, tmp_path)


FULL_FOR_A_WHILE = """
mount -t tmpfs -o size=600k none "$1" || exit 99
head -c 300000 /dev/zero > "$1/ballast"
shift
"$@" > full.txt 2>&1 &
until grep -q "tries again in 1 s" full.txt; do sleep 0.05; kill -0 $! || exit 98; done
rm trials/ballast
wait $! || exit 97
cp -a trials kept
"""


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a small disk, which is root's")
def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path: Path) -> None:
    hunt = Hunt(tmp_path / "hunt", merged(SPACE, {"model": {"width": 64, "depth": 2}}))
    hunt.trials_at.mkdir()
    command = hunt.command("--retries", "4")
    subprocess.run(
        ["unshare", "-m", "sh", "-c", FULL_FOR_A_WHILE, "sh", str(hunt.trials_at), *command],
        cwd=hunt.directory, env=own_environment(), check=True, timeout=PATIENCE,
    )  # fmt: skip
    assert "No space left on device" in (hunt.directory / "full.txt").read_text()
    (trial,) = hunt.trials()
    assert trial.status == "completed"
    # Written again, and not computed again.
    assert statistics(trial)["retries"] == 0
    assert statistics(trial)["env_steps_here"] == statistics(trial)["env_steps"] == 768
    kept = hunt.directory / "kept" / Path(trial.working_dir).name
    shutil.copytree(kept, trial.working_dir)
    assert (kept / "curve.jsonl").read_bytes() == undisturbed(trial, tmp_path)


def test_a_directory_that_becomes_unwritable_stops_the_hunt(tmp_path: Path) -> None:
    hunt = Hunt(tmp_path / "hunt", merged(SPACE, SLOW, {"task": {"epochs": 4, "max_epochs": 4}}))
    # Root writes everywhere, unless it gives up the right to.
    drop = "-dac_override,-dac_read_search"
    prefix = ["setpriv", f"--inh-caps={drop}", f"--bounding-set={drop}"] if os.geteuid() == 0 else []
    if prefix and not shutil.which("setpriv"):
        pytest.skip("root writes everywhere")
    going = hunt.start(prefix=prefix)
    going.wait_for_epochs(1)
    (timing,) = hunt.trials_at.glob("*/timing.jsonl")
    timing.parent.chmod(0o555)
    try:
        going.end()
    finally:
        timing.parent.chmod(0o755)
    assert going.code == 130, going.output
    assert going.status == "interrupted"
    (sentence,) = going.sentences
    assert "cannot be written: Permission denied" in sentence
    after = hunt.run()
    assert (after.code, after.status) == (0, "completed")
    assert after.began[0] in (1, 2)
    assert curve(after.trial) == undisturbed(after.trial, tmp_path)


TORN: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
}


@pytest.mark.parametrize("how", TORN)
def test_a_torn_checkpoint_costs_one_epoch(how: str, tmp_path: Path) -> None:
    (tmp_path / "trial.yaml").write_text(yamlio.dump(merged(SPACE, {"optimizer": {"lr": 1e-3}})))
    command = [BIN / "ppo-hpo", "run", "--config", "trial.yaml", "--dir", "trial"]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options], cwd=tmp_path, env=own_environment(), capture_output=True, text=True,
            timeout=PATIENCE,
        )  # fmt: skip

    assert run("--epochs", "2").returncode == 0
    newest, _ = Storage(tmp_path / "trial").paths()
    newest.write_bytes(TORN[how](newest.read_bytes()))
    done = run()
    assert done.returncode == 0, done.stderr
    assert "refused: " in done.stderr
    assert _BEGAN.findall(done.stderr) == ["1"]
    through = subprocess.run(
        [*command[:-1], "through"], cwd=tmp_path, env=own_environment(), capture_output=True, timeout=PATIENCE
    )
    assert through.returncode == 0
    files = [tmp_path / name / "curve.jsonl" for name in ("trial", "through")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # With none left that can be used it is refused, and not begun again over what may be somebody's.
    for path in Storage(tmp_path / "trial").paths():
        path.write_bytes(TORN[how](path.read_bytes()))
    refused = run()
    assert refused.returncode == 2
    assert "ppo-hpo: error: " in refused.stderr


# ------------------------------------------------------------------------ retry


def test_what_is_being_trained_is_not_put_back(tmp_path: Path) -> None:
    hunt = Hunt(tmp_path / "hunt", merged(SPACE, SLOW, {"task": {"epochs": 4, "max_epochs": 4}}))
    going = hunt.start()
    orphan = going.wait_for_epochs(1)
    os.kill(orphan, signal.SIGSTOP)
    try:
        (trial,) = hunt.trials()
        alone = hunt.retry()
        named = hunt.retry("--trial", trial.id)
        assert hunt.trials()[0].status == "reserved"
        # Its worker is gone, and then the trial as well: nobody holds its lock, but the heartbeat is young.
        going.process.kill()
    finally:
        os.kill(orphan, signal.SIGKILL)
    going.end()
    assert alone.returncode == 0
    assert (
        f"{trial.id}  reserved  skipped: it is being trained by writer 1, process {orphan} on "
        in alone.stdout
    )
    assert "0 of 1 broken or reserved trial requeued" in alone.stdout
    assert named.returncode == 2
    assert named.stderr.splitlines()[-1].startswith(f"ppo-hpo: error: Trial {trial.id} is being trained by ")
    seen = hunt.retry()
    assert "its worker was seen " in seen.stdout
    assert "0 of 1 broken or reserved trial requeued" in seen.stdout
    # Its heart stood still for two minutes.
    hunt.set("trials", {"heartbeat": utcnow() - datetime.timedelta(seconds=121)})
    put_back = hunt.retry("--status", "reserved")
    assert f"{trial.id}  reserved  requeued" in put_back.stdout
    after = hunt.run()
    assert (after.code, after.status, after.trial.id) == (0, "completed", trial.id)
    assert after.began[0] in (1, 2)
    for arguments, part in (
        (
            ["--trial", trial.id],
            f"Trial {trial.id} is completed, but only broken or reserved trials can be requeued",
        ),
        (["--trial", "zzz"], "no trial whose id begins with 'zzz'"),
    ):
        refused = hunt.retry(*arguments)
        assert refused.returncode == 2
        assert part in refused.stderr.splitlines()[-1]


def test_what_a_killed_worker_left_for_the_algorithm_is_mended(tmp_path: Path) -> None:
    # Killed while it held the lock, and after it had stored a result that the algorithm never heard of.
    hunt = Hunt(
        tmp_path / "hunt",
        merged(SPACE, {"task": {"epochs": "orion~fidelity(1, 2, base=2)", "max_epochs": 2}}),
        {"hyperband": {"seed": 1, "repetitions": 1}}, max_trials=2,
    )  # fmt: skip
    first = hunt.run()
    assert first.code == 0, first.output
    since = utcnow().replace(microsecond=0)
    hunt.set("algo", {"locked": 1, "heartbeat": since, "state": None})
    young = hunt.retry()
    assert "The algorithm has been locked since " in young.stdout
    assert "skipped; if it stays locked, try again in " in young.stdout
    assert hunt.get("algo")["locked"] == 1
    hunt.set("algo", {"heartbeat": since - datetime.timedelta(seconds=121)})
    old = hunt.retry()
    assert "longer than any worker needs it: released" in old.stdout
    assert old.stdout.count("the algorithm did not know its result: repaired") == len(hunt.trials())
    assert hunt.get("algo")["locked"] == 0
    assert "repaired" not in hunt.retry().stdout


# ------------------------------------------------------------- signals and clocks

EARLY = """
import os, sys


class Signals:
    def find_spec(self, name, path=None, target=None):
        if name == "{name}":
            os.kill(os.getpid(), {signum})


sys.meta_path.insert(0, Signals())
sys.modules.pop("{name}", None)
from ppo_hpo.__main__ import main
sys.argv = ["ppo-hpo", "run", "--config", "trial.yaml"]
main()
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", ["ppo_hpo.cli.main", "ppo_hpo.spec.config", "ppo_hpo.trial.runner"])
def test_a_signal_before_the_trial_began_is_an_interruption(
    signum: signal.Signals, name: str, tmp_path: Path
) -> None:
    (tmp_path / "trial.yaml").write_text(yamlio.dump(merged(SPACE, {"optimizer": {"lr": 1e-3}})))
    done = subprocess.run(
        [sys.executable, "-c", EARLY.format(name=name, signum=int(signum))], cwd=tmp_path,
        env=own_environment(ORION_INTERRUPT_CODE="37"), capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 37, done.stderr
    assert done.stderr.startswith("ppo-hpo: stopped ")
    assert "Traceback" not in done.stderr


# Back and forth by days at each look, as a clock that somebody sets.
JUMPING = """
import sys, time
real, looks = time.time, iter(range(10**9))
time.time = lambda: real() + 86400.0 * (next(looks) % 5 - 2)
from ppo_hpo.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "trial.yaml").write_text(yamlio.dump(merged(SPACE, {"optimizer": {"lr": 1e-3}})))
    for name, code in (("jumped", JUMPING), ("through", JUMPING.replace("86400.0", "0.0"))):
        done = subprocess.run(
            [sys.executable, "-c", code, "run", "--config", "trial.yaml", "--dir", name],
            cwd=tmp_path, env=own_environment(), capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "jumped/curve.jsonl").read_bytes() == (tmp_path / "through/curve.jsonl").read_bytes()

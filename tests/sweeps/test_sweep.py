"""Whole sweeps: `ppo_hpo.sweep`, `ppo-hpo sweep` and `orion hunt` on the same trials, with every executor."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import importlib.util
import io
import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ppo_hpo
from ppo_hpo import UserError
from ppo_hpo.orion.experiment import params_of, statistics_of
from ppo_hpo.spec import yamlio
from ppo_hpo.state.curve import read_curve
from ppo_hpo.sweeps.executors import make
from ppo_hpo.sweeps.progress import SweepProgress, duration
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE = 300
STEPS = 256
SPACE: dict[str, Any] = {
    "env": {"id": "CartPole-v1", "n_envs": 4},
    "task": {
        "epochs": "orion~fidelity(1, 4, base=2)", "max_epochs": 4,
        "steps_per_epoch": STEPS, "eval_episodes": 1,
    },
    "model": {"width": "orion~choices([4, 8])", "depth": 1},
    "optimizer": {"lr": "orion~loguniform(1e-4, 1e-2, precision=4)"},
    "ppo": {"n_steps": 32, "n_epochs": 1, "n_minibatches": "orion~choices([1, 2])"},
}  # fmt: skip
ASHA = {"asha": {"seed": 1, "num_rungs": 3, "num_brackets": 1}}


def write_space(folder: Path, **groups: dict[str, Any]) -> str:
    content = {group: {**values, **groups.get(group, {})} for group, values in SPACE.items()}
    path = folder / "space.yaml"
    path.write_text(yamlio.dump(content))
    return str(path)


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return write_space(tmp_path)


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ORION_")}
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}


def run(*command: str, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, env=environment(), cwd=cwd, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def what_was_found(result: ppo_hpo.SweepResult) -> dict[str, float]:
    """Hyperparameters to objective, of all that is completed."""
    return {
        json.dumps(params_of(trial), sort_keys=True): trial.objective.value
        for trial in result.client.fetch_trials_by_status("completed")
    }


def assert_each_once(result: ppo_hpo.SweepResult, count: int) -> None:
    frame = result.trials
    assert list(frame["status"]) == ["completed"] * count
    assert frame["id"].is_unique
    assert len(what_was_found(result)) == count
    for trial in result.client.fetch_trials():
        assert statistics_of(trial)["epochs"] == params_of(trial)["task.epochs"]
        assert (Path(trial.working_dir) / "results.json").is_file()
    database = result.client.storage._db
    assert [record["locked"] for record in database.read("algo", {"experiment": result.client.id})] == [0]


def test_what_kind_of_database_a_file_is(tmp_path: Path) -> None:
    """By its content; a new one by its name."""
    from orion.core.io.database.pickleddb import PickledDB

    from ppo_hpo.orion.sqlitedb import SQLiteDB
    from ppo_hpo.sweeps.plan import storage_of

    def kind(name: str | None) -> tuple[str, str]:
        database = storage_of(None if name is None else str(tmp_path / name), tmp_path)["database"]
        return database["type"], Path(database["host"]).name

    assert kind(None) == ("sqlitedb", "orion.sqlite")
    assert kind("new.sqlite") == ("sqlitedb", "new.sqlite")
    assert kind("new.pkl") == ("pickleddb", "new.pkl")
    PickledDB(host=str(tmp_path / "old.sqlite")).write("trials", {"a": 1})
    SQLiteDB(host=str(tmp_path / "old.pkl")).write("trials", {"a": 1})
    assert kind("old.sqlite") == ("pickleddb", "old.sqlite")
    assert kind("old.pkl") == ("sqlitedb", "old.pkl")
    for url, expected in (("sqlite", "sqlitedb"), ("sqlitedb", "sqlitedb"), ("pickleddb", "pickleddb")):
        database = storage_of(f"{url}://{tmp_path}/new", tmp_path)["database"]
        assert database == {"type": expected, "host": f"{tmp_path}/new"}


def test_looking_at_a_database_keeps_the_locks_of_this_process(tmp_path: Path) -> None:
    """The kernel drops them when a process closes the file, however it had opened it."""
    from ppo_hpo.orion.sqlitedb import SQLiteDB
    from ppo_hpo.sweeps.plan import storage_of

    file = tmp_path / "orion.sqlite"
    database = SQLiteDB(host=str(file))
    database.initiate_connection()
    code = (
        "import sqlite3, sys\ndb = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)\n"
        "try: db.execute('BEGIN IMMEDIATE')\nexcept sqlite3.OperationalError as error: print(error)"
    )
    with database._transaction():
        assert storage_of(str(file), tmp_path)["database"]["type"] == "sqlitedb"
        assert run(sys.executable, "-c", code, str(file)).stdout == "database is locked\n"


@pytest.mark.parametrize(
    "content", [b"nothing of the kind", b"SQLite format 3\0 and no more", b"\x80\x04\x95", None]
)
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "orion.sqlite"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"^The database {re.escape(str(file))} \(\w+\) cannot be used: .*[^.]\.$"
    ):
        ppo_hpo.sweep("CartPole-v1", storage=str(file), directory=tmp_path / "sweep", progress=False)
    if content is not None:
        assert file.read_bytes() == content


def test_a_password_is_not_printed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be used") as caught:
        ppo_hpo.sweep(
            "CartPole-v1", storage="mongodb://me:secret@localhost:1/x", directory=tmp_path, progress=False
        )
    assert "secret" not in str(caught.value)


def test_python_then_hunt_then_python(tmp_path: Path, space: str) -> None:
    """The same as one sweep that nothing interrupted, trial for trial and to the bit."""
    first = ppo_hpo.sweep(space=space, algorithm=ASHA, name="mine", max_trials=3, n_workers=1, progress=False)
    assert_each_once(first, 3)
    assert (tmp_path / "mine" / "orion.sqlite").read_bytes().startswith(b"SQLite format 3")
    assert re.search(r"orion hunt -n mine -c mine/orion\.yaml", str(first))
    # It is done, so that the same call would do nothing.
    lines = str(first).splitlines()
    assert lines[-3].startswith("more trials ")
    assert lines[-3].endswith("ppo-hpo sweep --name mine --max-trials N")
    assert lines[-2].endswith("orion hunt -n mine -c mine/orion.yaml --exp-max-trials N")
    assert lines[-1].startswith("report      ")
    assert first.commands[0].endswith("ppo-hpo sweep --name mine")
    hunt = next(command for command in first.commands if "orion hunt" in command)
    run("sh", "-c", f"{hunt} --exp-max-trials 5")
    # Nothing but the name is needed to go on.
    second = ppo_hpo.sweep(name="mine", max_trials=8, n_workers=1, progress=False)
    assert_each_once(second, 8)
    assert set(first.trials["id"]) <= set(second.trials["id"])
    through = ppo_hpo.sweep(
        space=space, algorithm=ASHA, name="through", max_trials=8, progress=False, executor="single"
    )
    assert what_was_found(second) == what_was_found(through)
    assert second.best_params == through.best_params
    assert second.best.objective.value == second.trials["objective"].min()
    # Promotions went on, whoever had trained their lower rung: nothing was trained twice.
    trials = second.client.fetch_trials()
    promoted = [trial for trial in trials if trial.parent]
    assert promoted
    for trial in promoted:
        parent = second.client.get_trial(uid=trial.parent)
        assert statistics_of(trial)["continued_from_epoch"] == params_of(parent)["task.epochs"]
    # What it cost, by the curves and by hand.
    trained = (
        sum(params_of(t)["task.epochs"] - statistics_of(t)["continued_from_epoch"] for t in trials) * STEPS
    )
    evaluated = sum(
        row["eval_steps"]
        for trial in trials
        for row in read_curve(Path(trial.working_dir))
        if row["epoch"] > statistics_of(trial)["continued_from_epoch"] or not trial.parent
    )
    assert second.cost.env_steps == trained + evaluated
    assert second.cost.eval_steps == evaluated
    assert second.cost.saved_steps == sum(statistics_of(t)["continued_from_epoch"] for t in promoted) * STEPS
    assert second.cost.cpu_seconds > 0
    assert second.cost.wall_seconds == pytest.approx(second.trials["wall_seconds"].sum())
    # Nothing is left to do: the same call reads what is there.
    again = ppo_hpo.sweep(name="mine", progress=False)
    assert list(again.trials["id"]) == list(second.trials["id"])


def sweep_by(executor: Any, name: str = "it", count: int = 20) -> ppo_hpo.SweepResult:
    return ppo_hpo.sweep(
        space="space.yaml", algorithm={"random": {"seed": 1}}, name=name, max_trials=count, n_workers=2,
        executor=executor, progress=False,
    )  # fmt: skip


def processes_of(result: ppo_hpo.SweepResult) -> set[int]:
    rows = [
        json.loads(line)
        for trial in result.client.fetch_trials()
        for line in (Path(trial.working_dir) / "timing.jsonl").read_text().splitlines()
    ]
    return {row["pid"] for row in rows}


@pytest.mark.parametrize("executor", [None, "single", {"poolexecutor": {"backend": "threading"}}],
                         ids=["workers", "single", "threading"])  # fmt: skip
def test_twenty_trials(space: str, executor: Any) -> None:
    result = sweep_by(executor)
    assert_each_once(result, 20)
    here = {os.getpid()}
    assert here.isdisjoint(processes_of(result)) if executor is None else processes_of(result) == here


# In a process of its own, because pools fork what this one has.
POOLS = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.sweeps.test_sweep import sweep_by
for name in sys.argv[3:]:
    sweep_by(name, name, int(sys.argv[2]))
"""


def test_twenty_trials_in_orions_pools(space: str) -> None:
    run(sys.executable, "-c", POOLS, str(REPOSITORY), "20", "joblib", "poolexecutor")
    for name in ("joblib", "poolexecutor"):
        result = ppo_hpo.sweep(name=name, progress=False)
        assert_each_once(result, 20)
        assert os.getpid() not in processes_of(result)


@contextlib.contextmanager
def dask_cluster(folder: Path) -> Iterator[str]:
    """A scheduler and two workers, each a process of its own, over TCP."""
    own = {**environment(), "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}
    started: list[subprocess.Popen[bytes]] = []

    def start(what: str, *options: str) -> None:
        code = f"from distributed.cli.dask_{what} import main; main()"
        command = [sys.executable, "-c", code, *options]
        with open(folder / f"{what}-{len(started)}.log", "wb") as log:
            started.append(subprocess.Popen(command, cwd=folder, env=own, stdout=log, stderr=log))

    try:
        where = folder / "scheduler.json"
        start(
            "scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--no-dashboard",
            "--scheduler-file",
            str(where),
        )
        address = wait_for(lambda: where.is_file() and json.loads(where.read_text())["address"], PATIENCE)
        for _ in range(2):
            start("worker", address, "--nthreads", "1", "--no-dashboard")
        yield address
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(PATIENCE)


def test_twenty_trials_on_a_cluster_of_dasks(tmp_path: Path, space: str) -> None:
    pytest.importorskip("distributed", reason="pip install 'ppo-hpo[dask]'")
    with dask_cluster(tmp_path) as address:
        assert address.startswith("tcp://127.0.0.1:")
        result = sweep_by(address)
    assert_each_once(result, 20)
    assert len(processes_of(result)) == 2


def test_a_slow_fetch_from_dask_does_not_break_later_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As https://github.com/dask/distributed/issues/8514, which load brings about."""
    pytest.importorskip("distributed", reason="pip install 'ppo-hpo[dask]'")
    settings = {"processes": False, "dashboard_address": ":0"}
    with make({"dask": settings}, 1) as executor:
        fetch = executor.client._gather_remote

        async def fetch_slowly(*args: Any) -> Any:
            await asyncio.sleep(0.5)
            return await fetch(*args)

        monkeypatch.setattr(executor.client, "_gather_remote", fetch_slowly)
        for number in range(2):
            futures, results = [executor.submit(abs, -number)], []
            while futures:
                results += executor.async_get(futures, timeout=0.2)
            assert [getattr(result, "value", result) for result in results] == [number]


def test_twenty_trials_on_a_cluster_of_rays(space: str) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'ppo-hpo[ray]'")
    result = sweep_by("ray")
    assert_each_once(result, 20)


def test_two_that_begin_at_once_share_the_trials(space: str) -> None:
    command = ["ppo-hpo", "sweep", space, "--name", "shared", "--max-trials", "8", "--executor", "single",
               "--algorithm", "random", "--quiet"]  # fmt: skip
    both = [
        subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=PATIENCE)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    result = ppo_hpo.sweep(name="shared", progress=False)
    assert 8 <= len(result.trials) <= 9
    assert_each_once(result, len(result.trials))


def test_a_worker_that_is_killed_loses_nothing(tmp_path: Path, space: str) -> None:
    kwargs = {"how": "kill:1", "at": 600, "notes": str(tmp_path / "notes")}
    env = {"id": "tests.envs:Fails-v0", "n_envs": 2, "kwargs": kwargs}
    result = ppo_hpo.sweep(
        space=write_space(tmp_path, env=env), algorithm={"random": {"seed": 1}}, name="killed", max_trials=2,
        progress=False,
    )  # fmt: skip
    assert (tmp_path / "notes-kill:1").read_bytes() == b"x"
    assert_each_once(result, 2)
    # It was killed in some epoch, and went on from the one before.
    assert sum(values["continued"] for values in map(statistics_of, result.client.fetch_trials())) == 1
    assert result.cost.saved_steps == 0


def test_a_pool_whose_worker_dies_does_not_wait_for_ever(tmp_path: Path, space: str) -> None:
    kwargs = {"how": "kill:1", "at": 600, "notes": str(tmp_path / "notes")}
    write_space(tmp_path, env={"id": "tests.envs:Fails-v0", "n_envs": 2, "kwargs": kwargs})
    done = run(sys.executable, "-c", POOLS, str(REPOSITORY), "2", "poolexecutor", code=1)
    assert "A worker process of Orion's pool died" in done.stderr
    assert_each_once(sweep_by("single", "poolexecutor", 2), 2)


@pytest.mark.parametrize("executor", ["workers", "single", "{poolexecutor: {backend: threading}}"])
def test_ctrl_c(tmp_path: Path, space: str, executor: str) -> None:
    """One sentence, code 130, the trial interrupted; the same command goes on with it."""
    write_space(tmp_path, task={"steps_per_epoch": 40960})
    command = [
        "ppo-hpo", "sweep", "space.yaml", "--name", "stopped", "--max-trials", "1", "--algorithm", "random",
        "--executor", executor, "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        (curve,) = wait_for(lambda: list(tmp_path.glob("stopped/trials/*/curve.jsonl")), PATIENCE)
        wait_for(lambda: len(curve.read_text().splitlines()) >= 2, PATIENCE)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == (
        "ppo-hpo: 1 trial of the sweep 'stopped' was interrupted by SIGINT. Rerun the command to resume it "
        "(exit code 130)"
    )
    if executor == "workers":
        assert "best trial" in run(*command).stdout
    result = ppo_hpo.sweep(name="stopped", progress=False, executor="single")
    assert_each_once(result, 1)
    assert statistics_of(result.best)["continued_from_epoch"] >= 1


def test_the_command_tells_how_far_it_is(tmp_path: Path, space: str) -> None:
    done = run("ppo-hpo", "sweep", space, "--name", "told", "--max-trials", "2", "--algorithm",
               "{random: {seed: 3}}", "--executor", "single", "--set", "optimizer.lr=1e-3",
               "--epochs", "1")  # fmt: skip
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    for number, line in enumerate(lines, 1):
        assert re.fullmatch(
            rf" +\d+ s  trial +{number}  [0-9a-f]{{8}}  epoch 0 -> 1  return +[\d.]+  best +[\d.]+", line
        ), line
    assert "\033" not in done.stderr
    assert "2 completed" in done.stdout
    assert yamlio.load(Path("told/space.yaml"))["optimizer"]["lr"] == 1e-3
    assert "optimizer.lr" not in ppo_hpo.sweep(name="told", progress=False).trials.columns


def test_an_environment_that_is_a_module_here(tmp_path: Path, space: str) -> None:
    """A console script and its workers find it, too."""
    (tmp_path / "mine.py").write_text(
        'import gymnasium\ngymnasium.register("Mine-v0", "gymnasium.envs.classic_control:CartPoleEnv", '
        "max_episode_steps=30)\n"
    )
    run("ppo-hpo", "sweep", "--env", "mine:Mine-v0", space, "--max-trials", "1", "--epochs", "1", "--name",
        "mine", "--n-jobs", "1")  # fmt: skip
    assert yamlio.load(Path("mine/space.yaml"))["env"]["id"] == "mine:Mine-v0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "tpe"}, "uses random, but tpe was asked for"),
        ({"algorithm": {"random": {"seed": 2}}}, "uses random with seed = 5, but random with seed = 2 was"),
        ({"env": "Acrobot-v1"}, "`env.id` is CartPole-v1, but Acrobot-v1 was asked for"),
        ({"space": "classic-control"}, "has another space"),
        ({"overrides": {"optimizer": {"lr": 1e-3}}}, "`optimizer.lr` is orion~loguniform"),
        ({"epochs": 2}, "`task.epochs` is orion~fidelity"),
    ],
    ids=["algorithm", "seed", "environment", "space", "override", "epochs"],
)
def test_another_sweep_under_the_same_name_is_refused(
    options: dict[str, Any], message: str, begun: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        ppo_hpo.sweep(name="begun", progress=False, **options)
    # What was refused has changed nothing.
    assert len(ppo_hpo.sweep(name="begun", progress=False, algorithm="random", env="CartPole-v1").trials) == 1


def test_a_space_that_was_edited_is_not_written_over(begun: Path) -> None:
    path = begun / "begun" / "space.yaml"
    before = path.read_text()
    path.write_text(before.replace("eval_episodes: 1", "eval_episodes: 2"))
    try:
        with pytest.raises(UserError, match=r"was changed after the sweep began: `task\.eval_ep"):
            ppo_hpo.sweep(name="begun", progress=False)
        with pytest.raises(UserError, match="has a sweep of another space"):
            ppo_hpo.sweep("Acrobot-v1", name="other", directory="begun", progress=False)
    finally:
        path.write_text(before)
    ppo_hpo.sweep(name="begun", progress=False)


def test_the_name_is_the_functions_whatever_was_imported_first() -> None:
    code = "import ppo_hpo; ppo_hpo.SweepResult; import ppo_hpo.sweeps.run; assert callable(ppo_hpo.sweep)"
    run(sys.executable, "-c", code)


@pytest.fixture(scope="module")
def begun_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    ppo_hpo.sweep(
        space=write_space(folder), algorithm={"random": {"seed": 5}}, name="begun", max_trials=1,
        directory=folder / "begun", executor="single", progress=False,
    )  # fmt: skip
    return folder


@pytest.fixture
def begun(begun_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(begun_once)
    return begun_once


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "A sweep needs an environment, a space or a name"),
        ({"env": "CartPole-v1", "max_trials": 0}, "must be a whole number of at least 1, but got 0"),
        ({"env": "CartPole-v1", "n_workers": 1.5}, "`n_workers` must be a whole number"),
        ({"env": "CartPole-v1", "space": "nothing"}, "No space is called 'nothing'"),
        ({"env": "CartPole-v1", "algorithm": "nothing"}, "Orion has no such algorithm"),
        ({"env": "CartPole-v1", "algorithm": ["asha"]}, "An algorithm is a name or {name: options}"),
        ({"env": "CartPole-v1", "executor": "nothing"}, "An executor must be workers, single"),
        ({"env": "CartPole-v1", "executor": "http://here"}, "A cluster's address begins with tcp://"),
        ({"env": "CartPole-v1", "executor": {"workers": {"colour": 1}}}, "cannot be started with"),
        ({"env": "CartPole-v1", "storage": "nothing://here"}, "Orion has no such storage"),
        ({"env": "CartPole-v1", "name": "../up"}, "A sweep's name has letters"),
        ({"env": "CartPole-v1", "overrides": {"ppo": {"gama": 1}}}, "Did you mean"),
        ({"space": "cartpole"}, "Nothing is searched in this space"),
        ({"env": "CartPole-v1", "warm_start": "classic-control"}, "is a search space"),
        ({"env": "CartPole-v1", "space": "classic-control", "warm_start": {"optimizer": {"lr": 0.5}}},
         "A warm start must be inside the space, but optimizer.lr = 0.5 is not in"),
    ],
)  # fmt: skip
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        ppo_hpo.sweep(progress=False, **options)
    assert not list(tmp_path.iterdir())


def test_a_mistake_that_all_trials_share_is_one_sentence(space: str) -> None:
    done = run("ppo-hpo", "sweep", "nosuchmodule:Env-v0", "--space", space, "--name", "bad", code=2)
    assert done.stderr.startswith("ppo-hpo: error: `env.id: nosuchmodule:Env-v0` needs the module")
    assert len(done.stderr.splitlines()) == 1
    statuses = list(ppo_hpo.orion.experiment.open_experiment("bad", "bad/orion.yaml").fetch_trials())
    assert {trial.status for trial in statuses} <= {"interrupted", "new"}


def test_trials_that_fail_each_time_end_it(tmp_path: Path, space: str) -> None:
    # The first one finishes epochs, so that its mistake may be its own; those after it fail at once.
    kwargs = {"how": "word", "at": 600, "notes": str(tmp_path / "notes")}
    write_space(tmp_path, env={"id": "tests.envs:Fails-v0", "n_envs": 2, "kwargs": kwargs})
    options = ("--name", "bad", "--algorithm", "random", "--executor", "single")
    done = run("ppo-hpo", "sweep", "space.yaml", *options, code=2)
    assert done.stderr.count("broken: ") == 3
    assert done.stderr.splitlines()[-1].startswith(
        "ppo-hpo: error: Too many trials failed (3 are broken). trial "
    )
    assert "`ppo-hpo retry bad -c bad/orion.yaml`" in done.stderr


def test_why_no_trial_is_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sweep says when nothing runs and nothing is proposed must be true each time."""
    from orion.client import build_experiment
    from orion.core.utils.exceptions import WaitingForTrials

    from ppo_hpo.inspect import retry
    from ppo_hpo.orion.algorithm_lock import utc_now
    from ppo_hpo.sweeps.run import _raise_if_exhausted

    monkeypatch.setattr(retry, "_LOCK_SECONDS", 0.1)

    def client(name: str, x: str) -> Any:
        return build_experiment(
            name, space={"x": x, "task": {"epochs": "fidelity(1, 4, base=2)"}}, algorithm=ASHA, max_trials=99,
            storage={"type": "legacy", "database": {"type": "sqlitedb", "host": str(tmp_path / "db")}},
            working_dir=str(tmp_path / name),
        )  # fmt: skip

    def reason(client: Any) -> str:
        with pytest.raises(UserError, match="has no trial to propose, and none is running") as caught:
            _raise_if_exhausted(client, tmp_path, retry.Waiting(None))
        return str(caught.value).partition("running. ")[2]

    small, large = client("small", "choices([1, 2, 3, 4, 5])"), client("large", "uniform(0, 1)")
    with contextlib.suppress(WaitingForTrials):
        while True:
            trial = small.suggest()
            small.observe(trial, trial.params["x"])
    assert reason(small) == "All configurations of its space were tried."
    for _ in range(2):
        large.observe(large.suggest(), 1.0)
    assert reason(large).startswith("asha ends here. For further trials, start a sweep with another name")
    large.release(large.suggest(), status="broken")
    assert reason(large).startswith("It may wait for its 1 broken trials: requeue them with `ppo-hpo retry ")
    # A lock that is young, or whose holder runs, is waited for. Of others the user decides.
    lock = {"locked": 1, "heartbeat": utc_now(), "holder": None}
    large.storage._db.write("algo", lock, {"experiment": large.id})
    _raise_if_exhausted(large, tmp_path, retry.Waiting(None))
    lock["heartbeat"] -= datetime.timedelta(seconds=300)
    large.storage._db.write("algo", lock, {"experiment": large.id})
    assert "If it has ended, `ppo-hpo retry large` releases the lock." in reason(large)


def test_warm_start(space: str) -> None:
    known = {"model": {"width": 8, "depth": 1}, "optimizer": {"lr": 2e-3}, "env": {"n_envs": 4},
             "ppo": {"n_steps": 32, "batch_size": 64}, "task": {"steps_per_epoch": STEPS}}  # fmt: skip
    other = {**known, "optimizer": {"lr": 3e-3}}
    result = ppo_hpo.sweep(
        space=space, algorithm=ASHA, name="warm", max_trials=8, warm_start=[known, other], executor="single",
        progress=False,
    )  # fmt: skip
    assert_each_once(result, 8)
    first, second = (params_of(trial) for trial in sorted(result.client.fetch_trials(), key=began)[:2])
    assert first == {"model.width": 8, "optimizer.lr": 2e-3, "ppo.n_minibatches": 2, "task.epochs": 1}
    assert second == {**first, "optimizer.lr": 3e-3}


def began(trial: Any) -> Any:
    return trial.start_time


def test_progress_on_a_terminal_and_elsewhere() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        progress = SweepProgress(4, 1, 12.5, 16, stream)
        progress._shown = -math.inf
        progress.tick()
        progress.close()
    assert terminal.getvalue().startswith("\r\033[K1/4 trials  best 12.5  0 steps/s  0 running")
    assert pipe.getvalue().endswith(" s  1/4 trials  best 12.5  0 steps/s  0 running\n")
    assert "\033" not in pipe.getvalue()


def test_progress_of_running_trials(tmp_path: Path) -> None:
    class Trial:
        id = "abcdef0123456789"
        working_dir = str(tmp_path)
        params: dict[str, Any] = {"task": {"epochs": 4}}  # noqa: RUF012

    rows = [{"epoch": epoch, "env_steps": epoch * 100} for epoch in range(4)]
    curve = tmp_path / "curve.jsonl"

    def have(epochs: int) -> None:
        curve.write_text("".join(json.dumps(row) + "\n" for row in rows[: epochs + 1]))

    progress = SweepProgress(2, 0, None, 16)
    # It goes on from epoch 1: those 100 steps are of somebody else.
    have(1)
    progress.started(Trial)
    progress._display._began -= 100
    have(3)
    assert progress.text() == "0/2 trials  2 steps/s  1 running: abcdef01 (epoch 3 of 4)"
    progress.ended(
        Trial, [{"name": "objective", "value": -5.0}, {"name": "env_steps_here", "value": 300.0}], None
    )
    assert progress.text() == "1/2 trials  best 5.0  3 steps/s  100 s left  0 running".replace(
        "100 s", "2 min"
    )
    assert [duration(seconds) for seconds in (3, 99, 600, 7200)] == ["3 s", "99 s", "10 min", "2.0 h"]


def test_a_result_is_picklable_in_its_parts(begun: Path) -> None:
    result = ppo_hpo.sweep(name="begun", progress=False)
    assert pickle.loads(pickle.dumps(result.cost)) == result.cost
    assert result.best_config is not None
    assert yamlio.load(result.best_config)["optimizer"]["lr"] == result.best_params["optimizer.lr"]

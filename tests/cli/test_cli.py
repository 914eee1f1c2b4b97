"""The command line: real processes, their exit codes, and every word they say when the input is bad."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import ppo_hpo
from ppo_hpo.cli.main import main
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError
from ppo_hpo.state.checkpoint import Storage
from tests.waiting import may_mount

REPOSITORY = Path(__file__).parents[2]
# 5 episodes of 25 steps in each of 2 environments fit into 256 steps: no warning, whatever runs.
TINY = {
    "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
    "task": {"epochs": 2, "max_epochs": 2, "steps_per_epoch": 256, "eval_episodes": 2},
    "model": {"width": 8, "depth": 1},
    "ppo": {"n_steps": 64, "batch_size": 32, "n_epochs": 2},
}


def environment(**extra: str) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if not key.startswith("ORION_")}
    # The tree is found wherever the command runs; its modules come from there, and nothing else does.
    return {**own, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "default", **extra}


def start(
    *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None, code: str | None = None
) -> subprocess.Popen[str]:
    python = [sys.executable, "-c", code] if code else [sys.executable, "-P", "-m", "ppo_hpo"]
    return subprocess.Popen(
        [*python, *map(str, arguments)],
        cwd=cwd,
        env=environment(**(env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    *arguments: str | Path, cwd: Path, env: Mapping[str, str] | None = None, code: str | None = None
) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, cwd=cwd, env=env, code=code)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_one_sentence(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2 and one line, which says what is wrong."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("ppo-hpo: error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yamlio.dump(TINY))
    return path


# ----------------------------------------------------------- without a trial

# What is refused before a trial begins costs a fraction of a second, and leaves nothing behind.
BAD: dict[str, tuple[list[str], list[str]]] = {
    "unknown environment": (
        ["--set", "env.id=CartPool-v1"],
        ["`env.id: CartPool-v1` cannot be made", "Did you mean: `CartPole`?", "module:EnvId"],
    ),
    "unknown version": (["--set", "env.id=CartPole-v9"], ["CartPole-v9", "`v0`, `v1`"]),
    "malformed id": (["--set", "env.id=Cart Pole"], ["`env.id: Cart Pole` cannot be made", "Malformed"]),
    "missing module": (
        ["--set", "env.id=nosuchmodule:Env-v0"],
        ["`env.id: nosuchmodule:Env-v0` needs the module 'nosuchmodule'", "not on the path"],
    ),
    "module without it": (
        ["--set", "env.id=tests.envs:Nothing-v0"],
        ["tests.envs:Nothing-v0", "cannot be made"],
    ),
    "observation space": (
        ["--set", "env.id=tests.envs:Image-v0"],
        ["observation space Box(-inf, inf, (4, 4), float32)", "FlattenObservation"],
    ),
    "action space": (
        ["--set", "env.id=tests.envs:Switches-v0"],
        ["action space MultiBinary(3)", "Discrete or Box actions"],
    ),
    "unknown argument": (
        ["--set", "env.kwargs.gravity=3"],
        ["does not take `env.kwargs: {'gravity': 3}`", "unexpected keyword argument 'gravity'"],
    ),
    "bad argument": (
        ["--set", "env.id=FrozenLake-v1", "--set", "env.kwargs.map_name=nope"],
        ["`env.id: FrozenLake-v1` cannot be made with `env.kwargs: {'map_name': 'nope'}`", "KeyError"],
    ),
    "no arguments": (
        ["--set", "env.kwargs=3", "--set", "env.kwargs.gravity=3"],
        ["`env.kwargs` must map argument names to values, but got 3"],
    ),
    "unknown device": (
        ["--device", "gpu"],
        ["argument --device: must be auto, cpu, cuda, cuda:N or cuda:N,M, but got 'gpu'"],
    ),
    "no trials on a device": (
        ["--trials-per-device", "0"],
        ["argument --trials-per-device: must be a whole number of at least 1, but got '0'"],
    ),
    "unknown key": (["--set", "ppo.clip_rnge=0.1"], ["`ppo.clip_rnge`", "Did you mean clip_range?"]),
    "unknown group": (["--set", "pppo.gamma=0.1"], ["A group must be one of env, task", "'pppo'"]),
    "no equals sign": (["--set", "optimizer.lr"], ["--set takes GROUP.KEY=VALUE", "'optimizer.lr'"]),
    "no group": (["--set", "lr=1e-3"], ["--set takes GROUP.KEY=VALUE", "'lr=1e-3'"]),
    "no value": (["--set", "optimizer.lr="], ["`optimizer.lr` must be a number, but got None"]),
    "no YAML": (["--set", "optimizer.lr=[1"], ["--set optimizer.lr is not valid YAML"]),
    "bad value": (["--set", "optimizer.lr=-1"], ["`0 < optimizer.lr <= 10` must hold", "got -1"]),
    "bad combination": (["--set", "ppo.batch_size=33"], ["ppo.batch_size must divide", "got 33"]),
    "beyond the file's epochs": (
        ["--epochs", "3"],
        ["`--epochs <= task.max_epochs` must hold, but got 3 and 2"],
    ),
    "no epochs": (["--epochs", "0"], ["`--epochs >= 1` must hold, but got 0"]),
    "negative seed": (["--seed", "-1"], ["`--seed >= 0` must hold, but got -1"]),
    "word for a seed": (
        ["--seed", "one"],
        ["argument --seed: invalid int value: 'one'", "See ppo-hpo run --help"],
    ),
    "unknown option": (["--gpu"], ["unrecognized arguments: --gpu", "See ppo-hpo --help"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, config: Path, tmp_path: Path) -> None:
    options, parts = BAD[case]
    assert_one_sentence(run("run", "--config", config, *options, cwd=tmp_path), *parts)
    assert not list(tmp_path.rglob("checkpoint*"))
    assert not list(tmp_path.rglob("log.txt"))


@pytest.mark.skipif(importlib.util.find_spec("Box2D") is not None, reason="box2d is installed")
def test_missing_extra_is_named(config: Path, tmp_path: Path) -> None:
    done = run("run", "--config", config, "--set", "env.id=LunarLander-v3", cwd=tmp_path)
    assert_one_sentence(done, "LunarLander-v3", "pip install 'ppo-hpo[box2d]'")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "--config", "nothing.yaml"], ["nothing.yaml cannot be read: No such file or directory."]),
        (["run", "--config", "nothing"], ["No space is called 'nothing'", "classic-control"]),
        (["run", "--config", "."], ["No space is called '.'"]),
        (["run", "--config", "./"], ["cannot be read: Is a directory"]),
        (
            ["run", "--config", "classic-control"],
            ["`task.epochs` is still a prior", "Let `orion hunt` fill it in"],
        ),
        (["run"], ["the following arguments are required: --config. See ppo-hpo run --help."]),
        (["fly"], ["invalid choice: 'fly'"]),
        (["space"], ["the following arguments are required: ACTION"]),
        (["space", "show"], ["the following arguments are required: NAME"]),
        (["report"], ["the following arguments are required: NAME"]),
    ],
    ids=lambda value: " ".join(value) if value[0] in ("run", "space", "fly", "report") else "",
)
def test_bad_commands(arguments: list[str], parts: list[str], tmp_path: Path) -> None:
    assert_one_sentence(run(*arguments, cwd=tmp_path), *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("ppo: {gamma: 0.9\n", "is not valid YAML"),
        ("- 1\n- 2\n", "must map groups (env, task"),
        ("", "must map groups (env, task"),
        ("ppo: 3\n", "must map groups (env, task"),
        ("ppo: {gamma: 0.9, gamma: 0.8}", "key `gamma` is given twice"),
        ("ppo: {gamma: 'orion~uniform(0, 1)'}", "`ppo.gamma` is still a prior"),
    ],
)
def test_bad_files(text: str, part: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    assert_one_sentence(run("run", "--config", "bad.yaml", cwd=tmp_path), part)


def test_directory_under_a_file(config: Path, tmp_path: Path) -> None:
    done = run("run", "--config", config, "--dir", config / "trial", cwd=tmp_path)
    assert_one_sentence(done, f"The directory {config}/trial cannot be made: Not a directory.")
    done = run("run", "--config", config, "--dir", config, cwd=tmp_path)
    assert_one_sentence(done, f"The directory {config} cannot be made: File exists.")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser")
def test_directory_that_is_not_ours(config: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    done = run("run", "--config", config, "--dir", closed, cwd=tmp_path)
    assert_one_sentence(done, f"The directory {closed} cannot be written. Choose another one.")


def test_incomplete_environment_of_orion(config: Path, tmp_path: Path) -> None:
    done = run("run", "--config", config, cwd=tmp_path, env={"ORION_TRIAL_ID": "x"})
    assert_one_sentence(done, "Orion's environment is incomplete: 'ORION_EXPERIMENT_NAME' is missing")


def test_under_orion_the_end_of_schedules_has_to_be_in_the_file(tmp_path: Path) -> None:
    # Each rung would otherwise be a trial of its own.
    path = tmp_path / "tiny.yaml"
    path.write_text(yamlio.dump({**TINY, "task": {"epochs": 2, "steps_per_epoch": 256}}))
    done = run("run", "--config", path, cwd=tmp_path, env={"ORION_TRIAL_ID": "x"})
    assert_one_sentence(done, "has no `task.max_epochs`", "the highest fidelity")


def test_no_arguments_is_a_question_about_them(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == ""
    assert done.stdout.startswith("usage: ppo-hpo ")
    assert all(command in done.stdout for command in ("run", "space", "report"))


def test_version_and_help(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"ppo-hpo {ppo_hpo.__version__}\n", "")
    done = run("run", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for option in ("--config", "--set", "--device", "--seed", "--epochs", "--dir"):
        assert option in done.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_goes_away(unbuffered: str, tmp_path: Path) -> None:
    # As `ppo-hpo space show default | head -1`.
    with start("space", "show", "default", cwd=tmp_path, env={"PYTHONUNBUFFERED": unbuffered}) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 141


# --------------------------------------------------------------- with a trial


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder in which `ppo-hpo run --epochs 1` was said once, without `--dir`."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "tiny.yaml").write_text(yamlio.dump(TINY))
    options = ["--epochs", "1", "--seed", "5", "--set", "optimizer.lr=1e-3"]
    return folder, run("run", "--config", "tiny.yaml", *options, cwd=folder)


def the_trial(folder: Path) -> Path:
    (directory,) = (folder / "ppo-hpo-runs").iterdir()
    return directory


def test_run_writes_what_the_documentation_lists(
    begun: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = begun
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    directory = the_trial(folder)
    config = TrialConfig.from_mapping(yamlio.load(directory / "config.yaml"))
    expected = TrialConfig.from_mapping({**TINY, "optimizer": {"lr": 1e-3}})
    assert config == expected.replace(task={"epochs": 1, "seed": 5})
    assert directory.name == f"CartPole-v1-{config.identity()[:12]}"
    assert {path.name for path in directory.iterdir()} >= {
        "config.yaml",
        "curve.jsonl",
        "timing.jsonl",
        "work.jsonl",
        "checkpoint-000001.safetensors",
        "results.json",
        "log.txt",
        "lock",
    }
    rows = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    results = {item["name"]: item["value"] for item in json.loads((directory / "results.json").read_text())}
    assert results["objective"] == -rows[-1]["return_mean"] == -results["return_mean"]
    assert re.search(rf"^return +{results['return_mean']:.2f} ", done.stdout, re.MULTILINE)
    assert f"directory   {directory.relative_to(folder)}" in done.stdout


def test_the_same_command_goes_on(begun: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = begun
    options = ["--seed", "5", "--set", "optimizer.lr=1e-3"]
    done = run("run", "--config", "tiny.yaml", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    directory = the_trial(folder)
    assert "resumes, and trains from epoch 1 to 2" in (directory / "log.txt").read_text()
    results = {item["name"]: item["value"] for item in json.loads((directory / "results.json").read_text())}
    assert (results["continued"], results["continued_from_epoch"]) == (1.0, 1.0)
    assert (results["env_steps"], results["env_steps_here"]) == (512.0, 256.0)
    assert len((directory / "curve.jsonl").read_text().splitlines()) == 3

    # The same directory for other hyperparameters: refused, and nothing is lost.
    before = {path.name: path.read_bytes() for path in directory.glob("*.*") if path.name != "log.txt"}
    done = run("run", "--config", "tiny.yaml", "--seed", "6", "--dir", directory, cwd=folder)
    assert_one_sentence(
        done,
        f"The checkpoint of epoch 2 in {directory} belongs to other hyperparameters",
        "optimizer.lr is 0.001 there and 0.0003 here",
        "task.seed is 5 there and 6 here",
    )
    assert {
        path.name: path.read_bytes() for path in directory.glob("*.*") if path.name != "log.txt"
    } == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(config: Path, tmp_path: Path) -> None:
    done = run("run", "--config", config, "--device", "cuda", cwd=tmp_path)
    assert_one_sentence(done, "Device 'cuda' was asked for, but torch finds none here. Choose cpu or auto.")


def test_an_environment_that_is_broken_from_the_start(config: Path, tmp_path: Path) -> None:
    options = ["--set", "env.id=tests.envs:BecomesNaN-v0", "--set", "env.kwargs.after=0"]
    done = run("run", "--config", config, *options, "--dir", "trial", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "ppo-hpo: error: `env.id: tests.envs:BecomesNaN-v0` returned the reward nan"
    )
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("checkpoint*"))
    assert not (tmp_path / "trial" / "results.json").exists()


MINE = """
import gymnasium
gymnasium.register("Mine-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=25)
"""


def test_orion_is_told_in_its_own_form(tmp_path: Path) -> None:
    # The environment is a module beside the user, which a console script does not find by itself.
    (tmp_path / "mine.py").write_text(MINE)
    config = tmp_path / "tiny.yaml"
    config.write_text(yamlio.dump({**TINY, "env": {"id": "mine:Mine-v0", "n_envs": 2}}))
    trials = tmp_path / "experiment"
    results_path = tmp_path / "results.log"
    results_path.touch()  # Orion makes it
    done = run(
        "run",
        "--config",
        config,
        cwd=tmp_path,
        env={
            "ORION_EXPERIMENT_NAME": "some",
            "ORION_EXPERIMENT_VERSION": "3",
            "ORION_TRIAL_ID": "a1b2c3d4e5f6",
            "ORION_WORKING_DIR": str(trials / "some_a1b2"),
            "ORION_RESULTS_PATH": str(results_path),
            "ORION_INTERRUPT_CODE": "130",
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert all(line.startswith("[a1b2c3d4] ") for line in done.stderr.splitlines())
    assert "trains for some-v3 from epoch 0 to 2" in done.stderr
    entries = json.loads(results_path.read_text())
    assert [entry["name"] for entry in entries if entry["type"] == "objective"] == ["objective"]
    assert all(set(entry) == {"name", "type", "value"} for entry in entries)
    assert all(type(entry["value"]) is float for entry in entries)
    assert json.loads((trials / "some_a1b2" / "results.json").read_text()) == entries
    # The trial's state lies where Orion said, and its siblings can find it.
    assert Storage(trials / "some_a1b2").load() is not None
    assert [path.name for path in (trials / ".ppo_hpo").glob("*/*")] == ["some_a1b2"]

    from orion.core.worker.trial import Trial

    trial = Trial(results=entries)
    statistics = {item.name: item.value for item in trial.statistics}
    assert trial.objective.value == -statistics["return_mean"]
    assert statistics["env_steps"] == 512.0


@pytest.mark.parametrize(
    ("signum", "orion_code", "code"),
    [(signal.SIGTERM, None, 143), (signal.SIGINT, None, 130), (signal.SIGTERM, "37", 37)],
    ids=["SIGTERM-by-hand", "SIGINT-by-hand", "SIGTERM-under-orion"],
)
def test_a_signal_ends_it_at_once_and_whole(
    signum: signal.Signals, orion_code: str | None, code: int, config: Path, tmp_path: Path
) -> None:
    directory, results_path = tmp_path / "trials" / "one", tmp_path / "results.log"
    orion = {
        "ORION_EXPERIMENT_NAME": "some",
        "ORION_EXPERIMENT_VERSION": "1",
        "ORION_TRIAL_ID": "a1b2c3d4e5f6",
        "ORION_WORKING_DIR": str(directory),
        "ORION_RESULTS_PATH": str(results_path),
        "ORION_INTERRUPT_CODE": orion_code or "",
    }
    long = ["--set", "task.max_epochs=5000", "--set", "task.epochs=5000"]
    place = [] if orion_code else ["--dir", str(directory)]
    process = start("run", "--config", config, *long, *place, cwd=tmp_path, env=orion if orion_code else {})
    log = directory / "log.txt"
    deadline = time.monotonic() + 60
    while not (log.exists() and "epoch 2/5000" in log.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signum)
    sent = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - sent < 10
    assert process.returncode == code
    assert f"ppo-hpo: stopped by {signum.name}" in err.splitlines()[-1]
    assert f"(exit code {code})" in err.splitlines()[-1]
    assert "Traceback" not in err
    # Nothing is half-written, and nothing pretends to be a result.
    assert not list(directory.glob(".*.tmp"))
    assert not (directory / "results.json").exists()
    assert not results_path.exists()
    checkpoint = Storage(directory).load(on_refused=lambda error: pytest.fail(str(error)))
    assert checkpoint is not None
    assert checkpoint.epoch >= 2
    rows = [json.loads(line) for line in (directory / "curve.jsonl").read_text().splitlines()]
    # The checkpoint is written first, so that the curve may lack its last row, and no other.
    assert [row["epoch"] for row in rows] == list(range(len(rows)))
    assert checkpoint.epoch - len(rows) + 1 in (0, 1)


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from ppo_hpo.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_records_that_cannot_grow_are_left_out_with_a_warning(config: Path, tmp_path: Path) -> None:
    # A limit on the size of files: log.txt and timing.jsonl are at it already, checkpoints stay below.
    directory = tmp_path / "trial"
    directory.mkdir()
    for name in ("log.txt", "timing.jsonl"):
        (directory / name).write_text("x" * 20_000)
    done = run("run", "--config", config, "--dir", directory, cwd=tmp_path, code=LIMITED)
    assert done.returncode == 0, done.stderr
    assert f"{directory}/timing.jsonl cannot be written: File too large. It lacks a line" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Logging error" not in done.stderr
    checkpoint = Storage(directory).load()
    assert checkpoint is not None
    assert checkpoint.epoch == TrialConfig.from_mapping(yamlio.load(config)).task.epochs


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a small disk, which is root's")
def test_full_disk(config: Path, tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    script = 'mount -t tmpfs -o size=40k none "$1" || exit 99; shift 1; "$@"; code=$?; '
    script += f"cp -a {disk}/trial {kept}; exit $code"
    python = [sys.executable, "-m", "ppo_hpo", "run", "--config", str(config), "--dir", str(disk / "trial")]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(disk), *python, "--set", "task.epochs=500",
         "--set", "task.max_epochs=500"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ppo-hpo: error: {disk}/trial/")
    assert "cannot be written: No space left on device. What was saved before is whole" in last
    assert "Traceback" not in done.stderr
    assert not list(kept.glob(".*.tmp"))
    checkpoint = Storage(kept).load(on_refused=lambda error: pytest.fail(str(error)))
    assert checkpoint is not None
    assert checkpoint.epoch >= 1


def test_main_can_be_called() -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0


@pytest.mark.parametrize("name", ["log.txt", "timing.jsonl", "failure.json", "lock", "curve.jsonl", "writer"])
def test_a_pipe_in_the_directory_is_refused_and_not_waited_for(
    name: str, config: Path, tmp_path: Path
) -> None:
    (tmp_path / "trial").mkdir()
    os.mkfifo(tmp_path / "trial" / name)
    done = run("run", "--config", config, "--dir", "trial", cwd=tmp_path)
    assert_one_sentence(done, f"trial/{name} must be a ", "Remove it.")


def test_why_a_trial_by_hand_failed_is_kept_until_it_ends_well(config: Path, tmp_path: Path) -> None:
    settings = ["--set", "env.id=tests.envs:Fails-v0", "--set", "env.max_episode_steps=none"]
    kwargs = ["--set", "env.kwargs={how: raise, at: 400}"]
    done = run("run", "--config", config, "--dir", "trial", *settings, *kwargs, cwd=tmp_path)
    assert done.returncode == 1
    record = json.loads((tmp_path / "trial" / "failure.json").read_text())
    assert record["error"] == "RuntimeError: the simulator fell over"
    assert not record["stopped"]


def test_a_signal_that_the_environment_swallows_stops_all_the_same(config: Path, tmp_path: Path) -> None:
    directory = tmp_path / "trial"
    options = ["--set", "env.id=tests.envs:Swallows-v0", "--set", "env.n_envs=1", "--set", "ppo.n_steps=256"]
    process = start("run", "--config", config, *options, "--dir", str(directory), cwd=REPOSITORY)
    log = directory / "log.txt"
    deadline = time.monotonic() + 60
    while not (log.exists() and " from epoch " in log.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.5)  # into the steps, nearly all of whose time is spent where exceptions are swallowed
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "Traceback" not in err


@pytest.mark.parametrize("nothing", ["null", "none"])
def test_no_max_epochs_is_the_files_epochs_and_not_the_rungs(
    config: Path, tmp_path: Path, nothing: str
) -> None:
    from ppo_hpo.trial.run_command import RunRequest, configuration_of

    text = config.read_text().replace("max_epochs: 2", f"max_epochs: {nothing}")
    (tmp_path / "none.yaml").write_text(text)
    request = RunRequest(config=str(tmp_path / "none.yaml"), epochs=1)
    assert configuration_of(request, under_orion=False)["task"]["max_epochs"] == 2
    with pytest.raises(UserError, match="this value says where schedules end"):
        configuration_of(request, under_orion=True)

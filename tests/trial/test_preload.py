"""`ppo-hpo run --preload`: real servers, clients and trials, beside the same command without it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo.spec import yamlio
from ppo_hpo.state.checkpoint import read
from ppo_hpo.state.process_identity import Process
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TINY = {
    "env": {"id": "witness:Witness-v0", "n_envs": 2, "max_episode_steps": 25},
    "task": {"epochs": 2, "steps_per_epoch": 256, "eval_episodes": 2},
    "model": {"width": 8, "depth": 1},
    "ppo": {"n_steps": 64, "batch_size": 32, "n_epochs": 2},
}
LONG = ["--set", "task.epochs=5000", "--set", "task.max_epochs=5000"]
# CartPole, which writes down what its process is, and fails as it is told.
WITNESS = """
import json, os, resource, signal, sys
import gymnasium
import numpy
from gymnasium.envs.classic_control import CartPoleEnv

def seen():
    umask = os.umask(0)
    os.umask(umask)
    signals = [n for n in signal.valid_signals() if n not in (signal.SIGTERM, signal.SIGINT)]
    return {
        "environ": dict(os.environ), "cwd": os.getcwd(), "argv": sys.argv, "path": sys.path,
        "umask": umask, "nice": os.nice(0), "affinity": sorted(os.sched_getaffinity(0)),
        "limits": {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n[:7] == "RLIMIT_"},
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "handlers": [str(signal.getsignal(n)) for n in signals],
        "streams": [[s.encoding, s.errors, s.line_buffering, s.isatty()] for s in
                    (sys.stdin, sys.stdout, sys.stderr)],
        "descriptors": sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                              if os.path.exists(f"/proc/self/fd/{n}")),
        "threads": len(os.listdir("/proc/self/task")), "modules": sorted(sys.modules),
        "pid": os.getpid(), "ppid": os.getppid(), "stdin": os.fstat(0).st_ino, "draw": numpy.random.rand(),
    }

class Witness(CartPoleEnv):
    def __init__(self, end=""):
        super().__init__()
        self.end = end

    def step(self, action):
        # Environments are tried before the trial is locked. What counts is the process that trains.
        names = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                 if os.path.exists(f"/proc/self/fd/{n}")]
        if not os.path.exists("seen.json") and any(name.endswith("/lock") for name in names):
            with open("seen.json", "w") as file:
                json.dump(seen(), file)
        if self.end:
            exec(self.end)
        return super().step(action)

gymnasium.register("Witness-v0", Witness, max_episode_steps=25)
"""


def environment(runtime: Path, **extra: str) -> dict[str, str]:
    # pytest names the test in a variable, and what differs there has a server of its own.
    own = {k: v for k, v in os.environ.items() if not k.startswith(("ORION_", "PPO_HPO_", "PYTEST"))}
    return {
        **own,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "XDG_RUNTIME_DIR": str(runtime),
        **extra,
    }


class Place:
    """A folder to run commands in, with a directory of servers that may be shared."""

    def __init__(self, folder: Path, runtime: Path, **extra: str) -> None:
        self.folder = folder
        self.runtime = runtime
        self.environment = environment(runtime, **extra)
        folder.mkdir(exist_ok=True)
        (folder / "witness.py").write_text(WITNESS)
        (folder / "tiny.yaml").write_text(yamlio.dump(TINY))

    def start(self, *options: str, directory: str = "trial", **how: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "ppo_hpo", "run", "--config", "tiny.yaml", "--device", "cpu"]
        return subprocess.Popen(
            [*command, "--dir", directory, *options],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **how,
        )

    def run(self, *options: str, **how: Any) -> subprocess.CompletedProcess[str]:
        with self.start(*options, **how) as process:
            out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def seen(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "seen.json").read_text()))

    def servers(self, *options: str) -> list[int]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "ppo_hpo", "preload", *options],
            env=self.environment, capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        return [int(number) for number in re.findall(r"^process (\d+)", done.stdout, re.MULTILINE)]

    def wait_for_epoch(self, epoch: int, process: subprocess.Popen[str], directory: str = "trial") -> int:
        """Process id of the trial, once it has done an epoch."""
        path = self.folder / directory / "timing.jsonl"

        def done() -> bool:
            assert process.poll() is None, process.communicate()
            return path.exists() and len(path.read_text().splitlines()) >= epoch

        wait_for(done, 60)
        return int(json.loads(path.read_text().splitlines()[-1])["pid"])


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def children_of(pid: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if path.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(path.parent.name)
    return found


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Servers that several tests share."""
    folder = tmp_path_factory.mktemp("runtime")
    yield folder
    Place(folder / "end", folder).servers("--stop")


@pytest.fixture
def place(tmp_path: Path, runtime: Path) -> Place:
    return Place(tmp_path / "place", runtime)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Place]:
    """A place whose server is nobody else's."""
    (tmp_path / "runtime").mkdir()
    made = Place(tmp_path / "place", tmp_path / "runtime", PPO_HPO_PRELOAD_IDLE="30")
    yield made
    if (tmp_path / "runtime").stat().st_mode & 0o777 == 0o755:
        made.servers("--stop")


def without_clock(text: str) -> str:
    return re.sub(r"at [\d,]+ steps/s|[\d,]+ steps/s|^directory .*$|; \S+$", "", text, flags=re.MULTILINE)


# ------------------------------------------------------------- it is a plain run


def test_the_results_are_those_of_a_plain_run(place: Place) -> None:
    options = ["--set", "normalize.norm_obs=true", "--set", "normalize.norm_reward=true", "--seed", "3"]
    for env in ("witness:Witness-v0", "Pendulum-v1"):
        chosen = [*options, "--set", f"env.id={env}"]
        plain = place.run(*chosen, directory=f"plain-{env[:3]}")
        warm = place.run("--preload", *chosen, directory=f"warm-{env[:3]}")
        assert (plain.returncode, warm.returncode) == (0, 0), warm.stderr
        assert without_clock(warm.stdout) == without_clock(plain.stdout)
        assert without_clock(warm.stderr) == without_clock(plain.stderr)
        one, other = (place.folder / f"{name}-{env[:3]}" for name in ("plain", "warm"))
        assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
        for name in ("curve.jsonl", "config.yaml"):
            assert (one / name).read_bytes() == (other / name).read_bytes()
        for epoch in (1, 2):
            left, right = (read(path / f"checkpoint-{epoch:06}.safetensors") for path in (one, other))
            assert left.arrays.keys() == right.arrays.keys()
            for name, array in left.arrays.items():
                assert array.tobytes() == right.arrays[name].tobytes(), name


def test_its_process_is_that_of_a_plain_run(place: Place) -> None:
    found = {}
    for name, options in {"plain": [], "warm": ["--preload"], "again": ["--preload"]}.items():
        place.environment["ORION_OTHER"] = name
        done = place.run(*options, directory=name)
        assert done.returncode == 0, done.stderr
        found[name] = place.seen()
        (place.folder / "seen.json").unlink()
    plain, warm, again = found["plain"], found["warm"], found["again"]
    assert warm["ppid"] == again["ppid"]
    assert warm["ppid"] in place.servers()
    # The standard streams are the client's, the pipes that this test reads among them.
    assert without_clock(done.stdout).startswith("return")
    # What only it has, it says; all the rest is equal.
    for seen, name in ((plain, "plain"), (warm, "warm")):
        assert seen["environ"].pop("ORION_OTHER") == name
        assert name in seen["argv"]
        assert seen["cwd"] == str(place.folder)
        assert any(path.endswith(f"{name}/lock") for path in seen["descriptors"])
        seen["descriptors"] = len(seen["descriptors"])
    kept = [
        "environ", "path", "umask", "nice", "affinity", "limits", "blocked", "handlers", "streams",
        "descriptors", "threads", "stdin",
    ]  # fmt: skip
    assert {key: warm[key] for key in kept} == {key: plain[key] for key in kept}
    assert warm["threads"] == 2  # the trial's, and the one that gives signs of life to others
    # A stream that nobody seeds differs between processes, forked ones included.
    assert warm["draw"] != again["draw"]
    # The server has imported all that a trial needs, but for the environment's own module.
    missing = set(plain["modules"]) - set(warm["modules"])
    assert {name for name in missing if not name.startswith("ppo_hpo.cli")} <= {"runpy", "ppo_hpo.__main__"}
    preloaded = modules_of_a_server(place)
    assert set(warm["modules"]) - preloaded <= {
        "witness",
        "ppo_hpo.trial.preload_client",
        "ppo_hpo.trial.preload_server",
    }


def modules_of_a_server(place: Place) -> set[str]:
    code = """
import json, os, sys
from ppo_hpo.trial import preload_server
preload_server.preload()
assert len(os.listdir("/proc/self/task")) == 1
assert not sys.modules["torch"].cuda.is_initialized()
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=place.environment, capture_output=True, text=True,
        check=True, timeout=60,
    )  # fmt: skip
    return set(json.loads(done.stdout))


def test_the_client_is_light(place: Place) -> None:
    code = """
import sys
from ppo_hpo.cli.main import main
assert main(sys.argv[1:]) == 0
print("MODULES", *sorted(sys.modules))
"""
    command = ["run", "--preload", "--config", "tiny.yaml", "--device", "cpu", "--dir", "trial"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=place.folder, env=place.environment,
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    modules = set(done.stdout.rpartition("MODULES ")[2].split())
    ours = {name for name in modules if re.match(r"ppo_hpo\.(?!cli\b)", name)}
    assert ours - {"ppo_hpo.spec", "ppo_hpo.state", "ppo_hpo.trial"} == {
        "ppo_hpo.spec.errors",
        "ppo_hpo.spec.printing",
        "ppo_hpo.spec.user_dir",
        "ppo_hpo.state.process_identity",
        "ppo_hpo.trial.gpu_detection",
        "ppo_hpo.trial.preload_client",
        "ppo_hpo.trial.process",
        "ppo_hpo.trial.run_command",
    }
    assert not {"numpy", "yaml", "torch", "gymnasium"} & modules
    assert "runs without a preloaded process" not in done.stderr


@pytest.mark.parametrize("name", ["PPO_HPO_PRELOAD", "PPO_HPO_WARM"])
def test_the_variable_is_the_option(name: str, place: Place) -> None:
    place.environment[name] = "1"
    assert place.run().returncode == 0
    assert place.seen()["ppid"] in place.servers()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--set", "optimizer.lr=-1"], 2),
        (["--set", "env.id=Nothing-v0"], 2),
        (["--set", "env.kwargs.end=raise KeyError('mine')"], 1),
        (["--set", "env.kwargs.end=raise SystemExit(5)"], 1),
        (["--set", "env.kwargs.end=os._exit(7)"], 7),
        (["--set", "env.kwargs.end=os.kill(os.getpid(), 9)"], -9),
        (["--set", "env.kwargs.end=os.kill(os.getpid(), 11)"], -11),
    ],
    ids=lambda value: str(value),
)
def test_it_ends_as_a_plain_run_does(options: list[str], code: int, place: Place) -> None:
    plain = place.run(*options, directory="plain")
    warm = place.run("--preload", *options, directory="warm")
    assert (plain.returncode, warm.returncode) == (code, code)
    assert warm.stdout == plain.stdout
    # Tracebacks begin at the command in one and at the server in the other; their ends are equal.
    assert warm.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]
    assert warm.stderr.count("Traceback") == plain.stderr.count("Traceback")
    assert ("Traceback" in plain.stderr) == (code == 1)


@pytest.mark.parametrize("options", [[], ["--preload"]], ids=["plain", "warm"])
def test_the_end_of_the_process_loses_nothing(options: list[str], place: Place) -> None:
    # A file that nobody closes, a function to be called at the end, and a thread that takes a moment.
    end = (
        "import atexit, threading; first = 'kept' not in globals(); "
        "kept = globals().setdefault('kept', open('kept.txt', 'w')) if first else globals()['kept']; "
        "kept.write('x'); first and atexit.register(print, 'at the end'); "
        "first and threading.Timer(2, print, ['in a thread']).start()"
    )
    done = place.run(*options, "--set", f"env.kwargs.end={end}")
    assert done.returncode == 0, done.stderr
    # The thread speaks after two seconds, on a slow machine before the trial's own last words.
    lines = done.stdout.splitlines()
    assert lines.count("in a thread") == 1
    assert lines[-1] == "at the end"
    steps = json.loads((place.folder / "trial" / "results.json").read_text())
    counted = sum(item["value"] for item in steps if item["name"] in ("env_steps", "eval_steps"))
    assert len((place.folder / "kept.txt").read_text()) >= counted


# ------------------------------------------------------------- it is stopped


@pytest.mark.parametrize(
    ("signum", "orion_code", "code"),
    [(signal.SIGTERM, "", 143), (signal.SIGINT, "", 130), (signal.SIGTERM, "37", 37)],
)
def test_a_signal_stops_the_trial(signum: signal.Signals, orion_code: str, code: int, place: Place) -> None:
    place.environment["ORION_INTERRUPT_CODE"] = orion_code
    process = place.start("--preload", *LONG, start_new_session=True)
    pid = place.wait_for_epoch(2, process)
    assert pid != process.pid
    # As a terminal does it, and as whoever ends a whole job does it.
    os.killpg(process.pid, signum)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.count(f"stopped by {signum.name}. Everything saved is whole") == 1
    assert "Traceback" not in err
    assert is_gone(pid)
    saved = max((place.folder / "trial").glob("checkpoint-*.safetensors"))
    assert read(saved).epoch >= 2


def test_no_signal_is_lost_at_any_moment(place: Place) -> None:
    assert place.run("--preload").returncode == 0
    server = place.seen()["ppid"]
    codes = set()
    milliseconds = 0
    # Beyond 200 only on a slow machine, until a trial has come so far that it can end by itself.
    while milliseconds < 200 or 143 not in codes:
        assert milliseconds < 20_000, codes
        process = place.start("--preload", *LONG, directory="signals")
        time.sleep(milliseconds / 1000)
        process.terminate()
        _, err = process.communicate(timeout=30)
        # Before it can handle it, the signal kills it, as it kills a plain run.
        assert process.returncode in (-signal.SIGTERM, 143), err
        assert "Traceback" not in err
        codes.add(process.returncode)
        wait_for(lambda: not children_of(server), 60)
        milliseconds += 5 if milliseconds < 200 else 200


def test_a_trial_that_was_stopped_resumes_and_ends_as_one_that_was_not(place: Place) -> None:
    options = ["--set", "task.epochs=60", "--set", "task.max_epochs=60"]
    process = place.start("--preload", *options, directory="stopped")
    place.wait_for_epoch(2, process, "stopped")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    done = place.run("--preload", *options, directory="stopped")
    assert done.returncode == 0, done.stderr
    assert "resumes, and trains" in done.stderr
    assert place.run(*options, directory="through").returncode == 0
    curves = [(place.folder / name / "curve.jsonl").read_bytes() for name in ("stopped", "through")]
    assert curves[0] == curves[1]


def test_without_its_client_a_trial_stops(place: Place) -> None:
    process = place.start("--preload", *LONG)
    pid = place.wait_for_epoch(2, process)
    server = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    process.kill()
    _, err = process.communicate(timeout=30)
    wait_for(lambda: is_gone(pid), 60)
    assert not is_gone(server)
    # It was stopped, not killed: its standard error, which outlives the client, has its last word.
    assert "stopped by SIGTERM. Everything saved is whole" in err
    assert read(max((place.folder / "trial").glob("checkpoint-*.safetensors"))).epoch >= 2


def test_when_the_server_is_killed_the_client_runs_the_trial_itself(alone: Place) -> None:
    options = ["--set", "task.epochs=60", "--set", "task.max_epochs=60"]
    process = alone.start("--preload", *options)
    pid = alone.wait_for_epoch(2, process)
    (server,) = alone.servers()
    os.kill(server, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "runs without a preloaded process: the preloaded process died" in err
    assert "resumes, and trains" in err
    assert is_gone(pid)
    rows = [json.loads(line) for line in (alone.folder / "trial" / "timing.jsonl").read_text().splitlines()]
    assert {row["pid"] for row in rows} == {pid, process.pid}
    assert rows[-1]["epoch"] == 60
    # A server that died so is not tried again at once, in case it always does.
    done = alone.run("--preload", directory="next")
    assert done.returncode == 0
    assert "runs without a preloaded process: the last preloaded process died" in done.stderr


# ------------------------------------------------------------- its server


def test_many_clients_start_one_server(alone: Place) -> None:
    together = [alone.start("--preload", directory=f"trial{number}") for number in range(4)]
    for process in together:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "runs without a preloaded process" not in err
    assert len(alone.servers()) == 1
    assert len(list(alone.runtime.rglob("*.sock"))) == 1
    clients = {process.pid for process in together}
    for number in range(4):
        (*_, line) = (alone.folder / f"trial{number}" / "timing.jsonl").read_text().splitlines()
        assert json.loads(line)["pid"] not in clients


def test_what_a_process_inherits_chooses_the_server(place: Place) -> None:
    assert place.run("--preload").returncode == 0
    before = place.servers()
    place.environment["SOMETHING"] = "else"
    (place.folder / "seen.json").unlink()
    assert place.run("--preload", directory="other").returncode == 0
    seen = place.seen()
    assert seen["ppid"] in set(place.servers()) - set(before)
    assert seen["environ"]["SOMETHING"] == "else"

    (place.folder / "seen.json").unlink()
    done = place.run("--preload", directory="masked", umask=0o027)
    assert done.returncode == 0
    masked = place.seen()
    assert masked["umask"] == 0o027
    # Others may have ended meanwhile, as servers do that have nothing to do.
    assert masked["ppid"] in set(place.servers()) - {*before, seen["ppid"]}


def test_two_threads_are_run_by_the_client(place: Place) -> None:
    process = place.start("--preload", "--set", "task.threads=2")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    seen = place.seen()
    assert seen["pid"] == process.pid
    assert seen["environ"]["OMP_NUM_THREADS"] == "2"


def test_a_configuration_that_only_the_client_can_read(place: Place) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ppo_hpo", "run", "--preload", "--config", "/dev/stdin", "--dir", "x"],
        input=yamlio.dump(TINY), cwd=place.folder, env=place.environment, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "runs without a preloaded process: only this process has the file of --config open" in done.stderr


def test_an_idle_server_ends_and_leaves_nothing(alone: Place) -> None:
    alone.environment["PPO_HPO_PRELOAD_IDLE"] = "0.5"
    assert alone.run("--preload").returncode == 0
    server = alone.seen()["ppid"]
    wait_for(lambda: is_gone(server), 60)
    (directory,) = alone.runtime.iterdir()
    assert not list(directory.iterdir())
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_server_that_is_stopped_waits_for_its_trials(alone: Place) -> None:
    process = alone.start("--preload", *LONG, "--set", "env.id=CartPole-v1")
    pid = alone.wait_for_epoch(1, process)
    (server,) = alone.servers("--stop")
    wait_for(lambda: not alone.servers(), 60)
    assert not is_gone(server)
    # Who comes now has a server of its own.
    assert alone.run("--preload", directory="next").returncode == 0
    assert alone.servers() == [alone.seen()["ppid"]] != [server]
    assert not is_gone(pid)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    wait_for(lambda: is_gone(server), 60)


@pytest.mark.parametrize("change", [{"namespace": "pid:[1]"}, {"boot": "another"}, {"started": 1}, None])
def test_stop_never_signals_a_stranger(change: dict[str, Any] | None, alone: Place) -> None:
    """A container shares the directory, but not the pids; or a record is of an older release: a bare pid."""
    directory = alone.runtime / f"ppo-hpo-{os.geteuid()}"
    directory.mkdir(mode=0o700)
    with subprocess.Popen(["sleep", "600"]) as stranger, (directory / "x.lock").open("w") as lock:
        try:
            who = Process.of_child(stranger.pid)
            lock.write(str(who.pid) if change is None else json.dumps(asdict(who) | change))
            lock.flush()
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = subprocess.run(
                [sys.executable, "-P", "-m", "ppo_hpo", "preload", "--stop"],
                env=alone.environment, capture_output=True, text=True, check=True, timeout=60,
            )  # fmt: skip
            assert "asked to stop" not in done.stdout
            visible = change is None or "started" in change
            assert ("cannot be seen from here" in done.stdout) is not visible
            assert stranger.poll() is None
        finally:
            stranger.kill()


def test_changed_code_is_never_run_stale(alone: Place, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("ppo_hpo", "spaces"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    alone.environment["PYTHONPATH"] = str(tree)
    assert alone.run("--preload").returncode == 0
    before = alone.servers()
    with (tree / "ppo_hpo" / "trial" / "runner.py").open("a") as file:
        file.write('\nprint("the new code")\n')
    done = alone.run("--preload", directory="next")
    assert done.returncode == 0, done.stderr
    assert "the new code" not in done.stdout  # printed by the server, while it imported
    (server,) = set(alone.servers()) - set(before)
    (log,) = (path for path in alone.runtime.rglob("*.log") if path.read_text())
    assert log.read_text() == "the new code\n"
    assert json.loads(log.with_suffix(".lock").read_text())["pid"] == server


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_is_open_to_others_is_refused(mode: int, alone: Place) -> None:
    directory = alone.runtime / f"ppo-hpo-{os.geteuid()}"
    directory.mkdir()
    directory.chmod(mode)
    process = alone.start("--preload")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err.startswith(
        f"ppo-hpo: runs without a preloaded process: {directory} must be your own and closed"
    )
    assert alone.seen()["pid"] == process.pid
    assert not list(directory.iterdir())
    directory.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_somebody_else_is_refused(alone: Place) -> None:
    directory = alone.runtime / "ppo-hpo-0"
    directory.mkdir(mode=0o700)
    os.chown(directory, 65534, 65534)
    done = alone.run("--preload")
    assert done.returncode == 0
    assert "must be your own" in done.stderr
    os.chown(directory, 0, 0)


def test_a_link_in_its_place_is_refused(alone: Place, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    link = alone.runtime / f"ppo-hpo-{os.geteuid()}"
    link.symlink_to(elsewhere)
    done = alone.run("--preload")
    assert done.returncode == 0
    assert "runs without a preloaded process" in done.stderr
    assert not list(elsewhere.iterdir())
    link.unlink()


def test_a_hunt(tmp_path: Path, runtime: Path) -> None:
    place = Place(tmp_path / "place", runtime)
    space = {
        **TINY,
        "optimizer": {"lr": "orion~loguniform(1e-4, 1e-2)"},
        "task": {**TINY["task"], "epochs": "orion~fidelity(1, 4, base=2)", "max_epochs": 4},
    }
    (place.folder / "space.yaml").write_text(yamlio.dump(space))
    orion = {
        "experiment": {"max_trials": 6, "algorithm": {"random": {"seed": 1}}},
        "storage": {"type": "legacy", "database": {"type": "pickleddb", "host": str(tmp_path / "db.pkl")}},
        "worker": {
            "n_workers": 2, "executor": "joblib", "executor_configuration": {"backend": "threading"},
        },
    }  # fmt: skip
    (place.folder / "orion.yaml").write_text(yamlio.dump(orion))
    trials = tmp_path / "trials"
    done = subprocess.run(
        [BIN / "orion", "hunt", "-n", "warm", "-c", "orion.yaml", "--working-dir", trials,
         "ppo-hpo", "run", "--preload", "--config", "space.yaml", "--device", "cpu"],
        cwd=place.folder, env=place.environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Search finished successfully" in done.stdout
    assert "runs without a preloaded process" not in done.stdout + done.stderr
    assert place.seen()["ppid"] in place.servers()
    completed = list(trials.glob("*/results.json"))
    assert 6 <= len(completed) <= 7

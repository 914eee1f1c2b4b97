"""Two hosts that share a database and a store for checkpoints, and nothing else.

Where the kernel lets us (root, `unshare`, `ip`), a host is a network, a host name and a disk of its own, by
Linux's namespaces: the other one's disk is not there, and the store is reached by TCP over a cable (a veth
pair) to a third network. Elsewhere the hosts take turns on one disk, which is moved out of the other one's
way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
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
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.state.checkpoint import arrays_digest, read
from ppo_hpo.trial import runner
from ppo_hpo.trial.options import RunOptions
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE = 300
STEPS, RUNGS = 2048, (4, 8, 16)
SPACE: dict[str, Any] = {
    "env": {"id": "CartPole-v1", "n_envs": 4, "max_episode_steps": 100},
    "task": {
        "epochs": "orion~fidelity(4, 16, base=2)", "max_epochs": RUNGS[-1],
        "steps_per_epoch": STEPS, "eval_episodes": 1,
    },
    "model": {"width": 8, "depth": 1},
    "normalize": {"norm_obs": True, "norm_reward": True},
    "optimizer": {"lr": "orion~loguniform(1e-4, 1e-2, precision=4)"},
    "ppo": {"n_steps": 64, "n_epochs": 1, "n_minibatches": "orion~choices([1, 2])"},
}  # fmt: skip
HUB = "10.77.0.1"


class Lab:
    """The hosts `a` and `b`, the directory of the database, and the store.

    Every host sees its own disk as ``disk``.
    """

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.separate, self._on = can_separate(folder), ""
        self.disk, self.database, self.served = folder / "disk", folder / "database", folder / "served"
        for path in (self.database, self.served, *(self.private(host) for host in "ab")):
            path.mkdir(parents=True)
        self._inside: dict[str, list[str]] = {}
        if self.separate:
            self.disk.mkdir()
            self._build()
        self.store = self._open_store()
        for host in "ab":
            self.write(host)

    def private(self, host: str) -> Path:
        """The host's disk, seen from nowhere."""
        return self.disk if host == self._on else self.folder / "private" / host

    def _build(self) -> None:
        hub = self._namespace("hub", "--net", "ip link set lo up")
        self._inside["hub"] = ["nsenter", f"--net=/proc/{hub}/ns/net"]
        run([*self._inside["hub"], "ip", "address", "add", f"{HUB}/32", "dev", "lo"])
        for number, host in enumerate("ab", 1):
            pid = self._namespace(
                host,
                "--net --uts --mount",
                f"hostname host-{host}; ip link set lo up; "
                f"mount --bind {self.folder}/private/{host} {self.disk}; "
                f"mount -t tmpfs none {self.folder}/private; mount -t tmpfs none {self.served}",
            )
            near, far = f"10.77.{number}.1", f"10.77.{number}.2"
            self._inside[host] = ["nsenter", f"--target={pid}", "--net", "--uts", "--mount"]
            for where, command in (
                ("hub", f"link add to-{host} type veth peer name eth0 netns {pid}"),
                ("hub", f"address add {near}/24 dev to-{host}"),
                ("hub", f"link set to-{host} up"),
                (host, f"address add {far}/24 dev eth0"),
                (host, "link set eth0 up"),
                (host, f"route add {HUB} via {near}"),
            ):
                run([*self._inside[where], "ip", *command.split()])

    def _namespace(self, name: str, kinds: str, commands: str) -> int:
        """A process that has namespaces of its own, and keeps them."""
        ready = self.folder / f"{name}.ready"
        script = f"set -e; {commands}; touch {ready}; exec sleep infinity"
        process = subprocess.Popen(["unshare", *kinds.split(), "sh", "-c", script], start_new_session=True)
        self.stack.callback(end, process)
        wait_for(lambda: ready.exists() or process.poll() is not None, PATIENCE, pause=0.002)
        assert process.poll() is None
        return process.pid

    def _open_store(self) -> str:
        if importlib.util.find_spec("paramiko") is None:
            assert not self.separate
            return str(self.served)
        script = str(Path(__file__).parents[1] / "state" / "sftp_server.py")
        process = subprocess.Popen(
            [*self._inside.get("hub", []), sys.executable, script, str(self.served)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.stack.callback(end, process)
        assert process.stdout is not None
        port = int(process.stdout.readline())
        return f"sftp://me:secret@{HUB if self.separate else '127.0.0.1'}:{port}/store"

    def write(self, host: str) -> None:
        """What a user has on each host: the space, and where the database is."""
        own = self.private(host)
        for name in (f"user-{host}", "tmp"):
            (own / name).mkdir()
        (own / f"user-{host}" / "space.yaml").write_text(yamlio.dump(SPACE))
        configuration = {
            "experiment": {
                "algorithm": {"asha": {"seed": 2, "num_rungs": 3, "num_brackets": 1}},
                "working_dir": str(self.disk / "trials"),
            },
            "storage": {
                "type": "legacy",
                "database": {"type": "pickleddb", "host": str(self.database / "orion.pkl")},
            },
            "worker": {
                "n_workers": 1,
                "executor": "joblib",
                "executor_configuration": {"backend": "threading"},
            },
        }
        (own / f"user-{host}" / "orion.yaml").write_text(yamlio.dump(configuration))

    def start(self, host: str, *command: str, **variables: str) -> subprocess.Popen[str]:
        """A command of the user's, in the home directory of a host."""
        if not self.separate and self._on != host:
            if self._on:
                self.disk.rename(self.folder / "private" / self._on)
            (self.folder / "private" / host).rename(self.disk)
            self._on = host
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("ORION_", "PPO_HPO_"))}
        home = self.disk / f"user-{host}"
        process = subprocess.Popen(
            [*self._inside.get(host, []), "sh", "-c", 'cd "$HOME" && exec "$@"', "sh", *command],
            env={
                **kept, "HOME": str(home), "TMPDIR": str(self.disk / "tmp"), "PYTHONWARNINGS": "ignore",
                "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), **variables,
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.stack.callback(end, process)
        return process

    def hunt(self, host: str, max_trials: int) -> subprocess.Popen[str]:
        """The very same command on each host."""
        return self.start(
            host, "orion", "hunt", "-n", "two", "-c", "orion.yaml", "--exp-max-trials", str(max_trials),
            "ppo-hpo", "run", "--config", "space.yaml", "--device", "cpu", "--parent", "{trial.parent}",
            PPO_HPO_STORE=self.store,
        )  # fmt: skip

    def trials(self) -> dict[str, Any]:
        """Orion's records, by id."""
        from orion.client import get_experiment

        database = {"type": "pickleddb", "host": str(self.database / "orion.pkl")}
        experiment = get_experiment("two", storage={"type": "legacy", "database": database})
        return {one.id: one for one in experiment.fetch_trials()}

    def place(self, host: str, one: Any) -> Path:
        """The directory of a trial, on the disk of a host."""
        return self.private(host) / Path(one.working_dir).relative_to(self.disk)

    def host_of(self, one: Any) -> str:
        """Where a trial was completed."""
        (host,) = [host for host in "ab" if self.completed_on(host, one)]
        return host

    def completed_on(self, host: str, one: Any) -> bool:
        """Whether a trial's result lies on a host; in a copied directory there is that of the lower rung."""
        with contextlib.suppress(FileNotFoundError):
            entries = json.loads((self.place(host, one) / "results.json").read_text())
            return {e["name"]: e["value"] for e in entries}["epochs"] == one.params["/task/epochs"]
        return False

    def kept(self, uid: str) -> list[int]:
        """The epochs of a trial's checkpoints in the store."""
        found = (self.served / "store" / "trials" / uid).glob("checkpoint-*.safetensors")
        return sorted(int(path.stem.rpartition("-")[2]) for path in found)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, (command, done.stderr)


def end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == code, output
    return output


def can_separate(folder: Path) -> bool:
    """Whether this process may make namespaces, and cables between them."""
    if importlib.util.find_spec("paramiko") is None or not all(
        shutil.which(name) for name in ("unshare", "nsenter", "ip", "hostname")
    ):
        return False
    probe = f"mount -t tmpfs none {folder} && hostname x && ip link add x type veth peer name y"
    command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", probe]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Client:
    """What Orion's preparation of a trial asks of a client."""

    def __init__(self, parent: Any, *command: str) -> None:
        self.parent, self.metadata = parent, {"user_args": list(command)}

    def get_trial(self, uid: str) -> Any:
        return self.parent if uid == self.parent.id else None


def test_orion_cannot_promote_without_the_parents_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When Orion itself can, this patch of `ppo_hpo.orion.fixes` is not needed any more."""
    from orion.client.runner import prepare_trial_working_dir
    from orion.core.utils import backward
    from orion.core.worker.trial import Trial

    import ppo_hpo.plugin

    assert ppo_hpo.plugin.loaded
    ours = backward.ensure_trial_working_dir

    def child_of(value: float) -> tuple[Any, Any]:
        params = [{"name": "lr", "type": "real", "value": value}]
        parent = Trial(experiment=1, params=params, exp_working_dir=str(tmp_path))
        child = Trial(experiment=1, params=params, parent=parent.id, exp_working_dir=str(tmp_path))
        return parent, child

    parent, child = child_of(0.1)
    monkeypatch.setattr(backward, "ensure_trial_working_dir", ours.__wrapped__)
    with pytest.raises(FileNotFoundError):
        prepare_trial_working_dir(Client(parent, "ppo-hpo", "run"), child)
    monkeypatch.setattr(backward, "ensure_trial_working_dir", ours)
    # What is not ours is left to Orion.
    with pytest.raises(FileNotFoundError):
        prepare_trial_working_dir(Client(parent, "./train.py", "--lr=1"), child)
    assert not os.path.exists(child.working_dir)
    for number, command in enumerate([["ppo-hpo"], ["/some/bin/ppo-hpo"], ["python", "-m", "ppo_hpo"]]):
        parent, child = child_of(0.2 + number)
        prepare_trial_working_dir(Client(parent, *command, "run"), child)
        assert os.listdir(child.working_dir) == []
    # Where it is there it is copied as ever.
    parent, child = child_of(0.9)
    Path(parent.working_dir).mkdir()
    (Path(parent.working_dir) / "a").touch()
    prepare_trial_working_dir(Client(parent, "ppo-hpo", "run"), child)
    assert os.listdir(child.working_dir) == ["a"]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with contextlib.ExitStack() as stack:
        yield Lab(tmp_path, stack)


def assert_as_undisturbed(place: Path, alone: Path) -> None:
    """A trial is, to the bit, the one that a process trains by itself from the beginning."""
    config = TrialConfig.from_mapping(yamlio.load(place / "config.yaml"))
    runner.run(config, alone, RunOptions("cpu"), console=False)
    name = f"checkpoint-{config.task.epochs:06}.safetensors"
    left, right = read(place / name), read(alone / name)
    assert arrays_digest(left.arrays) == arrays_digest(right.arrays)
    assert left.meta["curve"] == right.meta["curve"]
    assert (place / "curve.jsonl").read_bytes() == (alone / "curve.jsonl").read_bytes()
    objectives = [json.loads((path / "results.json").read_text())[0] for path in (place, alone)]
    assert objectives[0] == objectives[1]


def test_a_sweep_on_two_hosts(lab: Lab, tmp_path: Path) -> None:
    """A trial that is killed on one host resumes on the other, to the bit. So do promotions, both ways."""
    trials = lab.served / "store" / "trials"
    # Host A completes two trials, and is killed with its third one, as by a power cut.
    hunt = lab.hunt("a", 2)
    finish(hunt)
    before = set(os.listdir(trials))
    assert len(before) == 2
    hunt = lab.hunt("a", 6)

    def third() -> str | None:
        under_way = {uid: max(lab.kept(uid), default=0) for uid in set(os.listdir(trials)) - before}
        return next((uid for uid, epoch in under_way.items() if epoch not in (0, *RUNGS)), None)

    lost = wait_for(third, PATIENCE, pause=0.002)
    os.killpg(hunt.pid, signal.SIGKILL)
    hunt.wait()
    record = lab.trials()[lost]
    assert record.status == "reserved"
    assert not lab.completed_on("a", record)
    reached = max(lab.kept(lost))
    assert 0 < reached < record.params["/task/epochs"]
    # Host B takes it over, and resumes the sweep.
    said = finish(lab.start("b", "ppo-hpo", "retry", "two", "-c", "orion.yaml", "--trial", lost[:8]))
    assert f"{lost}  reserved  requeued" in said
    finish(lab.hunt("b", 6))
    # And A, back again, with what B did.
    finish(lab.hunt("a", 8))

    found = lab.trials()
    assert [one.status for one in found.values()].count("completed") >= 8
    assert found[lost].status == "completed"
    assert lab.host_of(found[lost]) == "b"
    statistics = {uid: {r.name: r.value for r in one.results} for uid, one in found.items()}
    assert statistics[lost]["continued_from_epoch"] == reached
    log = (lab.place("b", found[lost]) / "log.txt").read_text()
    assert f"found epoch {reached} in sftp://" in log or lab.store == str(lab.served)
    if lab.separate:
        rows = (lab.place("b", found[lost]) / "timing.jsonl").read_text().splitlines()
        assert {json.loads(row)["host"] for row in rows} == {"host-b"}
        assert not list((lab.folder / "disk").iterdir())
    # Promotions resumed from the end of their lower rung, also if that was on the other host.
    crossed = set()
    for uid, one in found.items():
        if one.status == "completed" and one.parent:
            parent = found[one.parent]
            if uid != lost:
                assert statistics[uid]["continued_from_epoch"] == statistics[parent.id]["epochs"]
            crossed.add(lab.host_of(parent) + lab.host_of(one))
    print("hosts as namespaces:", lab.separate, crossed)
    assert crossed & {"ab", "ba"}
    for uid, one in found.items():
        if one.status == "completed":
            assert_as_undisturbed(lab.place(lab.host_of(one), one), tmp_path / "alone" / uid)

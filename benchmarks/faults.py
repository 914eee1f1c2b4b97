"""Faults on purpose: does every trial of a sweep end where it would have ended undisturbed, to the bit?

    python benchmarks/faults.py --seeds 1 2 3 4 5    # Linux; about ten minutes each on two cores

Thirty trials of PPO on CartPole-v1 under ASHA (1, 3 and 9 epochs), by four workers, each an `orion hunt` of
its own on one PickledDB, as on a cluster. Meanwhile an adversary with a seed does at random instants what
`KINDS` says, and a supervisor does what its user would. It starts workers that ended again. Where a trial
is broken or nothing goes on it says `ppo-hpo retry`, which puts trials back, and tells the algorithm a result
that a worker stored but did not live to tell it (ASHA waits for it for ever). It releases the algorithm's
lock where its holder was killed, sooner than `ppo-hpo retry`, which waits for two minutes. At the end nobody
is disturbed any more, and what Orion proposed beyond the thirty is finished as well; a completed trial at
which a second process was killed is run once more by hand, so that it tidies up. Then

- every trial that Orion has must be completed;
- its objective, its curve's bytes and all arrays of its last checkpoint must equal those of one run of the
  same `config.yaml` that nobody disturbed;
- no life (the trials of one configuration, promotions included) may have begun more epochs twice than faults
  hit it, as its logs tell: an epoch counts when it is begun;
- no temporary file may be left.

Then `faults_executors.py` disturbs a sweep on each executor: a worker is killed while its peer is busy, and
the leader is told to stop.

Whenever no trial trains for more than ten seconds, though nobody is stopped, no disk is full and no worker
has just been started, some process must have printed why it waits. Each such wait is listed, with what was
printed. One without a reason is a failure.

Exit code 1 otherwise. `faults.c` is preloaded into every worker and trial. It sets their clock, and kills a
worker while it copies a directory. Without gcc these kinds are left out. Root gives the sweep a host name of
its own, mounts a tmpfs for the trials and one for the database, and runs everything else without its right to
override permissions (`setpriv` of util-linux), so that they bite. Whoever is not root fills the disk by a
limit on the size of files (`RLIMIT_FSIZE`) on every running trial instead. A heartbeat of 3 seconds lets
Orion take a trial from its worker after 15, dead or not. `max_broken` is high, because faults from outside
say nothing about the space. Appends to `results/faults.json` and writes `results/faults.md` from it.
"""

from __future__ import annotations

import argparse
import collections
import json
import mmap
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faults_executors
import machine

RESULTS = Path(__file__).resolve().parent / "results"
BIN = Path(sys.executable).parent
NAME, TRIALS, WORKERS = "faults", 30, 4
HEARTBEAT = 3
# Orion frees a trial after five of them; a process that is stopped for longer loses its trial.
STOPPED = (5 * HEARTBEAT + 1.0, 5 * HEARTBEAT + 4.0)
#: Sizes in MiB of what root mounts.
DISKS = {"trials": 48, "database": 16}
PATIENCE = 1800.0
SPACE = """
env: {id: CartPole-v1, n_envs: 8, max_episode_steps: 200}
task: {epochs: 'orion~fidelity(1, 9, base=4)', max_epochs: 9, steps_per_epoch: 12288, eval_episodes: 8}
optimizer: {lr: 'orion~loguniform(1e-4, 1e-2)'}
normalize: {norm_obs: 'orion~choices([True, False])', norm_reward: 'orion~choices([True, False])'}
model: {width: 'orion~choices([16, 32])'}
ppo: {n_steps: 64, batch_size: 128, n_epochs: 'orion~choices([6, 8])', clip_range: 'orion~uniform(0.1, 0.3)'}
"""
#: What is done, how often in one sweep, and how many faults each is.
KINDS = {
    "trial: SIGKILL": 6,
    "trial: SIGTERM": 2,
    "worker: SIGKILL": 3,
    "worker and trial: SIGKILL": 2,
    "disk full": 2,
    "checkpoint cut short, SIGKILL": 2,
    "checkpoint with a flipped bit, SIGKILL": 2,
    "curve cut short, SIGKILL": 1,
    "directory unreadable": 2,
    "trial: SIGSTOP past the heartbeat": 2,
    "worker: SIGSTOP past the heartbeat": 1,
    "worker: SIGTERM": 2,
    "worker: SIGKILL while it copies a directory": 2,
    "clock set forward by an hour": 1,
    "clock set back by two hours": 1,
    "host name changed": 2,
    "database's disk full": 2,
    **faults_executors.KINDS,
}
#: Kinds that need `faults.c`, and root.
LIBRARY_KINDS = (
    "worker: SIGKILL while it copies a directory",
    "clock set forward by an hour",
    "clock set back by two hours",
)
ROOT_KINDS = ("host name changed",)
#: Seconds that a worker may take to end after SIGTERM, and for which all may wait without a printed reason.
WORKER_ENDS, UNEXPLAINED = 30.0, 10.0
# What a process prints that says why it waits.
_REASON = re.compile(r"wait|tries again|stops|locked|in use|requeue|lost", re.I)
#: What sweeps showed before and while this was written, for the page.
FINDINGS = """
What these sweeps and those before them showed:

- A trial's directory that could not be read gave a traceback; now it is one sentence. The trial is
  interrupted and its hunt stops, and both go on when the hunt is started again.
- A trial whose only checkpoint was torn stayed broken for ever; now it starts again.
- A first sweep of seed 3 failed: a process was killed while it looked at a trial that another one had just
  completed, and left its empty claim there. Nobody comes to a completed trial again, so that the supervisor
  here runs it once more, as "run again to tidy up" counts.
- A worker that is killed after it stored a result, before it told the algorithm, leaves Orion's ASHA waiting
  for that result ("results told again").
- Sweeps stood still for up to half a minute while Orion's lock went from hand to hand among workers that
  waited. A worker without a trial asks the algorithm again at once, and so holds its lock nearly always. One
  that has a result polls for the lock once in a second, and mostly finds it taken. `ppo_hpo.orion.waiting`
  changes both, and lets a worker say for what it waits.
"""
_LINE = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) INFO (.*)$", re.M)
_START = re.compile(r"(?:resumes, and )?trains(?: for \S+)? from epoch (\d+) to (\d+) on ")


@dataclass
class Fault:
    """One thing that the adversary did.

    Attributes:
        at: seconds since the sweep's start.
        kind: one of `KINDS`.
        faults: how many it counts for: a torn file and the kill that makes it matter are two.
        trials: names of the directories of the trials it hit.
        process: whom, where it was one.
    """

    at: float
    kind: str
    faults: int
    trials: list[str]
    process: int | None = None

    def __str__(self) -> str:
        return f"{self.at:7.2f} s  {self.kind:40} {self.process or '':>8}  {' '.join(self.trials)}"


@dataclass
class Running:
    """A process that runs a trial."""

    pid: int
    parent: int
    directory: Path
    stopped: bool


@dataclass
class Sweep:
    """The sweep, its supervisor and its adversary, in one folder."""

    folder: Path
    seed: int
    tmpfs: bool
    count: int
    interval: float
    faults: list[Fault] = field(default_factory=list)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    #: What is still to be undone, with when.
    pending: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    max_trials: int = TRIALS
    #: When no trial trained for long: since when, for how long, and what was printed meanwhile.
    waits: list[dict[str, Any]] = field(default_factory=list)
    slowest_end: float = 0.0
    by_executor: list[faults_executors.Disturbed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trials = self.folder / "trials"
        self.trials.mkdir(exist_ok=True)
        self.database = self.folder / "database" / "orion.pkl"
        self.database.parent.mkdir(exist_ok=True)
        self.library = Library(self.folder) if shutil.which("gcc") else None
        self.random = random.Random(self.seed)
        self.started = time.monotonic()
        self.full: Fault | None = None
        self.stopped: set[int] = set()
        self.lock_seen: tuple[Any, float] = (None, 0.0)
        self.waiting_since = self.started
        self.retrying: subprocess.Popen[bytes] | None = None
        self.retried = self.folder / "retried.txt"
        self.starting = 0.0  # seconds that a worker may need until it has its first trial
        self.begun: dict[int, float] = {}  # when each worker was started
        self.idle: tuple[float, int] | None = None  # since when nothing trains, and how much was printed then
        self.copying: Fault | None = None
        self.ending: dict[int, float] = {}  # workers that were told to end, and when
        (self.folder / "space.yaml").write_text(SPACE)
        (self.folder / "orion.yaml").write_text(
            f"experiment:\n  algorithm: {{asha: {{seed: {self.seed}, num_rungs: 3, num_brackets: 1}}}}\n"
            f"  working_dir: {self.trials}\n  max_broken: 1000\n"
            f"storage: {{type: legacy, database: {{type: pickleddb, host: {self.database}}}}}\n"
            f"worker: {{n_workers: 1, executor: singleexecutor, max_broken: 1000, heartbeat: {HEARTBEAT}}}\n"
        )

    # ------------------------------------------------------------------ the sweep

    def start_worker(self) -> subprocess.Popen[bytes]:
        own = {k: v for k, v in os.environ.items() if not k.startswith("ORION_")}
        environment = {
            **own,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.folder),
            "ORION_HEARTBEAT": str(HEARTBEAT),
            **(self.library.environment if self.library else {}),
        }
        command = [str(BIN / "orion"), "hunt", "-n", NAME, "-c", "orion.yaml"]
        command += ["--exp-max-trials", str(self.max_trials)]
        command += ["ppo-hpo", "run", "--config", "space.yaml", "--device", "cpu"]
        with open(self.folder / "output.txt", "ab") as output:
            worker = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.begun[worker.pid] = time.monotonic()
        return worker

    def running(self) -> list[Running]:
        """The processes that run trials now, orphans included."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            paths = [Path(os.fsdecode(a)) for a in arguments if a.endswith(b".conf")]
            if paths and paths[0].parent.parent == self.trials and state[0] not in "ZX":
                found.append(Running(int(entry.name), int(state[1]), paths[0].parent, state[0] == "T"))
        return sorted(found, key=lambda running: running.pid)

    def client(self) -> Any:
        from orion.client import get_experiment

        storage = {"type": "legacy", "database": {"type": "pickleddb", "host": str(self.database)}}
        return get_experiment(NAME, storage=storage, mode="w")

    def supervise(self) -> None:
        """What a cluster's supervisor and its user do."""
        if self.full is not None and "database" in self.full.kind:
            return  # It would wait for the database as well, and it is this process that makes room again.
        for index, worker in enumerate(self.workers):
            if worker.poll() is None:
                continue
            if (since := self.ending.pop(worker.pid, None)) is not None:
                self.slowest_end = max(self.slowest_end, time.monotonic() - since)
            if self.completed < self.max_trials:
                self.counts["workers started again"] += 1
                self.workers[index] = self.start_worker()
        client = self.client()
        trials = client.fetch_trials()
        self.completed = sum(trial.status == "completed" for trial in trials)
        self.proposed = len(trials)
        if self.full is not None:
            reserved = {Path(trial.working_dir).name for trial in trials if trial.status == "reserved"}
            self.full.trials = sorted({*self.full.trials, *reserved})
        if self.completed != self.proposed or self.completed >= self.max_trials:
            self.waiting_since = time.monotonic()
        stands_still = time.monotonic() - self.waiting_since > 20
        if stands_still:
            self.waiting_since = time.monotonic()
        if stands_still or any(trial.status == "broken" for trial in trials):
            self.say_retry()
        # Its time says when it was last taken or given back.
        (lock,) = client.storage._db.read("algo", {"experiment": client.id})
        if not lock["locked"] or lock["heartbeat"] != self.lock_seen[0]:
            self.lock_seen = (lock["heartbeat"], time.monotonic())
        elif time.monotonic() - self.lock_seen[1] > STOPPED[1] + 5:
            # No worker needs that long, not even one that was stopped: its holder was killed.
            client.storage.release_algorithm_lock(uid=client.id)
            self.counts["algorithm locks released"] += 1

    def say_retry(self) -> None:
        """`ppo-hpo retry` in a process of its own, one at a time: the adversary does not wait for it."""
        if self.retrying is not None and self.retrying.poll() is None:
            return
        self.counts["ppo-hpo retry"] += 1
        self.retrying = subprocess.Popen(
            [BIN / "ppo-hpo", "retry", NAME, "-c", "orion.yaml", "--status", "broken"],
            cwd=self.folder, stdout=self.retried.open("ab"), stderr=subprocess.STDOUT,
            env={**os.environ, **(self.library.environment if self.library else {})},
        )  # fmt: skip

    def count_retried(self) -> None:
        """What `ppo-hpo retry` said that it did."""
        if self.retrying is not None:
            self.retrying.wait()
        text = self.retried.read_text() if self.retried.exists() else ""
        self.counts["broken put back"] += len(re.findall(r"  broken .*requeued$", text, re.M))
        self.counts["results told again"] += text.count("the algorithm did not know its result: repaired")

    def put_back(self, client: Any, trial: Any) -> None:
        from orion.storage.base import FailedUpdate

        status = trial.status
        try:
            client.storage.set_trial_status(trial, "interrupted", was=status)
            self.counts[f"{status} put back"] += 1
        except FailedUpdate:
            pass  # somebody was faster

    def run(self) -> None:
        """The sweep with its faults, until all that Orion proposed is done and nobody runs any more."""
        self.completed = self.proposed = 0
        first = self.start_worker()
        self.workers = [first]
        self.wait_for(lambda: bool(self.running()), "the first trial")
        # What the next ones may need: they start beside others.
        self.starting = 2 * (time.monotonic() - self.started)
        self.workers += [self.start_worker() for _ in range(WORKERS - 1)]
        kinds = [kind for kind in KINDS if self.tmpfs or kind not in ROOT_KINDS]
        kinds = [kind for kind in kinds if self.library or kind not in LIBRARY_KINDS]
        deck = [kind for kind in kinds if kind not in faults_executors.KINDS for _ in range(KINDS[kind])]
        self.random.shuffle(deck)
        deck = deck[: self.count]
        due = time.monotonic() + self.random.expovariate(1 / self.interval)
        look = 0.0
        while deck or self.pending or self.completed < self.max_trials:
            now = time.monotonic()
            if now - self.started > PATIENCE:
                raise SystemExit(f"the sweep was not done after {PATIENCE:g} s; it lies in {self.folder}")
            for item in [item for item in self.pending if item[0] <= now]:
                self.pending.remove(item)
                item[1]()
            if self.full is not None:
                here = {running.directory.name for running in self.running()}
                self.full.trials = sorted(here | set(self.full.trials))
            if self.completed >= self.max_trials:
                deck = []
            if deck and now >= due and self.strike(deck[0]):
                deck.pop(0)
                due = now + self.random.expovariate(1 / self.interval)
            self.see_copying()
            if now >= look:
                self.supervise()
                self.see_waits()
                look = time.monotonic() + 1.0
            time.sleep(0.05)
        self.disturbed = time.monotonic() - self.started
        self.finish()

    def finish(self) -> None:
        """Undisturbed: what Orion proposed beyond the thirty is finished too."""
        self.wait_for(lambda: all(worker.poll() is not None for worker in self.workers), "the workers")
        self.wait_for(lambda: not self.running(), "the orphans")
        self.count_retried()
        if self.library:
            self.library.set_clock(0.0)
            self.library.kill_copier(0)
        for _ in range(20):
            client = self.client()
            trials = client.fetch_trials()
            left = [trial for trial in trials if trial.status != "completed"]
            if not left:
                self.tidy_up(trials)
                return
            for trial in left:
                if trial.status in ("broken", "reserved"):
                    self.put_back(client, trial)
            if client.storage.get_algorithm_lock_info(uid=client.id).locked:
                client.storage.release_algorithm_lock(uid=client.id)
                self.counts["algorithm locks released"] += 1
            self.max_trials = len(trials)
            self.start_worker().wait()
        raise SystemExit(f"trials are left over that no worker finishes; they lie in {self.folder}")

    def tidy_up(self, trials: list[Any]) -> None:
        """Run a trial again in which a process was killed after another one had completed it.

        It left its claim, which the next process takes away; but nobody comes to a trial that is completed.
        """
        for trial in trials:
            directory = Path(trial.working_dir)
            if any(directory.rglob("stage-*")) or any(directory.rglob(".ppo-hpo-*")):
                self.counts["trials run again to tidy up"] += 1
                command = [BIN / "ppo-hpo", "run", "--config", directory / "config.yaml"]
                command += ["--dir", directory, "--device", "cpu"]
                subprocess.run(command, cwd=self.folder, check=False, stdout=subprocess.DEVNULL)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        limit = time.monotonic() + 120
        while not condition():
            if time.monotonic() > limit:
                raise SystemExit(f"waited in vain for {what}; all of it lies in {self.folder}")
            time.sleep(0.1)

    # -------------------------------------------------------------- the adversary

    def strike(self, kind: str) -> bool:
        """Do it; False where there is nobody to do it to now."""
        running = self.running()
        # What is stopped stays so until Orion has given its trial away.
        running = [one for one in running if not one.stopped]
        if not running:
            return False
        victim = self.random.choice(running)
        fault = Fault(round(time.monotonic() - self.started, 2), kind, 1, [victim.directory.name], victim.pid)
        try:
            if not self.act(fault, victim, running):
                return False
        except ProcessLookupError:
            return False
        if fault is not self.copying:  # Whom that hits shows later.
            self.note(fault)
        return True

    def act(self, fault: Fault, victim: Running, running: list[Running]) -> bool:
        """Do what a fault's kind says; False where that cannot be done now."""
        kind = fault.kind
        if kind in ("trial: SIGKILL", "trial: SIGTERM"):
            os.kill(victim.pid, signal.SIGKILL if "KILL" in kind else signal.SIGTERM)
        elif kind in (*LIBRARY_KINDS, *ROOT_KINDS):
            return self.strike_machine(fault)
        elif kind.startswith("worker"):
            return self.strike_worker(fault, running)
        elif kind == "trial: SIGSTOP past the heartbeat":
            self.stop(victim.pid)
        elif "full" in kind:
            if self.full is not None:
                return False
            self.fill_disk(fault)
        elif kind == "directory unreadable":
            fault.process = None
            self.lock_up(victim.directory)
        else:
            fault.faults = 2
            return self.tear(victim, kind)
        return True

    def note(self, fault: Fault) -> None:
        self.faults.append(fault)
        print(fault, flush=True)

    def note_executor(self, kind: str, trials: list[str], process: int) -> None:
        self.note(Fault(round(time.monotonic() - self.started, 2), kind, 1, trials, process))

    def strike_worker(self, fault: Fault, running: list[Running]) -> bool:
        """Any worker, whatever it does now: runs a trial, waits, asks the algorithm, copies a directory."""
        if self.full is not None:
            return False
        workers = [worker.pid for worker in self.workers if worker.poll() is None]
        workers = [pid for pid in workers if pid not in self.stopped]
        if not workers:
            return False
        fault.process = worker = self.random.choice(workers)
        own = [one for one in running if one.parent == worker]
        fault.trials = [one.directory.name for one in own] or self.reserved()
        if "SIGSTOP" in fault.kind:
            self.stop(worker)
            return True
        if "SIGTERM" in fault.kind:
            self.ending[worker] = time.monotonic()
            os.kill(worker, signal.SIGTERM)
            return True
        os.kill(worker, signal.SIGKILL)
        for one in own if "trial" in fault.kind else []:
            os.kill(one.pid, signal.SIGKILL)
        return True

    def strike_machine(self, fault: Fault) -> bool:
        """What hits the machine, and with it every trial that some worker has."""
        fault.process = None
        if self.full is not None:
            return False
        if "copies" in fault.kind:
            assert self.library is not None
            if self.copying is None:
                self.library.kill_copier(self.random.randint(1, 6))
                self.copying = fault
                return True
            return False
        trials = self.client().fetch_trials()
        fault.trials = sorted(Path(t.working_dir).name for t in trials if t.status == "reserved")
        if "host name" in fault.kind:
            socket.sethostname(f"host-{self.random.randrange(10**6)}")
        else:
            assert self.library is not None
            self.library.set_clock(self.library.ahead + (3600.0 if "forward" in fault.kind else -7200.0))
        return True

    def see_copying(self) -> None:
        """Write down that a worker was killed while it copied a directory, once one was."""
        fault = self.copying
        if self.full is None and fault is not None and self.library and not self.library.copier_lives:
            fault.at, fault.trials = round(time.monotonic() - self.started, 2), self.reserved()
            self.copying = None
            self.note(fault)

    def see_waits(self) -> None:
        """Note since when nothing trains, and what was printed meanwhile."""
        now, output = time.monotonic(), self.folder / "output.txt"
        busy = any(not one.stopped for one in self.running()) or self.completed >= self.max_trials
        starts = any(w.poll() is None and now < self.begun[w.pid] + self.starting for w in self.workers)
        if not busy and not (starts or self.stopped or self.full is not None):
            self.idle = self.idle or (now, output.stat().st_size)
            return
        if self.idle is not None and now - self.idle[0] > UNEXPLAINED:
            with output.open(errors="replace") as file:
                file.seek(self.idle[1])
                lines = [line.strip() for line in file if _REASON.search(line)]
            since, seconds = round(self.idle[0] - self.started, 1), round(now - self.idle[0], 1)
            self.waits.append({"at": since, "seconds": seconds, "reason": lines[0][:300] if lines else None})
            told = lines[0][:200] if lines else "no reason was printed"
            print(f"{since:7.2f} s  nothing trained for {seconds} s: {told}", flush=True)
        self.idle = None

    def reserved(self) -> list[str]:
        """Directories of the trials that some worker has and no process runs: one of them was hit."""
        begun = {one.directory.name for one in self.running()}
        trials = self.client().fetch_trials()
        return sorted({Path(t.working_dir).name for t in trials if t.status == "reserved"} - begun)

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self.pending.append((time.monotonic() + seconds, action))

    def stop(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        self.stopped.add(pid)

        def go_on() -> None:
            self.stopped.discard(pid)
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                self.counts["ended while stopped"] += 1

        self.later(self.random.uniform(*STOPPED), go_on)

    def fill_disk(self, fault: Fault) -> None:
        fault.process, fault.trials, self.full = None, [], fault
        database = "database" in fault.kind
        ballast = (self.database.parent if database else self.trials) / "ballast"

        def pids() -> list[int]:
            return [w.pid for w in self.workers] if database else [one.pid for one in self.running()]

        def fill() -> None:
            if self.tmpfs:
                with ballast.open("ab", buffering=0) as file:
                    try:
                        while True:
                            file.write(bytes(4096))
                    except OSError:
                        pass
            else:
                for pid in pids():
                    limit_size(pid, 1024)

        def make_room() -> None:
            ballast.unlink(missing_ok=True)
            for pid in pids() if not self.tmpfs else []:
                limit_size(pid, resource.RLIM_INFINITY)
            self.full = None

        seconds = self.random.uniform(1.0, 4.0)
        fill()
        # What others remove in the meantime is taken too.
        for tenth in range(1, int(10 * seconds)):
            self.later(tenth / 10, fill)
        self.later(seconds, make_room)

    def lock_up(self, directory: Path) -> None:
        """Nobody enters, reads or writes the trial's directory for a while."""
        mode = directory.stat().st_mode & 0o777
        directory.chmod(0)
        self.later(self.random.uniform(1.0, 4.0), lambda: directory.chmod(mode))

    def tear(self, victim: Running, kind: str) -> bool:
        """Spoil a file of a trial and kill it, so that it has to be read again."""
        from ppo_hpo.spec.errors import UserError
        from ppo_hpo.state.checkpoint import Storage

        # Stopped, so that it does not end in between: nobody could put back what a completed trial lost.
        os.kill(victim.pid, signal.SIGSTOP)
        done = False
        try:
            paths = Storage(victim.directory).paths()
            if not paths or int(paths[0].stem[-6:]) >= self.epochs(victim):
                return False
            path = victim.directory / "curve.jsonl" if kind.startswith("curve") else paths[0]
            content = bytearray(path.read_bytes())
            if not content:
                return False  # cut to nothing before, and not yet read again
            if "flipped" in kind:
                bit = self.random.randrange(8 * len(content))
                content[bit // 8] ^= 1 << bit % 8
            else:
                content = content[: self.random.randrange(len(content))]
            path.write_bytes(content)
            done = True
        except (OSError, UserError):
            return False  # its directory is unreadable just now
        finally:
            os.kill(victim.pid, signal.SIGKILL if done else signal.SIGCONT)
        return True

    def epochs(self, running: Running) -> int:
        """Of the trial, as Orion asked for them."""
        from ppo_hpo.spec import yamlio

        arguments = Path(f"/proc/{running.pid}/cmdline").read_bytes().split(b"\0")
        path = next(Path(os.fsdecode(a)) for a in arguments if a.endswith(b".conf"))
        return int(yamlio.load(path)["task"]["epochs"])  # type: ignore[index,call-overload]


class Library:
    """`faults.c`, compiled, and the file through which it is told what to do."""

    def __init__(self, folder: Path) -> None:
        library, path = folder / "faults.so", folder / "faults.bin"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
        path.write_bytes(bytes(16))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 16)
        self.environment = {"LD_PRELOAD": str(library), "FAULTS_FILE": str(path)}

    @property
    def ahead(self) -> float:
        return float(struct.unpack_from("d", self._memory)[0])

    def set_clock(self, ahead: float) -> None:
        struct.pack_into("d", self._memory, 0, ahead)

    def kill_copier(self, number: int) -> None:
        struct.pack_into("i", self._memory, 8, number)

    @property
    def copier_lives(self) -> bool:
        return int(struct.unpack_from("i", self._memory, 8)[0]) > 0


def limit_size(pid: int, soft: int) -> None:
    try:
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    except ProcessLookupError:
        pass


# ---------------------------------------------------------------------- judgement


@dataclass
class End:
    """Where a trial ended, or would have."""

    objective: float
    epoch: int
    arrays: str
    curve: str


def end_of(directory: Path, objective: float) -> End:
    import hashlib

    from ppo_hpo.state.checkpoint import Storage, arrays_digest, read

    last = read(Storage(directory).paths()[0])
    curve = hashlib.sha256((directory / "curve.jsonl").read_bytes()).hexdigest()
    return End(objective, last.epoch, arrays_digest(last.arrays), curve)


def undisturbed(configuration: Path) -> End:
    """One run of a trial's `config.yaml` from its beginning, in a process of its own."""
    from ppo_hpo.spec import yamlio
    from ppo_hpo.spec.config import TrialConfig
    from ppo_hpo.trial import runner
    from ppo_hpo.trial.options import RunOptions

    with tempfile.TemporaryDirectory() as folder:
        config = TrialConfig.from_mapping(yamlio.load(configuration))
        outcome = runner.run(config, Path(folder), RunOptions("cpu"), console=False)
        return end_of(Path(folder), outcome.objective)


def begun_twice(directories: list[Path]) -> int:
    """Epochs that were begun again in one life, from its logs, which promotions copy.

    The last epoch that a process began counts too, where it was killed: that is the most it can have lost.
    """
    lines = sorted({line for d in directories for line in _LINE.findall((d / "log.txt").read_text())})
    begun = last = 0
    open_run = False
    for _, text in lines:
        if start := _START.match(text):
            begun += open_run
            open_run = True
            last = max(last, int(start[2]))
        elif re.match(r"epoch \d+/", text):
            begun += 1
        elif text.startswith(("done:", "has done")):
            open_run = False
    return begun + open_run - last


def judge(sweep: Sweep) -> dict[str, Any]:
    """Compare with undisturbed runs; the rows of the table."""
    import torch  # noqa: F401 - once for all forks below

    from ppo_hpo.spec import yamlio
    from ppo_hpo.spec.config import TrialConfig

    trials = sweep.client().fetch_trials()
    for one in sweep.by_executor:
        trials += faults_executors.trials_of(one)
    completed = [trial for trial in trials if trial.status == "completed"]
    complaints = [f"{trial.id} is {trial.status}" for trial in trials if trial.status != "completed"]
    complaints += [complaint for one in sweep.by_executor for complaint in one.complaints]
    paths = [Path(trial.working_dir) / "config.yaml" for trial in completed]
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        references = pool.map(undisturbed, paths, chunksize=1)
    equal = 0
    lives: dict[str, list[Path]] = collections.defaultdict(list)
    for trial, reference in zip(completed, references, strict=True):
        directory = Path(trial.working_dir)
        config = TrialConfig.from_mapping(yamlio.load(directory / "config.yaml"))
        # Each sweep on an executor has lives of its own.
        lives[f"{directory.parent} {config.identity()}"].append(directory)
        if config.task.epochs != trial.params.get("/task/epochs", config.task.epochs):
            complaints.append(f"{trial.id} has {config.task.epochs} epochs in its configuration")
        try:
            end = end_of(directory, trial.objective.value)
        except Exception as error:  # it is what is looked for here
            complaints.append(f"{trial.id}: {error}")
            continue
        equal += end == reference
        if end != reference:
            complaints.append(f"{trial.id} ended in {end}, undisturbed in {reference}")
    repeated = 0
    for life in lives.values():
        names = {directory.name for directory in life}
        hits = sum(fault.faults for fault in sweep.faults if names & set(fault.trials))
        twice = begun_twice(life)
        repeated += twice
        if twice > hits:
            complaints.append(f"{sorted(names)}: {twice} epochs begun twice, {hits} faults")
    unexplained = [wait for wait in sweep.waits if wait["reason"] is None]
    complaints += [
        f"nothing trained for {w['seconds']} s from {w['at']} s, and nobody said why" for w in unexplained
    ]
    if sweep.slowest_end > WORKER_ENDS:
        complaints.append(f"a worker had not ended {sweep.slowest_end:.0f} s after SIGTERM")
    left = [
        path
        for pattern in (".ppo-hpo-*", "stage-*", ".new-*", ".old-*", ".*.copy")
        for path in sweep.trials.rglob(pattern)
    ]
    complaints += [f"left over: {path.relative_to(sweep.trials)}" for path in left]
    output = (sweep.folder / "output.txt").read_text(errors="replace")
    by_kind = collections.Counter(fault.kind.partition(" (")[0] for fault in sweep.faults)
    return {
        "seed": sweep.seed,
        "passed": not complaints,
        "complaints": complaints,
        "faults": sum(fault.faults for fault in sweep.faults),
        "by_kind": {kind: by_kind[kind] for kind in KINDS},
        "trials": len(trials),
        "configurations": len(lives),
        "completed": len(completed),
        "equal": equal,
        "epochs_begun_twice": repeated,
        "temporary_files": len(left),
        "waits_over_ten_seconds": len(sweep.waits),
        "waits_without_a_reason": len(unexplained),
        "waits": sweep.waits,
        "seconds_to_end_after_sigterm": round(
            max([sweep.slowest_end, *(one.slowest_end for one in sweep.by_executor)]), 1
        ),
        "reservations_lost": output.count("was given to another worker"),
        "trials_waited_for": output.count("is in use by"),
        **{name.replace(" ", "_"): count for name, count in sorted(sweep.counts.items())},
        "disk": "a tmpfs filled up" if sweep.tmpfs else "RLIMIT_FSIZE of 1 KiB on every running trial",
        "seconds": round(sweep.disturbed, 1),
        "log": [str(fault) for fault in sweep.faults],
    }


# ------------------------------------------------------------------------ results


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown, a row for each seed."""
    rows = [
        ("seed", "seed"), ("faults", "faults"), ("trials", "trials"), ("completed", "completed"),
        ("bit-equal", "equal"), ("epochs begun twice", "epochs_begun_twice"),
        ("temporary files", "temporary_files"), ("workers started again", "workers_started_again"),
        ("broken trials put back", "broken_put_back"), ("locks released", "algorithm_locks_released"),
        ("results told again", "results_told_again"), ("reservations lost", "reservations_lost"),
        ("run again to tidy up", "trials_run_again_to_tidy_up"),
        ("waits over 10 s", "waits_over_ten_seconds"), ("without a reason", "waits_without_a_reason"),
        ("slowest end after SIGTERM (s)", "seconds_to_end_after_sigterm"), ("seconds", "seconds"),
    ]  # fmt: skip
    lines = ["| " + " | ".join(title for title, _ in rows) + " | passed |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for run in runs:
        cells = [str(run.get(key, 0)) for _, key in rows]
        lines.append("| " + " | ".join(cells) + f" | {'yes' if run['passed'] else '**no**'} |")
    lines += ["", "| fault | " + " | ".join(f"seed {run['seed']}" for run in runs) + " | all |"]
    lines.append("|---" * (len(runs) + 2) + "|")
    for kind in KINDS:
        counts = [run["by_kind"].get(kind, 0) for run in runs]
        lines.append(f"| {kind} | " + " | ".join(map(str, counts)) + f" | {sum(counts)} |")
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any]) -> None:
    path = RESULTS / "faults.json"
    content = json.loads(path.read_text()) if path.exists() else {"runs": []}
    content["machine"] = machine.describe()
    runs = [run for run in content["runs"] if run["seed"] != result["seed"]]
    content["runs"] = sorted([*runs, result], key=lambda run: int(run["seed"]))
    path.write_text(json.dumps(content, indent=1) + "\n")
    total = sum(run["faults"] for run in content["runs"])
    page = (
        "# Faults on purpose\n\n"
        f"`benchmarks/faults.py` says what is done and compared: {total} faults in {len(content['runs'])} "
        "sweeps. A checkpoint or curve that is spoiled counts as two faults, with the kill that makes it "
        "matter; all other rows of the second table count one. Seconds are of the sweep, on a machine that "
        f"others used too.\n\n{table(content['runs'])}{FINDINGS}\n{machine.sentence(content['machine'])}\n"
    )
    (RESULTS / "faults.md").write_text(page)


def sweep_in(folder: Path, arguments: argparse.Namespace) -> int:
    """As the user that trials run as."""
    sweep = Sweep(folder, arguments.seeds[0], arguments.tmpfs, arguments.faults, arguments.interval)
    try:
        sweep.run()
        sweep.by_executor = faults_executors.sweeps(
            folder, folder / "space.yaml", arguments.seeds[0], sweep.note_executor
        )
        result = judge(sweep)
    finally:
        for running in sweep.running():
            os.kill(running.pid, signal.SIGKILL)
        for worker in sweep.workers:
            worker.kill()
    (folder / "outcome.json").write_text(json.dumps(result))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seeds", type=int, nargs="+", required=True, metavar="S", help="of the adversary and of ASHA"
    )
    parser.add_argument("--faults", type=int, default=sum(KINDS.values()), metavar="N", help="at most")
    parser.add_argument(
        "--interval", type=float, default=3.0, metavar="SECONDS", help="mean time between two"
    )
    parser.add_argument("--keep", action="store_true", help="keep the sweep's folder")
    parser.add_argument("--quick", action="store_true", help="write no results")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tmpfs", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        return sweep_in(arguments.inside, arguments)
    codes = [one_seed(arguments, seed) for seed in arguments.seeds]
    return max(codes)


def one_seed(arguments: argparse.Namespace, seed: int) -> int:
    """The sweeps of one seed, in a folder of their own; 0 if all is as it should be."""
    root = os.geteuid() == 0
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    command = [sys.executable, __file__, "--inside", str(folder), "--seeds", str(seed)]
    command += ["--faults", str(arguments.faults), "--interval", str(arguments.interval)]
    result = None
    try:
        if root:
            for name in DISKS:
                (folder / name).mkdir()
                options = f"size={DISKS[name]}m,mode=755"
                subprocess.run(["mount", "-t", "tmpfs", "-o", options, "faults", folder / name], check=True)
            # What root would otherwise do in spite of a mode.
            rights = "-dac_override,-dac_read_search"
            command = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *command, "--tmpfs"]
            command = ["unshare", "--uts", *command]
        code = subprocess.run(command).returncode
        if code == 0:
            result = json.loads((folder / "outcome.json").read_text())
    finally:
        if root and not (arguments.keep or result is None):
            for name in DISKS:
                subprocess.run(["umount", folder / name], check=False)
        if arguments.keep or result is None:
            print(f"the sweep lies in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if result is None:
        return 1
    for complaint in result["complaints"]:
        print(f"wrong: {complaint}")
    print(table([result]))
    if not arguments.quick:
        write({**result, "commit": machine.commit()})
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())

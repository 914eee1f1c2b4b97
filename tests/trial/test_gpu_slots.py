"""GPUs shared out: the rules by hand, the driver by what its documentation shows, places by real processes.

No GPU is needed, and none is used. `nvidia-smi` is a script here that prints what it was given.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from orion.client import get_experiment

import ppo_hpo
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import MachineError, UserError
from ppo_hpo.sweeps.executors import make
from ppo_hpo.trial import gpu_detection, gpu_slots
from ppo_hpo.trial.gpu_detection import Card, cards, device_name, visible
from ppo_hpo.trial.gpu_slots import choose
from ppo_hpo.trial.options import RunOptions
from tests.runs import run_quietly

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 60
# NVIDIA's MIG User Guide, "Device Enumeration", drivers from R470 on; three of its GPUs, not all instances.
MIG_LISTING = """\
GPU 0: A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 1g.5gb      Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 1g.5gb      Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: A100-SXM4-40GB (UUID: GPU-0aa11ebd-627f-af3f-1a0d-4e1fd92fd7b0)
  MIG 2g.10gb     Device  0: (UUID: MIG-0c757cd7-e942-5726-a0b8-0e8fb7067135)
GPU 2: A100-SXM4-40GB (UUID: GPU-5d5ba0d6-0000-627f-1a0d-4e1fd92fd7b0)
"""
# As drivers before R470 name instances, from an administrator's notes.
OLD_LISTING = """\
GPU 0: A100-PCIE-40GB (UUID: GPU-0069414c-9f30-41f9-d5d8-87890423f0c4)
  MIG 1g.5gb Device 0: (UUID: MIG-GPU-0069414c-9f30-41f9-d5d8-87890423f0c4/7/0)
  MIG 1g.5gb Device 1: (UUID: MIG-GPU-0069414c-9f30-41f9-d5d8-87890423f0c4/8/0)
"""
A, B, C = "GPU-aaaa1111", "GPU-aaaa2222", "GPU-cccc3333"
EQUAL = (Card("X", A, 100), Card("X", B, 80), Card("X", C, 30))
MIXED = (Card("X", A, 100), Card("Y", B, 80))


def names(found: Any) -> list[str]:
    return [gpu.key for gpu in found]


# ------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("auto", "auto"),
        ("cpu", "cpu"),
        ("cuda", "cuda"),
        ("cuda:12", "cuda:12"),
        ("cuda:2,0", "cuda:2,0"),
        ([1, 0], "cuda:1,0"),
        (("cuda:1", "cuda:3"), "cuda:1,3"),
    ],
)
def test_names_of_devices(given: Any, name: str) -> None:
    assert device_name(given) == name


@pytest.mark.parametrize(
    "given",
    ["", "gpu", "cuda:", "cuda:-1", "cuda:1,", "cuda:1, 2", "cpu:0", "CUDA", "cuda:²", [], [-1], None, 0],
)
def test_invalid_devices(given: Any) -> None:
    with pytest.raises(UserError, match=r"`device` must be auto, cpu, cuda, cuda:N or cuda:N,M, but got"):
        device_name(given)


def test_each_gpu_is_named_once() -> None:
    with pytest.raises(UserError, match=r"each GPU once, but got 'cuda:1,1'"):
        device_name("cuda:1,1")


@pytest.mark.parametrize("limit", [0, -1, 1.5, "2", True])
def test_invalid_numbers_of_trials(limit: Any) -> None:
    with pytest.raises(UserError, match="`trials_per_device` must be a whole number of at least 1, but got"):
        RunOptions(trials_per_device=limit)


# ---------------------------------------------------------------------- what is there


def test_what_nvidia_smi_prints() -> None:
    memory = (
        "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77, [N/A]\nGPU-0aa11ebd-627f-af3f-1a0d-4e1fd92fd7b0, 39000\n"
    )
    first, second, third = cards(MIG_LISTING, memory)
    assert (first.name, first.uuid) == ("A100-SXM4-40GB", "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77")
    assert [card.free for card in (first, second, third)] == [None, 39000, None]
    assert first.instances == (
        "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f",
        "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb",
    )
    assert [len(card.instances) for card in (second, third)] == [1, 0]
    (old,) = cards(OLD_LISTING, "")
    assert old.instances[1] == "MIG-GPU-0069414c-9f30-41f9-d5d8-87890423f0c4/8/0"


def test_lines_that_name_no_gpu_are_ignored() -> None:
    listing = "Unable to determine the device handle for GPU0: Unknown Error\n" + MIG_LISTING.splitlines()[0]
    assert len(cards(listing, "No devices were found\n")) == 1
    assert cards("No devices were found\n", "") == ()
    assert cards("  MIG 1g.5gb Device 0: (UUID: MIG-c6d4)\n", "") == ()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, [A, B, C]),
        ("", []),
        ("-1", []),
        ("0", [A]),
        ("2,1", [C, B]),
        ("0,2,-1,1", [A, C]),  # the Programming Guide's own example
        (" 1 , 0", [B, A]),
        ("0,3,1", [A]),
        ("0,0", []),
        ("1gpu2,2ampere", [B, C]),
        ("none", []),
        (C, [C]),
        (f"{C},{A}", [C, A]),
        ("GPU-c", [C]),
        ("GPU-c,GPU-aaaa,GPU-aaaa1", [C]),  # the second could be either of two
        (f"{A},GPU-aaaa1", []),
        (f"{A},GPU-zzzz,{B}", [A]),
        (f"{A},1", [A]),
        (f"{A}, {B}", [A]),
    ],
)
def test_what_can_be_seen(monkeypatch: pytest.MonkeyPatch, value: str | None, found: list[str]) -> None:
    assert names(visible(value, None, EQUAL)) == found
    # And torch reads it so.
    if value is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    parsed: list[Any] = torch.cuda._parse_visible_devices()
    if parsed and isinstance(parsed[0], str):
        parsed = torch.cuda._transform_uuid_to_ordinals(parsed, [A, B, C])
    beyond = next((at for at, number in enumerate(parsed) if number >= 3), len(parsed))
    assert [[A, B, C][number] for number in parsed[:beyond]] == found


def test_mig_instances() -> None:
    found = cards(MIG_LISTING, "")
    instances = [instance for card in found for instance in card.instances]
    assert names(visible(None, None, found)) == instances
    assert [gpu.token for gpu in visible(f"{instances[2]},{instances[0]}", None, found)] == [
        instances[2],
        instances[0],
    ]
    old = "MIG-GPU-0069414c-9f30-41f9-d5d8-87890423f0c4/7/0"
    assert [(gpu.token, gpu.free) for gpu in visible(old, None, ())] == [(old, None)]
    assert visible(f"{old},{old}", None, ()) == ()


def test_whether_a_number_is_known_depends_on_the_order() -> None:
    # CUDA begins with the fastest by default, so it is unknown which of unequal GPUs is number 0.
    assert [gpu.free for gpu in visible("1,0", None, MIXED)] == [None, None]
    assert [gpu.token for gpu in visible("1,0", "FASTEST_FIRST", MIXED)] == ["1", "0"]
    assert [gpu.free for gpu in visible("1,0", "PCI_BUS_ID", MIXED)] == [80, 100]
    assert [gpu.free for gpu in visible("1,0", None, EQUAL)] == [80, 100]
    assert [gpu.free for gpu in visible(B, None, MIXED)] == [80]


def test_without_a_driver_torch_says_how_many() -> None:
    assert [gpu.token for gpu in visible(None, None, (), lambda: 2)] == ["0", "1"]
    assert [gpu.token for gpu in visible("5,7", None, (), lambda: 2)] == ["5", "7"]
    assert visible(None, None, (), lambda: 0) == ()


# ------------------------------------------------------------------------ sharing out


def shared_out(free: list[int | None], trials: int, limit: int | None = None) -> list[int | None]:
    counts, order = [0] * len(free), list[int | None]()
    for _ in range(trials):
        place = choose(free, counts, limit)
        order.append(place)
        if place is not None:
            counts[place] += 1
    return order


def test_equal_gpus_take_turns() -> None:
    assert shared_out([40, 40, 40], 7) == [0, 1, 2, 0, 1, 2, 0]
    assert shared_out([None, None], 3) == [0, 1, 0]


def test_by_hand() -> None:
    # The example by which D'Hondt's method is usually told: 100, 80, 30, 20 and eight seats. The quotients in
    # order: 100, 80, 50, 40, 33.3, 30, 26.7, 25.
    assert shared_out([100, 80, 30, 20], 8) == [0, 1, 0, 1, 0, 2, 1, 0]


def test_a_trial_more_is_weighed_with_those_that_are_there() -> None:
    assert choose([78, 80], [0, 1]) == 0  # 78 or 40
    assert choose([30, 80], [0, 1]) == 1  # 30 or 40
    assert choose([40, 80], [0, 1]) == 0  # both 40: the one with fewer
    assert choose([0, 0, 0], [2, 1, 1]) == 1


def test_no_more_than_are_allowed() -> None:
    assert shared_out([100, 10], 5, limit=2) == [0, 0, 1, 1, None]
    assert choose([], []) is None


def test_where_one_is_not_known_all_count_as_equal() -> None:
    assert shared_out([100, None], 4) == [0, 1, 0, 1]


# ------------------------------------------------------- the driver, and real processes


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A machine with an `nvidia-smi` of ours, and nothing in the environment that says otherwise."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu_slots, "_runs_only_trials", False)
    monkeypatch.setattr(gpu_slots, "_kept", None)
    monkeypatch.setattr(gpu_slots, "_PAUSE", 0.05)

    def answering(found: tuple[Card, ...], before: str = "") -> Path:
        listing = "".join(f"GPU {n}: {card.name} (UUID: {card.uuid})\n" for n, card in enumerate(found))
        (folder / "listing").write_text(listing)
        (folder / "memory").write_text("".join(f"{card.uuid}, {card.free}\n" for card in found))
        script = folder / "nvidia-smi"
        script.write_text(
            f'#!/bin/sh\n{before}\necho "$@" >> {folder}/asked\ncase "$1" in\n-L) cat {folder}/listing;;\n'
            "--query-gpu=uuid,memory.free)\n"
            f'[ "$2" = --format=csv,noheader,nounits ] && cat {folder}/memory;;\nesac\n'
        )
        script.chmod(0o755)
        return folder

    return answering


def test_the_driver_is_asked(machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = machine(EQUAL)
    assert gpu_detection.read_driver() == EQUAL
    machine((), "exit 9")
    assert gpu_detection.read_driver() == ()
    machine(EQUAL, "exec sleep 600")
    monkeypatch.setattr(gpu_detection, "_DRIVER_TIMEOUT", 0.2)
    assert gpu_detection.read_driver() == ()
    (folder / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(folder))
    assert gpu_detection.read_driver() == ()


class Log(logging.Logger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("test")
        self.lines: list[str] = []

    def handle(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def taking(device: str = "cuda", limit: int | None = None, count: int = 0, **options: Any) -> Any:
    return gpu_slots.taken(device, limit, count=lambda: count, **{"log": Log(), **options})


def test_threads_are_told_numbers(machine: Callable[..., Path]) -> None:
    machine(EQUAL)
    log, order = Log(), list[str]()

    def nested(depth: int) -> None:
        with taking(log=log) as device:
            order.append(device)
            thread = threading.Thread(target=nested, args=(depth - 1,))
            if depth > 1:
                thread.start()
                thread.join()

    nested(4)
    # 100, 80, 100/2, 80/2: by hand.
    assert order == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert log.lines[2] == f"takes GPU 0 of 3 ({A}, 100 MiB free); other trials of yours on it: 1"
    # All of it was given back.
    with taking() as device:
        assert device == "cuda:0"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert [p.name for p in Path(os.environ["TMPDIR"]).glob("ppo-hpo-*/*")] == ["gpus.lock"]


def test_those_that_are_named(machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(EQUAL)
    with taking("cuda:1,2") as one, taking("cuda:1,2") as two, taking("cuda:2") as three:
        assert (one, two, three) == ("cuda:1", "cuda:1", "cuda:2")  # 80, then 40 and not 30
    with pytest.raises(
        MachineError, match=r"^Device 'cuda:3' was asked for, but 3 can be seen here\. Choose"
    ):
        taking("cuda:1,3").__enter__()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{C},{A}")
    with taking("cuda:1") as one:
        assert one == "cuda:1"
    with pytest.raises(MachineError, match=r"but 2 can be seen here, by CUDA_VISIBLE_DEVICES=GPU-c"):
        taking("cuda:2").__enter__()


def test_without_gpus_torch_has_the_word(
    machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(EQUAL)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for device, told in {"cuda": "cuda", "cuda:1,0": "cuda:1", "cpu": "cpu", "auto": "cpu"}.items():
        with taking(device) as name:
            assert name == told


def test_auto_asks_torch_first_where_the_process_is_not_ours(machine: Callable[..., Path]) -> None:
    machine(EQUAL)
    with taking("auto", count=0) as device:
        assert device == "cpu"
    with taking("auto", count=3) as device:
        assert device == "cuda:0"


SCRIPT = """
import logging, os, sys, time
from ppo_hpo.trial import gpu_slots
gpu_slots._PAUSE = 0.05
logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.INFO)
gpu_slots.own_process()
limit = int(sys.argv[2]) or None
def count():
    raise AssertionError("torch is not asked")
for _ in range(2):
    with gpu_slots.taken(sys.argv[1], limit, count=count, log=logging.getLogger()) as device:
        print(device, os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
assert "torch" not in sys.modules
sys.stdin.read()
"""


class Process:
    """A process of its own that takes a GPU, and keeps it until it ends."""

    def __init__(self, device: str = "cuda", limit: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, device, str(limit)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def took(self) -> str:
        assert self.process.stdout is not None
        first, second = self.process.stdout.readline(), self.process.stdout.readline()
        assert first == second  # the second trial has the GPU of the first
        return first.strip()

    def end(self, signum: int = signal.SIGTERM) -> str:
        self.process.send_signal(signum)
        return self.process.communicate(timeout=PATIENCE)[1]


def test_processes_that_know_nothing_of_each_other(machine: Callable[..., Path]) -> None:
    machine(EQUAL)
    running = []
    try:
        for expected in ("0", "1", "0", "1"):
            running.append(Process())
            assert running[-1].took() == f"cuda {expected}"
        # A process that is killed gives nothing back, and yet its place is free: 100/2 is more than 80/3.
        running.pop(0).end(signal.SIGKILL)
        running.append(Process())
        assert running[-1].took() == "cuda 0"
    finally:
        for process in running:
            process.end()


def test_one_that_has_to_wait(machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(EQUAL)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{C},{B}")
    first, second = Process("auto", 1), Process("cuda", 1)
    try:
        assert {first.took().split()[1], second.took().split()[1]} == {B, C}
        third = Process("cuda", 1)
        assert third.process.stderr is not None
        assert third.process.stderr.readline() == "waits for a GPU: each of 2 is at the limit of trials (1)\n"
        assert third.process.poll() is None
        first.end()
        assert third.took().startswith("cuda GPU-")
        third.end()
    finally:
        for process in (first, second):
            process.process.kill()
            process.process.communicate()


def test_a_tick_can_end_the_wait(machine: Callable[..., Path]) -> None:
    machine(EQUAL[:1])
    began = time.monotonic()

    def tick() -> None:
        if time.monotonic() - began > 0.2:
            raise KeyboardInterrupt

    with taking(limit=1), pytest.raises(KeyboardInterrupt):
        taking(limit=1, tick=tick).__enter__()


def test_a_directory_that_is_somebody_elses(
    machine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(EQUAL)
    (Path(os.environ["TMPDIR"]) / f"ppo-hpo-{os.geteuid()}").mkdir(mode=0o777)
    (Path(os.environ["TMPDIR"]) / f"ppo-hpo-{os.geteuid()}").chmod(0o777)
    log = Log()
    with taking(log=log) as one, taking() as two:
        assert (one, two) == ("cuda:0", "cuda:0")
    assert "must be your own and closed to others" in log.lines[0]


# ------------------------------------------------------------------------------ trials

CONFIG = TrialConfig.from_mapping(
    {
        "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
        "task": {"epochs": 1, "max_epochs": 1, "steps_per_epoch": 128, "eval_episodes": 2},
        "model": {"width": 8, "depth": 1},
        "ppo": {"n_steps": 64, "batch_size": 64, "n_epochs": 1},
    }
)


def test_auto_trains_vectors_on_the_cpu_without_asking_for_gpus(
    machine: Callable[..., Path], tmp_path: Path
) -> None:
    folder = machine(EQUAL)
    run_quietly(CONFIG, tmp_path / "trial", device="auto")
    assert "on cpu (1 thread, numpy gradients, " in (tmp_path / "trial" / "log.txt").read_text()
    assert not (folder / "asked").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_trial_that_asks_for_a_gpu_takes_one(machine: Callable[..., Path], tmp_path: Path) -> None:
    machine(EQUAL)
    with pytest.raises(MachineError, match="Device 'cuda:0' was asked for, but torch finds none here"):
        run_quietly(CONFIG, tmp_path / "trial", device="cuda", trials_per_device=2)
    assert f"takes GPU 0 of 3 ({A}, 100 MiB free)" in (tmp_path / "trial" / "log.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_sweep_hands_it_on(
    machine: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(EQUAL)
    monkeypatch.chdir(tmp_path)
    groups = CONFIG.to_mapping()
    groups["optimizer"]["lr"] = "orion~loguniform(1e-4, 1e-2)"
    (tmp_path / "space.yaml").write_text(yamlio.dump(groups))
    options = {"space": "space.yaml", "algorithm": "random", "name": "it", "max_trials": 1, "progress": False}
    # A worker is a process of its own, and sees its GPU alone: it is not told the number.
    with pytest.raises(UserError, match="Device 'cuda' was asked for, but torch finds none here"):
        ppo_hpo.sweep(**options, device=[2, 1], trials_per_device=2)
    (log,) = (tmp_path / "it" / "trials").glob("*/log.txt")
    assert f"takes GPU 1 of 3 ({B}, 80 MiB free)" in log.read_text()
    # A hunt that resumes the sweep gets the same option.
    storage = yamlio.load(tmp_path / "it" / "orion.yaml")["storage"]
    command = get_experiment("it", storage=storage).metadata["user_args"]
    assert command[4:] == ["--device", "cuda:2,1", "--trials-per-device", "2"]


def test_ray_gives_out_gpus_itself() -> None:
    with pytest.raises(UserError, match="Ray chooses GPUs itself: the device must be cuda, but got 'cuda:1'"):
        make("ray", 1, RunOptions("cuda:1"))

"""What surrounds a process does not change a trial (law 11), through whatever entry it is trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_hpo.spec import yamlio

REPOSITORY = Path(__file__).parents[2]
# Of this width the weights and the gradients differ between one thread and two, where nothing limits them.
TRIAL = {
    "env": {"id": "Pendulum-v1", "n_envs": 2},
    "task": {"epochs": 1, "steps_per_epoch": 256, "eval_episodes": 2},
    "model": {"width": 256, "depth": 2},
    "ppo": {"n_steps": 64, "batch_size": 64, "n_epochs": 2},
}
VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PLAIN = dict.fromkeys(VARIABLES, "1")
FIRST = {
    "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Asia/Kathmandu", "LANG": "de_DE",
}  # fmt: skip
SECOND = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "PYTHONHASHSEED": "2"}


class Process:
    def __init__(self, folder: Path, variables: dict[str, str], *options: str) -> None:
        (folder / "elsewhere").mkdir(parents=True)
        (folder / "trial.yaml").write_text(yamlio.dump(TRIAL))
        own = {k: v for k, v in os.environ.items() if not k.startswith(("ORION_", "PPO_HPO_", "PYTEST"))}
        paths = {"PYTHONPATH": str(REPOSITORY), "XDG_RUNTIME_DIR": str(folder), "PPO_HPO_PRELOAD_IDLE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.end_to_end.surroundings", "../trial.yaml", *options],
            cwd=folder / "elsewhere",
            env={k: v for k, v in own.items() if k not in VARIABLES} | paths | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def digests(self) -> dict[str, list[str]]:
        out, err = self._process.communicate(timeout=240)
        assert self._process.returncode == 0, err
        found: dict[str, list[str]] = json.loads(out.splitlines()[-1])
        return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two threads need two cores")
def test_the_surroundings_of_a_process_do_not_change_a_trial(tmp_path: Path) -> None:
    """A trial through every entry: eight processes that import torch, which take most of this test's time."""
    processes = [
        Process(tmp_path / "plain", PLAIN, "command", "class"),
        Process(tmp_path / "first", FIRST, "hostile", "class", "objective", "threads", "worker", "command"),
        Process(tmp_path / "second", SECOND, "class", "objective", "preloaded"),
    ]
    plain, first, second = (process.digests() for process in processes)
    expected, policy = plain["command"], plain["policy"]
    assert len(expected) == 1
    for found in (plain, first, second):
        assert found == dict.fromkeys(found, expected) | {"policy": policy}

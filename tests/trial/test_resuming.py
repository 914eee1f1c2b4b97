"""Laws 2 and 3: a trial that stops at any instant and resumes ends the same, bit for bit.

Each case runs as real processes, `ppo-hpo run`, on one environment: 4 epochs at once; 2 and then 2 more in
another process; and a process that is killed (SIGKILL) at random moments until it gets through.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import TornCheckpoint
from ppo_hpo.state.checkpoint import Storage, read
from tests.runs import run_quietly

ENVIRONMENTS = (
    "CartPole-v1",
    "Acrobot-v1",
    "Pendulum-v1",
    "tests.envs:RandomWalk-v0",
    "tests.envs:Target-v0",
    "tests.envs:RandomWalk-v0 async",
    "CartPole-v1 native",
    "CartPole-v1 envpool",
    "Pendulum-v1 envpool",
    "tests.envs:Eyes-v0",
)
# Images are not normalised, and their network has another size; a step of it takes longer.
FOR_IMAGES = {
    "task": {"epochs": 4, "steps_per_epoch": 128, "eval_episodes": 2, "seed": 7},
    "model": {"features_dim": 16},
    "normalize": {"norm_reward": True},
}
KILLS = 20
KILLS_OF_ASYNC = 2  # it starts processes each time: half a second for each environment
REPOSITORY = Path(__file__).parents[2]


def _config(case: str) -> dict[str, dict[str, object]]:
    env, _, vectorization = case.partition(" ")
    # All that has a state is on: normalisers and schedules; so are value clipping and target_kl.
    config: dict[str, dict[str, object]] = {
        "env": {"id": env, "n_envs": 2, "vectorization": vectorization or "auto"},
        "task": {"epochs": 4, "steps_per_epoch": 512, "eval_episodes": 3, "seed": 7},
        "model": {"width": 16, "depth": 1},
        "optimizer": {"lr": 1e-3},
        "lr_schedule": {"name": "linear"},
        "normalize": {"norm_obs": True, "norm_reward": True},
        "ppo": {
            "n_steps": 64,
            "batch_size": 32,
            "n_epochs": 3,
            "clip_range_schedule": "linear",
            "clip_range_vf": 0.5,
            "target_kl": 0.05,
            "ent_coef": 0.01,
        },
    }
    return config | (FOR_IMAGES if "Eyes" in env else {})


def _start(config: Path, directory: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ppo_hpo", "run", "--config", str(config), "--dir", str(directory)]
    return subprocess.Popen(
        [*command, "--device", "cpu", *options],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _run(config: Path, directory: Path, *options: str) -> None:
    assert _start(config, directory, *options).wait() == 0


def _assert_equal(one: Path, other: Path) -> None:
    """Compare parameters, optimizer state, normalisers, curve and objective: all but the clock."""
    left, right = (read(path / "checkpoint-000004.safetensors") for path in (one, other))
    assert left.arrays.keys() == right.arrays.keys()
    for name, array in left.arrays.items():
        assert array.dtype == right.arrays[name].dtype
        assert array.tobytes() == right.arrays[name].tobytes(), name
    assert left.meta["curve"] == right.meta["curve"]
    assert left.meta["identity"] == right.meta["identity"]
    assert (one / "curve.jsonl").read_bytes() == (other / "curve.jsonl").read_bytes()
    assert _objective(one) == _objective(other)


def _objective(directory: Path) -> float:
    entries = json.loads((directory / "results.json").read_text())
    return next(entry["value"] for entry in entries if entry["type"] == "objective")


@pytest.fixture(scope="module", params=ENVIRONMENTS, ids=lambda name: name.rpartition(":")[2])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A configuration file, and the directory in which its trial ran without a stop."""
    if request.param.endswith("envpool"):
        pytest.importorskip("envpool")
    root = tmp_path_factory.mktemp("continuing")
    config = root / "config.yaml"
    config.write_text(yamlio.dump(_config(request.param)))
    _run(config, root / "through")
    return config, root / "through"


def test_the_trial_learns_something_that_could_differ(undisturbed: tuple[Path, Path]) -> None:
    _, through = undisturbed
    rows = [json.loads(line) for line in (through / "curve.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["n_updates"] > 0 for row in rows[1:])
    checkpoints = [read(through / f"checkpoint-00000{epoch}.safetensors") for epoch in (3, 4)]
    first = next(name for name in checkpoints[0].arrays if name.startswith("model.") and "0.weight" in name)
    before, after = (checkpoint.arrays[first] for checkpoint in checkpoints)
    assert not np.array_equal(before, after)


def test_two_epochs_and_two_more_equal_four(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    config, through = undisturbed
    _run(config, tmp_path, "--epochs", "2")
    assert not (tmp_path / "checkpoint-000003.safetensors").exists()
    _run(config, tmp_path)
    _assert_equal(through, tmp_path)
    assert "resumes, and trains from epoch 2 to 4" in (tmp_path / "log.txt").read_text()


def test_one_epoch_a_kill_and_three_more(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    config, through = undisturbed
    _run(config, tmp_path, "--epochs", "1")
    log = tmp_path / "log.txt"
    begun = log.stat().st_size
    process = _start(config, tmp_path)
    while log.stat().st_size == begun:  # until it has begun to train
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    _run(config, tmp_path)
    _assert_equal(through, tmp_path)


def test_killed_at_twenty_random_moments(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    config, through = undisturbed
    kills = KILLS_OF_ASYNC if "async" in config.read_text() else KILLS
    directory = tmp_path / "trial"
    _run(config, directory, "--epochs", "1")
    command = [sys.executable, "-m", "tests.trial.kill_loop", config, directory, str(kills), str(config)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == kills
    _assert_equal(through, directory)
    assert not list(directory.glob(".*.tmp"))


@pytest.mark.parametrize("spoil", [lambda content: content[:-1], lambda content: b""])
def test_a_trial_whose_checkpoints_are_all_torn_starts_again(
    spoil: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    config = TrialConfig.from_mapping(_config("CartPole-v1"))
    whole = run_quietly(config, tmp_path / "whole")
    # Siblings of one name only: nothing of the first run may be found.
    siblings = tmp_path / "trials"
    here = siblings / "one"
    run_quietly(config, here, siblings=siblings)
    names = [path.name for path in Storage(here).paths()]
    assert len(names) == 2
    for name in names:
        (here / name).write_bytes(spoil((here / name).read_bytes()))
    again = run_quietly(config, here, siblings=siblings)
    assert again.objective == whole.objective
    assert again.statistics["env_steps_here"] == whole.statistics["env_steps"]
    assert (here / "curve.jsonl").read_bytes() == (tmp_path / "whole" / "curve.jsonl").read_bytes()
    assert {f"{name}.torn" for name in names} <= {path.name for path in here.iterdir()}
    # A fork is in no index: it could not start again as itself.
    fork = siblings / "fork"
    fork.mkdir()
    config = TrialConfig.from_mapping({**_config("CartPole-v1"), "optimizer": {"lr": 2e-3}})
    (fork / names[0]).write_bytes(spoil((here / names[0]).read_bytes()))
    with pytest.raises(TornCheckpoint):
        run_quietly(config, fork, siblings=siblings)

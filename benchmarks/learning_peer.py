"""Stable-Baselines3 on the presets of `learning.py`: what it is given, and one run of it."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class PeerRun:
    """Stable-Baselines3 on one preset and one seed.

    Attributes:
        task: all that it was given, so that a stored run is known for what it is.
        final: mean return of the final policy over the same fresh episodes.
    """

    preset: str
    seed: int
    task: dict[str, Any]
    final: float
    final_std: float
    env_steps: int
    seconds: float
    version: str


def task_of(preset: str, seed: int, first_episode_seed: int, episodes: int) -> dict[str, Any]:
    """A preset in the peer's words."""
    from ppo_hpo import TrialConfig
    from ppo_hpo.spec.space import fill, read_space

    config = TrialConfig.from_mapping(fill(read_space(preset), {}))
    groups = config.to_mapping()
    if groups["env"]["kwargs"] or groups["env"]["max_episode_steps"] is not None:
        raise ValueError("a preset with arguments of its environment needs them handed to the peer as well")
    names = {
        "env": ("n_envs",),
        "model": ("width", "depth", "activation", "ortho_init", "log_std_init"),
        "optimizer": ("lr", "eps"),
        "normalize": tuple(groups["normalize"]),
        "ppo": tuple(groups["ppo"]),
    }
    return {
        "env": config.env.id,
        "seed": seed,
        "total_steps": config.max_epochs * config.task.steps_per_epoch,
        "lr_schedule": config.lr_schedule.name,
        "lr_final": config.optimizer.lr * config.lr_schedule.final,
        "first_episode_seed": first_episode_seed,
        "episodes": episodes,
        **{name: groups[group][name] for group, wanted in names.items() for name in wanted},
    }


def run_one(python: str, preset: str, task: dict[str, Any]) -> PeerRun:
    """Train the peer on one preset and one seed, then play the fresh episodes."""
    command = [python, str(HERE / "peers" / "learn.py"), json.dumps(task)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    return PeerRun(
        preset=preset,
        seed=task["seed"],
        task=task,
        final=float(np.mean(found["returns"])),
        final_std=float(np.std(found["returns"])),
        env_steps=found["env_steps"],
        seconds=found["seconds"],
        version=found["version"],
    )


def stored_runs(results: Path) -> list[PeerRun]:
    """The peer's runs of earlier results."""
    path = results / "learning.json"
    stored = json.loads(path.read_text()).get("peer_runs", []) if path.exists() else []
    return [PeerRun(**run) for run in stored]

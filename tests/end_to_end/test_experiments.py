"""`experiments/hunt.py`, which `make demo` runs, on an experiment of seconds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "experiments" / "hunt.py"
ORION = """
experiment:
  max_trials: 2
  algorithm: {random: {seed: 1}}
"""
SPACE = """
env: {id: CartPole-v1, n_envs: 2}
task: {epochs: 1, max_epochs: 1, steps_per_epoch: 256, eval_episodes: 2}
optimizer: {lr: 'orion~loguniform(1e-4, 1e-2)'}
ppo: {n_steps: 64}
"""
UNTUNED = SPACE.replace("'orion~loguniform(1e-4, 1e-2)'", "3e-4")


def test_the_demo_shows_untuned_beside_tuned(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name, text in (("orion.yaml", ORION), ("space.yaml", SPACE), ("untuned.yaml", UNTUNED)):
        (folder / name).write_text(text)

    command = [sys.executable, str(SCRIPT), str(folder), "--seeds", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) <= 25
    returns = [line.split() for line in lines if re.fullmatch(r"[-\d ]+", line)]
    assert [len(row) for row in returns] == [1, 2]  # the defaults; the hunt's trials
    assert " . ." in lines  # one dot for each training on a fresh seed
    rows = {line.split()[0]: line.split()[1:3] for line in lines if line.startswith(("untuned ", "tuned "))}
    assert rows["untuned"][0] == rows["tuned"][0] == "256"
    tested = json.loads((folder / "output" / "best" / "best.json").read_text())["tested"]
    assert sorted(row[1] for row in rows.values()) == sorted(f"{one['scores'][0]:.0f}" for one in tested)
    assert "Tuning changed: optimizer.lr 0.0003 -> 0." in done.stdout

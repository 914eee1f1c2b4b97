"""Judge the best model of a sweep of rl_zoo3, inside its environment.

    python zoo_judge.py ENV REPORT.csv MODELS EPISODES FIRST_SEED

REPORT.csv is what rl_zoo3 wrote of its trials, MODELS the folder it saved them in. Prints JSON.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO


def main() -> None:
    env_id, report, models, episodes, first_seed = sys.argv[1:]
    torch.set_num_threads(1)
    with open(report, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["value"]]
    # Pruned trials have values too; those that saved a model were evaluated.
    rows = [row for row in rows if (Path(models) / f"trial_{row['number']}" / "best_model.zip").exists()]
    best = max(rows, key=lambda row: float(row["value"]))
    model = PPO.load(Path(models) / f"trial_{best['number']}" / "best_model.zip", device="cpu")
    env = gymnasium.make(env_id)
    returns = []
    for episode in range(int(episodes)):
        obs, _ = env.reset(seed=int(first_seed) + episode)
        total, done = 0.0, False
        while not done:
            action, _ = model.predict(obs, deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            done = terminated or truncated
        returns.append(total)
    # Up to the last evaluation: what is trained after it is not judged.
    steps = sum(
        int(np.load(Path(models) / f"trial_{row['number']}" / "evaluations.npz")["timesteps"][-1])
        for row in rows
    )
    states = [row.get("state", "") for row in rows]
    found = {
        "return": statistics.fmean(returns),
        "claimed": float(best["value"]),
        "trials": len(rows),
        "steps": steps,
        "pruned": sum("PRUNED" in state for state in states),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

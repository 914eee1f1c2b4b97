"""Judge one model of Stable-Baselines3, inside its environment: its mean return in fresh episodes.

python zoo_play.py ENV MODEL.zip SEEDS EPISODES FIRST_SEED
"""

from __future__ import annotations

import statistics
import sys

import gymnasium
import torch
from stable_baselines3 import PPO


def main() -> None:
    env_id, path = sys.argv[1:3]
    seeds, episodes, first_seed = map(int, sys.argv[3:])
    torch.set_num_threads(1)
    model = PPO.load(path, device="cpu")
    env = gymnasium.make(env_id)
    returns = []
    for seed in range(seeds):
        for episode in range(episodes):
            obs, _ = env.reset(seed=first_seed + seed if episode == 0 else None)
            total, done = 0.0, False
            while not done:
                action, _ = model.predict(obs, deterministic=True)
                obs, reward, terminated, truncated, _ = env.step(action)
                total += float(reward)
                done = terminated or truncated
            returns.append(total)
    print(statistics.fmean(returns))


if __name__ == "__main__":
    main()

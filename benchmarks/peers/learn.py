"""Stable-Baselines3 trains a preset on one seed and plays fresh episodes. Runs in its own environment.

    .peers/sb3/bin/python peers/learn.py '{"env": "CartPole-v1", "seed": 0, ...}'

Prints a line of JSON: the returns of the final policy's episodes and the wall seconds of training. An episode
is played as our evaluator plays it: a new environment, reset with the episode's seed, most probable actions,
observations normalised by the statistics that training left.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import metadata
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

Task = dict[str, Any]


def train(task: Task) -> tuple[PPO, VecNormalize | None]:
    """The model, and the statistics of the normalisation if there is one."""
    envs: Any = make_vec_env(task["env"], task["n_envs"], seed=task["seed"])
    normalizer = None
    if task["norm_obs"] or task["norm_reward"]:
        names = ("norm_obs", "norm_reward", "clip_obs", "clip_reward", "gamma")
        envs = normalizer = VecNormalize(envs, **{name: task[name] for name in names})
    names = ("n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range_vf", "ent_coef",
             "vf_coef", "max_grad_norm", "target_kl", "normalize_advantage", "seed")  # fmt: skip
    activation = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[task["activation"]]
    model = PPO(
        "MlpPolicy",
        envs,
        learning_rate=scheduled(task["lr"], task["lr_final"], task["lr_schedule"]),
        clip_range=scheduled(task["clip_range"], 0.0, task["clip_range_schedule"]),
        **{name: task[name] for name in names},
        policy_kwargs={
            "net_arch": [task["width"]] * task["depth"],
            "activation_fn": activation,
            "ortho_init": task["ortho_init"],
            "log_std_init": task["log_std_init"],
            "optimizer_kwargs": {"eps": task["eps"]},
        },
        device="cpu",
    )
    model.learn(task["total_steps"])
    return model, normalizer


def scheduled(value: float, final: float, schedule: str) -> Any:
    """The value itself, or its line down to `final` over what remains of training."""
    if schedule == "constant":
        return value
    return lambda remaining: final + (value - final) * remaining


def play(model: PPO, normalizer: VecNormalize | None, name: str, seeds: list[int]) -> list[float]:
    """One episode for each seed, all side by side."""
    envs = [gymnasium.make(name) for _ in seeds]
    obs = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
    returns, running = np.zeros(len(seeds)), np.ones(len(seeds), bool)
    while running.any():
        seen = obs if normalizer is None else normalizer.normalize_obs(obs)
        actions, _ = model.predict(seen, deterministic=True)
        for index in np.flatnonzero(running):
            obs[index], reward, terminated, truncated, _ = envs[index].step(actions[index])
            returns[index] += reward
            running[index] = not (terminated or truncated)
    return [float(value) for value in returns]


def main() -> int:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    started = time.perf_counter()
    model, normalizer = train(task)
    seconds = time.perf_counter() - started
    first = task["first_episode_seed"]
    seeds = list(range(first, first + task["episodes"]))
    returns = play(model, normalizer, task["env"], seeds)
    steps, version = model.num_timesteps, metadata.version("stable_baselines3")
    print(json.dumps({"returns": returns, "seconds": seconds, "env_steps": steps, "version": version}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

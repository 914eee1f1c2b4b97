"""One peer trains one preset, and says how long it took. Runs in the peer's own environment.

    .peers/sbx/bin/python peers/train.py sbx '{"env": "CartPole-v1", ...}'

Prints a line of JSON: seconds of the timed rollouts with their updates, by the clock and of CPU, the
process's peak memory in MiB and the version of the peer. The clock runs from the end of the last rollout of
the warm-up to the end of the last rollout of all, so that it sees as many updates as rollouts and no
compilation.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import runpy
import sys
import time
import types
from importlib import metadata
from typing import Any

Preset = dict[str, Any]
Time = tuple[float, float]
Seconds = dict[str, float]
PACKAGES = {"sb3": "stable_baselines3", "sbx": "sbx-rl", "cleanrl": "cleanrl"}


def now() -> Time:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def between(started: Time, ended: Time) -> Seconds:
    return {"seconds": ended[0] - started[0], "cpu_seconds": ended[1] - started[1]}


def baselines(preset: Preset, *, jax: bool) -> Seconds:
    """Stable-Baselines3 or SBX, which have one interface."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack

    torch.set_num_threads(1)
    if jax:
        import flax.linen as nn
        from sbx import PPO

        activations = {"tanh": nn.tanh, "relu": nn.relu}
    else:
        from stable_baselines3 import PPO

        activations = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}
    times: list[Time] = []

    class Clock(BaseCallback):
        def _on_rollout_end(self) -> None:
            times.append(now())

        def _on_step(self) -> bool:
            return True

    policy: dict[str, Any] = {}
    if preset["images"]:
        register_atari()
        envs = VecFrameStack(make_atari_env(preset["env"], preset["n_envs"], seed=0), 4)
    else:
        envs = make_vec_env(preset["env"], preset["n_envs"], seed=0)
        policy["net_arch"] = [preset["width"]] * 2
        policy["activation_fn"] = activations[preset["activation"]]
    names = ("n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range",
             "ent_coef", "vf_coef", "max_grad_norm")  # fmt: skip
    model = PPO(
        "CnnPolicy" if preset["images"] else "MlpPolicy",
        envs,
        learning_rate=preset["lr"],
        **{name: preset[name] for name in names},
        policy_kwargs=policy,
        device="cpu",
        seed=0,
    )
    model.learn(preset["total_steps"], Clock())
    return between(times[preset["warm_up"] - 1], times[-1])


# ------------------------------------------------------------------------------------- CleanRL
#
# Its scripts are run as they are, but on today's gymnasium: they were written for gym 0.23 and gymnasium
# 0.28, whose environments differ from everyone else's here. What changed since is put in their way below.


def cleanrl(preset: Preset) -> Seconds:
    """The package's script for this kind of task."""
    import gymnasium
    import torch

    if not preset["images"] and (preset["width"], preset["activation"]) != (64, "tanh"):
        raise SystemExit("its scripts have networks of 64-64 tanh and no option for others")
    torch.set_num_threads(1)
    times: list[Time] = []
    if preset["images"]:
        register_atari()
    if isinstance(gymnasium.make(preset["env"]).action_space, gymnasium.spaces.Box):
        script = "cleanrl.ppo_continuous_action"
        clocked_gymnasium(gymnasium, times, preset["n_steps"])
    else:
        script = "cleanrl.ppo_atari" if preset["images"] else "cleanrl.ppo"
        sys.modules["gym"] = old_gym(gymnasium, times, preset["n_steps"])
    options = {
        "env-id": preset["env"],
        "total-timesteps": preset["total_steps"],
        "learning-rate": preset["lr"],
        "num-envs": preset["n_envs"],
        "num-steps": preset["n_steps"],
        "num-minibatches": preset["n_envs"] * preset["n_steps"] // preset["batch_size"],
        "update-epochs": preset["n_epochs"],
        "gamma": preset["gamma"],
        "gae-lambda": preset["gae_lambda"],
        "clip-coef": preset["clip_range"],
        "ent-coef": preset["ent_coef"],
        "vf-coef": preset["vf_coef"],
        "max-grad-norm": preset["max_grad_norm"],
        "anneal-lr": False,
        "clip-vloss": False,
        "cuda": False,
    }
    sys.argv = [script, *(f"--{key}={value}" for key, value in options.items())]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        runpy.run_module(script, run_name="__main__")
    return between(times[preset["warm_up"] - 1], times[-1])


def clocked_envs(gymnasium: Any, times: list[Time], n_steps: int) -> Any:
    """A class of vector environments that notes the time when a rollout's last step is done.

    It hands out no infos: with them, the scripts print and log every episode.
    """
    same_step = gymnasium.vector.AutoresetMode.SAME_STEP

    class Envs(gymnasium.vector.SyncVectorEnv):
        def __init__(self, makers: Any) -> None:
            super().__init__(makers, autoreset_mode=same_step)
            self.steps = 0

        def step(self, actions: Any) -> Any:
            *found, _ = super().step(actions)
            self.steps += 1
            if self.steps % n_steps == 0:
                times.append(now())
            return *found, {}

    return Envs


def clocked_gymnasium(gymnasium: Any, times: list[Time], n_steps: int) -> None:
    """Give the script for continuous actions its vector environments, and nothing to normalise.

    It normalises observations and rewards and has no option to leave that out; no other contender does it
    here. (One of its calls also lacks an argument that gymnasium 1 wants.)
    """
    gymnasium.vector.SyncVectorEnv = clocked_envs(gymnasium, times, n_steps)
    for name in ("NormalizeObservation", "NormalizeReward", "TransformObservation", "TransformReward"):
        setattr(gymnasium.wrappers, name, lambda env, *options, **more: env)


def old_gym(gymnasium: Any, times: list[Time], n_steps: int) -> types.ModuleType:
    """A module `gym` with as much of gym 0.23's interface as the scripts for discrete actions use."""

    class Envs(clocked_envs(gymnasium, times, n_steps)):
        def reset(self, **options: Any) -> Any:
            return super().reset(**options)[0]

        def step(self, actions: Any) -> Any:
            obs, reward, terminated, truncated, infos = super().step(actions)
            return obs, reward, terminated | truncated, infos

    def seedable(env: Any) -> Any:
        env.seed = lambda seed: env.reset(seed=seed)
        return env

    now = gymnasium.wrappers
    module = types.ModuleType("gym")
    module.make = gymnasium.make
    module.spaces = gymnasium.spaces
    module.vector = types.SimpleNamespace(SyncVectorEnv=Envs)
    module.wrappers = types.SimpleNamespace(
        RecordEpisodeStatistics=lambda env: seedable(now.RecordEpisodeStatistics(env)),
        ResizeObservation=now.ResizeObservation,
        GrayScaleObservation=now.GrayscaleObservation,
        FrameStack=lambda env, frames: seedable(now.FrameStackObservation(env, frames)),
    )
    return module


def register_atari() -> None:
    import ale_py
    import gymnasium

    gymnasium.register_envs(ale_py)


def main() -> int:
    name, preset = sys.argv[1], json.loads(sys.argv[2])
    found = cleanrl(preset) if name == "cleanrl" else baselines(preset, jax=name == "sbx")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**found, "peak_mib": peak, "version": metadata.version(PACKAGES[name])}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast is training beside Stable-Baselines3, and beside what the environment and the products allow?

    python benchmarks/speed.py                         # every preset that can be made here, 5 pairs each
    python benchmarks/speed.py --preset cartpole-4 --pairs 3

Ours and Stable-Baselines3 run in turn (A B A B ...), each in a process of its own with one thread, with the
same hyperparameters on the same environment and no evaluation; the medians of the pairs are quoted. Seconds
are those of training, after a first rollout with its update that is not counted. Two floors are measured in
the same run: stepping the environments with random actions (in our own loop, `SyncEnvs`), and the matrix
products of the updates and of acting alone, in numpy. "Share" is (environment floor + product floor) / our
time.

Stable-Baselines3 comes from the environment that runs this (`pip install -e '.[test]'`); LunarLander-v3 needs
`.[box2d]` and HalfCheetah-v5 `.[mujoco]`: what cannot be made is left out and named.
"""

from __future__ import annotations

import os

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
for variable in THREADS:  # before numpy is imported
    os.environ[variable] = "1"

import argparse  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import machine  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Preset:
    """One training task; `rollouts` is how many are timed."""

    env: str
    n_envs: int
    n_steps: int
    batch_size: int
    n_epochs: int
    rollouts: int
    width: int = 64

    @property
    def rollout_steps(self) -> int:
        return self.n_envs * self.n_steps


PRESETS = {
    "cartpole-20": Preset("CartPole-v1", 8, 32, 256, 20, 60),
    "cartpole-4": Preset("CartPole-v1", 8, 128, 256, 4, 40),
    "acrobot": Preset("Acrobot-v1", 16, 256, 64, 4, 6),
    "pendulum": Preset("Pendulum-v1", 4, 1024, 64, 10, 5),
    "lunarlander": Preset("LunarLander-v3", 16, 1024, 64, 4, 2),
    "halfcheetah": Preset("HalfCheetah-v5", 1, 512, 64, 20, 10, width=256),
}


# ------------------------------------------------------------- one measurement, in its own process


def ours(preset: Preset, engine: str) -> float:
    import torch

    torch.set_num_threads(1)
    from ppo_hpo import PPO, TrialConfig

    config = TrialConfig.from_mapping(
        {
            "env": {"id": preset.env, "n_envs": preset.n_envs},
            "task": {
                "epochs": 1,
                "steps_per_epoch": preset.rollout_steps * (preset.rollouts + 1),
                "eval_episodes": 1,
            },
            "model": {"width": preset.width, "activation": "relu" if preset.width > 64 else "tanh"},
            "ppo": {
                "n_steps": preset.n_steps,
                "batch_size": preset.batch_size,
                "n_epochs": preset.n_epochs,
            },
        }
    )
    times: list[float] = []
    task = PPO.from_config(config, "cpu", engine=engine)  # type: ignore[arg-type]
    task.events.subscribe("end_rollout", lambda task, **details: times.append(time.perf_counter()))
    task.fit(1)
    return times[-1] - times[0]


def stable_baselines3(preset: Preset) -> float:
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    times: list[float] = []

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            times.append(time.perf_counter())

        def _on_step(self) -> bool:
            return True

    activation = torch.nn.ReLU if preset.width > 64 else torch.nn.Tanh
    model = PPO(
        "MlpPolicy",
        make_vec_env(preset.env, preset.n_envs, seed=0),
        n_steps=preset.n_steps,
        batch_size=preset.batch_size,
        n_epochs=preset.n_epochs,
        policy_kwargs={"net_arch": [preset.width, preset.width], "activation_fn": activation},
        device="cpu",
        seed=0,
    )
    model.learn(preset.rollout_steps * (preset.rollouts + 1), Clock())
    return time.perf_counter() - times[1]


def environment_floor(preset: Preset) -> float:
    import numpy as np

    from ppo_hpo.config import EnvConfig
    from ppo_hpo.envs import probe
    from ppo_hpo.vector import SyncEnvs

    config = EnvConfig(id=preset.env, n_envs=preset.n_envs)
    info = probe(config)
    envs = SyncEnvs(config, info)
    envs.reset(list(range(preset.n_envs)))
    stream = np.random.default_rng(0)
    steps = min(preset.n_steps * preset.rollouts, 4096)
    if info.continuous:
        actions: Any = stream.standard_normal((steps, preset.n_envs, info.action_dim)).astype(np.float32)
    else:
        actions = stream.integers(0, info.action_dim, (steps, preset.n_envs))
    started = time.perf_counter()
    for action in actions:
        envs.step(action)
    return (time.perf_counter() - started) / (steps * preset.n_envs) * preset.rollout_steps * preset.rollouts


def product_floor(preset: Preset) -> float:
    """Every matrix product of the timed rollouts: acting, rating and valuing, and each update's three."""
    import numpy as np

    from ppo_hpo.config import EnvConfig
    from ppo_hpo.envs import probe

    info = probe(EnvConfig(id=preset.env))
    shapes = [(info.obs_dim, preset.width), (preset.width, preset.width)]
    heads = (info.action_dim, 1)

    def seconds(batch: int, *, backward: bool, networks: int) -> float:
        real = lambda *shape: np.ones(shape, np.float32)  # noqa: E731
        jobs = []
        layers = [shape for shape in shapes for _ in range(networks)]
        layers += [(preset.width, outputs) for outputs in heads[:networks]]
        for inputs, outputs in layers:
            x, w, d = real(batch, inputs), real(outputs, inputs), real(batch, outputs)
            jobs.append((x, w.T))
            if backward:
                jobs.append((d.T, x))
                if inputs != info.obs_dim:
                    jobs.append((d, w))
        repeats = 30
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(repeats):
                for a, b in jobs:
                    a @ b
            best = min(best, (time.perf_counter() - started) / repeats)
        return best

    updates = preset.rollout_steps // preset.batch_size * preset.n_epochs * preset.rollouts
    acting = preset.n_steps * preset.rollouts
    return (
        updates * seconds(preset.batch_size, backward=True, networks=2)
        + acting * seconds(preset.n_envs, backward=False, networks=1)
        + preset.rollouts * seconds(preset.rollout_steps, backward=False, networks=2)
    )


MEASURES = {
    "ours": lambda preset: ours(preset, "auto"),
    "autograd": lambda preset: ours(preset, "autograd"),
    "sb3": stable_baselines3,
    "environment": environment_floor,
    "products": product_floor,
}


# ----------------------------------------------------------------------------- all of them


def measure(what: str, preset: str) -> dict[str, float]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", what, "--preset", preset]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(name: str, pairs: int) -> dict[str, Any]:
    preset = PRESETS[name]
    steps = preset.rollout_steps * preset.rollouts
    rates: dict[str, list[float]] = {"ours": [], "sb3": [], "autograd": []}
    memory: dict[str, list[float]] = {"ours": [], "sb3": [], "autograd": []}
    ratios, shares = [], []
    for pair in range(pairs):
        found = {what: measure(what, name) for what in MEASURES}
        for what in rates:
            rates[what].append(steps / found[what]["seconds"])
            memory[what].append(found[what]["peak_mib"])
        ratios.append(found["sb3"]["seconds"] / found["ours"]["seconds"])
        floor = found["environment"]["seconds"] + found["products"]["seconds"]
        shares.append(floor / found["ours"]["seconds"])
        print(f"  {name} {pair + 1}/{pairs}: {ratios[-1]:.1f}x, {shares[-1]:.0%} of the floor", flush=True)
    return {
        "preset": vars(preset),
        "steps": steps,
        **{f"{what}_steps_per_second": statistics.median(values) for what, values in rates.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "share_of_floor": statistics.median(shares),
        **{f"{what}_peak_mib": statistics.median(values) for what, values in memory.items()},
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| preset | ours, steps/s | ours by autograd | Stable-Baselines3 | ratio | share of the floor "
        "| peak MiB, ours / SB3 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        preset = PRESETS[name]
        lines.append(
            f"| {preset.env}, {preset.n_envs} x {preset.n_steps}, batch {preset.batch_size}, "
            f"{preset.n_epochs} passes | {row['ours_steps_per_second']:,.0f} "
            f"| {row['autograd_steps_per_second']:,.0f} | {row['sb3_steps_per_second']:,.0f} "
            f"| {row['ratio']:.1f}x | {row['share_of_floor']:.0%} "
            f"| {row['ours_peak_mib']:.0f} / {row['sb3_peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, nargs="+", default=list(PRESETS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        seconds = MEASURES[arguments.measure](PRESETS[arguments.preset[0]])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "peak_mib": peak}))
        return 0
    rows: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for name in arguments.preset:
        try:
            rows[name] = compare(name, arguments.pairs)
        except RuntimeError as error:
            left_out[name] = str(error)
            print(f"  {name} is left out: {error}", flush=True)
    print(table(rows))
    if arguments.preset == list(PRESETS):
        RESULTS.mkdir(exist_ok=True)
        content = {
            "machine": machine.describe(),
            "pairs": arguments.pairs,
            "presets": rows,
            "left_out": left_out,
        }
        (RESULTS / "speed.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / "speed.md").write_text(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

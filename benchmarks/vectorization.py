"""How fast do environments step, by what steps them? Environment steps per second, without any learning.

    python benchmarks/vectorization.py             # as committed; two minutes
    python benchmarks/vectorization.py --rounds 1  # a quick look; writes nothing

Each kind of `env.vectorization` steps the same environments with the same random actions on one thread
(`async` has a process for each environment, on all cores). Kinds take turns, round by round; the medians are
quoted. `Sleep` is an environment whose step only waits for a millisecond: what `async` is for. What cannot be
made here (EnvPool, Box2D or MuJoCo not installed, no native version) has a dash.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # before numpy is imported
    os.environ[variable] = "1"

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import gymnasium  # noqa: E402
import machine  # noqa: E402
import numpy as np  # noqa: E402

from ppo_hpo.envs.make import probe  # noqa: E402
from ppo_hpo.envs.vector import vectorize  # noqa: E402
from ppo_hpo.spec.config import EnvConfig  # noqa: E402
from ppo_hpo.spec.errors import UserError  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("sync", "async", "native", "envpool")
CASES = [
    (name, n)
    for name in ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "LunarLander-v3", "HalfCheetah-v5")
    for n in (8, 64)
] + [("vectorization:Sleep-v0", 8)]
SECONDS = 0.7
ROUNDS = 3


class Sleep(gymnasium.Env[Any, Any]):
    """Waits for a millisecond in each step."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        time.sleep(0.001)
        return np.zeros(1, np.float32), 0.0, False, False, {}


gymnasium.register("Sleep-v0", Sleep, max_episode_steps=100)


def rate(name: str, n_envs: int, kind: str) -> float | None:
    """Environment steps per second; None where it cannot be had."""
    if kind == "async" and n_envs > 16:
        return None  # so many processes are nobody's choice
    config = EnvConfig(id=name, n_envs=n_envs, vectorization=kind)  # type: ignore[arg-type]
    try:
        info = probe(config)
        envs = vectorize(config, info)
    except UserError:
        return None
    stream = np.random.default_rng(0)
    shape = (256, n_envs)
    actions = (
        stream.standard_normal((*shape, info.action_dim)).astype(np.float32)
        if info.continuous
        else stream.integers(0, info.action_dim, shape)
    )
    envs.reset(list(range(n_envs)))
    steps, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < SECONDS:
        envs.step(actions[steps % 256])
        steps += 1
    envs.close()
    return steps * n_envs / elapsed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    rows: list[dict[str, Any]] = []
    for name, n_envs in CASES:
        found: dict[str, list[float | None]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind in KINDS:
                found[kind].append(rate(name, n_envs, kind))
        medians = {
            kind: None if None in values else round(statistics.median(values))  # type: ignore[type-var]
            for kind, values in found.items()
        }
        rows.append({"env": name.rpartition(":")[2], "n_envs": n_envs, **medians})
        print(rows[-1], flush=True)
    lines = ["| environment | n_envs | " + " | ".join(KINDS) + " |", "|---" * (2 + len(KINDS)) + "|"]
    for row in rows:
        cells = [f"{row[kind]:,}" if row[kind] else "-" for kind in KINDS]
        lines.append(f"| {row['env']} | {row['n_envs']} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    if rounds == ROUNDS:
        RESULTS.mkdir(exist_ok=True)
        content = {"machine": machine.describe(), "rounds": rounds, "rows": rows}
        (RESULTS / "vectorization.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / "vectorization.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

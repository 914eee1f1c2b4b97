"""One measurement of ours, or of a floor, in a process of its own. `speed.py` starts it.

    python benchmarks/measures.py ours '{"env": "CartPole-v1", ...}'

Prints a line of JSON: seconds by the clock and of CPU, and the process's peak memory in MiB.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

Preset = dict[str, Any]
Time = tuple[float, float]
Seconds = dict[str, float]


def now() -> Time:
    """Wall and CPU seconds."""
    return time.perf_counter(), time.process_time()


def between(started: Time, ended: Time) -> Seconds:
    return {"seconds": ended[0] - started[0], "cpu_seconds": ended[1] - started[1]}


def ours(preset: Preset, engine: str = "auto", vectorization: str | None = None) -> Seconds:
    """Training: from the end of the last rollout of the warm-up to the end of the last of all."""
    import torch

    torch.set_num_threads(1)
    from ppo_hpo import PPO

    times: list[Time] = []
    task = PPO.from_config(trial(preset, vectorization), "cpu", engine=engine)  # type: ignore[arg-type]
    task.events.subscribe("end_rollout", lambda task, **details: times.append(now()))
    task.fit(1)
    return between(times[preset["warm_up"] - 1], times[-1])


def trial(preset: Preset, vectorization: str | None) -> Any:
    """The preset as a trial of one epoch."""
    from ppo_hpo import TrialConfig

    names = ("n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range",
             "ent_coef", "vf_coef", "max_grad_norm")  # fmt: skip
    env: dict[str, Any] = {"id": preset["env"], "n_envs": preset["n_envs"]}
    if vectorization is not None:
        env["vectorization"] = vectorization
    if preset["images"]:
        env["wrapper"] = "atari"
    return TrialConfig.from_mapping(
        {
            "env": env,
            "task": {"epochs": 1, "steps_per_epoch": preset["total_steps"], "eval_episodes": 1},
            "model": {"width": preset["width"], "activation": preset["activation"]},
            "optimizer": {"lr": preset["lr"]},
            "ppo": {name: preset[name] for name in names},
        }
    )


def environment(preset: Preset, vectorization: str | None = None) -> Seconds:
    """The floor of the environments: stepped as ours steps them, with random actions drawn before."""
    import numpy as np

    from ppo_hpo.envs import probe
    from ppo_hpo.vector import vectorize

    config = trial(preset, vectorization).env
    info = probe(config)
    envs = vectorize(config, info)
    envs.reset(list(range(preset["n_envs"])))
    stream = np.random.default_rng(0)
    timed = preset["n_steps"] * preset["rollouts"]
    steps = min(timed, 4096)
    if info.continuous:
        actions: Any = stream.standard_normal((steps, preset["n_envs"], info.action_dim)).astype(np.float32)
    else:
        actions = stream.integers(0, info.action_dim, (steps, preset["n_envs"]))
    started = now()
    for action in actions:
        envs.step(action)
    return {name: value / steps * timed for name, value in between(started, now()).items()}


def products(preset: Preset) -> Seconds:
    """The floor of the arithmetic: every matrix product of the timed rollouts, in numpy, and nothing else."""
    import numpy as np

    networks = images(preset) if preset["images"] else mlps(preset)

    def seconds(batch: int, names: tuple[str, ...], *, backward: bool) -> float:
        jobs = []
        for name in names:
            for index, (positions, inputs, outputs) in enumerate(networks[name]):
                rows = batch * positions
                x = np.ones((rows, inputs), np.float32)
                w = np.ones((outputs, inputs), np.float32)
                d = np.ones((rows, outputs), np.float32)
                jobs.append((x, w.T))
                if backward:
                    jobs.append((d.T, x))
                    if index or name == "heads":  # nobody needs the gradient of an observation
                        jobs.append((d, w))
        best = float("inf")
        for _ in range(5):
            # CPU time: of pure arithmetic on one thread that is the clock's on an idle core.
            repeats, started = 0, time.process_time()
            while repeats < 30 and time.process_time() - started < 0.5:
                for a, b in jobs:
                    a @ b
                repeats += 1
            best = min(best, (time.process_time() - started) / repeats)
        return best

    rollouts, names = preset["rollouts"], tuple(networks)
    updates = preset["n_envs"] * preset["n_steps"] // preset["batch_size"] * preset["n_epochs"] * rollouts
    total = updates * seconds(preset["batch_size"], names, backward=True)
    # Of a shared network, values come with the actions; else all of a rollout is valued at its end.
    acts = names if preset["images"] else ("actor",)
    total += preset["n_steps"] * rollouts * seconds(preset["n_envs"], acts, backward=False)
    if not preset["images"]:
        total += rollouts * seconds(preset["n_envs"] * preset["n_steps"], names, backward=False)
    return {"seconds": total, "cpu_seconds": total}


def mlps(preset: Preset) -> dict[str, list[tuple[int, int, int]]]:
    """Layers of the actor and the critic as (rows for each sample, inputs, outputs)."""
    from ppo_hpo.envs import probe

    info = probe(trial(preset, None).env)
    width = preset["width"]
    hidden = [(1, info.obs_dim, width), (1, width, width)]
    return {"actor": [*hidden, (1, width, info.action_dim)], "critic": [*hidden, (1, width, 1)]}


def images(preset: Preset) -> dict[str, list[tuple[int, int, int]]]:
    """The same of the shared convolutions (Mnih et al. 2015), as products over patches, and of the heads."""
    trunk = [(20 * 20, 4 * 8 * 8, 32), (9 * 9, 32 * 4 * 4, 64), (7 * 7, 64 * 3 * 3, 64), (1, 3136, 512)]
    return {"trunk": trunk, "heads": [(1, 512, 6), (1, 512, 1)]}


def torch_alone(preset: Preset) -> Seconds:
    """Importing torch, for its memory."""
    started = now()
    import torch  # noqa: F401

    return between(started, now())


MEASURES = {
    "ours": ours,
    "ours_envpool": lambda preset: ours(preset, vectorization="envpool"),
    "ours_native": lambda preset: ours(preset, vectorization="native"),
    "ours_autograd": lambda preset: ours(preset, engine="autograd"),
    "environment": environment,
    "environment_envpool": lambda preset: environment(preset, "envpool"),
    "environment_native": lambda preset: environment(preset, "native"),
    "products": products,
    "torch": torch_alone,
}


def main() -> int:
    found = MEASURES[sys.argv[1]](json.loads(sys.argv[2]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**found, "peak_mib": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

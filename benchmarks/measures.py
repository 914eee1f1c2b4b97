"""One measurement of ours, or of a floor, in a process of its own. `speed.py` starts it.

    python benchmarks/measures.py ours '{"env": "CartPole-v1", ...}'

Prints a line of JSON: seconds by the clock and of CPU, and the process's peak memory in MiB.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
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

    from ppo_hpo.envs.make import probe
    from ppo_hpo.envs.vector import vectorize

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
    """The floor of the arithmetic: the products of the timed rollouts and nothing else.

    Of MLPs these are matrix products, in numpy; of images torch's convolutions without biases and
    activations, since no matrix product over patches in numpy is as fast.
    """
    rollout = preset["n_envs"] * preset["n_steps"]
    updates = rollout // preset["batch_size"] * preset["n_epochs"]
    if preset["images"]:  # the network is shared: values come with the actions
        update, act = convolutions(preset["batch_size"], True), convolutions(preset["n_envs"], False)
        total = updates * fastest(update) + preset["n_steps"] * fastest(act)
    else:  # all of a rollout is valued and rated at its end
        actor, critic = mlps(preset)
        update = matrices(preset["batch_size"], [actor, critic], True)
        act, rate = matrices(preset["n_envs"], [actor], False), matrices(rollout, [actor, critic], False)
        total = updates * fastest(update) + preset["n_steps"] * fastest(act) + fastest(rate)
    total *= preset["rollouts"]
    return {"seconds": total, "cpu_seconds": total}


def mlps(preset: Preset) -> list[list[tuple[int, int]]]:
    """Layers of the actor and of the critic as (inputs, outputs)."""
    from ppo_hpo.envs.make import probe

    info = probe(trial(preset, None).env)
    width = preset["width"]
    hidden = [(info.obs_dim, width), (width, width)]
    return [[*hidden, (width, info.action_dim)], [*hidden, (width, 1)]]


def matrices(batch: int, networks: list[list[tuple[int, int]]], backward: bool) -> Callable[[], None]:
    """All products of one pass through the networks."""
    import numpy as np

    jobs = []
    for layers in networks:
        for index, (inputs, outputs) in enumerate(layers):
            x, w, d = (np.ones(s, np.float32) for s in ((batch, inputs), (outputs, inputs), (batch, outputs)))
            jobs.append((x, w.T))
            if backward:
                jobs.append((d.T, x))
                if index:  # nobody needs the gradient of an observation
                    jobs.append((d, w))

    def run() -> None:
        for a, b in jobs:
            a @ b

    return run


def convolutions(batch: int, backward: bool) -> Callable[[], None]:
    """One pass through the usual network for Atari games (Mnih et al. 2015) and its two heads."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    layers = [
        nn.Conv2d(4, 32, 8, stride=4, bias=False),
        nn.Conv2d(32, 64, 4, stride=2, bias=False),
        nn.Conv2d(64, 64, 3, bias=False),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 512, bias=False),
        nn.Linear(512, 6 + 1, bias=False),
    ]
    network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.ones(batch, 4, 84, 84).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = network(x)
            if backward:
                out.backward(torch.ones_like(out))

    return run


def fastest(job: Callable[[], None]) -> float:
    """CPU seconds of one run; of arithmetic on one thread they are the clock's on an idle core."""
    best = float("inf")
    for _ in range(5):
        repeats, started = 0, time.process_time()
        while repeats < 30 and time.process_time() - started < 0.5:
            job()
            repeats += 1
        best = min(best, (time.process_time() - started) / repeats)
    return best


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

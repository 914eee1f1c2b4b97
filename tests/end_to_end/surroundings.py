"""Trains a trial through each entry that is named, and prints digests: the process of `test_surroundings`.

python -m tests.end_to_end.surroundings trial.yaml hostile class objective
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppo_hpo import PPO, TrialConfig, export_policy, load_policy, objective
from ppo_hpo.orion.workers import Workers
from ppo_hpo.spec import yamlio
from ppo_hpo.state.checkpoint import Storage, arrays_digest, read


def by_class(config: dict[str, Any], directory: str) -> None:
    task = PPO.from_config(TrialConfig.from_mapping(config), "cpu", storage=directory)
    task.fit(1)
    task.finish()


def by_objective(config: dict[str, Any], directory: str) -> None:
    objective(config, directory=directory, console=False, device="cpu")()


def by_threads(config: dict[str, Any], directory: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(by_class, config), [f"{directory}/one", f"{directory}/other"]))


def by_worker(config: dict[str, Any], directory: str) -> None:
    with Workers(1) as workers:
        workers.wait([workers.submit(by_objective, config, directory)])


def by_command(options: list[str], directory: str) -> None:
    command = [sys.executable, "-P", "-m", "ppo_hpo", "run", "--config", sys.argv[1], "--device", "cpu"]
    subprocess.run([*command, "--dir", directory, *options], check=True, capture_output=True)


def digests(directory: str) -> set[str]:
    """The digests of all trained states below a directory, with their learning curves."""
    places = {path.parent for path in Path(directory).rglob("checkpoint-*")}
    newest = [read(Storage(place).paths()[0]) for place in places]
    return {arrays_digest(found.arrays) + json.dumps(found.meta["curve"]) for found in newest}


def actions(directory: str) -> set[str]:
    """The digest of an exported policy, and of its actions for single observations and for a batch."""
    export_policy(directory, f"{directory}.policy")
    policy = load_policy(f"{directory}.policy")
    observations = np.random.default_rng(0).standard_normal((100, *policy.info.obs_shape))
    outputs = [np.asarray(policy.act(obs)) for obs in (observations[0], observations[1], observations)]
    arrays = {name: tensor.numpy() for name, tensor in policy.network.state_dict().items()}
    return {arrays_digest(arrays | {str(n): output for n, output in enumerate(outputs)})}


def main() -> None:
    config: Any = yamlio.load(Path(sys.argv[1]))
    found = {}
    if "hostile" in sys.argv:
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        np.seterr(all="raise")
    entries: dict[str, Callable[[str], None]] = {
        "command": partial(by_command, []),
        "preloaded": partial(by_command, ["--preload"]),
        "class": partial(by_class, config),
        "objective": partial(by_objective, config),
        "threads": partial(by_threads, config),
        "worker": partial(by_worker, config),
    }
    mode = torch.inference_mode if "hostile" in sys.argv else torch.enable_grad
    for name in sys.argv[2:]:
        if name in entries:
            with mode():
                entries[name](name)
            found[name] = sorted(digests(name))
    found["policy"] = sorted(actions("class"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

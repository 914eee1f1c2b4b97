"""Environments stepped side by side without losing a transition.

Every kind resets an environment in the step that ends its episode. So each step of each environment is a
transition of its own task: there is no reset row to mask, and an epoch of n steps is n transitions. With
every kind, `reset` with the same seeds starts the same episodes again, so that trials resume bit for bit.

`sync` and `async` are here. They step gymnasium's own environments, and give the same results. For `native`
and `envpool` see `ppo_hpo.envs.native`.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import signal
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from numpy.typing import NDArray

from ppo_hpo.envs.make import EnvInfo, close_all, make, make_several
from ppo_hpo.envs.native import EnvPoolEnvs, NativeEnvs
from ppo_hpo.envs.step import Step, VectorEnv
from ppo_hpo.envs.take import FLAGS, FLOATS, SMALL_SQUARES, Intake
from ppo_hpo.spec.config import EnvConfig
from ppo_hpo.spec.errors import UserError

# Seconds that a step of an environment costs more in another process: it must be woken, and pipes are slow.
# benchmarks/vectorization.py measures 120 to 240 microseconds.
_ASYNC_SECONDS = 200e-6


def vectorize(config: EnvConfig, info: EnvInfo, threads: int = 1) -> VectorEnv:
    """Make the environments of a trial, as `env.vectorization` says.

    With one thread `auto` is `sync`. With more it measures a few steps and chooses `sync` or `async`.
    """
    kind = config.vectorization
    if kind == "auto":
        kind = "async" if _async_pays(config, info, threads) else "sync"
    envs: VectorEnv = _KINDS[kind](config, info, threads)
    return envs


def _async_pays(config: EnvConfig, info: EnvInfo, threads: int) -> bool:
    processes = min(threads, config.n_envs)
    if processes == 1 or multiprocessing.current_process().daemon:  # a daemon may have no children
        return False
    env = make(config)
    env.reset(seed=0)
    space = copy.deepcopy(env.action_space)  # the environment may use its own, or share it with others
    space.seed(0)
    n = 30
    actions = [space.sample() for _ in range(n)]
    started = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    seconds = (time.perf_counter() - started) / n
    close_all([env])
    return seconds / processes + _ASYNC_SECONDS < seconds


class SyncEnvs:
    """N environments of gymnasium's, stepped one after the other.

    gymnasium's `SyncVectorEnv` in its same-step mode returns the environment's own array as the final
    observation. An environment that reuses its buffer overwrites that in the reset; here it is copied first.
    """

    name = "sync"

    def __init__(self, config: EnvConfig, info: EnvInfo, threads: int = 1) -> None:
        self._envs = make_several(config, config.n_envs)
        self._steps: list[Any] = [env.step for env in self._envs]
        self._info, self._intake = info, Intake(info)
        self._step = Step.empty(config.n_envs, info)
        self._flat_obs = self._step.obs.reshape(-1) if info.obs_dtype.kind == "f" else np.zeros(0)

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Reset every environment, with one seed for each; return the observations ``[N, D]``."""
        for index, (env, seed) in enumerate(zip(self._envs, seeds, strict=True)):
            self._step.obs[index] = self._intake.reset(env.reset(seed=seed))
        self._intake.check_finite(self._step.obs)
        return self._step.obs

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one action in each environment: ``[N]`` integers or ``[N, A]`` reals."""
        result, intake, ended = self._step, self._intake, False
        all_obs, rewards, steps = result.obs, result.reward, self._steps
        dtype, shape = self._info.obs_dtype, self._info.obs_shape
        if result.ended:
            result.terminated[:] = result.truncated[:] = False
        for index, action in enumerate(self._info.to_env(actions)):
            returned = steps[index](action)
            try:
                obs, reward, terminated, truncated, _ = returned
            except (TypeError, ValueError):
                intake.step(returned)  # says what is wrong
                raise
            # Most steps have these types. `intake` takes them too, but its call costs more than the look.
            if not (
                type(reward) in FLOATS and type(terminated) in FLAGS and type(truncated) in FLAGS
                and type(obs) is np.ndarray and obs.dtype is dtype and obs.shape == shape
            ):  # fmt: skip
                obs, reward, terminated, truncated = intake.step(returned)
            if terminated or truncated:
                ended = True
                result.terminated[index], result.truncated[index] = terminated, truncated
                result.final_obs[index] = obs
                if truncated:  # where the task itself ended, nothing is computed from it
                    intake.check_finite(result.final_obs[index])
                obs = intake.reset(self._envs[index].reset())
            all_obs[index] = obs
            rewards[index] = reward
        flat = self._flat_obs
        if not flat.dot(flat) < SMALL_SQUARES:  # as `is_finite` does it, without its calls
            intake.check_finite(all_obs)
        result.ended = ended
        return result

    def close(self) -> None:
        """Close every environment; raise what the first one raised that failed to close."""
        if failure := close_all(self._envs):
            raise failure


class AsyncEnvs:
    """N environments of gymnasium's, each in a process of its own, with the same results as `SyncEnvs`.

    This is faster where a step takes much longer than waking a process, and the trial has several cores.
    """

    name = "async"

    def __init__(self, config: EnvConfig, info: EnvInfo, threads: int = 1) -> None:
        if multiprocessing.current_process().daemon:
            raise UserError(
                "`env.vectorization: async` starts processes, which a worker process of an executor may not "
                "do. Choose sync or auto there."
            )
        # The processes are not forks of this one. It has threads (torch's, Orion's), which a fork would leave
        # in the middle of whatever they do, and pipes, whose open copies would outlive it.
        self._envs = AsyncVectorEnv(
            [functools.partial(_make_in_worker, config, info)] * config.n_envs, context="spawn",
            autoreset_mode=AutoresetMode.SAME_STEP, copy=False,
        )  # fmt: skip
        self._info, self._n, self._intake = info, config.n_envs, Intake(info)
        self._final_obs = np.zeros((config.n_envs, *info.obs_shape), info.obs_dtype)

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Reset every environment, with one seed for each; return the observations ``[N, D]``."""
        if len(seeds) != self._n:
            raise ValueError(f"{self._n} environments need as many seeds, but got {len(seeds)}.")
        obs, _ = self._envs.reset(seed=[*seeds])
        self._intake.check_finite(obs)
        return np.asarray(obs)

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one action in each environment: ``[N]`` integers or ``[N, A]`` reals."""
        obs, reward, terminated, truncated, infos = self._envs.step(self._info.to_env(actions))
        ended = "final_obs" in infos
        if ended:
            for index in np.flatnonzero(terminated | truncated):
                self._final_obs[index] = infos["final_obs"][index]
                self._intake.check_finite(self._final_obs[index])
        self._intake.check_finite(obs)
        return Step(obs, self._final_obs, reward, terminated, truncated, ended)

    def close(self) -> None:
        """Close every environment and end its process."""
        self._envs.close()


def _make_in_worker(config: EnvConfig, info: EnvInfo) -> gymnasium.Env[Any, Any]:
    # Ctrl-C in a terminal reaches every process. The trial's own process ends the workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    intake = Intake(info)

    class Taken(gymnasium.Wrapper[Any, Any, Any, Any]):
        """Returns copies, because the worker keeps the final observation while it resets."""

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            result = self.env.reset(seed=seed, options=options)
            return np.array(intake.reset(result), info.obs_dtype), result[1]

        def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
            result = self.env.step(action)
            obs, reward, terminated, truncated = intake.step(result)
            return np.array(obs, info.obs_dtype), reward, terminated, truncated, result[4]

    return Taken(make(config))


_KINDS: dict[str, Any] = {"sync": SyncEnvs, "async": AsyncEnvs, "native": NativeEnvs, "envpool": EnvPoolEnvs}

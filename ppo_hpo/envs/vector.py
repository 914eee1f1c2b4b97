"""Environments stepped side by side without losing a transition.

Every kind resets an environment in the step that ends its episode. So each step of each environment is a
transition of its own task: there is no reset row to mask, and an epoch of n steps is n transitions. With
every kind, `reset` with the same seeds starts the same episodes again, so that trials resume bit for bit.

`sync` and `async` are here. They step gymnasium's own environments, and give the same results. For `native`
and `envpool` see `ppo_hpo.envs.native`.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from numpy.typing import NDArray

from ppo_hpo.envs.make import EnvInfo, make
from ppo_hpo.envs.native import EnvPoolEnvs, NativeEnvs
from ppo_hpo.envs.step import Step, VectorEnv, put_obs, to_number
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
    env.action_space.seed(0)
    n = 30
    actions = [env.action_space.sample() for _ in range(n)]
    started = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    seconds = (time.perf_counter() - started) / n
    env.close()
    return seconds / processes + _ASYNC_SECONDS < seconds


class SyncEnvs:
    """N environments of gymnasium's, stepped one after the other.

    gymnasium's `SyncVectorEnv` in its same-step mode returns the environment's own array as the final
    observation. An environment that reuses its buffer overwrites that in the reset; here it is copied first.
    """

    name = "sync"

    def __init__(self, config: EnvConfig, info: EnvInfo, threads: int = 1) -> None:
        self._envs = [make(config) for _ in range(config.n_envs)]
        for env in self._envs:
            _speed_up_contains(env.unwrapped.action_space)
        self._steps: list[Any] = [env.step for env in self._envs]
        self._info = info
        self._step = Step.empty(config.n_envs, info)

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Reset every environment, with one seed for each; return the observations ``[N, D]``."""
        for index, (env, seed) in enumerate(zip(self._envs, seeds, strict=True)):
            obs, _ = env.reset(seed=seed)
            put_obs(self._info.id, obs, self._step.obs[index])
        return self._step.obs

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one action in each environment: ``[N]`` integers or ``[N, A]`` reals."""
        result = self._step
        all_obs, rewards, terminations, truncations = (
            result.obs, result.reward, result.terminated, result.truncated
        )  # fmt: skip
        ended = False
        length = len(all_obs[0])
        for index, action in enumerate(self._info.to_env(actions)):
            obs, reward, terminated, truncated, _ = self._steps[index](action)
            try:
                rewards[index] = reward + 0.0  # numpy makes None a NaN
                terminations[index], truncations[index] = terminated, truncated
                if terminated or truncated:
                    ended = True
                    put_obs(self._info.id, obs, result.final_obs[index])
                    obs, _ = self._envs[index].reset()
                all_obs[index] = obs
                # numpy would silently spread a single number over the whole row.
                if len(obs) != length:
                    raise ValueError
            except (TypeError, ValueError):
                to_number(self._info.id, reward)
                put_obs(self._info.id, obs, all_obs[index])
                raise
        result.ended = ended
        return result

    def close(self) -> None:
        """Close every environment."""
        for env in self._envs:
            env.close()


def _speed_up_contains(space: Any) -> None:
    """Make the method `contains` of a `Discrete` space faster; its answers stay the same.

    Environments assert in each step that the space contains the action. gymnasium's own method takes a
    quarter of a step of CartPole. The object is kept, because it has an rng of its own.
    """
    if type(space) is Discrete:
        space.__class__ = _QuickDiscrete


class _QuickDiscrete(Discrete):
    def contains(self, x: Any) -> bool:
        if type(x) is np.int64 and self.start <= x < self.start + self.n:
            return True
        return super().contains(x)


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
            [functools.partial(_make_in_worker, config)] * config.n_envs, context="spawn",
            autoreset_mode=AutoresetMode.SAME_STEP, copy=False,
        )  # fmt: skip
        self._info, self._n = info, config.n_envs
        self._final_obs = np.zeros((config.n_envs, *info.obs_shape), info.obs_dtype)

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Reset every environment, with one seed for each; return the observations ``[N, D]``."""
        if len(seeds) != self._n:
            raise ValueError(f"{self._n} environments need as many seeds, but got {len(seeds)}.")
        obs, _ = self._envs.reset(seed=[*seeds])
        return np.asarray(obs)

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one action in each environment: ``[N]`` integers or ``[N, A]`` reals."""
        obs, reward, terminated, truncated, infos = self._envs.step(self._info.to_env(actions))
        ended = "final_obs" in infos
        if ended:
            for index in np.flatnonzero(terminated | truncated):
                self._final_obs[index] = infos["final_obs"][index]
        return Step(obs, self._final_obs, reward, terminated, truncated, ended)

    def close(self) -> None:
        """Close every environment and end its process."""
        self._envs.close()


def _make_in_worker(config: EnvConfig) -> gymnasium.Env[Any, Any]:
    # Ctrl-C in a terminal reaches every process. The trial's own process ends the workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    class Copied(gymnasium.ObservationWrapper[Any, Any, Any]):
        """Returns copies, because the worker keeps the final observation while it resets."""

        def observation(self, observation: Any) -> Any:
            space = self.observation_space
            copy: NDArray[Any] = np.empty(space.shape or (), space.dtype)
            put_obs(config.id, observation, copy)
            return copy

        def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
            obs, reward, *rest = super().step(action)
            return obs, to_number(config.id, reward), *rest

    return Copied(make(config))


_KINDS: dict[str, Any] = {"sync": SyncEnvs, "async": AsyncEnvs, "native": NativeEnvs, "envpool": EnvPoolEnvs}

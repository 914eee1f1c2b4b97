"""Environments stepped side by side without losing a transition.

Whatever steps them, an environment is reset in the step that ends its episode. So every step of every
environment is a transition of its own task: there is no reset row to mask, and an epoch of n steps is n
transitions. And whatever steps them, `reset` with the same seeds begins the same episodes again, which
lets a trial continue to the bit.

`sync` and `async` step gymnasium's own environments and give the same results. `native` and `envpool` have
one implementation for all environments at once, faster, with rounding and random numbers of its own:
another trial with other results, each of which repeats.
"""

from __future__ import annotations

import functools
import multiprocessing
import signal
import time
import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from numpy.typing import NDArray

from ppo_hpo.envs.make import EnvInfo, make, malformed
from ppo_hpo.spec.config import EnvConfig
from ppo_hpo.spec.errors import MachineError, UserError

# One step of an environment in another process costs about so many seconds of waking and of pipes;
# benchmarks/vectorization.py measures 120 to 240 microseconds.
_ASYNC_SECONDS = 200e-6


@dataclass(slots=True)
class Step:
    """What one step of all environments gave. The arrays are reused by the next step.

    Attributes:
        obs: ``[N, D]`` what to act on next; where an episode ended, the first of the next episode.
        final_obs: ``[N, D]`` what the action led to, where an episode ended; elsewhere anything.
        reward: ``[N]``.
        terminated: ``[N]`` the task itself ended.
        truncated: ``[N]`` the episode was cut, as by a time limit.
        ended: whether any episode ended.
    """

    obs: NDArray[Any]
    final_obs: NDArray[Any]
    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    ended: bool = False


class VectorEnv(Protocol):
    """N environments side by side."""

    name: str

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Begin new episodes everywhere, one seed each; return the observations ``[N, D]``."""

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one action in each environment: ``[N]`` integers or ``[N, A]`` reals."""

    def close(self) -> None:
        """Close every environment."""


def vectorize(config: EnvConfig, info: EnvInfo, threads: int = 1) -> VectorEnv:
    """Make the environments of a trial, as `env.vectorization` says.

    Args:
        config: the environment.
        info: of the environment.
        threads: that the trial may use. With one, `auto` is `sync`; with more it measures a few steps
            and takes the faster of `sync` and `async`.

    Raises:
        UserError: the environment cannot be had in this way.
    """
    kind = config.vectorization
    if kind == "auto":
        kind = "async" if _async_pays(config, info, threads) else "sync"
    envs: VectorEnv = _KINDS[kind](config, info, threads)
    return envs


def _async_pays(config: EnvConfig, info: EnvInfo, threads: int) -> bool:
    processes = min(threads, config.n_envs)
    if processes == 1 or multiprocessing.current_process().daemon:  # which may have no children
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


def _buffers(n: int, info: EnvInfo) -> Step:
    obs = np.zeros((n, *info.obs_shape), info.obs_dtype)
    no = np.zeros(n, np.bool_)
    return Step(obs, obs.copy(), np.zeros(n), no, no.copy())


class SyncEnvs:
    """N environments of gymnasium's, stepped one after the other.

    gymnasium's `SyncVectorEnv` in its same-step mode hands out the environment's own array as final
    observation, which an environment that reuses its buffer overwrites at the reset; here it is copied first.
    """

    name = "sync"

    def __init__(self, config: EnvConfig, info: EnvInfo, threads: int = 1) -> None:
        self._envs = [make(config) for _ in range(config.n_envs)]
        for env in self._envs:
            _quicken(env.unwrapped.action_space)
        self._steps: list[Any] = [env.step for env in self._envs]
        self._info = info
        self._step = _buffers(config.n_envs, info)

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Begin new episodes everywhere, one seed each; return the observations ``[N, D]``."""
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
                # One number would be spread over the whole row without a word.
                if len(obs) != length:
                    raise ValueError
            except (TypeError, ValueError):
                number_of(self._info.id, reward)
                put_obs(self._info.id, obs, all_obs[index])
                raise
        result.ended = ended
        return result

    def close(self) -> None:
        """Close every environment."""
        for env in self._envs:
            env.close()


def put_obs(name: str, obs: Any, row: NDArray[Any]) -> None:
    """Copy an observation into its row of an array.

    Args:
        name: the environment's id.
        obs: that it gave.
        row: of the shape that its space promises.

    Raises:
        UserError: it has another shape, or holds something that is no number.
    """
    try:
        if np.shape(obs) == row.shape:
            row[...] = obs
            return
    except (TypeError, ValueError):
        pass
    raise malformed(name, "observation", obs, f"{row.dtype} of shape {row.shape}")


def number_of(name: str, reward: Any) -> float:
    """A reward as a number.

    Raises:
        UserError: it is none.
    """
    try:
        return float(reward)
    except (TypeError, ValueError):
        raise malformed(name, "reward", reward, "a number") from None


def _quicken(space: Any) -> None:
    """Let a `Discrete` space say sooner whether it contains an action.

    Environments assert it in each step, and gymnasium's way there takes a quarter of a step of CartPole.
    The answers stay the same; the object stays too, because it has its own stream of random numbers.
    """
    if type(space) is Discrete:
        space.__class__ = _QuickDiscrete


class _QuickDiscrete(Discrete):
    def contains(self, x: Any) -> bool:
        if type(x) is np.int64 and self.start <= x < self.start + self.n:
            return True
        return super().contains(x)


class AsyncEnvs:
    """N environments of gymnasium's, each in a process of its own; the same results as `SyncEnvs`.

    It pays where one step takes much longer than waking a process, and where the trial has several cores.
    """

    name = "async"

    def __init__(self, config: EnvConfig, info: EnvInfo, threads: int = 1) -> None:
        if multiprocessing.current_process().daemon:
            raise UserError(
                "`env.vectorization: async` starts processes, which a worker process of an executor may not: "
                "choose sync or auto there."
            )
        # Not forks of this process: it has threads (torch's, Orion's), which a fork would leave in the
        # middle of whatever they were doing, and pipes, whose open copies would outlive it.
        self._envs = AsyncVectorEnv(
            [functools.partial(_make_in_worker, config)] * config.n_envs,
            context="spawn",
            autoreset_mode=AutoresetMode.SAME_STEP,
            copy=False,
        )
        self._info = info
        self._n = config.n_envs
        self._final_obs = np.zeros((config.n_envs, *info.obs_shape), info.obs_dtype)

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Begin new episodes everywhere, one seed each; return the observations ``[N, D]``."""
        if len(seeds) != self._n:
            raise ValueError(f"{self._n} environments need as many seeds, not {len(seeds)}")
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
    """Make an environment in a process of `AsyncEnvs`."""
    # A terminal's Ctrl-C reaches every process: the trial's own ends the workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    class Copied(gymnasium.ObservationWrapper[Any, Any, Any]):
        """Hands out copies: the worker keeps the final observation while it resets."""

        def observation(self, observation: Any) -> Any:
            space = self.observation_space
            copy: NDArray[Any] = np.empty(space.shape or (), space.dtype)
            put_obs(config.id, observation, copy)
            return copy

        def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
            obs, reward, *rest = super().step(action)
            return obs, number_of(config.id, reward), *rest

    return Copied(make(config))


class NativeEnvs:
    """An environment's own implementation for all N at once, which gymnasium calls its vector entry point.

    In gymnasium's registry `CartPole-v1` has one. It resets in the step after the one that ended an episode,
    a row that is no transition; here it is made to reset in the same step. Environments of your own
    are taken if their metadata has ``autoreset_mode`` same-step and they report ``final_obs``.
    """

    name = "native"

    def __init__(self, config: EnvConfig, info: EnvInfo, threads: int = 1) -> None:
        from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

        options = dict(config.kwargs)
        if config.max_episode_steps is not None:
            options["max_episode_steps"] = config.max_episode_steps
        make(config).close()  # imports the module of a `module:EnvId`, and says what is wrong with it
        spec = gymnasium.spec(config.id.rpartition(":")[2])
        if spec.vector_entry_point is None:
            raise UserError(
                f"`env.vectorization: native` needs an environment with a vector entry point, but "
                f"`env.id: {config.id}` has none. Choose auto, or envpool if EnvPool has it."
            )
        try:
            self._envs: Any = gymnasium.make_vec(
                config.id, config.n_envs, vectorization_mode="vector_entry_point", **options
            )
        except TypeError as failure:
            raise UserError(
                f"The native version of `env.id: {config.id}` does not take {options}: {failure}."
            ) from None
        self._cartpole = type(self._envs.unwrapped) is CartPoleVectorEnv
        mode = self._envs.metadata.get("autoreset_mode")
        if not self._cartpole and mode != AutoresetMode.SAME_STEP:
            raise UserError(
                f"`env.vectorization: native` needs an environment that resets in the step that ends an "
                f"episode, but the native version of `env.id: {config.id}` has autoreset mode {mode}. "
                f"Choose auto."
            )
        self._info = info
        self._result = _buffers(config.n_envs, info)

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Begin new episodes everywhere, with one stream of random numbers that the first seed begins."""
        obs, _ = self._envs.reset(seed=seeds[0])
        return np.asarray(obs, self._info.obs_dtype)

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one action in each environment: ``[N]`` integers or ``[N, A]`` reals."""
        obs, reward, terminated, truncated, infos = self._envs.step(
            self._info.clipped(actions) if self._info.continuous else actions + self._info.first_action
        )
        done = terminated | truncated
        result = self._result
        result.ended = bool(done.any())
        if result.ended:
            if self._cartpole:
                result.final_obs[done] = obs[done]
                obs = self._reset_cartpoles(done)
            else:
                for index in np.flatnonzero(done):
                    result.final_obs[index] = infos["final_obs"][index]
        result.obs, result.terminated, result.truncated = obs, terminated, truncated
        result.reward[:] = reward
        return result

    def _reset_cartpoles(self, done: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Do now what `CartPoleVectorEnv.step` would do in the next step, and keep it from doing it."""
        envs = self._envs.unwrapped
        size = (4, int(done.sum()))
        envs.state[:, done] = envs.np_random.uniform(low=envs.low, high=envs.high, size=size)
        envs.steps[done] = 0
        envs.prev_done[:] = False
        obs: NDArray[np.float32] = envs.state.T.astype(np.float32)
        return obs

    def close(self) -> None:
        """Close the environments."""
        self._envs.close()


class EnvPoolEnvs:
    """EnvPool's implementation in C++ (Weng et al. 2022), as many threads as the trial has.

    EnvPool's seeds are given when a pool is made, so each `reset` makes one, which takes milliseconds. A pool
    resets an environment in the step after the one that ended its episode; here it is told to at once.
    """

    name = "envpool"

    def __init__(self, config: EnvConfig, info: EnvInfo, threads: int = 1) -> None:
        self._config, self._info, self._threads = config, info, threads
        self._pool: Any = None
        self._result = _buffers(config.n_envs, info)
        self._open([0] * config.n_envs)
        self._check()

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Begin new episodes everywhere, one seed each; return the observations ``[N, D]``."""
        if len(seeds) != self._config.n_envs:
            raise ValueError(f"{self._config.n_envs} environments need as many seeds, not {len(seeds)}")
        self.close()
        self._open(seeds)
        obs, _ = self._pool.reset()
        return np.asarray(obs, self._info.obs_dtype)

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one action in each environment: ``[N]`` integers or ``[N, A]`` reals."""
        info, result = self._info, self._result
        if info.continuous:
            chosen = info.clipped(actions)
        else:
            chosen = (actions + info.first_action).astype(np.int32)
        result.obs, reward, result.terminated, result.truncated, _ = self._pool.step(chosen)
        result.reward[:] = reward
        done = result.terminated | result.truncated
        result.ended = bool(done.any())
        if result.ended:
            ids = np.flatnonzero(done).astype(np.int32)
            result.final_obs[ids] = result.obs[ids]
            first, infos = self._pool.reset(ids)
            result.obs[infos["env_id"]] = first
        return result

    def close(self) -> None:
        """Close the pool."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _open(self, seeds: list[int]) -> None:
        try:
            import envpool
        except ImportError:
            raise MachineError(
                "`env.vectorization: envpool` needs EnvPool. Install it with: pip install 'ppo-hpo[envpool]'"
            ) from None
        config = self._config
        if config.id not in envpool.list_all_envs():
            raise UserError(
                f"`env.vectorization: envpool` needs an environment that EnvPool has, but it has no "
                f"`env.id: {config.id}`. Choose auto."
            )
        options = dict(config.kwargs)
        if config.max_episode_steps is not None:
            options["max_episode_steps"] = config.max_episode_steps
        try:
            with warnings.catch_warnings():
                # gymnasium's spaces warn that EnvPool gives bounds of single precision in double.
                warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
                self._pool = envpool.make(
                    config.id, env_type="gymnasium", num_envs=config.n_envs, seed=seeds,
                    num_threads=min(self._threads, config.n_envs), **options,
                )  # fmt: skip
                # Made when first asked for, and kept; `step` asks.
                self._spaces = self._pool.observation_space, self._pool.action_space
        except (TypeError, ValueError, AssertionError) as failure:
            raise UserError(
                f"EnvPool's `{config.id}` cannot be made with {options}: {' '.join(str(failure).split())}."
            ) from None

    def _check(self) -> None:
        """The same task, as far as spaces tell: gymnasium's version is the one that evaluates."""
        shape, actions = self._spaces[0].shape, self._spaces[1]
        size = int(np.prod(actions.shape)) if self._info.continuous else int(actions.n)
        if shape != self._info.obs_shape or size != self._info.action_dim:
            raise UserError(
                f"EnvPool's `{self._config.id}` has observations of shape {shape} and {size} actions, but "
                f"gymnasium's has {self._info.obs_shape} and {self._info.action_dim}. Choose auto."
            )


_KINDS: dict[str, Any] = {
    "sync": SyncEnvs,
    "async": AsyncEnvs,
    "native": NativeEnvs,
    "envpool": EnvPoolEnvs,
}

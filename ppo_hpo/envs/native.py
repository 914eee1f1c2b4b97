"""Vector environments with one implementation for all environments at once: native ones and EnvPool.

They are faster, with rounding and random numbers of their own. So a trial on them has other results than one
on gymnasium's environments, though each repeats bit for bit.
"""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from ppo_hpo.envs.make import EnvInfo, make, options_of
from ppo_hpo.envs.step import Step
from ppo_hpo.envs.take import Intake
from ppo_hpo.spec.config import EnvConfig
from ppo_hpo.spec.errors import MachineError, UserError


class NativeEnvs:
    """An environment's own implementation for all N at once, which gymnasium calls its vector entry point.

    In gymnasium's registry `CartPole-v1` has one. It resets in the step after the one that ended an episode,
    which gives a row that is not a transition. Here it resets in the same step instead. An environment of
    your own must have the ``autoreset_mode`` same-step in its metadata, and report ``final_obs``.
    """

    name = "native"

    def __init__(self, config: EnvConfig, info: EnvInfo, threads: int = 1) -> None:
        from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv

        options = options_of(config)
        make(config).close()  # imports the module of a `module:EnvId`, and raises what is wrong with it
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
        self._info, self._n, self._intake = info, config.n_envs, Intake(info)
        self._result = Step.empty(config.n_envs, info)

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Reset every environment; the first seed determines the one rng that they share."""
        obs, _ = self._envs.reset(seed=seeds[0])
        return self._intake.first_batch(obs, self._n)

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one action in each environment: ``[N]`` integers or ``[N, A]`` reals."""
        obs, reward, terminated, truncated, infos = self._envs.step(
            self._info.clipped(actions) if self._info.continuous else actions + self._info.first_action
        )
        obs, reward, terminated, truncated = self._intake.batch(self._n, obs, reward, terminated, truncated)
        done = terminated | truncated
        result = self._result
        result.ended = bool(done.any())
        if result.ended:
            if self._cartpole:
                result.final_obs[done] = obs[done]
                obs = self._reset_cartpoles(done)
            else:
                for index in np.flatnonzero(done):
                    result.final_obs[index] = self._intake.observation(infos["final_obs"][index])
                self._intake.check_finite(result.final_obs[done])
        result.obs, result.reward, result.terminated, result.truncated = obs, reward, terminated, truncated
        return result

    def _reset_cartpoles(self, done: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Reset now what `CartPoleVectorEnv.step` would reset in the next step, and keep it from doing so."""
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
    """EnvPool's implementation in C++ (Weng et al. 2022), with as many threads as the trial has.

    A pool takes its seeds when it is made, so each `reset` makes a new one, which takes milliseconds. A pool
    resets an environment in the step after the one that ended its episode; here it is told to do so at once.
    """

    name = "envpool"

    def __init__(self, config: EnvConfig, info: EnvInfo, threads: int = 1) -> None:
        self._config, self._info, self._threads = config, info, threads
        self._intake = Intake(info)
        self._pool: Any = None
        self._result = Step.empty(config.n_envs, info)
        self._open([0] * config.n_envs)
        self._check_spaces()

    def reset(self, seeds: list[int]) -> NDArray[Any]:
        """Reset every environment, with one seed for each; return the observations ``[N, D]``."""
        if len(seeds) != self._config.n_envs:
            raise ValueError(f"{self._config.n_envs} environments need as many seeds, but got {len(seeds)}.")
        self.close()
        self._open(seeds)
        obs, _ = self._pool.reset()
        return self._intake.first_batch(obs, self._config.n_envs)

    def step(self, actions: NDArray[Any]) -> Step:
        """Take one action in each environment: ``[N]`` integers or ``[N, A]`` reals."""
        info, result = self._info, self._result
        if info.continuous:
            chosen = info.clipped(actions)
        else:
            chosen = (actions + info.first_action).astype(np.int32)
        result.obs, result.reward, result.terminated, result.truncated = self._intake.batch(
            self._config.n_envs, *self._pool.step(chosen)[:4]
        )
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
        options = options_of(config)
        try:
            with warnings.catch_warnings():
                # gymnasium's spaces warn that EnvPool gives single precision bounds in double precision.
                warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
                self._pool = envpool.make(
                    config.id, env_type="gymnasium", num_envs=config.n_envs, seed=seeds,
                    num_threads=min(self._threads, config.n_envs), **options,
                )  # fmt: skip
                # A pool makes its spaces when they are first asked for, as `step` does, and warns then.
                self._spaces = self._pool.observation_space, self._pool.action_space
        except (TypeError, ValueError, AssertionError) as failure:
            raise UserError(
                f"EnvPool's `{config.id}` cannot be made with {options}: {' '.join(str(failure).split())}."
            ) from None

    def _check_spaces(self) -> None:
        """Refuse a pool whose spaces differ from those of gymnasium's version, which evaluates the trial."""
        shape, actions = self._spaces[0].shape, self._spaces[1]
        size = int(np.prod(actions.shape)) if self._info.continuous else int(actions.n)
        if shape != self._info.obs_shape or size != self._info.action_dim:
            raise UserError(
                f"EnvPool's `{self._config.id}` has observations of shape {shape} and {size} actions, but "
                f"gymnasium's has {self._info.obs_shape} and {self._info.action_dim}. Choose auto."
            )

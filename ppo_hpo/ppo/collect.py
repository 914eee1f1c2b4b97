"""Collecting rollouts: the policy acts in the training environments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.envs.make import EnvInfo
from ppo_hpo.envs.step import VectorEnv
from ppo_hpo.envs.take import Intake
from ppo_hpo.ppo.agent import Agent
from ppo_hpo.ppo.rollout import Episodes, Float32, Rollout, sampling_noise


class Collector:
    """Collects one rollout after another in environments that it resets once, at its construction.

    The agent's normaliser and scaler learn from every observation and reward. ``before_step`` is called
    before each step of the environments; what it raises leaves the last checkpoint as it is.
    """

    def __init__(
        self,
        agent: Agent,
        envs: VectorEnv,
        info: EnvInfo,
        seeds: list[int],
        rng: np.random.Generator,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._agent, self._envs, self._info = agent, envs, info
        self._rng, self._before_step, self._intake = rng, before_step, Intake(info)
        self.episodes = Episodes(len(seeds))
        agent.scaler.reset()
        raw_obs = envs.reset(seeds)
        agent.normalizer.update(raw_obs)
        #: ``[N, D]`` observations, normalised, from which the next rollout starts.
        self.obs: NDArray[Any] = agent.normalizer(raw_obs)

    def collect(self, n_steps: int) -> Rollout:
        """Take ``n_steps`` steps in each environment."""
        info, learner, envs = self._info, self._agent.learner, self._envs
        normalizer, scaler = self._agent.normalizer, self._agent.scaler
        shape = (n_steps, len(self.obs))
        noise = sampling_noise(self._rng, (*shape, info.action_dim), continuous=info.continuous)
        all_obs = np.empty((*shape, *info.obs_shape), np.uint8 if info.images else np.float32)
        actions = np.empty_like(noise) if info.continuous else np.empty(shape, np.int64)
        raw_reward, reward = np.empty(shape), np.empty(shape)
        terminated, truncated, done = (np.zeros(shape, np.bool_) for _ in range(3))
        outputs: list[Any] = []
        cut_at: list[tuple[int, int]] = []
        cut_obs: list[NDArray[Any]] = []
        obs = self.obs
        for t in range(n_steps):
            self._before_step()
            all_obs[t] = obs
            if learner.reuses_outputs:
                action, output = learner.act_with_outputs(obs, noise[t])
                outputs.append(output)
            else:
                action = learner.act(obs, noise[t])
            actions[t] = action
            step = envs.step(action)
            if step.ended:
                terminated[t] = step.terminated
                # Both flags at once mean that the task ended in its last allowed step: nothing follows.
                truncated[t] = step.truncated & ~step.terminated
                done[t] = terminated[t] | truncated[t]
            raw_reward[t] = step.reward
            reward[t] = scaler(step.reward, done[t])
            normalizer.update(step.obs)
            obs = normalizer(step.obs)
            if step.ended:
                for n in np.flatnonzero(truncated[t]):
                    cut_at.append((t, int(n)))
                    cut_obs.append(np.array(normalizer(step.final_obs[n])))  # the next step reuses it
        self._intake.check_finite(reward=raw_reward)
        self.obs = np.array(obs)  # the environments reuse it
        self.episodes.add(raw_reward, done)
        log_prob, value = self._evaluate(all_obs, actions, outputs)
        final_value = np.zeros(shape, np.float32)
        if cut_at:
            final_value[tuple(np.array(cut_at).T)] = learner.values(np.stack(cut_obs))
        return Rollout(all_obs, actions, log_prob, value, reward, terminated, truncated, final_value)

    def _evaluate(
        self, obs: NDArray[Any], action: NDArray[Any], outputs: list[Any]
    ) -> tuple[Float32, Float32]:
        """Log-probabilities and values ``[T, N]`` of all steps, in one batch.

        The policy does not change during a rollout, so one batch at the end gives the same as a small one
        in each step. A network with shared layers computed its outputs while it acted; they are reused.
        """
        learner, shape = self._agent.learner, obs.shape[:2]
        obs, action = (array.reshape(-1, *array.shape[2:]) for array in (obs, action))
        if learner.reuses_outputs:
            log_prob, value = learner.evaluate_outputs(outputs, action)
        else:
            log_prob, value = learner.log_probs(obs, action), learner.values(obs)
        return log_prob.reshape(shape), value.reshape(shape)

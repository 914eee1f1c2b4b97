"""Rollouts: what the policy did and what came of it, `[T, N]`, time first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ppo_hpo.envs.make import EnvInfo
from ppo_hpo.envs.vector import VectorEnv
from ppo_hpo.ppo.normalize import ObservationNormalizer, RewardScaler

Float32 = NDArray[np.float32]


class Policy(Protocol):
    """What collecting and evaluating need of an agent; all arrays are numpy's.

    For images read ``[N, H, W, C]`` or ``[N, C, H, W]`` of bytes where it says ``[N, D]``.
    """

    #: Whether `act_and_keep` is to be taken: acting has computed what values and log-probabilities need.
    keeps: bool

    def act(self, obs: NDArray[Any], noise: Float32 | None) -> NDArray[Any]:
        """Actions for observations ``[N, D]``: sampled by ``noise [N, A]``, or the mode."""

    def act_and_keep(self, obs: NDArray[Any], noise: Float32) -> tuple[NDArray[Any], Any]:
        """Actions for observations ``[N, D]``, and what `rate_kept` takes of them."""

    def rate_kept(self, kept: list[Any], action: NDArray[Any]) -> tuple[Float32, Float32]:
        """Log-probabilities and values ``[T * N]`` of what T times `act_and_keep` gave, with its actions."""

    def values(self, obs: NDArray[Any]) -> Float32:
        """Values ``[B]`` of observations ``[B, D]``."""

    def log_probs(self, obs: NDArray[Any], action: NDArray[Any]) -> Float32:
        """Log-probabilities ``[B]`` of actions."""


class Samples(NamedTuple):
    """What the update learns from: a rollout with time and environments in one axis, each ``[B, ...]``.

    All are contiguous, actions are integers or single precision, images bytes, everything else single
    precision.
    """

    obs: NDArray[Any]
    action: NDArray[Any]
    old_log_prob: Float32
    old_value: Float32
    advantage: Float32
    returns: Float32


@dataclass(frozen=True)
class Rollout:
    """T steps of N environments.

    Attributes:
        obs: ``[T, N, D]`` normalised, as the networks saw them; ``[T, N, H, W, C]`` bytes or the like for
            images.
        action: ``[T, N]`` integers or ``[T, N, A]`` reals, as sampled.
        log_prob: ``[T, N]`` of the actions when they were taken.
        value: ``[T, N]`` of ``obs``.
        reward: ``[T, N]``, scaled where the trial scales them.
        terminated: ``[T, N]`` the task itself ended: nothing follows.
        truncated: ``[T, N]`` the episode was cut: its future is worth ``final_value``.
        final_value: ``[T, N]`` value of the last observation of an episode that was cut; else 0.
    """

    obs: NDArray[Any]
    action: NDArray[Any]
    log_prob: Float32
    value: Float32
    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    final_value: Float32

    @property
    def done(self) -> NDArray[np.bool_]:
        """Where an episode ended, for either reason."""
        return self.terminated | self.truncated

    def next_value(self, last_value: Float32) -> Float32:
        """The value of what each step led to, ``[T, N]``.

        Args:
            last_value: ``[N]`` of the observations that follow the last step.
        """
        following = np.concatenate([self.value[1:], last_value[None]])
        return np.where(self.truncated, self.final_value, following)

    def samples(self, advantage: NDArray[Any], returns: NDArray[Any]) -> Samples:
        """The rollout as samples, with the advantage ``[T, N]`` and the returns ``[T, N]`` of each."""
        arrays = (self.obs, self.action, self.log_prob, self.value, advantage, returns)
        flat = [array.reshape(-1, *array.shape[2:]) for array in arrays]
        return Samples(*(a.astype(np.float32) if a.dtype == np.float64 else a for a in flat))


@dataclass
class Episodes:
    """Returns and lengths of the training episodes that ended, in raw rewards."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def begin(self, n_envs: int) -> None:
        """Forget the episodes under way: all environments were reset."""
        self._return = np.zeros(n_envs)
        self._length = np.zeros(n_envs, np.int64)

    def add(self, reward: NDArray[Any], done: NDArray[np.bool_]) -> None:
        """Take in a rollout's rewards ``[T, N]`` and where episodes ended ``[T, N]``."""
        begins = np.zeros(reward.shape[1], np.int64)
        for t, n in np.argwhere(done).tolist():
            self.returns.append(float(self._return[n] + reward[begins[n] : t + 1, n].sum()))
            self.lengths.append(int(self._length[n]) + t + 1 - int(begins[n]))
            self._return[n], self._length[n], begins[n] = 0.0, 0, t + 1
        for n, begin in enumerate(begins.tolist()):
            self._return[n] += reward[begin:, n].sum()
            self._length[n] += len(reward) - begin


def collect(
    policy: Policy,
    envs: VectorEnv,
    info: EnvInfo,
    obs: NDArray[Any],
    n_steps: int,
    normalizer: ObservationNormalizer,
    scaler: RewardScaler,
    stream: np.random.Generator,
    episodes: Episodes,
    tick: Callable[[], None] = lambda: None,
) -> tuple[Rollout, NDArray[Any]]:
    """Run the policy for ``n_steps`` in each environment.

    Values and log-probabilities are computed at the end, for all samples in one batch: the policy
    does not change during a rollout. A policy whose values come with its actions keeps them instead.

    Args:
        policy: acts, values and rates.
        envs: N environments, in the middle of whatever episodes they are in.
        info: of the environment.
        obs: ``[N, D]`` normalised observations to begin with.
        n_steps: T.
        normalizer: takes in every observation seen.
        scaler: takes in every reward.
        stream: of the actions' noise.
        episodes: takes in every reward, unscaled.
        tick: called before each step; raising in it leaves everything as it was at the last epoch.

    Returns:
        The rollout, and the normalised observations ``[N, D]`` that follow it.
    """
    n = len(obs)
    shape = (n_steps, n)
    all_obs = np.empty((*shape, *info.obs_shape), np.uint8 if info.images else np.float32)
    noise = sampling_noise(stream, (*shape, info.action_dim), continuous=info.continuous)
    action = np.empty((*shape, info.action_dim) if info.continuous else shape, _dtype(info))
    raw_reward, reward = np.empty(shape), np.empty(shape)
    terminated, truncated = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    done = np.zeros(shape, np.bool_)
    cut_at: list[tuple[int, int]] = []
    cut_obs: list[NDArray[Any]] = []
    kept: list[Any] = []
    for t in range(n_steps):
        tick()
        all_obs[t] = obs
        if policy.keeps:
            chosen, parts = policy.act_and_keep(obs, noise[t])
            kept.append(parts)
        else:
            chosen = policy.act(obs, noise[t])
        action[t] = chosen
        step = envs.step(chosen)
        if step.ended:
            terminated[t] = step.terminated
            # Both flags at once means that the task ended in its last allowed step: nothing follows.
            truncated[t] = step.truncated & ~step.terminated
            done[t] = terminated[t] | truncated[t]
        raw_reward[t] = step.reward
        reward[t] = scaler(step.reward, done[t])
        normalizer.update(step.obs)
        obs = normalizer(step.obs)
        if step.ended:
            for index in np.flatnonzero(truncated[t]):
                cut_at.append((t, int(index)))
                cut_obs.append(np.array(normalizer(step.final_obs[index])))  # the next step reuses it
    episodes.add(raw_reward, done)
    flat_obs = all_obs.reshape(-1, *info.obs_shape)
    flat_action = action.reshape(len(flat_obs), *action.shape[2:])
    if policy.keeps:
        log_prob, value = policy.rate_kept(kept, flat_action)
    else:
        log_prob, value = policy.log_probs(flat_obs, flat_action), policy.values(flat_obs)
    final_value = np.zeros(shape, np.float32)
    if cut_at:
        final_value[tuple(np.array(cut_at).T)] = policy.values(np.stack(cut_obs))
    rollout = Rollout(
        obs=all_obs,
        action=action,
        log_prob=log_prob.reshape(shape),
        value=value.reshape(shape),
        reward=reward,
        terminated=terminated,
        truncated=truncated,
        final_value=final_value,
    )
    return rollout, np.array(obs)


def sampling_noise(stream: np.random.Generator, shape: tuple[int, ...], *, continuous: bool) -> Float32:
    """Noise that turns a policy's output into a sample of it, on any device.

    Standard normal for means, and standard Gumbel for logits: the largest of logits + Gumbel noise
    is a sample of their softmax (Gumbel 1954).
    """
    if continuous:
        return stream.standard_normal(shape, np.float32)
    exponential = stream.standard_exponential(shape, np.float32)
    return -np.log(np.maximum(exponential, np.finfo(np.float32).tiny))


def _dtype(info: EnvInfo) -> type[np.generic]:
    return np.float32 if info.continuous else np.int64

"""Tiny environments with known answers, made by id: ``tests.envs:EndlessReward-v0``."""

from __future__ import annotations

import contextlib
import time
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces

Obs = np.ndarray[Any, Any]
StepResult = tuple[Obs, float, bool, bool, dict[str, Any]]


def _box(*shape: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, shape, np.float32)


class EndlessReward(gymnasium.Env[Obs, int]):
    """Reward 1 forever, whatever one does: every state is worth 1 / (1 - gamma).

    Only the time limit of its registration cuts it, so that a value that depends on the limit is wrong.
    """

    observation_space = _box(1)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action: int) -> StepResult:
        return np.ones(1, np.float32), 1.0, False, False, {}


class Target(gymnasium.Env[Obs, Obs]):
    """Continuous: reward 1 for the action `TARGET`, and less by the squared distance from it.

    Each episode begins at a random place, from which the observation then decays. Actions outside of
    their bounds are an error.
    """

    TARGET = np.array([0.5, -0.25])

    observation_space = _box(3)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        self._place = self.np_random.uniform(-1.0, 1.0, 3)
        return self._place.astype(np.float32), {}

    def step(self, action: Obs) -> StepResult:
        assert self.action_space.contains(action), action
        self._place = 0.9 * self._place
        reward = 1.0 - float(np.square(action - self.TARGET).sum())
        return self._place.astype(np.float32), reward, False, False, {}


class RandomWalk(gymnasium.Env[Obs, int]):
    """Discrete: action 2 pays 1 and the others nothing, until a random walk leaves (-3, 3).

    The walk depends on no action, so that neither does an episode's length; it is drawn in `step`, so
    that an episode depends on how often its random state was used before. Registered with a time limit
    that cuts about half of the episodes.
    """

    observation_space = _box(2)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        self._place = self._steps = 0.0
        return self._obs(), {}

    def step(self, action: int) -> StepResult:
        self._place += self.np_random.normal()
        self._steps += 1.0
        return self._obs(), float(action == 2), abs(self._place) >= 3.0, False, {}

    def _obs(self) -> Obs:
        return np.array([self._place, self._steps / 10.0], np.float32)


class Counter(gymnasium.Env[Obs, int]):
    """Observes the steps of this episode and of its whole life; rewards the latter.

    It hands out the same array every time and changes it in place, as environments may: whoever keeps
    an observation without copying it sees the next one, or the reset.

    Args:
        ends_at: step of the episode that terminates it; None never does.
    """

    observation_space = _box(2)
    action_space = spaces.Discrete(2)

    def __init__(self, ends_at: int | None = None) -> None:
        self._ends_at = ends_at
        self._obs = np.zeros(2, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        self._obs[0] = 0.0
        return self._obs, {}

    def step(self, action: int) -> StepResult:
        self._obs += 1.0
        return self._obs, float(self._obs[1]), self._obs[0] == self._ends_at, False, {}


class BecomesNaN(EndlessReward):
    """`EndlessReward` until something is NaN.

    Args:
        after: steps of its whole life that are good.
        part: ``reward`` or ``observation``, what becomes NaN.
    """

    def __init__(self, after: int = 100, part: str = "reward") -> None:
        self._left = after
        self._part = part

    def step(self, action: int) -> StepResult:
        obs, reward, terminated, truncated, info = super().step(action)
        self._left -= 1
        if self._left < 0:
            if self._part == "reward":
                reward = float("nan")
            else:
                obs = np.full_like(obs, np.nan)
        return obs, reward, terminated, truncated, info


class FromFive(EndlessReward):
    """Discrete actions 5, 6 and 7; the reward is the action's number."""

    action_space = spaces.Discrete(3, start=5)

    def step(self, action: int) -> StepResult:
        assert self.action_space.contains(action), action
        return np.ones(1, np.float32), float(action), False, False, {}


class Swallows(EndlessReward):
    """Takes whatever is raised while it steps for an error of its own, as careless code does."""

    def step(self, action: int) -> StepResult:
        with contextlib.suppress(BaseException):
            time.sleep(0.01)
        return super().step(action)


class Short(EndlessReward):
    """Gives one number where its space promises three."""

    observation_space = _box(3)


class Image(EndlessReward):
    """An observation space that is not supported: two dimensions."""

    observation_space = _box(4, 4)


class Switches(EndlessReward):
    """An action space that is not supported."""

    action_space = spaces.MultiBinary(3)


class Sleeps(EndlessReward):
    """`EndlessReward`, whose step takes a hundredth of a second."""

    def step(self, action: int) -> StepResult:
        time.sleep(0.01)
        return super().step(action)


class Walks(gymnasium.vector.VectorEnv[Obs, Obs, Obs]):
    """`RandomWalk`, all at once: episodes end outside of (-2, 2), and begin again in the same step."""

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}

    def __init__(self, num_envs: int = 1) -> None:
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = _box(2), spaces.Discrete(3)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        self._state = np.zeros((self.num_envs, 2), np.float32)
        return self._state.copy(), {}

    def step(self, actions: Obs) -> tuple[Obs, Obs, Obs, Obs, dict[str, Any]]:
        self._state += np.stack([self.np_random.normal(size=self.num_envs), np.ones(self.num_envs)], 1)
        terminated = np.abs(self._state[:, 0]) >= 2.0
        infos = {"final_obs": self._state.copy()} if terminated.any() else {}
        self._state[terminated] = 0.0
        reward = (actions == 2).astype(np.float64)
        return self._state.copy(), reward, terminated, np.zeros(self.num_envs, np.bool_), infos


class Late(Walks):
    """`Walks` that say to begin again in the step after."""

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}


gymnasium.register("EndlessReward-v0", EndlessReward, max_episode_steps=5)
gymnasium.register("Target-v0", Target, max_episode_steps=10)
gymnasium.register("RandomWalk-v0", RandomWalk, max_episode_steps=10)
gymnasium.register("Counter-v0", Counter)
gymnasium.register("BecomesNaN-v0", BecomesNaN, max_episode_steps=10)
gymnasium.register("FromFive-v0", FromFive, max_episode_steps=5)
gymnasium.register("Swallows-v0", Swallows, max_episode_steps=5)
gymnasium.register("Short-v0", Short, max_episode_steps=5)
gymnasium.register("Image-v0", Image)
gymnasium.register("Switches-v0", Switches)
gymnasium.register("Sleeps-v0", Sleeps, max_episode_steps=5)
gymnasium.register("Walks-v0", RandomWalk, vector_entry_point=Walks)
gymnasium.register("Late-v0", RandomWalk, vector_entry_point=Late)

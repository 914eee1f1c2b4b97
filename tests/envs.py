"""Tiny environments with known answers, made by id: ``tests.envs:EndlessReward-v0``."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
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
    """Gives the reward 1 forever, so every state has the value 1 / (1 - gamma).

    Only the time limit of its registration cuts episodes. A value that depends on that limit is wrong.
    """

    observation_space = _box(1)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action: int) -> StepResult:
        return np.ones(1, np.float32), 1.0, False, False, {}


class Target(gymnasium.Env[Obs, Obs]):
    """Gives the reward 1 for the continuous action `TARGET`, less the squared distance from it.

    Each episode starts at a random place, from which the observation then decays. An action outside of its
    bounds is an error.
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
    """Gives the reward 1 for action 2 and 0 for the others, until a random walk leaves (-3, 3).

    Neither the walk nor the length of an episode depends on the actions. `step` draws the walk, so an episode
    depends on how often its rng was used before. The time limit of its registration cuts about half of them.
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
    """Observes the number of steps of this episode and of its whole life; the reward is the latter.

    It returns the same array every time and changes it in place, as environments may. An observation that is
    kept without a copy becomes the next one, or that of the reset.

    Args:
        ends_at: step of the episode that terminates it; None never terminates.
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
    """`EndlessReward` whose reward or observation becomes NaN.

    Args:
        after: steps of its whole life before that.
        part: what becomes NaN, ``reward`` or ``observation``.
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
    """Has the discrete actions 5, 6 and 7; the reward is the number of the action."""

    action_space = spaces.Discrete(3, start=5)

    def step(self, action: int) -> StepResult:
        assert self.action_space.contains(action), action
        return np.ones(1, np.float32), float(action), False, False, {}


class Swallows(EndlessReward):
    """Suppresses whatever is raised while it steps, as careless code does."""

    def step(self, action: int) -> StepResult:
        with contextlib.suppress(BaseException):
            time.sleep(0.01)
        return super().step(action)


class Short(EndlessReward):
    """Returns one number where its space promises three."""

    observation_space = _box(3)


class Image(EndlessReward):
    """Has an observation space of two dimensions, which is not supported."""

    observation_space = _box(4, 4)


class Switches(EndlessReward):
    """Has an action space that is not supported."""

    action_space = spaces.MultiBinary(3)


class Sleeps(EndlessReward):
    """`EndlessReward`, whose step takes a hundredth of a second."""

    def step(self, action: int) -> StepResult:
        time.sleep(0.01)
        return super().step(action)


class Walks(gymnasium.vector.VectorEnv[Obs, Obs, Obs]):
    """`RandomWalk` for all at once: episodes end outside of (-2, 2), and reset in the same step."""

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
    """`Walks` whose metadata says that it resets in the step after."""

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}


class Eyes(gymnasium.Env[Obs, int]):
    """Shows images ``[36, 40, 2]``; the reward is 1 for the number of the corner with a bright square.

    The channel of the square and the noise tell nothing, and the images of all corners are equally bright.

    Args:
        channels_first: whether the same images are ``[2, 36, 40]``.
    """

    action_space = spaces.Discrete(4)

    def __init__(self, channels_first: bool = False) -> None:
        self._first = channels_first
        shape = (2, 36, 40) if channels_first else (36, 40, 2)
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        return self._look(), {}

    def step(self, action: int) -> StepResult:
        reward = float(action == self._corner)
        return self._look(), reward, bool(self.np_random.random() < 0.1), False, {}

    def _look(self) -> Obs:
        self._corner = int(self.np_random.integers(4))
        image = self.np_random.integers(0, 100, (36, 40, 2), dtype=np.uint8)
        top, left = 24 * (self._corner // 2), 28 * (self._corner % 2)
        image[top : top + 12, left : left + 12, int(self.np_random.integers(2))] = 250
        return image.transpose(2, 0, 1) if self._first else image


class Gray(EndlessReward):
    """Shows images that are too small for convolutions, or have another range than bytes.

    Args:
        side: height and width of an image.
        high: largest value of a pixel.
    """

    def __init__(self, side: int = 35, high: int = 255) -> None:
        self.observation_space = spaces.Box(0, high, (side, side, 1), np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        return self._look(), {}

    def step(self, action: int) -> StepResult:
        return self._look(), 1.0, False, False, {}

    def _look(self) -> Obs:
        return np.zeros(self.observation_space.shape, np.uint8)


class Console:
    """Replaces the console of the Arcade Learning Environment by a script, as far as `Atari` needs it.

    The screen is 84 x 84, so that it is not resized. Pixel (0, 0) shows the number of the game's frame. A
    sprite of brightness 200 is at (1, 0) in even frames and at (1, 1) in odd ones.

    Attributes:
        frame: number of the current frame of the game.
        games: number of games started so far.
        pressed: names of all actions, one for each frame.
    """

    def __init__(
        self, lose_at: list[int], none_at: int, over_at: int, cut_at: int, pays: dict[int, float]
    ) -> None:
        self._lose_at, self._none_at, self._over_at = lose_at, none_at, over_at
        self._cut_at, self._pays = cut_at, pays
        self.pressed: list[str] = []
        self.games = self.frame = 0

    def begin(self) -> None:
        self.games += 1
        self.frame = 0

    def act(self, action: Any) -> float:
        assert not self.game_over(), "a frame after the game's end"
        self.frame += 1
        self.pressed.append(action.name)
        return self._pays.get(self.frame, 0.0)

    def lives(self) -> int:
        if self.frame >= min(self._none_at, self._over_at):
            return 0
        return 1 + len(self._lose_at) - sum(self.frame >= at for at in self._lose_at)

    def game_over(self, with_truncation: bool = True) -> bool:
        return self.frame >= self._over_at or (with_truncation and self.game_truncated())

    def game_truncated(self) -> bool:
        return self.frame >= self._cut_at

    def getScreenDims(self) -> tuple[int, int]:  # noqa: N802 - the names of ALE
        return 84, 84

    def getScreenGrayscale(self, screen: Obs) -> None:  # noqa: N802
        screen[:] = 0
        screen[0, 0] = self.frame
        screen[1, self.frame % 2] = 200


class Arcade(gymnasium.Env[Obs, int]):
    """A game on a `Console`; its arguments are the script of the game."""

    action_space = spaces.Discrete(3)
    observation_space = spaces.Box(0, 255, (128,), np.uint8)

    def __init__(
        self,
        frameskip: int = 4,
        obs_type: str = "rgb",
        fire: bool = True,
        lose_at: tuple[int, ...] = (),
        none_at: int = 10**6,
        over_at: int = 10**6,
        max_num_frames_per_episode: int = 10**6,
        pays: dict[str, float] | None = None,
    ) -> None:
        earned = {int(frame): pay for frame, pay in (pays or {}).items()}
        assert (frameskip, obs_type) == (1, "ram")
        self.ale = Console(list(lose_at), none_at, over_at, max_num_frames_per_episode, earned)
        self._meanings = ["NOOP", "FIRE", "UP"] if fire else ["NOOP", "UP", "DOWN"]

    def get_action_meanings(self) -> list[str]:
        return self._meanings

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        self.ale.begin()
        return np.zeros(128, np.uint8), {}


class Fails(RandomWalk):
    """`RandomWalk` that fails after so many steps of all environments.

    Args:
        how: kind of failure, and how often it happens in all processes of a trial, as in ``kill:1``; without
            a number it always happens. ``raise`` happens in some states only, so that it comes again at the
            same step. An empty string never fails.
        at: step from which on it happens; steps of evaluations count, too.
        notes: file that counts how often it happened.
    """

    steps_of_all: ClassVar[int] = 0

    def __init__(self, how: str = "", at: int = 0, notes: str = "") -> None:
        self._how, _, times = how.partition(":")
        self._times = int(times or 10**9)
        self._at, self._notes = at, f"{notes}-{how}"

    def step(self, action: int) -> StepResult:
        Fails.steps_of_all += 1
        result = super().step(action)
        if not self._how or Fails.steps_of_all < self._at or (self._how == "raise" and self._place < 2.0):
            return result
        happened = os.path.getsize(self._notes) if os.path.exists(self._notes) else 0
        if happened >= self._times:
            return result
        with open(self._notes, "ab") as notes:
            notes.write(b"x")
        return self._happen(*result)

    def _happen(self, obs: Obs, reward: Any, terminated: bool, truncated: bool, info: Any) -> StepResult:
        if self._how == "raise":
            raise RuntimeError("the simulator fell over")
        if self._how == "memory":
            limit = _address_space() + (256 << 20), resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_AS, limit)
            np.ones(1 << 28)
        if self._how == "io":
            raise OSError(errno.EIO, "Input/output error")
        if self._how == "pipe":
            raise EOFError
        if self._how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._how == "short":
            obs = obs[:1]
        reward = {"word": "much", "none": None, "nan": float("nan")}.get(self._how, reward)
        return obs, reward, terminated, truncated, info


class Odd(gymnasium.Env[Obs, int]):
    """Returns something odd from the step `at` of its whole life on, or from its first reset if that is 0.

    Args:
        what: a key of `ODD`.
        at: step of its life from which on it is odd.
    """

    action_space = spaces.Discrete(2)

    def __init__(self, what: str = "nothing", at: int = 0) -> None:
        space, self._odd = ODD[what]
        self.observation_space = space or _box(2)
        self._what, self._at, self._life = what, at, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Obs, dict[str, Any]]:
        super().reset(seed=seed)
        odd = self._odd.get("obs") if self._at == 0 else None
        return (self._obs() if odd is None else odd), {}

    def step(self, action: int) -> StepResult:
        self._life += 1
        odd = self._odd if self._life >= self._at else {}
        return (
            odd.get("obs", self._obs()), odd.get("reward", 1.0), odd.get("terminated", False),
            odd.get("truncated", False), {},
        )  # fmt: skip

    def _obs(self) -> Obs:
        return np.ones(self.observation_space.shape, self.observation_space.dtype)


_DOUBLE = spaces.Box(-np.inf, np.inf, (2,), np.float64)
#: Name to an observation space (None is a Box of two) and to what is returned.
ODD: dict[str, tuple[Any, dict[str, Any]]] = {
    "nothing": (None, {}),
    "fractions in integers": (spaces.Box(0, 1, (2,), np.int64), {"obs": np.array([0.9, 0.1])}),
    "beyond bytes": (spaces.Box(0, 255, (3,), np.uint8), {"obs": np.array([300, -1, 256.5])}),
    "negative bytes": (spaces.Box(0, 255, (2,), np.uint8), {"obs": np.array([-1, 0])}),
    "words": (None, {"obs": np.array(["1", "2"])}),
    "objects": (None, {"obs": np.array([1.0, "2"], object)}),
    "ragged": (None, {"obs": [1.0, [2.0]]}),
    "one number": (None, {"obs": 1.0}),
    "nan": (None, {"obs": np.array([np.nan, 0.0], np.float32)}),
    "infinity": (_DOUBLE, {"obs": np.array([0.0, -np.inf])}),
    "1e39": (_DOUBLE, {"obs": np.array([1e39, 0.0])}),
    "reward nan": (None, {"reward": float("nan")}),
    "reward 1e39": (None, {"reward": 1e39}),
    "reward word": (None, {"reward": "1.0"}),
    "reward none": (None, {"reward": None}),
    "rewards": (None, {"reward": np.array([1.0, 2.0])}),
    "reward huge": (None, {"reward": 10**400}),
    "flag word": (None, {"terminated": "False"}),
    "flag none": (None, {"truncated": None}),
    "flag number": (None, {"terminated": 2}),
    # These are taken.
    "double": (None, {"obs": np.array([0.1, 0.2])}),
    "list": (None, {"obs": [0.5, True]}),
    "whole fractions": (spaces.Box(0, 9, (2,), np.int64), {"obs": np.array([3.0, 4.0])}),
    "large": (_DOUBLE, {"obs": np.array([1e38, -1e30])}),
    "reward array": (None, {"reward": np.array([2.0])}),
    "reward scalar": (None, {"reward": np.float32(2.0)}),
    "reward truth": (None, {"reward": True}),
    "flag array": (None, {"terminated": np.array([True])}),
    "flag scalar": (None, {"truncated": np.bool_(True)}),
    "flag one": (None, {"terminated": 1}),
}


class OldReset(EndlessReward):
    """Returns the observation alone, as in gym before 0.26."""

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=seed)[0]


class OldSeed(EndlessReward):
    """Has no argument `seed`."""

    def reset(self) -> Any:  # type: ignore[override]
        return np.ones(1, np.float32)


class OldStep(EndlessReward):
    """Returns four values, as in gym before 0.26."""

    def step(self, action: int) -> Any:
        return (*super().step(action)[:3], {})


class Empty(EndlessReward):
    """Has a space of no numbers.

    Args:
        part: which one, ``observation`` or ``action``.
    """

    def __init__(self, part: str = "observation") -> None:
        if part == "observation":
            self.observation_space = _box(0)
        else:
            self.action_space = _box(0)  # type: ignore[assignment]


class Far(EndlessReward):
    """Has actions far from those of an untrained policy."""

    action_space = spaces.Box(500.0, 1000.0, (1,), np.float32)  # type: ignore[assignment]


class Fallible(EndlessReward):
    """Fails in one of its methods.

    Args:
        where: ``init``, ``reset``, ``step`` or ``close``.
        how: name of what is raised: an exception, or ``exit`` for SystemExit(0), or ``keyboard``.
    """

    def __init__(self, where: str = "init", how: str = "TypeError") -> None:
        self._where, self._how = where, how
        self._fail("init")

    def _fail(self, where: str) -> None:
        if where == self._where:
            raise {
                "exit": SystemExit(0), "keyboard": KeyboardInterrupt(), "TypeError": TypeError("of its own"),
                "RuntimeError": RuntimeError("of its own"),
            }[self._how]  # fmt: skip

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Obs, dict[str, Any]]:
        self._fail("reset")
        return super().reset(seed=seed)

    def step(self, action: int) -> StepResult:
        self._fail("step")
        return super().step(action)

    def close(self) -> None:
        self._fail("close")


class Watches(EndlessReward):
    """Sees what is done to it: the reward is 1 if its action space and its arguments are its own, else -1."""

    def __init__(self, things: list[int] | None = None) -> None:
        self.action_space = spaces.Discrete(2)
        self._own = things is None or things == [1]
        if things is not None:
            things.append(2)

    def step(self, action: int) -> StepResult:
        obs, _, *rest = super().step(action)
        own = self._own and type(self.action_space) is spaces.Discrete and type(action) is np.int64
        return obs, 1.0 if own else -1.0, *rest


class OnlyAWrapper(gymnasium.Wrapper[Obs, int, Obs, int]):
    """Defines the spaces, which the environment in it has not."""

    def __init__(self) -> None:
        super().__init__(_Bare())
        self.action_space, self.observation_space = spaces.Discrete(2), _box(1)


class _Bare(EndlessReward):
    observation_space = None  # type: ignore[assignment]
    action_space = None  # type: ignore[assignment]


class Remembers(RandomWalk):
    """Does not repeat itself.

    Args:
        how: ``state`` survives resets, or the ``seed`` is ignored.
    """

    def __init__(self, how: str = "state") -> None:
        self._how, self._seen = how, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Obs, dict[str, Any]]:
        if self._how == "seed":
            return super().reset(seed=None)
        return super().reset(seed=seed)

    def _obs(self) -> Obs:
        self._seen += self._how == "state"
        return super()._obs() / (1.0 + self._seen)


class OnlyOne(EndlessReward):
    """May exist once at a time, as a robot does.

    Attributes:
        made: how many were made.
    """

    alive: ClassVar[int] = 0
    made: ClassVar[int] = 0

    def __init__(self) -> None:
        if OnlyOne.alive:
            raise RuntimeError("the robot is in use")
        OnlyOne.alive += 1
        OnlyOne.made += 1

    def close(self) -> None:
        OnlyOne.alive -= 1


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


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
gymnasium.register("Eyes-v0", Eyes, max_episode_steps=12)
gymnasium.register("Gray-v0", Gray)
gymnasium.register("Arcade-v0", Arcade)
gymnasium.register("Sleeps-v0", Sleeps, max_episode_steps=5)
gymnasium.register("Fails-v0", Fails, max_episode_steps=10)
gymnasium.register("Walks-v0", RandomWalk, vector_entry_point=Walks)
gymnasium.register("Late-v0", RandomWalk, vector_entry_point=Late)
for _class in (OldReset, OldSeed, OldStep, Empty, Far, Fallible, Watches, Remembers, OnlyOne):
    gymnasium.register(f"{_class.__name__}-v0", _class, max_episode_steps=5)
gymnasium.register("Odd-v0", Odd, max_episode_steps=50)
gymnasium.register("OnlyAWrapper-v0", OnlyAWrapper)

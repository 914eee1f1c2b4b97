"""Games of the Arcade Learning Environment, treated as is usual since Mnih et al. 2015 (details 14 to 20).

One wrapper does it all, and asks the console itself: gymnasium's `AtariPreprocessing` begins a new game where
a life was lost, presses no button to start, leaves stacking and clipping to others, and takes a third longer
for a step, because it has every frame drawn. Its resizing needs OpenCV, 61 MB; here it is two small matrix
products, twice as fast.
"""

from __future__ import annotations

import math
import re
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from ppo_hpo.spec.errors import UserError

Frame = NDArray[np.uint8]

SKIP = 4
STACK = 4
SIZE = 84
MOST_NO_OPS = 30
_OLDER_NAME = re.compile(r"\w+NoFrameskip-v[04]")
# What the wrapper decides itself.
_OWN = ("frameskip", "obs_type", "continuous", "sound_obs")


def register(name: str) -> None:
    """Let gymnasium know the games, where ``name`` looks like one: ``ALE/Pong-v5``, ``PongNoFrameskip-v4``.

    Raises:
        ImportError: ale-py is not installed.
    """
    if name.startswith("ALE/") or (name not in gymnasium.registry and _OLDER_NAME.fullmatch(name)):
        import ale_py

        # It greets on standard error otherwise, once for each environment.
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        gymnasium.register_envs(ale_py)


def options_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a game is made with for `Atari`: single frames, and no picture that nobody looks at.

    Raises:
        UserError: ``kwargs`` has what the wrapper decides.
    """
    for key in _OWN:
        if key in kwargs:
            raise UserError(
                f"`env.wrapper: atari` decides `{key}` itself ({SKIP} frames a step, gray pictures, the "
                f"joystick's discrete actions), but `env.kwargs` has {key}={kwargs[key]!r}: leave it out."
            )
    return {**kwargs, "frameskip": 1, "obs_type": "ram"}


class Atari(gymnasium.Wrapper[Frame, int, Any, int]):
    """A game as PPO trains on it, or as it is judged.

    A step holds the joystick for 4 frames and shows the brighter of each pixel in the last two (sprites
    flicker). An observation is ``[84, 84, 4]``: the last four such pictures, gray, the latest one last, black
    where there is none yet. A game begins with 1 to 30 frames of doing nothing, and then, where the game has
    a fire button, with pressing it and the joystick's next position.

    In training each life is an episode, ended by the loss of it; the reset after it goes on with the same
    game, by one step of doing nothing and the fire button. Rewards are replaced by their sign. When judged,
    an episode is a whole game with its own rewards; after a lost life the same steps are taken, as part of
    the step that lost it, so that a policy sees what it saw in training. Stable-Baselines3's `AtariWrapper`
    does the same.

    ``reset(seed=...)`` begins a new game whatever went before: nothing is left of it.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], *, training: bool, max_steps: int | None = None) -> None:
        """Wrap a game.

        Args:
            env: made with `options_of`.
            training: see above.
            max_steps: cut a game after so many steps, beside the console's own limit in frames.
        """
        import ale_py

        super().__init__(env)
        console: Any = env.unwrapped
        self._ale: Any = console.ale
        meanings = console.get_action_meanings()
        self._actions = [getattr(ale_py.Action, name) for name in meanings]
        self._training = training
        fires = len(meanings) >= 3 and meanings[1] == "FIRE"
        self._to_begin = self._actions[1:3] if fires else []
        frames = None if env.spec is None else env.spec.kwargs.get("max_num_frames_per_episode")
        limits = [limit for limit in (max_steps, frames and frames // SKIP) if limit]
        self.time_limit: int | None = min(limits, default=None)
        self._max_steps = math.inf if max_steps is None else max_steps
        height, width = self._ale.getScreenDims()
        self._shrink = Shrink(height, width)
        self._screen, self._before = np.zeros((2, height, width), np.uint8)
        self._stack = np.zeros((SIZE, SIZE, STACK), np.uint8)
        # The four pictures of a pixel in one number, the latest in its highest byte: one shift moves them
        # all.
        self._pixels = self._stack.view("<u4")[..., 0]
        self._lives = self._steps = 0
        self._reward = 0.0
        self._life_lost = False
        self.observation_space = spaces.Box(0, 255, self._stack.shape, np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        """Begin the next life in training, where one was lost and no seed is given; else a new game."""
        goes_on = self._life_lost and seed is None
        self._reward = 0.0
        if goes_on:
            self._begin_life()
        if not goes_on or self._ale.game_over():
            self._begin_game(seed)
        self._lives, self._life_lost = self._ale.lives(), False
        if self._training:  # no action of the agent's earned it; a game that is judged keeps its whole score
            self._reward = 0.0
        return self._stack.copy(), {}

    def step(self, action: int) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        """Hold the joystick for 4 frames."""
        self._advance(self._actions[action])
        self._steps += 1
        lives = self._ale.lives()
        # Some games show 0 lives for some frames before they are over.
        lost, self._lives = 0 < lives < self._lives, lives
        if lost and not self._training and not self._over():
            self._begin_life()
            self._lives = self._ale.lives()
        terminated = self._ale.game_over(with_truncation=False)
        truncated = self._ale.game_truncated() or self._steps >= self._max_steps
        if lost and self._training and not (terminated or truncated):
            terminated = self._life_lost = True
        reward, self._reward = self._reward, 0.0
        if self._training:
            reward = float((reward > 0) - (reward < 0))
        return self._stack.copy(), reward, terminated, truncated, {}

    def _over(self) -> bool:
        return bool(self._ale.game_over()) or self._steps >= self._max_steps

    def _begin_game(self, seed: int | None) -> None:
        self.env.reset(seed=seed)
        self._steps = 0
        for _ in range(int(self.np_random.integers(1, MOST_NO_OPS + 1))):
            self._reward += self._ale.act(self._actions[0])
            if self._ale.game_over():
                self.env.reset()
        self._ale.getScreenGrayscale(self._screen)
        self._push()
        self._fire()

    def _begin_life(self) -> None:
        self._advance(self._actions[0])
        self._fire()

    def _fire(self) -> None:
        for action in self._to_begin:
            if not self._ale.game_over():
                self._advance(action)
        self._stack[..., :-1] = 0

    def _advance(self, action: Any) -> None:
        """Four frames, or as many as are left of the game; adds their rewards to what is owed."""
        ale = self._ale
        for frame in range(SKIP):
            self._reward += ale.act(action)
            if ale.game_over():
                break
            if frame == SKIP - 2:
                ale.getScreenGrayscale(self._before)
        ale.getScreenGrayscale(self._screen)
        if frame == SKIP - 1:
            np.maximum(self._screen, self._before, out=self._screen)
        self._push()

    def _push(self) -> None:
        np.right_shift(self._pixels, 8, out=self._pixels)
        self._stack[..., -1] = self._shrink(self._screen)


class Shrink:
    """Resizes a picture ``[H, W]`` to ``[84, 84]``: each new pixel is the mean of the area it covers.

    210 rows are 42 groups of 5, each of which becomes 2; 160 columns are 4 groups of 40, each of which
    becomes 21. So it is one small matrix for rows and one for columns. Their entries are whole numbers, and
    so are all sums, far below 2**24: single precision makes no error, whatever the order, and the result is
    the same on every machine.
    """

    def __init__(self, height: int, width: int) -> None:
        self._rows, self._columns = overlaps(height), overlaps(width).T.copy()
        self._groups = height // self._rows.shape[1]
        self._total = np.float32(self._rows[0].sum() * self._columns[:, 0].sum())

    def __call__(self, picture: Frame) -> Frame:
        """The picture, smaller; halves are rounded to even."""
        rows, columns = self._rows, self._columns
        groups = picture.reshape(self._groups, rows.shape[1], -1).astype(np.float32)
        sums: NDArray[np.float32] = np.matmul(rows, groups).reshape(-1, columns.shape[0]) @ columns
        sums /= self._total
        np.rint(sums, out=sums)
        return sums.reshape(SIZE, SIZE).astype(np.uint8)


def overlaps(length: int) -> NDArray[np.float32]:
    """How much of each old pixel each new one covers, in one group: ``[84 / g, length / g]``, g their
    divisor.

    The unit is so small that all are whole: an old pixel is ``84 / g`` units long and a new one ``length /
    g``.
    """
    divisor = math.gcd(length, SIZE)
    old, new = SIZE // divisor, length // divisor
    begin, other = new * np.arange(old)[:, None], old * np.arange(new)[None]
    covered: NDArray[Any] = np.minimum(begin + new, other + old) - np.maximum(begin, other)
    return np.asarray(np.maximum(covered, 0), np.float32)

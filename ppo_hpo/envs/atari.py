"""Games of the Arcade Learning Environment, wrapped as is usual since Mnih et al. 2015 (details 14 to 20).

One wrapper does everything, and calls the console itself. gymnasium's `AtariPreprocessing` starts a new game
where a life was lost, presses no button to start, and leaves stacking and clipping to others. Its step takes
a third longer, because it has every frame drawn. Its resizing needs OpenCV (61 MB); here two small matrix
products do it, twice as fast.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
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
# Arguments that the wrapper sets itself.
_OWN = ("frameskip", "obs_type", "continuous", "sound_obs")


def register(name: str) -> None:
    """Register the games with gymnasium if ``name`` is like ``ALE/Pong-v5`` or ``PongNoFrameskip-v4``."""
    if name.startswith("ALE/") or (name not in gymnasium.registry and _OLDER_NAME.fullmatch(name)):
        import ale_py

        # Otherwise each environment prints a greeting to standard error.
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        gymnasium.register_envs(ale_py)


def game_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with which gymnasium makes a game for `Atari`: single frames, and no rendered pictures."""
    for key in _OWN:
        if key in kwargs:
            raise UserError(
                f"`env.wrapper: atari` sets `{key}` itself ({SKIP} frames a step, gray pictures, the "
                f"joystick's discrete actions), but `env.kwargs` has {key}={kwargs[key]!r}. Leave it out."
            )
    return {**kwargs, "frameskip": 1, "obs_type": "ram"}


class Atari(gymnasium.Wrapper[Frame, int, Any, int]):
    """A game as PPO trains on it, or as it is evaluated.

    A step holds the joystick for 4 frames. Its picture has the brighter value of each pixel in the last two,
    since sprites flicker. An observation ``[84, 84, 4]`` is the last four such pictures in gray, the latest
    one last; pictures that do not exist yet are black. A game starts with 1 to 30 frames without action. A
    game with a fire button then presses it, and after it the joystick's next position.

    In training each life is an episode, which terminates when the life is lost. The next reset continues the
    same game, with one step without action and the fire button. Rewards are replaced by their sign.

    In evaluation an episode is a whole game with its own rewards. The step that loses a life then takes the
    same steps, so that a policy sees what it saw in training. Stable-Baselines3's `AtariWrapper` does the
    same.

    ``reset(seed=...)`` always starts a new game, which no earlier game influences.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], *, training: bool, max_steps: int | None = None) -> None:
        """Wrap a game made with `game_options`; beside ``max_steps`` the console has a limit in frames."""
        import ale_py

        super().__init__(env)
        console: Any = env.unwrapped
        self._ale: Any = console.ale
        meanings = console.get_action_meanings()
        self._actions = [getattr(ale_py.Action, name) for name in meanings]
        self._training = training
        fires = len(meanings) >= 3 and meanings[1] == "FIRE"
        self._start_actions = self._actions[1:3] if fires else []
        frames = None if env.spec is None else env.spec.kwargs.get("max_num_frames_per_episode")
        limits = [limit for limit in (max_steps, frames and frames // SKIP) if limit]
        self.time_limit: int | None = min(limits, default=None)
        self._max_steps = math.inf if max_steps is None else max_steps
        height, width = self._ale.getScreenDims()
        self._shrink = Shrink(height, width)
        self._screen, self._before = np.zeros((2, height, width), np.uint8)
        self._stack = np.zeros((SIZE, SIZE, STACK), np.uint8)
        # One number has the four pictures of a pixel, the latest in its highest byte: one shift moves all.
        self._pixels = self._stack.view("<u4")[..., 0]
        self._lives = self._steps = 0
        self._reward = 0.0
        self._life_lost = False
        self.observation_space = spaces.Box(0, 255, self._stack.shape, np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        """Start a new game; in training, without a seed and after a lost life, start the next life."""
        same_game = self._life_lost and seed is None
        self._reward = 0.0
        if same_game:
            self._start_life()
        if not same_game or self._ale.game_over():
            self._start_game(seed)
        self._lives, self._life_lost = self._ale.lives(), False
        if self._training:  # no action of the agent earned it; in evaluation a game keeps its whole score
            self._reward = 0.0
        return self._stack.copy(), {}

    def step(self, action: int) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        """Hold the joystick for 4 frames; see the class."""
        self._advance(self._actions[action])
        self._steps += 1
        lives = self._ale.lives()
        # Some games show 0 lives for some frames before they end.
        lost, self._lives = 0 < lives < self._lives, lives
        if lost and not self._training and not self._over():
            self._start_life()
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

    def _start_game(self, seed: int | None) -> None:
        self.env.reset(seed=seed)
        self._steps = 0
        for _ in range(int(self.np_random.integers(1, MOST_NO_OPS + 1))):
            self._reward += self._ale.act(self._actions[0])
            if self._ale.game_over():
                self.env.reset()
        self._ale.getScreenGrayscale(self._screen)
        self._push()
        self._fire()

    def _start_life(self) -> None:
        self._advance(self._actions[0])
        self._fire()

    def _fire(self) -> None:
        for action in self._start_actions:
            if not self._ale.game_over():
                self._advance(action)
        self._stack[..., :-1] = 0

    def _advance(self, action: Any) -> None:
        """Run 4 frames, or fewer if the game ends, and add their rewards to the reward of the step."""
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

    210 rows are 42 groups of 5, each of which becomes 2 rows. 160 columns are 4 groups of 40, each of which
    becomes 21. So one small matrix does the rows and one does the columns. Their entries are whole numbers,
    and so are all sums, far below 2**24. Single precision makes no error then, whatever the order, and the
    result is the same on every machine.
    """

    def __init__(self, height: int, width: int) -> None:
        self._rows, self._columns = overlaps(height), overlaps(width).T.copy()
        self._groups = height // self._rows.shape[1]
        self._total = np.float32(self._rows[0].sum() * self._columns[:, 0].sum())

    def __call__(self, picture: Frame) -> Frame:
        """The resized picture; halves are rounded to even."""
        rows, columns = self._rows, self._columns
        groups = picture.reshape(self._groups, rows.shape[1], -1).astype(np.float32)
        sums: NDArray[np.float32] = np.matmul(rows, groups).reshape(-1, columns.shape[0]) @ columns
        sums /= self._total
        np.rint(sums, out=sums)
        return sums.reshape(SIZE, SIZE).astype(np.uint8)


def overlaps(length: int) -> NDArray[np.float32]:
    """Overlap of each new pixel with each old one in one group, ``[84 / g, length / g]``.

    ``g`` is the greatest common divisor of 84 and ``length``. The unit is so small that all overlaps are
    whole numbers: an old pixel is ``84 / g`` units long and a new one ``length / g``.
    """
    divisor = math.gcd(length, SIZE)
    old, new = SIZE // divisor, length // divisor
    begin, other = new * np.arange(old)[:, None], old * np.arange(new)[None]
    covered: NDArray[Any] = np.minimum(begin + new, other + old) - np.maximum(begin, other)
    return np.asarray(np.maximum(covered, 0), np.float32)

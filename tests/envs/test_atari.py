"""Atari games: the wrapper against a scripted game, and against hand-written loops over real games."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from ppo_hpo import UserError
from ppo_hpo.envs.atari import Atari, Shrink
from ppo_hpo.envs.make import make, probe
from ppo_hpo.envs.vector import AsyncEnvs, SyncEnvs
from ppo_hpo.ppo.evaluate import Evaluator
from ppo_hpo.ppo.normalize import ObservationNormalizer
from ppo_hpo.ppo.task import PPO
from ppo_hpo.spec.config import EnvConfig, TrialConfig
from ppo_hpo.spec.space import fill, read_space

SEED = 5


def arcade(*, evaluation: bool = False, max_episode_steps: int | None = None, **script: Any) -> Atari:
    if "pays" in script:  # a configuration's keys are strings
        script["pays"] = {str(frame): pay for frame, pay in script["pays"].items()}
    config = EnvConfig(
        id="tests.envs:Arcade-v0", wrapper="atari", kwargs=script, max_episode_steps=max_episode_steps
    )
    env = make(config, evaluation=evaluation)
    assert isinstance(env, Atari)
    return env


def console(env: Atari) -> Any:
    return env.unwrapped.ale  # type: ignore[attr-defined]


def frames(obs: np.ndarray) -> list[int]:
    """The numbers of the frames in an observation, oldest first; 0 where there is none."""
    return obs[0, 0].tolist()


def start(env: Atari) -> int:
    """Reset; return the number of the frame that is seen first."""
    return frames(env.reset(seed=SEED)[0])[-1]


def no_ops(seed: int) -> int:
    random, _ = gymnasium.utils.seeding.np_random(seed)
    return int(random.integers(1, 31))


# ------------------------------------------------------------------------ by hand


def test_a_game_starts_with_no_ops_and_the_fire_button() -> None:
    env = arcade()
    n = no_ops(SEED)
    assert start(env) == n + 8
    assert console(env).pressed == ["NOOP"] * n + ["FIRE"] * 4 + ["UP"] * 4
    assert len({no_ops(seed) for seed in range(200)}) == 30  # each number there is

    quiet = arcade(fire=False)
    assert start(quiet) == n
    assert console(quiet).pressed == ["NOOP"] * n


def test_a_step_is_four_frames_and_shows_the_brighter_of_the_last_two() -> None:
    env = arcade()
    first = start(env)
    pressed = len(console(env).pressed)
    obs, *_ = env.step(2)
    assert console(env).pressed[pressed:] == ["UP"] * 4
    assert obs.shape == (84, 84, 4)
    assert obs.dtype == np.uint8
    assert env.observation_space.contains(obs)
    assert frames(obs)[-1] == first + 4
    # The sprite is left in even frames and right in odd ones, so the newest picture has both.
    assert obs[1, :2, -1].tolist() == [200, 200]


def test_pictures_are_stacked_oldest_first_and_black_before_the_first() -> None:
    env = arcade()
    first = start(env)
    seen = [frames(env.reset(seed=SEED)[0])] + [frames(env.step(0)[0]) for _ in range(5)]
    assert seen == [
        [0, 0, 0, first],
        [0, 0, first, first + 4],
        [0, first, first + 4, first + 8],
        [first, first + 4, first + 8, first + 12],
        [first + 4, first + 8, first + 12, first + 16],
        [first + 8, first + 12, first + 16, first + 20],
    ]


def test_an_observation_is_not_changed_by_the_next_step() -> None:
    env = arcade()
    start(env)
    obs = env.step(0)[0]
    kept = obs.copy()
    env.step(0)
    np.testing.assert_array_equal(obs, kept)


def test_rewards_are_signs_in_training_and_whole_in_evaluation() -> None:
    first = no_ops(SEED) + 8
    # Frames of the steps: +1..+4, +5..+8, +9..+12, +13..+16. In the first step 5 - 2, in the third -7.
    pays = {first - 1: 100.0, first + 2: 5.0, first + 4: -2.0, first + 9: -7.0, first + 13: 0.5}
    for evaluation, expected in ((False, [1, 0, -1, 1]), (True, [103, 0, -7, 0.5])):
        env = arcade(evaluation=evaluation, pays=pays)
        assert start(env) == first
        # What was paid before the first step, 100, belongs to the game in evaluation.
        assert [env.step(0)[1] for _ in range(4)] == expected

    for evaluation, expected in ((False, [0, 0]), (True, [300, 0])):
        env = arcade(evaluation=evaluation, pays={1: 100.0, first: 200.0})
        for _ in range(2):  # what nobody fetched is not paid in the next game
            start(env)
        assert [env.step(0)[1] for _ in range(2)] == expected


def test_a_life_is_an_episode_in_training_and_the_game_continues() -> None:
    first = no_ops(SEED) + 8
    env = arcade(lose_at=(first + 3, first + 30), over_at=first + 50)
    assert start(env) == first
    obs, _, terminated, truncated, _ = env.step(2)
    assert (terminated, truncated) == (True, False)
    assert frames(obs)[-1] == first + 4
    pressed = len(console(env).pressed)
    obs, _ = env.reset()
    # One step without action, then the button: the same game, without pictures of the old life.
    assert console(env).games == 1
    assert console(env).pressed[pressed:] == ["NOOP"] * 4 + ["FIRE"] * 4 + ["UP"] * 4
    assert frames(obs) == [0, 0, 0, first + 16]
    ends = [env.step(0)[2] for _ in range(4)]
    assert ends == [False, False, False, True]  # at frame + 32
    env.reset()  # + 44
    assert [env.step(0)[2:4] for _ in range(2)] == [(False, False), (True, False)]
    assert console(env).frame == first + 50
    env.reset()
    assert console(env).games == 2


def test_evaluation_plays_a_whole_game_and_starts_lives_as_in_training() -> None:
    first = no_ops(SEED) + 8
    env = arcade(
        evaluation=True, lose_at=(first + 3,), over_at=first + 30, pays={first + 1: 2.0, first + 9: 40.0}
    )
    assert start(env) == first
    pressed = len(console(env).pressed)
    obs, reward, terminated, truncated, _ = env.step(2)
    assert (terminated, truncated) == (False, False)
    assert console(env).pressed[pressed:] == ["UP"] * 4 + ["NOOP"] * 4 + ["FIRE"] * 4 + ["UP"] * 4
    assert reward == 42.0  # 40 of it while the next life began
    assert frames(obs) == [0, 0, 0, first + 16]
    steps = [env.step(0)[2:4] for _ in range(4)]
    assert steps == [(False, False)] * 3 + [(True, False)]
    assert console(env).games == 1


def test_a_game_without_lives_may_continue() -> None:
    """Some games show 0 lives for some frames before they end. Stable-Baselines3 continues then, too."""
    first = no_ops(SEED) + 8
    env = arcade(none_at=first + 3, over_at=first + 7)
    start(env)
    assert [env.step(0)[2] for _ in range(2)] == [False, True]


def test_evaluation_plays_whole_games_for_their_own_rewards() -> None:
    first = no_ops(SEED) + 8
    script = {
        "lose_at": [first + 3],
        "over_at": first + 30,
        "pays": {f"{first + 1}": 2.0, f"{first + 29}": 40.0},
    }
    config = EnvConfig(id="tests.envs:Arcade-v0", wrapper="atari", kwargs=script)

    class Still:
        def act(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
            return np.zeros(len(obs), np.int64)

    evaluator = Evaluator(config, probe(config), [SEED], 1000)
    found = evaluator(Still(), ObservationNormalizer(0, enabled=False, clip=10.0), None)
    assert (found.returns, found.lengths) == ((42.0,), (5,))  # the first step takes 16 frames


def test_a_game_that_ends_while_the_next_life_starts_is_followed_by_a_new_one() -> None:
    first = no_ops(SEED) + 8
    env = arcade(lose_at=(first + 3,), over_at=first + 6)
    start(env)
    assert env.step(0)[2]
    env.reset()
    assert console(env).games == 2
    env = arcade(evaluation=True, lose_at=(first + 3,), over_at=first + 6)
    start(env)
    assert env.step(0)[2:4] == (True, False)
    assert console(env).games == 1


def test_time_limits_cut_and_do_not_terminate() -> None:
    first = no_ops(SEED) + 8
    env = arcade(max_num_frames_per_episode=first + 6, lose_at=(first + 5,))
    assert env.time_limit == (first + 6) // 4
    start(env)
    assert [env.step(0)[2:4] for _ in range(2)] == [(False, False), (False, True)]
    env.reset()  # a new game, though a life was lost in the last step
    assert console(env).games == 2

    # In evaluation the life that would follow is not started any more.
    last = arcade(evaluation=True, lose_at=(first + 3,), max_episode_steps=1)
    start(last)
    assert last.step(0)[2:4] == (False, True)
    assert console(last).frame == first + 4

    short = arcade(max_episode_steps=3)
    assert short.time_limit == 3
    start(short)
    assert [short.step(0)[2:4] for _ in range(3)] == [(False, False)] * 2 + [(False, True)]
    start(short)
    assert [short.step(0)[3] for _ in range(3)] == [False, False, True]


def test_a_seed_always_starts_a_new_game() -> None:
    first = no_ops(SEED) + 8
    env = arcade(lose_at=(first + 3,), max_episode_steps=4)
    start(env)
    assert env.step(0)[2]  # a life is lost: without a seed the game would go on
    assert frames(env.reset(seed=SEED)[0]) == [0, 0, 0, first]
    assert console(env).games == 2
    assert env.step(0)[2]
    env.reset()
    assert console(env).games == 2
    assert [env.step(0)[3] for _ in range(3)] == [False, False, True]


# ----------------------------------------------------------------------- resizing


def shrunk_slowly(picture: np.ndarray) -> np.ndarray:
    """The mean over each new pixel's area, pixel by pixel, in whole numbers."""
    height, width = picture.shape
    result = np.zeros((84, 84), np.uint8)
    # In units of 1/84 of an old pixel an old pixel is 84 long, and a new one `height` or `width`.
    for i in range(84):
        for j in range(84):
            total = 0
            for y in range(i * height // 84, math.ceil((i + 1) * height / 84)):
                tall = min((y + 1) * 84, (i + 1) * height) - max(y * 84, i * height)
                for x in range(j * width // 84, math.ceil((j + 1) * width / 84)):
                    wide = min((x + 1) * 84, (j + 1) * width) - max(x * 84, j * width)
                    total += tall * wide * int(picture[y, x])
            whole, rest = divmod(total, height * width)
            up = 2 * rest > height * width or (2 * rest == height * width and whole % 2 == 1)
            result[i, j] = whole + up
    return result


@pytest.mark.parametrize("shape", [(210, 160), (250, 160), (84, 84)], ids=str)
def test_pictures_are_resized_by_area(shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.testing.assert_array_equal(Shrink(*shape)(picture), shrunk_slowly(picture))


# -------------------------------------------------------------------- real games


class ByHand:
    """A game stepped as the papers say, through gymnasium's own interface, frame by frame."""

    def __init__(self, game: str) -> None:
        self.env = gymnasium.make(game, frameskip=1, obs_type="grayscale", disable_env_checker=True)
        self.shrink = Shrink(210, 160)

    def reset(self, seed: int | None, goes_on: bool) -> np.ndarray:
        self.pictures = [np.zeros((84, 84), np.uint8)] * 4
        if goes_on:
            self.four(0)
        else:
            self.env.reset(seed=seed)
            for _ in range(int(self.env.unwrapped.np_random.integers(1, 31))):
                self.env.step(0)
        self.four(1)
        _, _, _, self.lives = self.four(2)
        self.pictures = [np.zeros((84, 84), np.uint8)] * 3 + self.pictures[-1:]
        return np.stack(self.pictures, -1)

    def four(self, action: int) -> tuple[np.ndarray, float, bool, int]:
        total, last = 0.0, []
        for _ in range(4):
            screen, reward, terminated, _, info = self.env.step(action)
            total += float(reward)
            last.append(screen)
        self.pictures = [*self.pictures[1:], self.shrink(np.maximum(last[-1], last[-2]))]
        return np.stack(self.pictures, -1), total, terminated, info["lives"]


@pytest.mark.parametrize("game", ["PongNoFrameskip-v4", "ALE/Breakout-v5"])
def test_real_games_against_a_loop_by_hand(game: str) -> None:
    """Some hundred random steps; the sticky actions of v5 come from the seed too."""
    env = make(EnvConfig(id=game, wrapper="atari"))
    by_hand = ByHand(game)
    obs, expected = env.reset(seed=3)[0], by_hand.reset(3, False)
    np.testing.assert_array_equal(obs, expected)
    actions = np.random.default_rng(0).integers(0, 4, 200).tolist()
    lives, rewards = [], []
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        expected, total, over, left = by_hand.four(action)
        np.testing.assert_array_equal(obs, expected)
        lost = 0 < left < by_hand.lives
        by_hand.lives = left
        assert (reward, terminated, truncated) == (np.sign(total), over or lost, False)
        rewards.append(reward)
        if terminated:
            lives.append(left)
            obs = env.reset()[0]
            np.testing.assert_array_equal(obs, by_hand.reset(None, goes_on=not over))
    assert len(set(rewards)) > 1
    if "Breakout" in game:
        assert lives[:4] == [4, 3, 2, 1]  # and each loss was an episode
    assert obs.std() > 10  # it shows something


def test_a_seed_resets_everything_of_a_used_game() -> None:
    """Law 3: lives, pictures, the console's memory and its random numbers all start again."""

    def play(env: Any) -> list[Any]:
        seen: list[Any] = [env.reset(seed=9)[0]]
        for action in np.random.default_rng(1).integers(0, 4, 60).tolist():
            obs, reward, terminated, truncated, _ = env.step(action)
            seen += [obs, reward, terminated]
            if terminated or truncated:
                seen.append(env.reset()[0])
        return seen

    config = EnvConfig(id="ALE/Breakout-v5", wrapper="atari")
    used = make(config)
    used.reset(seed=1)
    for action in [2, 3, 2, 0] * 20:
        if used.step(action)[2]:
            used.reset()
    while not used.step(3)[2]:
        pass  # a life is lost, and not yet begun again
    for one, other in zip(play(used), play(make(config)), strict=True):
        np.testing.assert_array_equal(one, other)


def pong(**task: Any) -> TrialConfig:
    """The preset `pong`, made as small as possible."""
    preset = TrialConfig.from_mapping(fill(read_space("pong"), {}))
    return preset.replace(
        env={"n_envs": 2, "max_episode_steps": 30, "kwargs": {"repeat_action_probability": 0.25}},
        task={"epochs": 2, "max_epochs": 2, "steps_per_epoch": 64, "eval_episodes": 1, **task},
        model={"features_dim": 8},
        ppo={"n_steps": 16, "batch_size": 16, "n_epochs": 2},
    )


def test_pong_learns_the_same_after_a_stop(tmp_path: Path) -> None:
    """Law 3 on a real game with sticky actions: a trial that stops in its second epoch ends the same."""

    class Stopped(Exception):
        pass

    def stop_in_the_middle() -> None:
        ticks.append(1)
        if len(ticks) == 20:
            raise Stopped

    through = PPO.from_config(pong(), "cpu")
    through.fit(2)
    through.finish()
    ticks: list[int] = []
    first = PPO.from_config(pong(), "cpu", storage=tmp_path)
    first.fit(1)
    first.before_step = stop_in_the_middle
    with pytest.raises(Stopped):
        first.fit(2)
    first.finish()
    again = PPO.from_config(pong(), "cpu", storage=tmp_path)
    assert again.epoch == 1
    again.fit(2)
    again.finish()
    one, other = through.state_dict(), again.state_dict()
    for name in one.keys() - {"progress"}:
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes(), name
    assert one["progress"]["curve"] == other["progress"]["curve"]
    assert one["progress"]["curve"][-1]["n_updates"] == 8


def test_processes_play_the_same_games() -> None:
    config = EnvConfig(id="PongNoFrameskip-v4", wrapper="atari", n_envs=2, max_episode_steps=9)
    info = probe(config)
    assert (info.obs_shape, info.obs_dtype, info.time_limit) == ((84, 84, 4), np.uint8, 9)
    sync, processes = SyncEnvs(config, info), AsyncEnvs(config, info)
    try:
        np.testing.assert_array_equal(sync.reset([1, 2]), processes.reset([1, 2]))
        for action in np.random.default_rng(0).integers(0, 6, (20, 2)):
            one, other = sync.step(action), processes.step(action)
            np.testing.assert_array_equal(one.obs, other.obs)
            np.testing.assert_array_equal(one.reward, other.reward)
            assert one.ended == other.ended
            if one.ended:
                np.testing.assert_array_equal(one.final_obs, other.final_obs)
    finally:
        processes.close()
        sync.close()


# -------------------------------------------------------------------------- mistakes


def test_the_wrapper_needs_a_game() -> None:
    for name in ("CartPole-v1", "tests.envs:Eyes-v0"):
        with pytest.raises(UserError, match=r"`env\.wrapper: atari` needs a game.*such as ALE/Pong-v5"):
            make(EnvConfig(id=name, wrapper="atari"))


@pytest.mark.parametrize("kwargs", [{"frameskip": 4}, {"obs_type": "rgb"}, {"continuous": True}], ids=str)
def test_arguments_that_the_wrapper_sets_are_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"sets `{next(iter(kwargs))}` itself"):
        make(EnvConfig(id="ALE/Pong-v5", wrapper="atari", kwargs=kwargs))


@pytest.mark.parametrize("kind", ["native", "envpool"])
def test_environments_that_are_not_gymnasiums_cannot_be_wrapped(kind: str) -> None:
    with pytest.raises(UserError, match=f"vectorization: {kind}` has others"):
        TrialConfig.from_mapping({"env": {"id": "ALE/Pong-v5", "wrapper": "atari", "vectorization": kind}})


def test_without_ale_py_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    known = {key: spec for key, spec in gymnasium.registry.items() if "ale_py" not in str(spec.entry_point)}
    monkeypatch.setattr(gymnasium.envs.registration, "registry", known)
    monkeypatch.setattr(gymnasium, "registry", known)
    for name in ("ALE/Pong-v5", "PongNoFrameskip-v4"):
        with pytest.raises(UserError, match=r"needs the module 'ale_py'.*pip install 'ppo-hpo\[atari\]'"):
            make(EnvConfig(id=name, wrapper="atari"))


def test_games_without_the_wrapper_are_images() -> None:
    info = probe(EnvConfig(id="ALE/Pong-v5"))
    assert (info.obs_shape, info.images, info.channels_last) == ((210, 160, 3), True, True)

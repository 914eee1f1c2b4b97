"""Vector environments: every step is a transition, and the same seeds start the same episodes again."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from ppo_hpo import PPO, TrialConfig
from ppo_hpo.envs.make import probe
from ppo_hpo.envs.step import VectorEnv
from ppo_hpo.envs.vector import vectorize
from ppo_hpo.spec.config import EnvConfig
from ppo_hpo.spec.errors import UserError

REPOSITORY = Path(__file__).parents[2]
T = 60
CASES = [
    ("tests.envs:RandomWalk-v0", "sync"),
    ("tests.envs:RandomWalk-v0", "async"),
    ("tests.envs:Target-v0", "async"),
    ("CartPole-v1", "native"),
    ("tests.envs:Walks-v0", "native"),
    ("CartPole-v1", "envpool"),
    ("Pendulum-v1", "envpool"),
]
EACH = pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{n.rpartition(':')[2]}-{k}" for n, k in CASES])


def make(name: str, kind: str, n_envs: int = 3, threads: int = 1, **env: Any) -> VectorEnv:
    if kind == "envpool":
        pytest.importorskip("envpool")
    config = EnvConfig(id=name, n_envs=n_envs, vectorization=kind, **env)  # type: ignore[arg-type]
    return vectorize(config, probe(config), threads)


def random_actions(name: str, steps: int, n_envs: int = 3) -> np.ndarray:
    info = probe(EnvConfig(id=name))
    stream = np.random.default_rng(0)
    if info.continuous:
        return stream.standard_normal((steps, n_envs, info.action_dim)).astype(np.float32)
    return stream.integers(0, info.action_dim, (steps, n_envs))


def play(envs: VectorEnv, seeds: list[int], actions: np.ndarray) -> dict[str, np.ndarray]:
    """All results of the steps; final observations are zeros where no episode ended."""
    seen: dict[str, list[Any]] = {
        name: [] for name in ("obs", "final_obs", "reward", "terminated", "truncated")
    }
    first = envs.reset(seeds).copy()
    for action in actions:
        step = envs.step(action)
        done = step.terminated | step.truncated
        assert step.ended == bool(done.any())
        for name, rows in seen.items():
            rows.append(np.array(getattr(step, name)))
        seen["final_obs"][-1][~done] = 0
    return {"first": first, **{name: np.array(rows) for name, rows in seen.items()}}


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(array, other[name], err_msg=name)


# ------------------------------------------------------------------------ law 3


@EACH
def test_the_same_seeds_start_the_same_episodes(name: str, kind: str) -> None:
    actions = random_actions(name, T)
    envs = make(name, kind)
    first = play(envs, [3, 4, 5], actions)
    assert (first["terminated"] | first["truncated"]).any() or name == "Pendulum-v1"
    # Used environments forget their past, and new ones start in the same way.
    play(envs, [7, 8, 9], actions[:17])
    assert_equal(play(envs, [3, 4, 5], actions), first)
    assert_equal(play(make(name, kind), [3, 4, 5], actions), first)
    other = play(envs, [6, 4, 5], actions)
    assert not np.array_equal(other["obs"][:, 0], first["obs"][:, 0])
    envs.close()


def test_async_gives_what_sync_gives() -> None:
    for name in ("tests.envs:RandomWalk-v0", "tests.envs:Target-v0", "tests.envs:Counter-v0", "CartPole-v1"):
        env: dict[str, Any] = {"max_episode_steps": 3} if "Counter" in name else {}
        actions = random_actions(name, T)
        seen = [play(make(name, kind, **env), [1, 2, 3], actions) for kind in ("sync", "async")]
        assert_equal(*seen)
        assert (seen[0]["terminated"] | seen[0]["truncated"]).any()


def test_threads_of_envpool_change_nothing() -> None:
    actions = random_actions("CartPole-v1", T)
    assert_equal(
        *(play(make("CartPole-v1", "envpool", threads=n), [1, 2, 3], actions) for n in (1, 3))
    )  # fmt: skip


# ------------------------------------------------------------------- transitions


def dynamics(obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """CartPole's next state (Barto, Sutton & Anderson 1983, as gymnasium has it), in double precision."""
    x, x_dot, theta, theta_dot = obs.astype(np.float64).T
    force = np.where(action == 1, 10.0, -10.0)
    cos, sin = np.cos(theta), np.sin(theta)
    push = (force + 0.05 * theta_dot**2 * sin) / 1.1
    angular = (9.8 * sin - cos * push) / (0.5 * (4.0 / 3.0 - 0.1 * cos**2 / 1.1))
    linear = push - 0.05 * angular * cos / 1.1
    return np.stack(
        [x + 0.02 * x_dot, x_dot + 0.02 * linear, theta + 0.02 * theta_dot, theta_dot + 0.02 * angular], 1
    )


@pytest.mark.parametrize("kind", ["sync", "async", "native", "envpool"])
def test_every_row_is_a_step_of_the_cart_and_no_row_is_a_reset(kind: str) -> None:
    """Each result follows from observation and action by the laws of motion, which no reset does."""
    actions = random_actions("CartPole-v1", 150)
    seen = play(make("CartPole-v1", kind), [1, 2, 3], actions)
    done = seen["terminated"] | seen["truncated"]
    assert done.sum() > 10
    before = np.concatenate([seen["first"][None], seen["obs"][:-1]])
    outcome = np.where(done[..., None], seen["final_obs"], seen["obs"])
    for t in range(150):
        np.testing.assert_allclose(outcome[t], dynamics(before[t], actions[t]), rtol=1e-4, atol=1e-5)
    # An episode ends where the pole or the cart is out of bounds, and nowhere else.
    outside = (np.abs(outcome[..., 2]) > 12 * np.pi / 180) | (np.abs(outcome[..., 0]) > 2.4)
    np.testing.assert_array_equal(seen["terminated"], outside)
    assert not seen["truncated"].any()
    # The next episode starts at once, near the middle, and every step has the reward 1.
    assert (np.abs(seen["obs"][done]) <= 0.05).all()
    assert len(np.unique(seen["obs"][done][:, 0])) == done.sum()
    assert (seen["reward"] == 1.0).all()


@pytest.mark.parametrize("kind", ["sync", "async", "native", "envpool"])
def test_the_time_limit_cuts_and_the_next_episode_has_it_all_again(kind: str) -> None:
    envs = make("CartPole-v1", kind, max_episode_steps=5)
    seen = play(envs, [1, 2, 3], np.tile([[0], [1]], (12, 3)))  # left, right: nothing falls in five steps
    assert not seen["terminated"].any()
    assert np.flatnonzero(seen["truncated"].all(1)).tolist() == [4, 9, 14, 19]
    assert seen["truncated"].sum() == 12


@pytest.mark.parametrize("kind", ["sync", "envpool"])
def test_a_pendulum_is_cut_after_200_steps_and_its_last_observation_is_kept(kind: str) -> None:
    seen = play(make("Pendulum-v1", kind), [1, 2, 3], np.zeros((401, 3, 1), np.float32))
    assert np.flatnonzero(seen["truncated"].any(1)).tolist() == [199, 399]
    assert not seen["terminated"].any()
    # cos and sin of one angle, which follows smoothly from the step before; the next episode's does not.
    final, before = seen["final_obs"][199], seen["obs"][198]
    np.testing.assert_allclose(final[:, 0] ** 2 + final[:, 1] ** 2, 1.0, atol=1e-5)
    assert (np.abs(final - before)[:, :2] < 0.5).all()
    assert not np.allclose(final, seen["obs"][199])


@pytest.mark.parametrize("kind", ["sync", "async", "envpool"])
def test_actions_reach_the_environment_within_its_bounds(kind: str) -> None:
    """Pendulum's torque ends at 2: more of it gives the very same step."""
    ones = np.ones((4, 3, 1), np.float32)
    seen = [play(make("Pendulum-v1", kind), [1, 2, 3], torque * ones) for torque in (2.0, 1000.0, 1.0)]
    assert_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0]["obs"], seen[2]["obs"])


# -------------------------------------------------------------------- the choice


def test_with_one_thread_auto_is_sync() -> None:
    assert make("CartPole-v1", "auto").name == "sync"


def test_with_more_threads_auto_measures() -> None:
    assert make("CartPole-v1", "auto", threads=2).name == "sync"  # microseconds: not worth a process
    slow = make("tests.envs:Sleeps-v0", "auto", threads=2)  # a hundredth of a second for each step
    assert slow.name == "async"
    assert make("tests.envs:Sleeps-v0", "auto", n_envs=1, threads=2).name == "sync"
    slow.close()


def _in_a_pool(kind: str) -> str:
    try:
        return make("tests.envs:Sleeps-v0", kind, threads=2).name
    except UserError as error:
        return str(error)


def test_in_a_daemon_which_may_have_no_children() -> None:
    with Pool(1) as pool:
        assert pool.apply(_in_a_pool, ("auto",)) == "sync"
        assert "Choose sync or auto there" in pool.apply(_in_a_pool, ("async",))
    with ProcessPoolExecutor(1) as executor:
        assert executor.submit(_in_a_pool, "async").result() == "async"


def test_the_log_names_the_kind_of_vectorization(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "env: {id: CartPole-v1, n_envs: 2, vectorization: native}\n"
        "task: {epochs: 1, steps_per_epoch: 64, eval_episodes: 1}\nppo: {n_steps: 32}\n"
    )
    command = [sys.executable, "-m", "ppo_hpo", "run", "--config", config, "--dir", tmp_path / "trial"]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    assert "native environments" in (tmp_path / "trial" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("Acrobot-v1", "native", "`env.id: Acrobot-v1` has none"),
        ("tests.envs:Late-v0", "native", "has autoreset mode"),
        ("tests.envs:Target-v0", "envpool", "it has no `env.id: tests.envs:Target-v0`"),
    ],
)
def test_impossible_kinds_are_refused(name: str, kind: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        make(name, kind)
    assert "Choose auto" in str(caught.value)


def test_arguments_that_a_version_does_not_take() -> None:
    with pytest.raises(UserError, match="does not take"):
        make("CartPole-v1", "native", kwargs={"render_mode": None, "no_such": 1})
    with pytest.raises(UserError, match="cannot be made with"):
        make("CartPole-v1", "envpool", kwargs={"sutton_barto_reward": True})


def test_without_envpool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "envpool", None)  # what an import sees where it is not installed
    config = EnvConfig(vectorization="envpool")
    with pytest.raises(UserError, match=r"pip install 'ppo-hpo\[envpool\]'"):
        vectorize(config, probe(config))


def test_the_faster_contains_gives_the_same_answers() -> None:
    """Environments assert that their space contains each action: the shortcut must not accept a wrong one."""
    plain, quick = gymnasium.spaces.Discrete(3, start=-1), gymnasium.spaces.Discrete(3, start=-1)
    from ppo_hpo.envs.make import _speed_up_contains

    _speed_up_contains(quick)
    things = [np.int64(v) for v in range(-3, 5)] + [*range(-3, 5), np.int32(1), np.int32(2), 1.0, None, "1"]
    things += [np.array(1), np.array([1]), np.uint8(1), np.float64(1.0), True]
    assert [quick.contains(x) for x in things] == [plain.contains(x) for x in things]
    quick.seed(5)
    plain.seed(5)
    assert [quick.sample() for _ in range(20)] == [plain.sample() for _ in range(20)]
    assert quick == plain
    box = gymnasium.spaces.Box(-1.0, 1.0, (2,))
    _speed_up_contains(box)
    assert type(box) is gymnasium.spaces.Box


@pytest.mark.parametrize("kind", ["native", "envpool"])
def test_a_task_learns_on_it(kind: str) -> None:
    """Evaluation takes gymnasium's own environment, whatever the training environments are."""
    if kind == "envpool":
        pytest.importorskip("envpool")
    config = TrialConfig.from_mapping(
        {
            "env": {"id": "CartPole-v1", "n_envs": 8, "vectorization": kind},
            "task": {"epochs": 10, "steps_per_epoch": 8192},
            "optimizer": {"lr": 1e-3},
            "lr_schedule": {"name": "linear"},
            "ppo": {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8},
        }
    )
    task = PPO.from_config(config, "cpu")
    task.fit(10)
    returns = [row["return_mean"] for row in task.metrics.curve]
    assert returns[0] < 150
    assert returns[-1] > 300

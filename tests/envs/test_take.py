"""What environments return: the same rules in the first look, in training and in evaluation."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ppo_hpo.envs.make import make, probe
from ppo_hpo.envs.take import is_finite
from ppo_hpo.envs.vector import vectorize
from ppo_hpo.ppo.agent import build_agent
from ppo_hpo.ppo.collect import Collector
from ppo_hpo.ppo.evaluate import Evaluation, Evaluator
from ppo_hpo.ppo.normalize import ObservationNormalizer
from ppo_hpo.spec.config import EnvConfig, PPOConfig, TaskConfig, TrialConfig
from ppo_hpo.spec.errors import EnvironmentFault, NotFinite, UserError
from tests.envs import ODD

TAKEN = list(ODD)[list(ODD).index("double") :]
REFUSED = {
    "fractions in integers": "of float64 that its space's int64 cannot hold: [0.9, 0.1]",
    "beyond bytes": "of float64 that its space's uint8 cannot hold: [300.0, -1.0, 256.5]",
    "negative bytes": "returned an observation of int64 that its space's uint8 cannot hold: [-1, 0]",
    "words": "but it must be float32 of shape (2,)",
    "objects": "but it must be float32 of shape (2,)",
    "ragged": "but it must be float32 of shape (2,)",
    "one number": "returned an observation of shape (), but it must be float32 of shape (2,)",
    "nan": "returned the observation [nan, 0.0], but it must be finite",
    "infinity": "returned the observation [0.0, -inf], but it must be finite",
    "1e39": "returned the observation [1e+39, 0.0], but it must be finite, and at most 3.4e+38",
    "reward nan": "returned the reward nan, but it must be finite",
    "reward 1e39": "returned the reward 1e+39, but it must be finite",
    "reward word": "returned the reward '1.0', but it must be a number",
    "reward none": "returned the reward None, but it must be a number",
    "rewards": "returned the reward array([1., 2.]), but it must be a number",
    "reward huge": "but it must be a number",
    "flag word": "returned terminated='False', but it must be true or false",
    "flag none": "returned truncated=None, but it must be true or false",
    "flag number": "returned terminated=2, but it must be true or false",
}


def config(what: str, at: int = 0, **env: Any) -> EnvConfig:
    return EnvConfig(id="tests.envs:Odd-v0", n_envs=2, kwargs={"what": what, "at": at}, **env)


class Constant:
    def act(self, obs: np.ndarray, noise: Any) -> np.ndarray:
        return np.zeros(len(obs), np.int64)


def evaluate(one: EnvConfig, n: int = 2) -> Evaluation:
    # A fault at a later step is not seen by the first look.
    info = probe(EnvConfig(id=one.id, kwargs={**one.kwargs, "at": 99}))
    normalizer = ObservationNormalizer(0, enabled=False, clip=1.0)
    return Evaluator(one, info, list(range(n)), 6)(Constant(), normalizer, None)


def train(one: EnvConfig) -> None:
    info = probe(EnvConfig(id=one.id, kwargs={**one.kwargs, "at": 99}))
    trial = TrialConfig(one, TaskConfig(steps_per_epoch=12), ppo=PPOConfig(n_steps=6, batch_size=4))
    envs = vectorize(one, info)
    try:
        agent = build_agent(trial, info, torch.device("cpu"))
        Collector(agent, envs, info, [1, 2], np.random.default_rng(0)).collect(6)
    finally:
        envs.close()


def test_everything_odd_has_an_answer() -> None:
    assert ["nothing", *REFUSED, *TAKEN] == list(ODD)


@pytest.mark.parametrize("look", [probe, train, evaluate])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_taken_is_told_in_the_same_words_everywhere(
    what: str, look: Callable[[EnvConfig], Any]
) -> None:
    for at in (0,) if look is probe else (0, 3):
        with pytest.raises(EnvironmentFault) as caught:
            look(config(what, at))
        assert REFUSED[what] in str(caught.value)
        assert str(caught.value).startswith("`env.id: tests.envs:Odd-v0` returned ")
        assert str(caught.value).endswith("Fix the environment.")


@pytest.mark.filterwarnings("ignore::UserWarning")  # gymnasium's, of what its worker raised
def test_processes_of_their_own_tell_the_same() -> None:
    for what in ("fractions in integers", "flag none", "nan"):
        with pytest.raises(UserError, match=r"Fix the environment\.$") as caught:
            train(config(what, 3, vectorization="async"))
        assert REFUSED[what] in str(caught.value)


@pytest.mark.parametrize("what", ["nothing", *TAKEN])
def test_what_is_taken_means_the_same_everywhere(what: str) -> None:
    odd = ODD[what][1]
    info = probe(config(what))
    envs = vectorize(config(what), info)
    first = envs.reset([1, 2]).copy()
    step = envs.step(np.zeros(2, np.int64))
    reward, ends = (
        np.asarray(odd.get("reward", 1.0)).item(),
        bool(odd.get("terminated") or odd.get("truncated")),
    )
    assert step.reward.tolist() == [reward] * 2
    assert step.terminated.tolist() == [bool(odd.get("terminated"))] * 2
    assert step.truncated.tolist() == [bool(odd.get("truncated"))] * 2
    assert step.ended == ends
    seen = np.asarray(odd.get("obs", np.ones(2)), info.obs_dtype)
    for obs in (first, step.obs, step.final_obs if ends else step.obs):
        np.testing.assert_array_equal(obs, [seen] * 2)
    steps = 1 if ends else 6
    assert evaluate(config(what)) == Evaluation((reward * steps,) * 2, (steps,) * 2)


def test_flags_are_forgotten_after_the_step_that_set_them() -> None:
    one = EnvConfig(id="tests.envs:RandomWalk-v0", n_envs=1, max_episode_steps=2)
    envs = vectorize(one, probe(one))
    envs.reset([0])
    flags = [envs.step(np.zeros(1, np.int64)).truncated.tolist() for _ in range(4)]
    assert flags == [[False], [True], [False], [True]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_finite(dtype: Any) -> None:
    large = min(float(np.finfo(dtype).max), 3e38)
    assert is_finite(np.full((3, 2), large, dtype))
    assert is_finite(np.full((3, 2), -large, dtype))
    assert is_finite(np.zeros((0, 2), dtype))
    for bad in (np.nan, np.inf, -np.inf, *((1e39,) if dtype is np.float64 else ())):
        array = np.zeros((3, 2), dtype)
        array[1, 1] = bad
        assert not is_finite(array)
        assert not is_finite(array[:, 1])
    assert is_finite(np.array([2**63 - 1]))


def test_actions_that_are_not_finite_are_the_policys() -> None:
    info = probe(EnvConfig(id="tests.envs:Target-v0"))
    with pytest.raises(NotFinite, match="The policy gives actions that are not finite"):
        info.to_env(np.array([[0.0, np.nan]], np.float32))


# --------------------------------------------------------------------- first look


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("OldReset", {}, "must return (observation, info) from `reset`, but returned array([1.]"),
        ("OldSeed", {}, "has a `reset` without the argument `seed`, as in the old package gym"),
        (
            "OldStep",
            {},
            "(observation, reward, terminated, truncated, info) from `step`, but returned (array",
        ),
        ("Empty", {}, "but an observation must have at least one number"),
        ("Empty", {"part": "action"}, "but an action must have at least one dimension"),
    ],
)
def test_other_interfaces_are_refused_with_the_rule(name: str, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        probe(EnvConfig(id=f"tests.envs:{name}-v0", kwargs=kwargs))
    assert said in str(caught.value)


@pytest.mark.parametrize("where", ["init", "reset", "step"])
def test_an_environments_own_errors_are_raised_as_they_are(where: str) -> None:
    with pytest.raises(TypeError, match="of its own") as caught:
        probe(EnvConfig(id="tests.envs:Fallible-v0", kwargs={"where": where} if where != "init" else {}))
    assert "in _fail" in "".join(traceback.format_exception(caught.value))


def test_a_missing_argument_is_one_that_it_does_not_take() -> None:
    with pytest.raises(UserError, match=r"does not take `env\.kwargs: \{'size': 3\}`"):
        probe(EnvConfig(id="tests.envs:RandomWalk-v0", kwargs={"size": 3}))


# ----------------------------------------------------- what belongs to the environment


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_an_environment_and_its_arguments_stay_its_own(kind: str) -> None:
    """Its space keeps its class, actions are of the type that the space samples, arguments are copies."""
    one = EnvConfig(
        id="tests.envs:Watches-v0", n_envs=2, kwargs={"things": [1]}, vectorization=kind  # type: ignore[arg-type]
    )  # fmt: skip
    envs = vectorize(one, probe(one))
    envs.reset([0, 1])
    assert envs.step(np.zeros(2, np.int64)).reward.tolist() == [1.0, 1.0]
    envs.close()
    normalizer = ObservationNormalizer(0, enabled=False, clip=1.0)
    evaluator = Evaluator(one, probe(one), [0, 1], 100)
    assert evaluator(Constant(), normalizer, None).returns == (5.0, 5.0)
    assert one.kwargs == {"things": [1]}


def test_only_a_wrapper_may_define_the_spaces() -> None:
    one = EnvConfig(id="tests.envs:OnlyAWrapper-v0", n_envs=1)
    envs = vectorize(one, probe(one))
    envs.reset([0])
    assert envs.step(np.zeros(1, np.int64)).reward.tolist() == [1.0]


def test_gymnasiums_own_environments_give_the_same_for_int_as_for_int64() -> None:
    for name in ("CartPole-v1", "Acrobot-v1", "MountainCar-v0"):
        one = EnvConfig(id=name, n_envs=1)
        info, envs, alone = probe(one), vectorize(one, probe(one)), make(one)
        first, expected = envs.reset([5]).copy(), alone.reset(seed=5)[0]
        np.testing.assert_array_equal(first[0], expected)
        for action in np.random.default_rng(0).integers(0, info.action_dim, 200):
            step = envs.step(np.array([action]))
            obs, reward, terminated, truncated, _ = alone.step(action)
            if terminated or truncated:
                break
            np.testing.assert_array_equal(step.obs[0], obs)
            assert step.reward[0] == reward

"""Deferred components: what is fixed, what is still open, and what is refused."""

from __future__ import annotations

import re

import pytest

from ppo_hpo.ppo.components import ActorCritic, LRSchedule, Optimizer, RolloutLoader, merge, open_priors
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.space import get_space

DEFAULT = get_space("default")


def test_nothing_fixed_leaves_all_of_the_default_space_open() -> None:
    assert ActorCritic().get_space() == {"model": DEFAULT["model"]}
    assert Optimizer().get_space() == {"optimizer": DEFAULT["optimizer"]}
    assert LRSchedule().get_space() == {"lr_schedule": DEFAULT["lr_schedule"]}
    assert RolloutLoader("CartPole-v1").get_space() == {"ppo": {"n_steps": DEFAULT["ppo"]["n_steps"]}}


def test_what_is_fixed_is_not_searched() -> None:
    assert Optimizer(lr=1e-3).get_space() == {"optimizer": {"eps": DEFAULT["optimizer"]["eps"]}}
    assert Optimizer(lr=1e-3, eps=1e-5).get_space() == {}
    assert LRSchedule(name="constant").get_space() == {}
    assert "width" not in ActorCritic(width=64).get_space()["model"]
    assert RolloutLoader("CartPole-v1", n_steps=64).get_space() == {}


def test_what_is_fixed_is_kept_in_its_own_type() -> None:
    model = ActorCritic(width=64.0, activation="relu")
    assert model.fixed == {"model": {"width": 64, "activation": "relu"}}
    assert type(model.fixed["model"]["width"]) is int
    assert repr(model) == "ActorCritic(width=64, activation='relu')"
    assert repr(Optimizer()) == "Optimizer()"


def test_a_loader_reaches_into_three_groups() -> None:
    loader = RolloutLoader("CartPole-v1", n_envs=4, max_episode_steps=50, n_steps=32, steps_per_epoch=1024)
    assert loader.fixed == {
        "env": {"id": "CartPole-v1", "n_envs": 4, "max_episode_steps": 50},
        "ppo": {"n_steps": 32},
        "task": {"steps_per_epoch": 1024},
    }
    assert RolloutLoader("CartPole-v1").fixed == {"env": {"id": "CartPole-v1"}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActorCritic(layers=2), "Unknown hyperparameter `model.layers`. It has width, depth"),
        (lambda: ActorCritic(widht=64), "`model.widht`. Did you mean width?"),
        (lambda: ActorCritic(width=0), "`model.width >= 1` must hold, but got 0."),
        (lambda: Optimizer(lr=-1.0), "`0 < optimizer.lr <= 10` must hold, but got -1.0."),
        (lambda: LRSchedule(name="cosine"), "`lr_schedule.name` must be one of constant, linear"),
        (lambda: RolloutLoader(""), "`env.id` must be the id of a gymnasium environment"),
        (lambda: RolloutLoader("CartPole-v1", n_steps=0), "`ppo.n_steps >= 1` must hold, but got 0."),
        (lambda: RolloutLoader("CartPole-v1", steps_per_epoch=2.5), "`task.steps_per_epoch` must be a whole"),
        (lambda: RolloutLoader("CartPole-v1", num_envs=2), "`env.num_envs`. Did you mean n_envs?"),
    ],
)
def test_mistakes_are_errors_at_once(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(UserError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("fixed", "open_"),
    [({}, True), ({"gamma": 0.9}, False), ({"one_minus_gamma": 0.1}, False), ({"gae_lambda": 0.9}, True)],
)
def test_a_quantity_fixed_in_one_spelling_is_not_searched_in_another(
    fixed: dict[str, float], open_: bool
) -> None:
    found = open_priors([("ppo", "gamma"), ("ppo", "one_minus_gamma")], {"ppo": fixed})
    prior = {"ppo": {"one_minus_gamma": DEFAULT["ppo"]["one_minus_gamma"]}}
    assert found == (prior if open_ else {})


def test_a_fixed_batch_size_closes_the_number_of_minibatches() -> None:
    assert open_priors([("ppo", "n_minibatches")], {"ppo": {"batch_size": 32}}) == {}
    assert open_priors([("ppo", "n_minibatches")], {}) == {
        "ppo": {"n_minibatches": DEFAULT["ppo"]["n_minibatches"]}
    }


def test_merge_takes_the_later_and_changes_nothing() -> None:
    one, other = {"ppo": {"gamma": 0.9, "n_steps": 32}}, {"ppo": {"gamma": 0.8}, "env": {"id": "A-v0"}}
    assert merge(one, other) == {"ppo": {"gamma": 0.8, "n_steps": 32}, "env": {"id": "A-v0"}}
    assert one == {"ppo": {"gamma": 0.9, "n_steps": 32}}
    assert merge() == {}

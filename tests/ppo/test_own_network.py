"""Networks of the user's own: each rule has its sentence, and their randomness is the trial's."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ppo_hpo import PPO, ActorCritic, LRSchedule, Optimizer, RolloutLoader, TrialConfig, UserError
from ppo_hpo.state.checkpoint import arrays_digest
from tests.ppo.test_task import SMALL, same


class Own(nn.Module):
    """A network of a user's with a shared layer. Tests replace its parts."""

    def __init__(self, inputs: int = 4, actions: int = 2, *between: nn.Module, log_std: Any = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 16), *between, nn.Tanh())
        self.actor, self.critic = nn.Linear(16, actions), nn.Linear(16, 1)
        self.log_std = log_std

    def policy(self, obs: Tensor) -> Any:
        return self.actor(self.body(obs))

    def value(self, obs: Tensor) -> Any:
        return self.critic(self.body(obs)).squeeze(-1)


class Column(Own):
    def value(self, obs: Tensor) -> Tensor:
        return self.critic(self.body(obs))


class Squeezed(Own):
    def value(self, obs: Tensor) -> Tensor:
        return self.critic(self.body(obs)).squeeze()


class NoValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(4, 2)


class Doubles(Own):
    def policy(self, obs: Tensor) -> Tensor:
        return super().policy(obs).double()


class Both(Own):
    def policy_and_value(self, obs: Tensor) -> Any:
        return self.policy(obs), self.critic(self.body(obs))


class Disagrees(Own):
    def policy_and_value(self, obs: Tensor) -> Any:
        return self.policy(obs) + 1.0, self.value(obs)


class One(Own):
    def policy_and_value(self, obs: Tensor) -> Any:
        return self.policy(obs)


class Noisy(Own):
    def policy(self, obs: Tensor) -> Tensor:
        return super().policy(obs) + torch.randn(len(obs), 2)


class Frozen(Own):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Detached(Own):
    def policy(self, obs: Tensor) -> Tensor:
        return super().policy(obs).detach()

    def value(self, obs: Tensor) -> Tensor:
        return super().value(obs).detach()


def task_of(network: nn.Module, env: str = "CartPole-v1", **groups: dict[str, Any]) -> PPO:
    merged = {g: {**SMALL.get(g, {}), **groups.get(g, {})} for g in {*SMALL, *groups} - {"model"}}
    merged["env"]["id"] = env
    return PPO.from_config(TrialConfig.from_mapping(merged), "cpu", model=network)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Column(), r"must return torch.float32 of shape \(1,\) as value\(obs\) of 1 observations of .*, "
         r"but got torch.float32 of shape \(1, 1\)\. Add \.squeeze\(-1\)"),
        (Squeezed(), r"\(1,\) as value\(obs\) of 1 obs.* but got torch.float32 of shape \(\)"),
        (Own(actions=3), r"\(1, 2\) as policy\(obs\).* of shape \(1, 3\)\. Give it one output for each"),
        (Own(inputs=5), r"must take observations torch.float32 of shape \(1, 4\) of CartPole-v1, but "
         r"policy\(obs\) raised RuntimeError: mat1"),
        (Own().double(), r"must have parameters of torch.float32, but body.0.weight has torch.float64\."),
        (Doubles(), r"as policy\(obs\) .* but got torch.float64"),
        (NoValue(), r"a NoValue, must have a method value\(obs\)"),
        (Both(), r"as value of policy_and_value\(obs\).* of shape \(1, 1\)"),
        (One(), r"must return two tensors from policy_and_value"),
        (Disagrees(), r"must give the same from policy_and_value\(obs\) as from policy\(obs\)"),
        (Noisy(), r"must give the same outputs twice in eval mode"),
        (Frozen(), r"must have a parameter that its outputs depend on and that requires a gradient"),
        (Detached(), r"must have a parameter that its outputs depend on"),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, nn.Module) else "",
)  # fmt: skip
def test_a_network_that_breaks_a_rule(network: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_of(network)


@pytest.mark.parametrize("log_std", [None, torch.zeros(()), torch.zeros(2), torch.zeros(1).double(), 0.0])
def test_continuous_actions_need_log_std(log_std: Any) -> None:
    with pytest.raises(
        UserError, match=r"must have log_std, torch.float32 of shape \(1,\), .* of Pendulum-v1 are"
    ):
        task_of(Own(3, 1, log_std=log_std), "Pendulum-v1")
    task = task_of(Own(3, 1, log_std=nn.Parameter(torch.zeros(1))), "Pendulum-v1")
    assert task.agent.learner.engine == "autograd"


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.MSELoss(reduction="none"), r"a scalar .*, but got torch.float32 of shape \(3,\)"),
        (lambda value, returns: 1.0, "a scalar that depends on the values, .*, but got 1.0"),
        (lambda value, returns: returns.sum(), "depends on the values"),
        (lambda value: value.sum(), r"must take values \[B\] and returns \[B\], but raised TypeError"),
    ],
)
def test_a_criterion_that_breaks_a_rule(criterion: Any, message: str) -> None:
    parts = (ActorCritic(), RolloutLoader("CartPole-v1"), Optimizer(), LRSchedule())
    task = PPO(*parts, "cpu", ppo_clip_param=0.2, ppo_max_grad_norm=0.5, criterion=criterion)
    with pytest.raises(UserError, match=message):
        task.init(ppo={"n_steps": 64})


def dropout() -> PPO:
    torch.manual_seed(0)
    return task_of(Own(4, 2, nn.Dropout(0.5)))


def test_dropout_is_off_while_the_policy_acts_and_draws_by_the_seed_of_the_trial_while_it_learns() -> None:
    modes: list[bool] = []
    tasks = []
    for seed in (1, 2):
        task = dropout()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        drop = task.model.body[1]  # type: ignore[union-attr, index]
        drop.register_forward_hook(lambda module, *_: modes.append(module.training))  # type: ignore[union-attr]
        if seed == 2:
            task.events.subscribe("end_rollout", lambda task, **details: task.model.train())
        task.fit(2)
        task.finish()
        assert torch.equal(torch.get_rng_state(), state)
        tasks.append(task)
    assert same(*tasks)
    # Collecting and evaluating, then learning, in turns.
    assert [mode for mode, _ in itertools.groupby(modes)][:4] == [False, True, False, True]
    off = task_of(Own())
    off.load_state_dict(tasks[0].state_dict(), strict=False)
    obs = np.ones((5, 4), np.float32)
    np.testing.assert_array_equal(off.agent.learner.values(obs), tasks[0].agent.learner.values(obs))


def test_a_network_with_dropout_resumes_to_the_bit_and_trains_the_same_in_threads(tmp_path: Path) -> None:
    whole, first = dropout(), dropout()
    whole.fit(2)
    first.fit(1)
    state = first.state_dict()
    later = dropout()
    later.load_state_dict(state)
    later.fit(2)
    assert same(whole, later)
    assert not same(whole, first)
    together = [dropout(), dropout(), dropout()]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda task: task.fit(2), together))
    for task in (whole, first, later, *together):
        task.finish()
    assert all(same(whole, task) for task in together)


def test_running_statistics_learn_in_the_update_alone_and_are_saved() -> None:
    task = task_of(Own(4, 2, nn.BatchNorm1d(16)))
    norm: Any = task.model.body[1]  # type: ignore[union-attr, index]
    assert not norm.running_mean.any()  # the dry run left no trace
    assert int(norm.num_batches_tracked) == 0
    task.fit(1)
    n_updates = int(task.metrics.latest["n_updates"])
    # Policy and value each pass through it.
    assert int(norm.num_batches_tracked) == 2 * n_updates
    again = task_of(Own(4, 2, nn.BatchNorm1d(16)))
    again.load_state_dict(task.state_dict())
    for one in (task, again):
        one.fit(2)
        one.finish()
    assert same(task, again)


def test_lazy_layers_draw_their_weights_by_the_seed_of_the_trial() -> None:
    def lazy(seed: int) -> str:
        network = Own()
        torch.manual_seed(0)
        network.actor, network.critic = nn.Linear(16, 2), nn.Linear(16, 1)
        network.body = nn.Sequential(nn.LazyLinear(16), nn.Tanh())
        torch.manual_seed(seed)
        return arrays_digest(task_of(network).agent.arrays())

    assert lazy(1) == lazy(2)

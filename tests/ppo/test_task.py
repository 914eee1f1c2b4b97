"""The documented interface of `ppo_hpo.PPO`: each name exists, and does what it is documented to do."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ppo_hpo
from ppo_hpo import (
    PPO,
    ActorCritic,
    BadResume,
    BadResumeGuard,
    CheckpointError,
    LRSchedule,
    Optimizer,
    RolloutLoader,
    TrialConfig,
    UserError,
)
from ppo_hpo.ppo.rollout import Rollout
from ppo_hpo.state.checkpoint import Storage, arrays_digest, read

REPOSITORY = Path(__file__).parents[2]
SMALL: dict[str, dict[str, Any]] = {
    "env": {"id": "CartPole-v1", "n_envs": 2},
    "task": {"epochs": 4, "steps_per_epoch": 256, "eval_episodes": 2},
    "model": {"width": 8, "depth": 1},
    "normalize": {"norm_obs": True, "norm_reward": True},
    "ppo": {"n_steps": 64, "batch_size": 32, "n_epochs": 2},
}


def small(storage: Path | None = None, **groups: dict[str, Any]) -> PPO:
    merged = {g: {**SMALL.get(g, {}), **groups.get(g, {})} for g in {*SMALL, *groups}}
    return PPO.from_config(TrialConfig.from_mapping(merged), "cpu", storage=storage)


def open_task(**options: Any) -> PPO:
    loader = RolloutLoader("CartPole-v1", n_envs=2, n_steps=64, steps_per_epoch=256)
    return PPO(ActorCritic(), loader, Optimizer(), LRSchedule(), "cpu", **options)


def same(one: PPO, other: PPO) -> bool:
    left, right = one.state_dict(), other.state_dict()
    left["progress"].pop("seconds")
    right["progress"].pop("seconds")
    assert left.keys() == right.keys()
    return all(
        torch.equal(left[k], right[k]) if isinstance(left[k], Tensor) else left[k] == right[k] for k in left
    )


# ----------------------------------------------------------------- names and defaults


def test_constructor_has_the_documented_names_and_defaults() -> None:
    documented = [
        ("model", inspect.Parameter.empty),
        ("dataloader", inspect.Parameter.empty),
        ("optimizer", inspect.Parameter.empty),
        ("lr_scheduler", inspect.Parameter.empty),
        ("device", inspect.Parameter.empty),
        ("ppo_epoch", 5),
        ("ppo_batch_size", 32),
        ("ppo_clip_param", 10),
        ("ppo_max_grad_norm", 1000),
        ("criterion", None),
        ("storage", None),
        ("logger", None),
    ]
    parameters = list(inspect.signature(PPO).parameters.values())
    assert [(p.name, p.default) for p in parameters[: len(documented)]] == documented
    # What we added can only be given by name, so that it is never in the way.
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[len(documented) :])


@pytest.mark.parametrize(
    ("method", "documented"),
    [
        ("init", {"gamma": 0.99, "optimizer": None, "lr_schedule": None, "model": None, "uid": None}),
        ("fit", {"epochs": inspect.Parameter.empty, "context": None}),
        ("get_space", {}),
        ("eval_loss", {"batch": inspect.Parameter.empty}),
        ("compute_returns", {"value": inspect.Parameter.empty, "actions": inspect.Parameter.empty}),
        ("ppo", {"current_state": inspect.Parameter.empty, "replay_vector": inspect.Parameter.empty}),
        ("state_dict", {"destination": None, "prefix": "", "keep_vars": False}),
        ("load_state_dict", {"state": inspect.Parameter.empty, "strict": True}),
        ("set_device", {"device": inspect.Parameter.empty}),
        ("parameters", {}),
        ("report", {}),
        ("resumed", {}),
        ("summary", {}),
        ("finish", {}),
    ],
)
def test_methods_have_the_documented_signatures(method: str, documented: dict[str, Any]) -> None:
    parameters = [
        (p.name, p.default)
        for p in inspect.signature(getattr(PPO, method)).parameters.values()
        if p.name != "self" and p.kind is not p.VAR_KEYWORD
    ]
    assert parameters[: len(documented)] == list(documented.items())


def test_defaults_are_those_of_the_constructor() -> None:
    task = open_task()
    task.init()
    config = task.config
    assert (config.ppo.n_epochs, config.ppo.batch_size) == (5, 32)
    assert (config.ppo.clip_range, config.ppo.max_grad_norm) == (10.0, 1000.0)
    assert config.ppo.gamma == 0.99


# ------------------------------------------------------------------ open and supplied


def test_get_space_collects_what_is_open_and_init_supplies_it() -> None:
    task = open_task(ppo_clip_param=None, normalize={"norm_obs": True})
    space = task.get_space(epochs="fidelity(1, 8, base=2)")
    assert space["task"] == {"epochs": "fidelity(1, 8, base=2)"}
    assert set(space["optimizer"]) == {"lr", "eps"}
    assert set(space["model"]) == {"width", "depth", "activation"}
    assert "clip_range" in space["ppo"]  # None left it open
    assert not {"n_epochs", "n_minibatches", "batch_size", "max_grad_norm", "n_steps"} & set(space["ppo"])
    assert space["normalize"] == {"norm_reward": "choices([True, False])"}

    from orion.core.io.space_builder import SpaceBuilder

    (trial,) = SpaceBuilder().build(space).sample(1, seed=3)
    proposed = trial.params
    task.init(**proposed)
    assert task.config.optimizer.lr == proposed["optimizer"]["lr"]
    assert task.config.ppo.gamma == 1.0 - proposed["ppo"]["one_minus_gamma"]
    assert task.config.ppo.clip_range == proposed["ppo"]["clip_range"]
    assert task.config.model.width == proposed["model"]["width"]
    assert task.config.max_epochs == 8  # schedules end at the highest fidelity (law 4)


def test_fixed_component_hyperparameters_leave_the_space() -> None:
    loader = RolloutLoader("CartPole-v1")
    parts = (ActorCritic(width=32), loader, Optimizer(lr=1e-3, eps=1e-5), LRSchedule(name="constant"))
    task = PPO(*parts, "cpu")
    space = task.get_space()
    assert "optimizer" not in space
    assert "lr_schedule" not in space
    assert "width" not in space["model"]
    assert "n_steps" in space["ppo"]


def test_what_is_fixed_cannot_be_supplied_again() -> None:
    task = open_task()
    with pytest.raises(UserError, match=r"`ppo\.clip_range` was fixed to 10"):
        task.init(ppo={"clip_range": 0.2})


def test_an_unknown_fidelity_is_refused() -> None:
    with pytest.raises(UserError, match="has no fidelity 'frames'"):
        open_task().get_space(frames="fidelity(1, 8)")


def test_gamma_of_init_and_of_the_group() -> None:
    task = open_task()
    task.init(gamma=0.9)
    assert task.config.ppo.gamma == 0.9
    task = open_task()
    task.init(ppo={"one_minus_gamma": 0.5})
    assert task.config.ppo.gamma == 0.5


def test_using_a_task_before_init_says_so() -> None:
    task = open_task()
    with pytest.raises(RuntimeError, match="call init"):
        task.fit(1)
    assert isinstance(task.model, ActorCritic)
    assert "not initialised" in task.summary()


# --------------------------------------------------------------------------- training


def test_fit_metrics_events_report_and_finish() -> None:
    task = small()
    seen: list[tuple[str, Any]] = []
    for name in task.events.NAMES:
        task.events.subscribe(name, lambda t, name=name, **details: seen.append((name, details)))
    task.fit(2, context={"who": "test"})
    names = [name for name, _ in seen]
    rollouts = 256 // (2 * 64)
    epoch = ["start_epoch", *["end_rollout"] * rollouts, "end_epoch"]
    assert names == ["start_fit", *epoch, *epoch, "end_fit"]
    assert seen[0][1] == {"epochs": 2, "context": {"who": "test"}}
    assert task.epoch == 2
    assert [row["epoch"] for row in task.metrics.curve] == [0, 1, 2]
    assert task.metrics.latest["env_steps"] == 512
    assert task.metrics.latest == task.metrics.at(2)
    report = task.report()
    assert report["objective"] == -task.metrics.latest["return_mean"]
    assert task.report(1)["objective"] == -task.metrics.at(1)["return_mean"]
    assert "2 of 4 done" in task.summary()
    task.finish()
    task.fit(3)  # opens its environments again
    assert task.epoch == 3
    task.finish()


def test_epoch_by_epoch_is_the_same_as_at_once() -> None:
    at_once, stepwise = small(), small()
    at_once.fit(3)
    for epochs in (1, 2, 3, 3, 2):  # what is reached already is not done again
        stepwise.fit(epochs)
    assert same(at_once, stepwise)


def test_another_seed_is_another_trial() -> None:
    one, other = small(), small(task={"seed": 1})
    one.fit(1)
    other.fit(1)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_fit_does_not_go_past_the_end_of_schedules() -> None:
    with pytest.raises(UserError, match=r"`epochs <= task.max_epochs` must hold.*got 5 and 4"):
        small().fit(5)


def test_a_trial_uses_one_thread_by_default_and_restores_the_limits() -> None:
    from threadpoolctl import threadpool_info

    def threads() -> set[int]:
        return {torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())}

    seen: list[set[int]] = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for task in (small(), small(task={"threads": 2})):
            task.events.subscribe("end_rollout", lambda task, **details: seen.append(threads()))
            task.fit(1)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [{1}] * 2 + [{2}] * 2


@pytest.mark.parametrize(
    ("engine", "groups"),
    [
        ("auto", {}),
        ("autograd", {}),
        (
            "auto",
            {
                "env": {"id": "tests.envs:Eyes-v0", "n_envs": 2},
                "model": {"features_dim": 8},
                "normalize": {},
                "ppo": {"n_steps": 8, "batch_size": 16, "n_epochs": 1},
                "task": {"steps_per_epoch": 16, "max_epochs": 2, "eval_episodes": 1},
            },
        ),
    ],
    ids=["numpy", "autograd", "images"],
)
def test_torchs_defaults_and_modes_do_not_change_a_trial(
    engine: Any, groups: dict[str, Any], tmp_path: Path
) -> None:
    config = TrialConfig.from_mapping({**SMALL, **groups})

    def train(directory: Path) -> tuple[str, list[Any]]:
        for epoch in (1, 2):  # the second one resumes
            task = PPO.from_config(config, "cpu", storage=directory, engine=engine)
            task.fit(epoch)
            task.finish()
        task.load_state_dict(task.state_dict())
        return arrays_digest(task.agent.arrays()), task.metrics.curve

    expected = train(tmp_path / "plain")
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), np.errstate(all="raise"):
            found = train(tmp_path / "hostile")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found == expected


def test_logger_gets_a_line_for_each_epoch(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("a test's own")
    config = TrialConfig.from_mapping(SMALL)
    with caplog.at_level(logging.INFO, logger.name):
        PPO.from_config(config, "cpu", logger=logger).fit(2)
    assert [record.message.split("  ")[0] for record in caplog.records] == ["epoch 1/4", "epoch 2/4"]


def test_set_device_keeps_the_state() -> None:
    moved, stayed = small(), small()
    for task in (moved, stayed):
        task.fit(1)
    moved.set_device("cpu")
    assert moved.device == torch.device("cpu")
    for task in (moved, stayed):
        task.fit(2)
    assert same(moved, stayed)
    with pytest.raises(UserError, match="Device 'cuda:99' was asked for"):
        moved.set_device("cuda:99")


class OwnNetwork(nn.Module):
    """A custom network with one shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)
        self.judge = nn.Linear(8, 1)
        self.log_std = None

    def policy(self, obs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(obs)))

    def value(self, obs: Tensor) -> Tensor:
        return self.judge(torch.tanh(self.body(obs))).squeeze(-1)


def test_a_custom_network_is_trained_and_its_hyperparameters_are_not_searched() -> None:
    torch.manual_seed(0)
    network = OwnNetwork()
    before = network.body.weight.detach().clone()
    loader = RolloutLoader("CartPole-v1", n_envs=2, n_steps=64, steps_per_epoch=256)
    task = PPO(network, loader, Optimizer(lr=1e-3), LRSchedule(), "cpu")
    assert "model" not in task.get_space()
    task.init()
    assert task.model is network
    task.fit(1)
    assert not torch.equal(before, network.body.weight)


# ------------------------------------------------------------------- single steps


def rollout_of(task: PPO) -> tuple[Rollout, np.ndarray]:
    """The first rollout of an epoch, and the observations after it."""
    from ppo_hpo.envs.vector import SyncEnvs
    from ppo_hpo.ppo.collect import Collector
    from ppo_hpo.spec import randomness

    envs, seeds = SyncEnvs(task.config.env, task.info), randomness.training_seeds(0, 0, 2)
    try:
        collector = Collector(task.agent, envs, task.info, seeds, randomness.make_rng(0, "action", 0))
        return collector.collect(64), collector.obs
    finally:
        envs.close()


def test_compute_returns_against_the_definition() -> None:
    task = small(ppo={"gae_lambda": 1.0, "gamma": 0.9})
    rollout, after = rollout_of(task)
    last = task.agent.learner.values(after)
    returns = task.compute_returns(last, rollout)
    # lambda = 1: the discounted sum of rewards, and the bootstrap where the rollout or an episode is cut.
    expected = np.zeros((64, 2))
    future = last.astype(np.float64)
    for t in reversed(range(64)):
        future = np.where(rollout.truncated[t], rollout.final_value[t], future)
        future = rollout.reward[t] + 0.9 * np.where(rollout.terminated[t], 0.0, future)
        expected[t] = future
    assert rollout.terminated.any()
    np.testing.assert_allclose(returns, expected, rtol=1e-6)


def test_ppo_lowers_the_loss_that_eval_loss_shows() -> None:
    task = small(ppo={"n_epochs": 10, "normalize_advantage": False})
    rollout, after = rollout_of(task)
    learner = task.agent.learner
    returns = task.compute_returns(learner.values(after), rollout)
    batch = rollout.samples(returns - rollout.value, returns)
    before = task.eval_loss(batch)
    assert task.eval_loss(batch) == before  # looking does not change it
    stats = task.ppo(after, rollout)
    assert stats["n_updates"] == 10 * 128 // 32
    assert task.eval_loss(batch) < before


def own_loop(task: PPO, epochs: int) -> list[dict[str, float]]:
    """Train by `PPO.ppo`, with rollouts collected as `fit` collects them."""
    from ppo_hpo.envs.vector import SyncEnvs
    from ppo_hpo.ppo.collect import Collector
    from ppo_hpo.spec import randomness

    envs, rows = SyncEnvs(task.config.env, task.info), []
    for epoch in range(task.epoch, task.epoch + epochs):
        seeds, rng = randomness.training_seeds(0, epoch, 2), randomness.make_rng(0, "action", epoch)
        collector = Collector(task.agent, envs, task.info, seeds, rng)
        for _ in range(task.config.rollouts_per_epoch):
            rollout = collector.collect(64)
            rows.append(task.ppo(collector.obs, rollout))
    envs.close()
    return rows


LINEAR = {
    "lr_schedule": {"name": "linear"},
    "ppo": {"clip_range": 0.4, "clip_range_schedule": "linear"},
    "task": {"epochs": 2, "max_epochs": 2},
}


def test_a_loop_of_single_steps_is_the_same_as_fit(tmp_path: Path) -> None:
    fitted, stepped = small(tmp_path / "fitted", **LINEAR), small(tmp_path / "stepped", **LINEAR)
    seen: dict[PPO, list[Any]] = {fitted: [], stepped: []}
    for task in seen:
        for event in ("start_epoch", "end_rollout", "end_epoch"):
            task.events.subscribe(event, lambda t, event=event, **d: seen[t].append((event, d["epoch"])))
    fitted.fit(2)
    rows = own_loop(stepped, 2)
    for name, first in (("lr", 3e-4), ("clip_range", 0.4)):
        assert [row[name] for row in rows] == pytest.approx([first * part for part in (1.0, 0.75, 0.5, 0.25)])
    assert stepped.epoch == 2
    assert [row["epoch"] for row in stepped.metrics.curve] == [0, 1, 2]
    for task in (fitted, stepped):
        # The first row is of a normaliser that the caller's first rollout has changed already.
        task.metrics.curve[0] = {"epoch": 0}
        for row in task.metrics.curve:  # the task saw no episodes of the caller's environments
            for key in ("train_episodes", "train_return", "train_length"):
                row.pop(key, None)
    assert same(fitted, stepped)
    assert seen[fitted] == seen[stepped]
    assert small(tmp_path / "stepped", **LINEAR).epoch == 2  # each epoch was saved
    with pytest.raises(UserError, match=r"`epochs <= task.max_epochs` must hold"):
        own_loop(stepped, 1)
    assert not stepped.bad_state
    fitted.finish()
    stepped.finish()


def test_fit_trains_an_epoch_begun_by_single_steps_from_its_first_rollout() -> None:
    task = small()
    rollout, after = rollout_of(task)
    task.ppo(after, rollout)
    assert task.epoch == 0
    updates: list[int] = []
    task.events.subscribe("end_rollout", lambda task, index, **details: updates.append(index))
    task.fit(1)
    task.finish()
    assert updates == [0, 1]


def test_eval_loss_uses_the_scheduled_clip_range() -> None:
    task = small(**LINEAR)
    own_loop(task, 1)
    rollout, after = rollout_of(task)
    learner = task.agent.learner
    returns = task.compute_returns(learner.values(after), rollout)
    batch = rollout.samples(returns - rollout.value, returns)
    # Other probabilities than those stored, so that the clip range matters.
    batch = batch._replace(old_log_prob=batch.old_log_prob + np.linspace(-1, 1, 128, dtype=np.float32))
    assert task.eval_loss(batch) == learner.loss(batch, 0.2) != learner.loss(batch, 0.4)
    task.ppo(after, rollout)
    assert task.eval_loss(batch) == pytest.approx(learner.loss(batch, 0.1), rel=1e-6)
    task.finish()


def test_single_steps_end_where_the_task_diverges() -> None:
    task = small()
    rollout, after = rollout_of(task)
    told: list[str] = []
    task.events.subscribe("diverged", lambda task, reason: told.append(reason))
    with torch.no_grad():
        next(task.parameters()).fill_(float("nan"))
    assert not np.isfinite(task.ppo(after, rollout)["value_loss"])
    assert (task.diverged, told, task.env_steps) == (True, ["rollout 1 of epoch 1"], 128)
    with pytest.raises(UserError, match="has diverged"):
        task.ppo(after, rollout)
    task.finish()


def test_criterion_takes_the_place_of_the_squared_error() -> None:
    def huber(value: Tensor, returns: Tensor) -> Tensor:
        return nn.functional.smooth_l1_loss(value, returns)

    losses = []
    for criterion in (None, huber):
        task = open_task(criterion=criterion, ppo={"vf_coef": 1.0, "ent_coef": 0.0})
        task.init()
        rollout, after = rollout_of(task)
        learner = task.agent.learner
        returns = task.compute_returns(learner.values(after), rollout)
        batch = rollout.samples(np.zeros_like(returns), returns)
        value = torch.from_numpy(learner.values(batch.obs))
        expected = (criterion or nn.functional.mse_loss)(value, torch.from_numpy(batch.returns))
        # With advantages of zero only the critic's loss is left.
        losses.append(task.eval_loss(batch))
        assert losses[-1] == pytest.approx(float(expected), rel=1e-5)
    assert losses[0] != losses[1]
    task = open_task(criterion=huber)
    with pytest.raises(UserError, match="must be none with a criterion"):
        task.init(ppo={"clip_range_vf": 0.2})


# ------------------------------------------------------------------------------ state


def test_state_dict_goes_through_memory_deepcopy_and_file(tmp_path: Path) -> None:
    whole, first = small(), small()
    whole.fit(3)
    first.fit(1)
    state = first.state_dict()
    for copied in (state, copy.deepcopy(state)):
        again = small()
        assert again.load_state_dict(copied) == []
        again.fit(3)
        assert same(whole, again)
    stored = small(tmp_path)
    stored.fit(1)
    resumed = small(tmp_path)
    assert not stored.resumed()
    assert resumed.resumed()
    assert resumed.epoch == 1
    resumed.fit(3)
    assert same(whole, resumed)


def test_loading_without_strict_names_missing_entries() -> None:
    task, other = small(), small()
    task.fit(1)
    state = task.state_dict()
    del state["model.actor.2.bias"]
    before = other.state_dict()["model.actor.2.bias"]
    assert other.load_state_dict(state, strict=False) == ["model.actor.2.bias"]
    assert torch.equal(other.state_dict()["model.actor.2.bias"], before)
    with pytest.raises(CheckpointError, match=r"model\.actor\.2\.bias"):
        small().load_state_dict(state)


def test_state_dict_goes_through_torchs_own_file_as_data_only(tmp_path: Path) -> None:
    whole, first = small(), small()
    whole.fit(3)
    first.fit(1)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again = small()
    # With `weights_only` torch reads data and runs no code.
    assert again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)) == []
    again.fit(3)
    assert same(whole, again)


def test_state_dict_is_a_snapshot_unless_keep_vars_is_set() -> None:
    task = small()
    snapshot, live = task.state_dict(), task.state_dict(keep_vars=True)
    into: dict[str, Any] = {"mine": 1}
    assert task.state_dict(into, prefix="ppo.") is into
    assert {"mine", "ppo.progress", "ppo.model.actor.0.weight"} <= set(into)
    task.fit(1)
    assert not torch.equal(snapshot["model.actor.0.weight"], live["model.actor.0.weight"])
    assert torch.equal(live["model.actor.0.weight"], next(task.parameters()))


def test_strict_requires_the_same_hyperparameters_and_otherwise_skipped_entries_are_named() -> None:
    task, wider = small(), small(model={"width": 16})
    task.fit(1)
    with pytest.raises(CheckpointError, match=r"model\.width is 8 there and 16 here"):
        wider.load_state_dict(task.state_dict())
    wider = small(model={"width": 16})
    before = wider.state_dict()
    left_out = wider.load_state_dict({**task.state_dict(), "model.nothing": torch.zeros(1)}, strict=False)
    # The skipped entries are exactly those that one side lacks or has in another shape.
    here, there = wider.state_dict(), task.state_dict()
    shapes = [(there[name].shape, here[name].shape) for name in here if name != "progress"]
    differ = [name for name in here if name != "progress" and here[name].shape != there[name].shape]
    assert len(differ) < len(shapes)
    assert left_out == sorted(["model.nothing", *differ])
    assert "model.actor.0.weight" in left_out
    assert "model.actor.2.bias" not in left_out  # has the same shape in both
    after = wider.state_dict()
    assert torch.equal(before["model.actor.0.weight"], after["model.actor.0.weight"])
    assert torch.equal(task.state_dict()["model.actor.2.bias"], after["model.actor.2.bias"])


def test_other_hyperparameters_do_not_resume_from_a_checkpoint(tmp_path: Path) -> None:
    small(tmp_path).fit(1)
    with pytest.raises(CheckpointError, match=r"optimizer.lr is 0.0003 there and 0.01 here"):
        small(tmp_path, optimizer={"lr": 0.01})
    assert small(tmp_path).resumed()  # nothing was lost by the attempt


def test_a_fork_resumes_from_its_parent_with_other_hyperparameters(tmp_path: Path) -> None:
    """Population-based training: Orion copies the parent's directory, and the child's id is another."""
    config = TrialConfig.from_mapping(SMALL)
    parent = PPO.from_config(config, "cpu", storage=tmp_path / "parent", uid="parent")
    (tmp_path / "parent").mkdir()
    parent.fit(2)
    shutil.copytree(tmp_path / "parent", tmp_path / "child")
    other = config.replace(optimizer={"lr": 0.01})
    child = PPO.from_config(other, "cpu", storage=tmp_path / "child", uid="child")
    assert child.epoch == 2
    born = child.state_dict()
    for name, tensor in parent.state_dict().items():
        if name != "progress":
            assert torch.equal(tensor, born[name]), name
    (line,) = child.lineage
    assert (line["uid"], line["epoch"]) == ("parent", 2)
    (newest, *_) = Storage(tmp_path / "parent").paths()
    assert line["state_sha256"] == arrays_digest(read(newest).arrays)
    child.fit(3)
    assert arrays_digest(child.agent.arrays()) != line["state_sha256"]
    parent.fit(3)
    assert not torch.equal(next(child.parameters()), next(parent.parameters()))
    again = PPO.from_config(other, "cpu", storage=tmp_path / "child", uid="child")
    assert again.epoch == 3
    assert again.lineage == child.lineage
    wider = config.replace(model={"width": 9})
    with pytest.raises(CheckpointError, match=r"cannot change model\.width\."):
        PPO.from_config(wider, "cpu", storage=tmp_path / "parent", uid="other")


# ------------------------------------------------------------------- guard and failure


def test_guard_refuses_a_task_that_failed(tmp_path: Path) -> None:
    task = small(tmp_path)
    task.fit(1)

    def fail(task: PPO, **details: Any) -> None:
        raise OSError("the network share went away")

    observer = task.events.subscribe("end_rollout", fail)
    with pytest.raises(OSError, match="went away"):
        task.fit(2)
    task.events.unsubscribe("end_rollout", observer)
    for again in (lambda: task.fit(2), task.state_dict, lambda: task.load_state_dict({})):
        with pytest.raises(BadResume, match="Make a new one"):
            again()
    fresh, whole = small(tmp_path), small()
    fresh.fit(2)
    whole.fit(2)
    assert same(fresh, whole)


def test_guard_by_itself() -> None:
    task = small()
    with pytest.raises(KeyError), BadResumeGuard(task):
        raise KeyError
    assert task.bad_state
    with pytest.raises(BadResume), BadResumeGuard(task):
        pass


def test_a_trial_that_diverges_scores_as_its_worst_evaluation(tmp_path: Path) -> None:
    """Law 7: a parameter becomes NaN in the second epoch."""
    task = small(tmp_path)

    def poison(task: PPO, epoch: int, **details: Any) -> None:
        if epoch == 1:
            with torch.no_grad():
                next(task.parameters()).fill_(float("nan"))

    told: list[str] = []
    task.events.subscribe("start_epoch", poison)
    task.events.subscribe("diverged", lambda task, reason: told.append(reason))
    task.fit(4)
    assert told == ["rollout 1 of epoch 2"]
    assert task.diverged
    assert task.epoch == 1
    report = task.report(4)
    assert report["diverged"] == 1.0
    assert report["objective"] == max(-row["return_mean"] for row in task.metrics.curve)
    assert np.isfinite(report["objective"])
    assert task.env_steps == 256 + 128  # it stopped at once
    assert small(tmp_path).epoch == 1  # no NaN was ever saved


@pytest.mark.parametrize("part", ["observation", "reward"])
def test_statistics_that_overflow_are_divergence(part: str, tmp_path: Path) -> None:
    """One huge but finite number makes a running variance infinite, while every loss stays finite."""
    task = small(tmp_path)

    def disturb(task: PPO, epoch: int, **details: Any) -> None:
        moments = task.agent.normalizer.moments if part == "observation" else task.agent.scaler.moments
        if epoch == 1:
            moments.update(np.full((1, *moments.mean.shape), 1e160))

    task.events.subscribe("start_epoch", disturb)
    task.fit(3)
    assert task.diverged
    assert small(tmp_path).epoch == 1  # what was saved before can be read


def test_trials_in_threads_equal_trials_that_run_alone() -> None:
    """The trial that ends first must not raise the limit of the others: BLAS has one limit in a process."""

    def run(width: int, epochs: int) -> list[dict[str, Any]]:
        task = small(model={"width": width}, ppo={"batch_size": 128})
        task.fit(epochs)
        return task.metrics.curve

    shapes = [(256, 3), (8, 1), (256, 3)]
    alone = [run(*shape) for shape in shapes]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda shape: run(*shape), shapes))
    assert together == alone


def test_a_gamma_given_twice_and_an_unknown_engine_are_refused() -> None:
    task = open_task(ppo={"gamma": 0.9})
    with pytest.raises(UserError, match="given twice"):
        task.init(gamma=0.98)
    with pytest.raises(UserError, match="`engine` must be auto or autograd"):
        open_task(engine="numpi")
    task = open_task(task={"max_epochs": 4})
    task.init()
    assert (task.config.task.epochs, task.config.max_epochs) == (4, 4)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: None,
        lambda state: {},
        lambda state: {**state, "progress": {}},
        lambda state: {**state, "progress": {**state["progress"], "epoch": 99}},
        lambda state: {**state, "progress": {**state["progress"], "curve": [1, 2]}},
        lambda state: {**state, "model.actor.0.bias": torch.full((8,), float("nan"))},
        lambda state: {**state, "model.actor.0.bias": torch.zeros(9)},
        lambda state: {**state, "model.actor.0.bias": "text"},
        lambda state: {name: value for name, value in state.items() if name != "model.actor.0.bias"},
    ],
)
def test_an_invalid_state_is_refused_and_nothing_is_loaded(spoil: Any) -> None:
    task = small()
    task.fit(1)
    before = copy.deepcopy(task.state_dict())
    with pytest.raises(CheckpointError):
        task.load_state_dict(spoil(task.state_dict()))
    task.bad_state = False  # only to look at it
    after = task.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k != "progress")


# ------------------------------------------------ what observers and callers do to a task


def zero_grad(module: nn.Module) -> None:
    module.zero_grad()


def move_and_back(module: nn.Module) -> None:
    module.double()
    module.float()


def backward(module: nn.Module) -> None:
    sum(parameter.sum() for parameter in module.parameters()).backward()


def new_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def train_mode(module: nn.Module) -> None:
    module.train()


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("act", [zero_grad, move_and_back, backward, new_data, train_mode])
def test_what_an_observer_does_to_the_network_does_not_stop_it_from_learning(act: Any, engine: Any) -> None:
    config = TrialConfig.from_mapping(SMALL)
    disturbed, alone = (PPO.from_config(config, "cpu", engine=engine) for _ in range(2))
    for event in ("start_fit", "start_epoch", "end_rollout", "end_epoch"):
        disturbed.events.subscribe(event, lambda task, **details: act(task.model))
    calls = iter(range(10**6))
    # The environment and `before_step` come in the middle of a rollout.
    disturbed.before_step = lambda: act(disturbed.model) if next(calls) % 100 == 7 else None
    for task in (disturbed, alone):
        task.fit(2)
        task.finish()
    assert same(disturbed, alone)
    assert disturbed.metrics.latest["grad_norm"] > 0.0


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_weights_that_an_observer_assigns_are_the_ones_that_act_and_learn(engine: Any) -> None:
    task = PPO.from_config(TrialConfig.from_mapping(SMALL), "cpu", engine=engine)
    task.fit(1)

    def assign(task: PPO, **details: Any) -> None:
        for parameter in task.parameters():
            parameter.data = torch.zeros_like(parameter)

    task.events.subscribe("end_epoch", assign)
    task.fit(2)
    assert not task.agent.learner.values(np.ones((3, 4), np.float32)).any()
    assert not any(tensor.any() for name, tensor in task.state_dict().items() if name.startswith("model."))
    task.finish()


@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_parameters_that_would_not_be_trained_are_refused(engine: Any) -> None:
    def freeze(module: Any) -> None:
        module.actor[0].weight.requires_grad_(False)

    def replace(module: Any) -> None:
        module.actor[0] = nn.Linear(4, 8)

    for change in (freeze, replace):
        task = PPO.from_config(TrialConfig.from_mapping(SMALL), "cpu", engine=engine)
        task.events.subscribe("start_epoch", lambda task, change=change, **details: change(task.model))
        with pytest.raises(UserError, match="added, removed or frozen after `init`"):
            task.fit(1)
        task.finish()


def test_a_state_loaded_after_a_divergence_is_as_if_nothing_had_happened() -> None:
    task, whole = small(), small()
    task.fit(1)
    state = task.state_dict()

    def poison(task: PPO, **details: Any) -> None:
        with torch.no_grad():
            next(task.parameters()).fill_(float("nan"))

    observer = task.events.subscribe("start_epoch", poison)
    task.fit(3)
    assert (task.diverged, task.epoch) == (True, 1)
    assert task.env_steps > 256
    task.events.unsubscribe("start_epoch", observer)
    task.load_state_dict(state)
    assert (task.diverged, task.env_steps) == (False, 256)
    for one in (task, whole):
        one.fit(3)
        one.finish()
    assert same(task, whole)
    assert task.report() == whole.report()


def test_seconds_are_those_of_the_state_that_was_loaded() -> None:
    task = small()
    task.fit(2)
    state, seconds = task.state_dict(), task.seconds
    assert seconds > 0.0
    for _ in range(2):
        task.load_state_dict(state)
        assert task.seconds == seconds
    assert small().seconds == 0.0
    task.fit(3)
    task.finish()
    assert task.seconds == seconds + task.metrics.seconds[3]


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copied_agent_acts_and_learns_with_its_own_weights(how: Any, engine: Any) -> None:
    task = PPO.from_config(TrialConfig.from_mapping(SMALL), "cpu", engine=engine)
    task.fit(1)
    task.finish()
    mine = task.agent
    yours = how(mine)
    assert arrays_digest(yours.arrays()) == arrays_digest(mine.arrays())
    obs = np.ones((3, 4), np.float32)
    before = mine.learner.values(obs)
    np.testing.assert_array_equal(yours.learner.values(obs), before)
    with torch.no_grad():
        for parameter in yours.learner.module.parameters():
            parameter.zero_()
    assert not yours.learner.values(obs).any()
    np.testing.assert_array_equal(mine.learner.values(obs), before)
    samples = rollout_of(task)[0].samples(np.ones((64, 2)), np.ones((64, 2)))
    yours.load(mine.state())
    for agent in (mine, yours):
        agent.learner.update(samples, np.random.default_rng(0), 1e-3, 0.2)
    assert arrays_digest(yours.arrays()) == arrays_digest(mine.arrays())


# ------------------------------------------------------------------ Olympus's defaults


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "ppo.clip_range=10, ppo.max_grad_norm=1000"),
        ({"ppo_clip_param": 0.2}, "ppo.max_grad_norm=1000"),
        ({"ppo": {"max_grad_norm": 0.5}}, "ppo.clip_range=10"),
        ({"ppo_clip_param": 0.2, "ppo_max_grad_norm": 0.5}, None),
        ({"ppo_clip_param": None, "ppo_max_grad_norm": None}, None),
    ],
)
def test_the_log_says_once_which_defaults_are_those_of_olympus(
    options: dict[str, Any], named: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    open_task(**options).init()
    told = [record.getMessage() for record in caplog.records if "Olympus" in record.getMessage()]
    assert len(told) == (named is not None)
    if named:
        assert f"({named})" in told[0]
        assert "ppo_clip_param=0.2 and ppo_max_grad_norm=0.5" in told[0]
    caplog.clear()
    PPO.from_config(TrialConfig.from_mapping({**SMALL, "ppo": {**SMALL["ppo"], "clip_range": 10.0}}), "cpu")
    assert not caplog.records


def test_every_example_sets_the_usual_values() -> None:
    folders = {"docs": "*.md", "ppo_hpo": "*.py", "experiments": "*.md"}
    pages = [path for folder, names in folders.items() for path in (REPOSITORY / folder).rglob(names)]
    pages += REPOSITORY.glob("*.md")
    examples = [
        text[found.start() : found.start() + 400]
        for page in pages
        for text in [page.read_text(encoding="utf-8")]
        for found in re.finditer(r"= PPO\(", text)
    ]
    assert len(examples) >= 3
    for example in examples:
        for name in ("ppo_epoch", "ppo_batch_size", "ppo_clip_param", "ppo_max_grad_norm"):
            assert f"{name}=" in example, example


def test_all_names_are_exported() -> None:
    assert {"PPO", "BadResumeGuard", "get_space", "objective", "run_trial"} <= set(ppo_hpo.__all__)

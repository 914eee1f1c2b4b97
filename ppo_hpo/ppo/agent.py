"""The agent: everything that training changes, and how it is built from hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppo_hpo.envs.make import EnvInfo, check_hyperparameters_fit
from ppo_hpo.ppo import own_network
from ppo_hpo.ppo.autograd import Criterion
from ppo_hpo.ppo.learner import Learner
from ppo_hpo.ppo.networks import MLPActorCritic, NatureCNN
from ppo_hpo.ppo.normalize import ObservationNormalizer, RewardScaler, RunningMoments
from ppo_hpo.spec import randomness
from ppo_hpo.spec.config import TrialConfig, no_bound_is_infinite
from ppo_hpo.spec.errors import UserError


@dataclass
class Agent:
    """Everything that training changes."""

    learner: Learner  # the network and its optimizer
    normalizer: ObservationNormalizer
    scaler: RewardScaler

    def finite(self) -> bool:
        """Whether every parameter and every running statistic is a finite number."""
        return self.learner.finite() and all(
            bool(np.isfinite(moments.mean).all() and np.isfinite(moments.var).all())
            for moments in self._moments().values()
        )

    def state(self) -> dict[str, Tensor]:
        """Every tensor by its name in a checkpoint: the learner's live tensors, copies of the statistics."""
        state = self.learner.state()
        for part, moments in self._moments().items():
            for name, array in moments.state().items():
                state[f"{part}.{name}"] = torch.from_numpy(np.asarray(array))
        return state

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The same as numpy arrays, for a checkpoint."""
        return {name: tensor.detach().cpu().numpy() for name, tensor in self.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state` returned; a missing tensor is a KeyError, another shape a ValueError."""
        self.learner.load(state)
        for part, moments in self._moments().items():
            moments.load({name: state[f"{part}.{name}"].numpy() for name in ("mean", "var", "count")})

    def _moments(self) -> dict[str, RunningMoments]:
        return {"observation_normalizer": self.normalizer.moments, "reward_scaler": self.scaler.moments}


def build_agent(
    config: TrialConfig,
    info: EnvInfo,
    device: torch.device,
    network: nn.Module | None = None,
    criterion: Criterion | None = None,
    engine: str = "auto",
) -> Agent:
    """Build an untrained agent, with a network of the caller's own or the one that ``config`` describes."""
    if config.task.seeds != 1:
        raise UserError(
            f"`task.seeds` must be 1 for a PPO task, but got {config.task.seeds}. To train several seeds "
            f"use `ppo-hpo run` or ppo_hpo.objective."
        )
    if criterion is not None and config.ppo.clip_range_vf is not None:
        raise UserError(
            f"`ppo.clip_range_vf` clips the squared error, so it must be none with a criterion of your own, "
            f"but got {config.ppo.clip_range_vf!r}."
        )
    check_hyperparameters_fit(config, info, own_network=network is not None)
    if criterion is not None:
        own_network.check_criterion(criterion, device)
    draws = False
    if network is None:
        network = build_network(config, info)
    else:
        seed = randomness.integer_seed(config.task.seed, "init")
        draws = own_network.check(network, info, device, seed)
    learner = Learner(
        network, config.optimizer, config.ppo, device,
        continuous=info.continuous, criterion=criterion, engine=engine,
    )  # fmt: skip
    learner.draws = draws
    rules = config.normalize
    scaler = RewardScaler(
        config.env.n_envs, config.ppo.gamma, enabled=rules.norm_reward,
        clip=no_bound_is_infinite(rules.clip_reward),
    )  # fmt: skip
    return Agent(learner, build_normalizer(config, info), scaler)


def build_normalizer(config: TrialConfig, info: EnvInfo) -> ObservationNormalizer:
    """The normaliser of observations, without statistics. Images pass it unchanged."""
    rules = config.normalize
    dim = 0 if info.images else info.obs_dim
    return ObservationNormalizer(dim, enabled=rules.norm_obs, clip=no_bound_is_infinite(rules.clip_obs))


def build_network(config: TrialConfig, info: EnvInfo, *, blank: bool = False) -> nn.Module:
    """The only place that decides which network is trained: images take the convolutional one.

    The weights of a ``blank`` one are to be loaded, so nothing is computed for them.
    """
    seed = None if blank else randomness.integer_seed(config.task.seed, "init")
    if not info.images:
        return MLPActorCritic(
            info.obs_dim, info.action_dim, config.model, continuous=info.continuous, seed=seed
        )
    return NatureCNN(
        info.obs_shape, info.action_dim, config.model,
        continuous=info.continuous, channels_last=info.channels_last, seed=seed,
    )  # fmt: skip


def describe(agent: Agent, config: TrialConfig, info: EnvInfo, epoch: int) -> str:
    """Environment, network, epochs and update, in words; ``epoch`` epochs are done."""
    module, ppo = agent.learner.module, config.ppo
    count = sum(parameter.numel() for parameter in module.parameters())
    sides = " x ".join(map(str, info.obs_shape))
    observations = f"images of {sides}" if info.images else f"{info.obs_dim} observations"
    limit = f"at most {info.time_limit} steps" if info.time_limit else "no time limit"
    lines = [
        f"environment  {info.id}: {observations}, {info.action_dim} {info.kind} "
        f"actions, {limit}; {config.env.n_envs} side by side",
        f"network      {type(module).__name__}, {count:,} parameters, on {agent.learner.device}, "
        f"gradients by {agent.learner.engine}",
        f"epoch        {epoch} of {config.max_epochs} done, "
        f"{config.task.steps_per_epoch:,} steps each, in rollouts of {config.rollout_steps:,}",
        f"update       {ppo.n_epochs} passes in batches of {ppo.batch_size}, "
        f"lr {config.optimizer.lr:g} ({config.lr_schedule.name}), clip {ppo.clip_range:g}",
    ]
    return "\n".join(lines)

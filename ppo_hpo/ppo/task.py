"""The task: PPO on one environment, from its hyperparameters to its result."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ppo_hpo.envs.make import probe
from ppo_hpo.ppo.agent import Agent, build_agent, describe
from ppo_hpo.ppo.autograd import Criterion
from ppo_hpo.ppo.components import ActorCritic, Hyperparameters, LRSchedule, Optimizer, RolloutLoader
from ppo_hpo.ppo.device import limited_threads, resolve_device
from ppo_hpo.ppo.events import Events, Metrics
from ppo_hpo.ppo.guard import BadResumeGuard
from ppo_hpo.ppo.rollout import Rollout, Samples
from ppo_hpo.ppo.task_envs import Environments
from ppo_hpo.ppo.task_state import Progress, load_newest, load_state, to_checkpoint
from ppo_hpo.ppo.train import Diverged, advantages, scheduled_rates
from ppo_hpo.spec import randomness, results
from ppo_hpo.spec.config import TrialConfig, check_value
from ppo_hpo.spec.errors import BadResume, UserError
from ppo_hpo.state.checkpoint import Storage


class PPO:
    """Proximal Policy Optimization (https://arxiv.org/abs/1707.06347) on one environment.

    Make a task, supply its open hyperparameters with `init`, and `fit` it:

        task = PPO(ActorCritic(), RolloutLoader("CartPole-v1"), Optimizer(lr=3e-4), LRSchedule(), "cpu")
        task.init()
        task.fit(4)
        print(task.report())

    Nothing is built before `init`. Four defaults differ from those of other PPO implementations: 5 passes,
    minibatches of 32, a clip range of 10 and a gradient norm of 1000. They are those of Olympus, whose
    interface this is. None leaves such a hyperparameter open, so that it is searched.

    Args:
        model: `ActorCritic`, or a network of your own with ``policy(obs)``, ``value(obs)`` and, for
            continuous actions, ``log_std``.
        dataloader: environment, and the size of a rollout.
        optimizer: hyperparameters of Adam.
        lr_scheduler: schedule of the learning rate.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or a torch device.
        ppo_epoch: `ppo.n_epochs`, passes over one rollout.
        ppo_batch_size: `ppo.batch_size`, samples in one minibatch.
        ppo_clip_param: `ppo.clip_range`, bound on the ratio of probabilities.
        ppo_max_grad_norm: `ppo.max_grad_norm`, bound on the norm of the gradient.
        criterion: loss of the critic, ``(value [B], returns [B]) -> scalar``; None is the mean squared error.
        storage: directory of the checkpoints, or a storage; None keeps no checkpoints.
        logger: logger that gets a line for each epoch; None is the logger ``ppo_hpo``.
        ppo: further fixed hyperparameters of the group `ppo`.
        normalize: fixed hyperparameters of the group `normalize`.
        task: fixed hyperparameters of the group `task`, such as ``seed`` and ``max_epochs``.
        engine: ``auto`` uses hand-written gradients where they exist (`ppo_hpo.ppo.numpy_engine`);
            ``autograd`` never does. Each resumes checkpoints of the other, though not bit for bit.

    Attributes:
        device: torch device that holds the network and its optimizer.
        events: moments that observers subscribe to.
        metrics: learning curve.
        config: hyperparameters, after `init`.
        info: description of the environment, after `init`.
        epoch: epochs done.
        diverged: whether a loss, a parameter or a return became NaN or infinite.
        lineage: forks that led to this task, oldest first; empty for a trial that is no fork.
        bad_state: whether something failed; see `BadResumeGuard`.
        before_step: called before each step of the training environments; what it raises stops `fit`.
        should_stop: called with the learning curve after each evaluation, and before the epoch is saved,
            so that its decision can be written down before anybody resumes from there. True ends `fit`.

    Raises:
        UserError: a value breaks its rule, or there is no such device.
    """

    def __init__(
        self,
        model: ActorCritic | nn.Module,
        dataloader: RolloutLoader,
        optimizer: Optimizer,
        lr_scheduler: LRSchedule,
        device: str | torch.device,
        ppo_epoch: int | None = 5,
        ppo_batch_size: int | None = 32,
        ppo_clip_param: float | None = 10,
        ppo_max_grad_norm: float | None = 1000,
        criterion: Criterion | None = None,
        storage: Storage | str | os.PathLike[str] | None = None,
        logger: logging.Logger | None = None,
        *,
        ppo: Mapping[str, Any] | None = None,
        normalize: Mapping[str, Any] | None = None,
        task: Mapping[str, Any] | None = None,
        engine: Literal["auto", "autograd"] = "auto",
    ) -> None:
        if not isinstance(model, ActorCritic | nn.Module):
            raise UserError(f"`model` must be an ActorCritic or a torch module, but got {model!r}.")
        own = {
            "n_epochs": ppo_epoch, "batch_size": ppo_batch_size,
            "clip_range": ppo_clip_param, "max_grad_norm": ppo_max_grad_norm,
        }  # fmt: skip
        fixed = {key: value for key, value in own.items() if value is not None}
        groups = {"ppo": fixed | dict(ppo or {}), "normalize": normalize or {}, "task": task or {}}
        self._hyperparameters = Hyperparameters(model, dataloader, optimizer, lr_scheduler, groups)
        if engine not in ("auto", "autograd"):
            raise UserError(f"`engine` must be auto or autograd, but got {engine!r}.")
        self._model, self._criterion, self._engine = model, criterion, engine
        self.device = resolve_device(device)
        self._storage = storage if isinstance(storage, Storage | None) else Storage(storage)
        self._log = logger or logging.getLogger("ppo_hpo")
        self.events, self.metrics = Events(), Metrics()
        self.before_step: Callable[[], None] = lambda: None
        self.should_stop: Callable[[Sequence[results.Row]], bool] = lambda curve: False
        self.epoch, self.diverged, self.bad_state = 0, False, False
        self.lineage: list[dict[str, Any]] = []
        self._agent: Agent | None = None
        self._resumed = False
        self._seconds_before, self._diverged_steps = 0.0, 0

    @classmethod
    def from_config(
        cls,
        config: TrialConfig,
        device: str | torch.device = "auto",
        *,
        storage: Storage | str | os.PathLike[str] | None = None,
        logger: logging.Logger | None = None,
        uid: str | None = None,
        model: nn.Module | None = None,
        engine: Literal["auto", "autograd"] = "auto",
    ) -> PPO:
        """Make a task with every hyperparameter fixed, ready to `fit`.

        ``device``, ``storage``, ``logger`` and ``engine`` are as in the constructor, ``uid`` as in `init`.

        Args:
            config: hyperparameters of the trial.
            model: network of your own; None is the one that ``config`` describes.
        """
        groups = config.to_mapping()
        env = dict(groups["env"])
        task = cls(
            model or ActorCritic(**groups["model"]), RolloutLoader(env.pop("id"), **env),
            Optimizer(**groups["optimizer"]), LRSchedule(**groups["lr_schedule"]), device,
            ppo_epoch=None, ppo_batch_size=None, ppo_clip_param=None, ppo_max_grad_norm=None,
            ppo=groups["ppo"], normalize=groups["normalize"], task=groups["task"],
            storage=storage, logger=logger, engine=engine,
        )  # fmt: skip
        task.init(gamma=config.ppo.gamma, uid=uid)
        return task

    def get_space(self, **fidelities: str) -> dict[str, dict[str, str]]:
        """Priors of what is not fixed yet, in the form that Orion's ``build_experiment`` takes.

        Args:
            **fidelities: ``epochs="fidelity(1, 16, base=4)"``. Schedules then end at the highest fidelity.

        Raises:
            UserError: PPO has no such fidelity, or its prior is wrong.
        """
        return self._hyperparameters.get_space(fidelities)

    def init(
        self,
        gamma: float = Hyperparameters.DEFAULT_GAMMA,
        optimizer: Mapping[str, Any] | None = None,
        lr_schedule: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        uid: str | None = None,
        *,
        ppo: Mapping[str, Any] | None = None,
        normalize: Mapping[str, Any] | None = None,
        task: Mapping[str, Any] | None = None,
    ) -> None:
        """Supply what is open, build everything, and resume from the last checkpoint, if there is one.

        ``task.init(**trial.params)`` takes what Orion proposes for the space of `get_space`. Whatever nobody
        supplies takes its default in `ppo_hpo.spec.config`.

        Args:
            gamma: discount factor, where neither ``ppo`` nor the constructor has one.
            optimizer: `lr`, `eps`.
            lr_schedule: `name`, `final`.
            model: `width`, `depth`, `activation`, `features_dim`, `ortho_init`, `log_std_init`.
            uid: id of the trial, for the log and to tell a fork from a mistake.
            ppo: hyperparameters of PPO itself.
            normalize: `norm_obs`, `norm_reward`, `clip_obs`, `clip_reward`.
            task: `epochs`, `max_epochs`, `seed`, ...

        Raises:
            UserError: a hyperparameter breaks a rule, the environment is not supported, or the storage holds
                checkpoints of another trial.
            BadResume: the task is initialised already, or failed before.
        """
        with BadResumeGuard(self):
            if self._agent is not None:
                raise BadResume("This task is initialised already. Make a new task to start again.")
            supplied = {
                "optimizer": optimizer, "lr_schedule": lr_schedule, "model": model, "ppo": ppo,
                "normalize": normalize, "task": task,
            }  # fmt: skip
            groups = {group: dict(values) for group, values in supplied.items() if values}
            self.config, self._uid = self._hyperparameters.complete(gamma, groups), uid
            self.info = probe(self.config.env)
            self._environments = Environments(self.config, self.info)
            network = self._model if isinstance(self._model, nn.Module) else None
            self._agent = build_agent(
                self.config, self.info, self.device, network, self._criterion, self._engine
            )
            self._resume()

    @property
    def agent(self) -> Agent:
        """The network, its optimizer and the normalisers; a RuntimeError before `init`."""
        if self._agent is None:
            raise RuntimeError("The task must be initialised first: call init(...).")
        return self._agent

    @property
    def model(self) -> ActorCritic | nn.Module:
        """The network; before `init`, the component it will be made from."""
        return self._model if self._agent is None else self._agent.learner.module

    # ----------------------------------------------------------------- training

    def fit(self, epochs: int, context: Mapping[str, Any] | None = None) -> None:
        """Train until ``epochs`` epochs are done in all, those before a checkpoint included.

        Each epoch ends with an evaluation, a row of the learning curve and a checkpoint. ``fit(1)``,
        ``fit(2)``, ... give the same as ``fit(n)``.

        Args:
            epochs: epoch to reach. Nothing happens where it is reached already.
            context: handed to the observers of `start_fit` and `end_fit`.

        Raises:
            UserError: ``epochs`` is beyond `task.max_epochs`, where schedules end, or a checkpoint cannot be
                written.
            BadResume: the task failed before.
        """
        epochs = check_value("task", "epochs", epochs)
        agent, config = self.agent, self.config
        if epochs > config.max_epochs:
            raise UserError(
                f"`epochs <= task.max_epochs` must hold, since schedules end there, but got {epochs} "
                f"and {config.max_epochs}. Make the task with task={{'max_epochs': {epochs}}}."
            )
        # Overflows are looked for after each rollout, where they end the trial.
        quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")
        with BadResumeGuard(self), limited_threads(config.task.threads), quiet:
            self.events.emit("start_fit", self, epochs=epochs, context=context)
            self._environments.open()
            if not self.metrics.curve:
                self.metrics.curve.append(self._environments.evaluate_untrained(agent))
                self._save()
            stop = self.diverged
            while self.epoch < epochs and not stop:
                stop = self._run_epoch(agent)
            self.events.emit("end_fit", self, epochs=epochs, context=context)

    def _run_epoch(self, agent: Agent) -> bool:
        """Train, evaluate and save one epoch; return whether it is the last one of `fit`."""
        self.events.emit("start_epoch", self, epoch=self.epoch)
        started = time.perf_counter()
        try:
            row = self._environments.train(agent, self.epoch, self._on_rollout, self.before_step)
        except Diverged as reason:
            self.diverged, self._diverged_steps = True, reason.env_steps
            self._log.warning("diverged in %s. The trial stops and scores as its worst evaluation.", reason)
            self.events.emit("diverged", self, reason=str(reason))
            return True
        seconds = time.perf_counter() - started
        self.epoch += 1
        self.metrics.curve.append(row)
        self.metrics.seconds[self.epoch] = seconds
        stop = self.should_stop(self.metrics.curve)
        self._save()
        self._log.info(
            "epoch %d/%d  %s steps  return %.1f +- %.1f  %s steps/s",
            self.epoch, self.config.max_epochs, f"{row['env_steps']:,}",
            row["return_mean"], row["return_std"], f"{self.config.task.steps_per_epoch / seconds:,.0f}",
        )  # fmt: skip
        self.events.emit("end_epoch", self, epoch=self.epoch, row=self.metrics.latest)
        return stop

    def _on_rollout(self, index: int, rollout: Rollout) -> None:
        self.events.emit("end_rollout", self, epoch=self.epoch, index=index, rollout=rollout)

    @property
    def vectorization(self) -> str:
        """How the training environments are stepped; where `env.vectorization` is ``auto``, what it chose."""
        return self._environments.open().name

    @property
    def env_steps(self) -> int:
        """Environment steps of training in the whole life of the trial, without those of evaluations."""
        return self.epoch * self.config.task.steps_per_epoch + self._diverged_steps

    @property
    def seconds(self) -> float:
        """Wall seconds of all epochs, those before a checkpoint included."""
        return self._seconds_before + sum(self.metrics.seconds.values())

    # ------------------------------------------------- single steps of the method

    def compute_returns(self, value: NDArray[Any], actions: Rollout) -> NDArray[Any]:
        """Returns ``[T, N]`` that the critic learns to predict: advantages plus values.

        Args:
            value: ``[N]`` values of the observations that follow the last step.
            actions: the rollout.
        """
        return advantages(actions, value, self.config.ppo) + actions.value

    def ppo(self, current_state: NDArray[Any], replay_vector: Rollout) -> dict[str, float]:
        """Update the network once: advantages, then epochs of clipped minibatch steps.

        Args:
            current_state: ``[N, D]`` normalised observations that follow the rollout.
            replay_vector: the rollout.

        Returns:
            Means over the minibatches; see `ppo_hpo.ppo.learner.UpdateStats`.
        """
        with BadResumeGuard(self):
            learner, config, rollout = self.agent.learner, self.config, replay_vector
            advantage = advantages(rollout, learner.values(current_state), config.ppo)
            samples = rollout.samples(advantage, advantage + rollout.value)
            rng = randomness.make_rng(config.task.seed, "shuffle", self.epoch)
            rates = scheduled_rates(config, self.epoch)
            return vars(learner.update(samples, rng, *rates)).copy()

    def eval_loss(self, batch: Samples) -> float:
        """The loss of a batch of samples (see `Rollout.samples`), without learning from it."""
        return self.agent.learner.loss(batch, self.config.ppo.clip_range)

    # -------------------------------------------------------------------- state

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the network."""
        return self.agent.learner.module.parameters()

    def state_dict(
        self, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Everything that a new task with the same hyperparameters needs to resume, bit for bit.

        Args:
            destination: mapping to put the entries into; None makes a new one.
            prefix: put in front of every name.
            keep_vars: return the live tensors of the network and its optimizer instead of copies.

        Returns:
            Tensors ``model.*``, ``optimizer.*``, ``observation_normalizer.*`` and ``reward_scaler.*``, and
            ``progress``, which is plain data.
        """
        with BadResumeGuard(self):
            state: dict[str, Any] = {} if destination is None else destination
            for name, tensor in self.agent.state().items():
                state[prefix + name] = tensor if keep_vars else tensor.detach().clone()
            state[prefix + "progress"] = self._progress().to_plain()
            return state

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> list[str]:
        """Load what `state_dict` returned.

        Args:
            state: state of a task with the same hyperparameters.
            strict: require the same hyperparameters, every entry and no other. Without it, entries that are
                missing, unknown or of another shape are skipped.

        Returns:
            Names of the skipped entries; empty when strict.

        Raises:
            CheckpointError: the state does not belong to this task.
        """
        with BadResumeGuard(self):
            progress, skipped = load_state(state, self.agent, self.config, strict=strict)
            self._continue_from(progress)
            return skipped

    def _continue_from(self, progress: Progress) -> None:
        self.epoch, self.metrics.curve, self.lineage = progress.epoch, progress.curve, progress.lineage
        self._seconds_before = progress.seconds

    def resumed(self) -> bool:
        """Whether `init` resumed from a checkpoint."""
        return self._resumed

    def _progress(self) -> Progress:
        config = self.config
        return Progress(
            self.epoch, self.metrics.curve, config.identity_mapping(), config.identity(),
            self.lineage, self.seconds, self._uid,
        )  # fmt: skip

    def _save(self) -> None:
        if self._storage is not None:
            self._storage.save(to_checkpoint(self.agent, self._progress()))

    def _resume(self) -> None:
        progress = load_newest(self._storage, self.agent, self.config, self._uid, self._log)
        if progress is not None:
            self._continue_from(progress)
            self._resumed = True
            self.events.emit("resumed", self, epoch=self.epoch)

    def report(self, epochs: int | None = None) -> dict[str, float]:
        """The objective, to be minimised, and the statistics of the evaluation it rests on.

        Args:
            epochs: epoch to report, at most the one reached; None is the one reached.

        Raises:
            RuntimeError: there is no evaluation yet.
        """
        reached = self.epoch if epochs is None else min(epochs, self.epoch)
        return self.metrics.report(reached, diverged=self.diverged)

    def summary(self) -> str:
        """Environment, network, epochs and update, in words."""
        if self._agent is None:
            return f"PPO, not initialised yet: {self._model!r}, {self._hyperparameters.components!r}"
        return describe(self._agent, self.config, self.info, self.epoch)

    def set_device(self, device: str | torch.device) -> None:
        """Move the network and its optimizer to another device.

        Raises:
            UserError: there is no such device.
        """
        self.device = resolve_device(device)
        if self._agent is not None:
            self._agent.learner = self._agent.learner.to(self.device)

    def finish(self) -> None:
        """Close the environments. `fit` opens them again."""
        if self._agent is not None:
            self._environments.close()

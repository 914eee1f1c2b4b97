"""The task: PPO on one environment, from its hyperparameters to its result."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import nn

from ppo_hpo.envs.make import probe
from ppo_hpo.ppo.agent import Agent, build_agent, describe
from ppo_hpo.ppo.autograd import Criterion
from ppo_hpo.ppo.components import ActorCritic, Hyperparameters, LRSchedule, Optimizer, RolloutLoader
from ppo_hpo.ppo.device import own_settings, resolve_device
from ppo_hpo.ppo.events import Events, Metrics
from ppo_hpo.ppo.guard import BadResumeGuard
from ppo_hpo.ppo.loop import Loop
from ppo_hpo.ppo.rollout import Rollout, Samples
from ppo_hpo.ppo.task_envs import Environments
from ppo_hpo.ppo.task_state import Progress, load_newest, load_state, to_checkpoint
from ppo_hpo.ppo.train import advantages, refuse_beyond_schedules
from ppo_hpo.spec import results
from ppo_hpo.spec.config import TrialConfig, check_value
from ppo_hpo.spec.errors import BadResume, UserError
from ppo_hpo.state.checkpoint import Storage

# With these defaults a user's first task fell from a return of -800 to -3,033.
_OLYMPUS = {"clip_range": 10, "max_grad_norm": 1000}
_UNUSUAL = (
    "Olympus's defaults (ppo.%s) hardly bound an update. PPO's usual values are ppo_epoch=10, "
    "ppo_batch_size=64, ppo_clip_param=0.2 and ppo_max_grad_norm=0.5."
)


class PPO:
    """Proximal Policy Optimization (https://arxiv.org/abs/1707.06347) on one environment.

    Make a task, supply its open hyperparameters with `init`, and `fit` it:

        task = PPO(ActorCritic(), RolloutLoader("CartPole-v1"), Optimizer(lr=3e-4), LRSchedule(), "cpu",
                   ppo_epoch=10, ppo_batch_size=64, ppo_clip_param=0.2, ppo_max_grad_norm=0.5)
        task.init()
        task.fit(4)
        print(task.report())

    Nothing is built before `init`. Four defaults differ from those of other PPO implementations: 5 passes,
    minibatches of 32, a clip range of 10 and a gradient norm of 1000. They are those of Olympus, whose
    interface this is, and the log says so. None leaves such a hyperparameter open, so that it is searched.

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
        found = [f"{name}={v}" for name, v in _OLYMPUS.items() if fixed.get(name) == v == groups["ppo"][name]]
        self._unusual = ", ppo.".join(found)
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
        self._seconds_before = 0.0

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
            ActorCritic(**groups["model"]) if model is None else model, RolloutLoader(env.pop("id"), **env),
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
            self._environments = Environments(self.config, self.info, self._log)
            self._loop = Loop(self, self._environments, self._save, self._log)
            network = self._model if isinstance(self._model, nn.Module) else None
            with own_settings(self.config.task.threads):
                self._agent = build_agent(
                    self.config, self.info, self.device, network, self._criterion, self._engine
                )
                self._resume()
            if self._unusual:
                self._log.warning(_UNUSUAL, self._unusual)

    @property
    def agent(self) -> Agent:
        """The network, its optimizer and the normalisers; a RuntimeError before `init`."""
        if self._agent is None:
            raise RuntimeError("The task must be initialised first: call init(...).")
        return self._agent

    @contextmanager
    def _at_work(self, last_epoch: int = 0) -> Iterator[Agent]:
        agent = self.agent
        refuse_beyond_schedules(self.config, last_epoch)
        with BadResumeGuard(self), own_settings(self.config.task.threads):
            yield agent

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
        with self._at_work(epochs):
            self._loop.emit("start_fit", epochs=epochs, context=context)
            self._loop.evaluate_untrained()
            stop = self.diverged
            while self.epoch < epochs and not stop:
                stop = self._loop.run_epoch()
            self._loop.emit("end_fit", epochs=epochs, context=context)

    @property
    def vectorization(self) -> str:
        """How the training environments are stepped; where `env.vectorization` is ``auto``, what it chose."""
        return self._environments.open().name

    @property
    def env_steps(self) -> int:
        """Environment steps of training in the whole life of the trial, without those of evaluations."""
        return self.epoch * self.config.task.steps_per_epoch + self._loop.diverged_steps

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
        """Update the network once: advantages, then epochs of clipped minibatch steps. `fit` does the same.

        An epoch takes ``config.rollouts_per_epoch`` calls; the last of them evaluates and saves it. `fit`
        trains an epoch that was begun here from its first rollout again.

        Args:
            current_state: ``[N, D]`` normalised observations that follow the rollout.
            replay_vector: the rollout.

        Returns:
            Means over the minibatches (see `ppo_hpo.ppo.learner.UpdateStats`), and the rates of the update.

        Raises:
            UserError: the task has diverged, or is at the end of its schedules.
        """
        if self.diverged:
            raise UserError("The task has diverged, so it cannot learn any more. Look at `task.diverged`.")
        with self._at_work(self.epoch + 1):
            return self._loop.update(replay_vector, current_state)

    def eval_loss(self, batch: Samples) -> float:
        """The loss of a batch of samples (see `Rollout.samples`), without learning from it."""
        learner = self.agent.learner
        with own_settings(self.config.task.threads):
            return learner.loss(batch, self._loop.rates.clip_range)

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
        with self._at_work() as agent:
            progress, skipped = load_state(state, agent, self.config, strict=strict)
            self._continue_from(progress)
            return skipped

    def _continue_from(self, progress: Progress) -> None:
        self.epoch, self.metrics.curve, self.lineage = progress.epoch, progress.curve, progress.lineage
        # Nothing that this process has done before belongs to what was loaded.
        self._seconds_before, self.metrics.seconds = progress.seconds, {}
        self.diverged = False
        self._loop.forget()

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
            self._loop.emit("resumed", epoch=self.epoch)

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

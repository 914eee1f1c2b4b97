"""The task: PPO on one environment, from its hyperparameters to its result."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ppo_hpo.envs.make import EnvInfo, probe, refuse_what_does_not_fit
from ppo_hpo.envs.vector import VectorEnv, vectorize
from ppo_hpo.ppo.autograd import Criterion
from ppo_hpo.ppo.components import (
    ActorCritic,
    Groups,
    LRSchedule,
    Optimizer,
    RolloutLoader,
    merge,
    open_priors,
)
from ppo_hpo.ppo.device import limited_threads, resolve_device
from ppo_hpo.ppo.evaluate import Evaluation, Evaluator
from ppo_hpo.ppo.events import Events, Metrics
from ppo_hpo.ppo.gae import gae
from ppo_hpo.ppo.guard import BadResumeGuard
from ppo_hpo.ppo.learner import Learner
from ppo_hpo.ppo.networks import MLPActorCritic, NatureCNN
from ppo_hpo.ppo.normalize import ObservationNormalizer, RewardScaler
from ppo_hpo.ppo.rollout import Rollout, Samples
from ppo_hpo.ppo.train import Agent, Diverged, scheduled, train_epoch
from ppo_hpo.spec import randomness, results
from ppo_hpo.spec.config import OTHER_SPELLINGS, TrialConfig, check_value, field_names
from ppo_hpo.spec.errors import BadResume, CheckpointError, UserError
from ppo_hpo.state import ownership
from ppo_hpo.state.checkpoint import MAX_HEADER, Checkpoint, Storage, arrays_digest

State = dict[str, Any]
_GAMMA = 0.99


class PPO:
    """Proximal Policy Optimization (https://arxiv.org/abs/1707.06347) on one environment.

    Make it, supply its open hyperparameters with `init`, and `fit`:

        task = PPO(ActorCritic(), RolloutLoader("CartPole-v1"), Optimizer(lr=3e-4), LRSchedule(), "cpu")
        task.init()
        task.fit(4)
        print(task.report())

    Attributes:
        device: where the networks are trained.
        events: what observers subscribe to.
        metrics: the learning curve.
        model: the network; before `init`, the component it will be made from.
        config: the hyperparameters, after `init`.
        epoch: epochs done.
        diverged: whether a loss or a parameter became NaN or infinite.
        lineage: where a forked trial came from, oldest first; empty for all others.
        bad_state: whether something failed; see `BadResumeGuard`.
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
        """Put the parts together; nothing is built yet.

        The four defaults that PPO's other implementations set otherwise (5 passes, batches of 32, a
        clip range of 10, a gradient norm of 1000) are those of Olympus, whose interface this is. None leaves
        one open, so that it is searched.

        Args:
            model: `ActorCritic`, or a network of your own with ``policy(obs)``, ``value(obs)`` and,
                for continuous actions, ``log_std``.
            dataloader: the environment, and how much of it makes a rollout.
            optimizer: Adam's hyperparameters.
            lr_scheduler: the learning rate's schedule.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or a torch device.
            ppo_epoch: `ppo.n_epochs`, passes over one rollout.
            ppo_batch_size: `ppo.batch_size`, samples in one minibatch.
            ppo_clip_param: `ppo.clip_range`.
            ppo_max_grad_norm: `ppo.max_grad_norm`.
            criterion: ``(value [B], returns [B]) -> scalar`` in the place of the mean squared error.
            storage: where checkpoints go, a directory; None keeps none.
            logger: gets a line for each epoch; None is the logger ``ppo_hpo``.
            ppo: further fixed hyperparameters of the group `ppo`.
            normalize: those of the group `normalize`.
            task: those of the group `task`, such as ``seed`` and ``max_epochs``.
            engine: ``auto`` takes hand-written gradients where they are known (`ppo.numpy_engine`);
                ``autograd`` never does. Both go on from each other's checkpoints, though not to the bit.

        Raises:
            UserError: a value that breaks its rule, or a device that is not there.
        """
        for value, kind, name in (
            (model, (ActorCritic, nn.Module), "model"),
            (dataloader, RolloutLoader, "dataloader"),
            (optimizer, Optimizer, "optimizer"),
            (lr_scheduler, LRSchedule, "lr_scheduler"),
        ):
            if not isinstance(value, kind):
                raise UserError(f"`{name}` must be a component of ppo_hpo, but got {value!r}.")
        own = {
            "n_epochs": ppo_epoch,
            "batch_size": ppo_batch_size,
            "clip_range": ppo_clip_param,
            "max_grad_norm": ppo_max_grad_norm,
        }
        fixed = {key: value for key, value in own.items() if value is not None}
        self._components = (dataloader, optimizer, lr_scheduler)
        self._model: ActorCritic | nn.Module = model
        parts = [component.fixed for component in self._components]
        if isinstance(model, ActorCritic):
            parts.append(model.fixed)
        groups: Groups = {
            "ppo": {**fixed, **(ppo or {})},
            "normalize": dict(normalize or {}),
            "task": dict(task or {}),
        }
        for group, values in groups.items():
            for key, value in values.items():
                check_value(group, key, value)
        self._fixed = merge(*parts, groups)
        if engine not in ("auto", "autograd"):
            raise UserError(f"`engine` must be auto or autograd, but got {engine!r}.")
        self.device = resolve_device(device)
        self.events = Events()
        self.metrics = Metrics()
        self.epoch = 0
        self.diverged = False
        self.bad_state = False
        self.lineage: list[dict[str, Any]] = []
        self._criterion = criterion
        self._engine = engine
        self._storage = storage if isinstance(storage, Storage | None) else Storage(storage)
        self._log = logger or logging.getLogger("ppo_hpo")
        self._fidelity: str | None = None
        self._uid: str | None = None
        self._agent: Agent | None = None
        self._envs: VectorEnv | None = None
        self._evaluator: Evaluator | None = None
        self._resumed = False
        self._seconds_before = 0.0
        self._diverged_steps = 0
        #: Called before each environment step; what it raises stops `fit` there.
        self.tick: Callable[[], None] = lambda: None
        #: Called with the learning curve after each evaluation, before the epoch is saved: so what it
        #: decides can be written down before anybody could go on from there. True ends `fit`.
        self.judge: Callable[[Sequence[results.Row]], bool] = lambda curve: False

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
        """A task that is fixed throughout and ready to `fit`; for the arguments see the constructor."""
        groups = config.to_mapping()
        env = dict(groups["env"])
        task = cls(
            model or ActorCritic(**groups["model"]),
            RolloutLoader(env.pop("id"), **env),
            Optimizer(**groups["optimizer"]),
            LRSchedule(**groups["lr_schedule"]),
            device,
            None,
            None,
            None,
            None,
            storage=storage,
            logger=logger,
            ppo=groups["ppo"],
            normalize=groups["normalize"],
            task=groups["task"],
            engine=engine,
        )
        task.init(gamma=config.ppo.gamma, uid=uid)
        return task

    # ------------------------------------------------------------------- making

    def get_space(self, **fidelities: str) -> dict[str, dict[str, str]]:
        """Priors for what is not fixed yet, in the form that Orion's ``build_experiment`` takes.

        Args:
            **fidelities: ``epochs="fidelity(1, 16, base=4)"``; schedules then end at its highest.

        Raises:
            UserError: a fidelity that PPO has not, or a bad one.
        """
        from ppo_hpo.spec.space import Space, spaces_directory, with_fidelities

        keys = [(group, key) for group in ("ppo", "normalize") for key in field_names(group)]
        space: Groups = open_priors(keys, self._fixed)
        for component in self._components:
            space = merge(space, component.get_space())
        if isinstance(self._model, ActorCritic):
            space = merge(space, self._model.get_space())
        given = with_fidelities(Space("PPO", spaces_directory(), {}, {}), fidelities)
        if given.max_epochs is not None:
            self._fidelity = str(given.max_epochs)
        return {k: v for k, v in merge(space, given.priors).items() if v}

    def init(
        self,
        gamma: float = _GAMMA,
        optimizer: Mapping[str, Any] | None = None,
        lr_schedule: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        uid: str | None = None,
        *,
        ppo: Mapping[str, Any] | None = None,
        normalize: Mapping[str, Any] | None = None,
        task: Mapping[str, Any] | None = None,
    ) -> None:
        """Supply what is open, build everything, and go on from the last checkpoint, if there is one.

        ``task.init(**trial.params)`` takes what Orion proposes for `get_space`'s space. What nobody
        supplies takes the default of its record in `ppo_hpo.spec.config`.

        Args:
            gamma: discount factor, unless ``ppo`` or the constructor has one.
            optimizer: `lr`, `eps`.
            lr_schedule: `name`, `final`.
            model: `width`, `depth`, `activation`, `features_dim`, `ortho_init`, `log_std_init`.
            uid: the trial's id, for the log, and to tell a fork from a mistake.
            ppo: PPO's own hyperparameters.
            normalize: `norm_obs`, `norm_reward`, `clip_obs`, `clip_reward`.
            task: `epochs`, `max_epochs`, `seed`, ...

        Raises:
            UserError: a hyperparameter that breaks a rule, an environment that is not supported, or
                a storage that holds another trial's checkpoints.
        """
        with BadResumeGuard(self):
            if self._agent is not None:
                raise BadResume("This task is initialised already. Make a new one to start again.")
            supplied = {
                "optimizer": optimizer, "lr_schedule": lr_schedule, "model": model, "ppo": ppo,
                "normalize": normalize, "task": task,
            }  # fmt: skip
            given: Groups = {g: dict(values) for g, values in supplied.items() if values}
            self._refuse_changes_of_fixed(given)
            groups = merge(self._fixed, given)
            if self._fidelity is not None:
                groups.setdefault("task", {}).setdefault("max_epochs", int(self._fidelity))
            own = groups.setdefault("ppo", {})
            if "gamma" not in own and "one_minus_gamma" not in own:
                own["gamma"] = gamma
            elif gamma not in (_GAMMA, own.get("gamma")):
                raise UserError(f"`ppo.gamma` is given twice: init got gamma={gamma!r} beside {own!r}.")
            self._build(TrialConfig.from_mapping(groups), uid)
            self._resume()

    def _refuse_changes_of_fixed(self, given: Groups) -> None:
        for group, values in given.items():
            for key in values:
                meant = OTHER_SPELLINGS.get(group, {}).get(key, key)
                fixed = self._fixed.get(group, {})
                if meant in fixed and (key != meant or values[key] != fixed[meant]):
                    raise UserError(
                        f"`{group}.{meant}` was fixed to {fixed[meant]!r} when the task was made, but init "
                        f"got {key}={values[key]!r}. Leave it open there (None) to set it here."
                    )

    def _build(self, config: TrialConfig, uid: str | None) -> None:
        if self._criterion is not None and config.ppo.clip_range_vf is not None:
            raise UserError(
                f"`ppo.clip_range_vf` belongs to the squared error and must be none with a criterion "
                f"of your own, but got {config.ppo.clip_range_vf!r}."
            )
        if config.task.seeds != 1:
            raise UserError(
                f"`task.seeds` must be 1 for a PPO task, but got {config.task.seeds}. Several seeds are the "
                f"trial runner's: ppo-hpo run, or ppo_hpo.objective."
            )
        self.config = config
        self._uid = uid
        self.info: EnvInfo = probe(config.env)
        own = None if isinstance(self._model, ActorCritic) else self._model
        refuse_what_does_not_fit(config, self.info, own_network=own is not None)
        learner = self._learner(own or build_network(config, self.info))
        rules = config.normalize
        self._agent = Agent(
            learner,
            ObservationNormalizer(
                0 if self.info.images else self.info.obs_dim, enabled=rules.norm_obs, clip=rules.clip_obs
            ),
            RewardScaler(
                config.env.n_envs, config.ppo.gamma, enabled=rules.norm_reward, clip=rules.clip_reward
            ),
        )

    def _learner(self, module: nn.Module) -> Learner:
        return Learner(
            module,
            self.config.optimizer,
            self.config.ppo,
            self.device,
            continuous=self.info.continuous,
            criterion=self._criterion,
            engine=self._engine,
        )

    def _resume(self) -> None:
        if self._storage is None:
            return
        checkpoint = self._storage.load(
            self._check_ours,
            lambda error: self._log.warning("refused: %s", error),
            MAX_HEADER + 8 + sum(array.nbytes for array in self._arrays().values()),
        )
        if checkpoint is None:
            return
        self._take_over(checkpoint)
        self._resumed = True
        self.events.emit("resumed", self, epoch=self.epoch)

    @property
    def agent(self) -> Agent:
        """The network, its optimizer and the normalisers.

        Raises:
            RuntimeError: `init` was not called.
        """
        if self._agent is None:
            raise RuntimeError("The task has to be initialised first: call init(...).")
        return self._agent

    @property
    def model(self) -> ActorCritic | nn.Module:
        """The network; before `init`, what it will be made from."""
        return self._model if self._agent is None else self._agent.learner.module

    # ----------------------------------------------------------------- training

    def fit(self, epochs: int, context: Mapping[str, Any] | None = None) -> None:
        """Train until ``epochs`` are done in all, those before a checkpoint included.

        Each epoch ends with an evaluation, a row of the curve and a checkpoint. A caller may also go
        from one epoch to the next: ``fit(1)``, ``fit(2)``, ... is the same as ``fit(n)``.

        Args:
            epochs: the epoch to be at; nothing happens where it is reached already.
            context: handed to the observers of `start_fit` and `end_fit`.

        Raises:
            UserError: beyond `task.max_epochs`, where schedules have ended; or a checkpoint that
                cannot be written.
            BadResume: the task failed before.
        """
        epochs = check_value("task", "epochs", epochs)
        config, agent = self.config_or_fail(), self.agent
        if epochs > config.max_epochs:
            raise UserError(
                f"`epochs <= task.max_epochs` must hold, since schedules end there, but got {epochs} "
                f"and {config.max_epochs}. Make the task with task={{'max_epochs': {epochs}}}."
            )
        # Overflows are looked for after each rollout, where they end the trial.
        quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")
        with BadResumeGuard(self), limited_threads(config.task.threads), quiet:
            self.events.emit("start_fit", self, epochs=epochs, context=context)
            self._open()
            if not self.metrics.curve:
                self._evaluate_untrained()
            while self.epoch < epochs and not self.diverged:
                self.events.emit("start_epoch", self, epoch=self.epoch)
                started = time.perf_counter()
                assert self._envs is not None
                try:
                    summary = train_epoch(
                        agent, self._envs, self.info, config, self.epoch, self._on_rollout, self.tick
                    )
                except Diverged as reason:
                    self._diverge(str(reason), reason.env_steps)
                    break
                evaluation = self._evaluate(self.epoch + 1)
                if not evaluation.finite:
                    self._diverge("an evaluation return is not finite", config.task.steps_per_epoch)
                    break
                if self._finish_epoch(summary, evaluation, time.perf_counter() - started):
                    break
            self.events.emit("end_fit", self, epochs=epochs, context=context)

    def config_or_fail(self) -> TrialConfig:
        """The hyperparameters.

        Raises:
            RuntimeError: `init` was not called.
        """
        _ = self.agent
        return self.config

    @property
    def vectorization(self) -> str:
        """What steps the training environments, where `env.vectorization` is ``auto`` as well."""
        self._open()
        assert self._envs is not None
        return self._envs.name

    def _open(self) -> None:
        if self._envs is None:
            config = self.config
            self._envs = vectorize(config.env, self.info, config.task.threads)
            seeds = randomness.evaluation_seeds(config.task.eval_episodes)
            limit = self.info.time_limit or config.task.steps_per_epoch
            self._evaluator = Evaluator(config.env, self.info, seeds, limit)

    def _on_rollout(self, index: int, rollout: Rollout) -> None:
        self.events.emit("end_rollout", self, epoch=self.epoch, index=index, rollout=rollout)

    def _evaluate(self, epoch: int) -> Evaluation:
        assert self._evaluator is not None
        agent, task = self.agent, self.config.task
        noise = None if task.eval_deterministic else randomness.make_rng(task.seed, "eval", epoch)
        return self._evaluator(agent.learner, agent.normalizer, noise)

    def _evaluate_untrained(self) -> None:
        evaluation = self._evaluate(0)
        if not evaluation.finite:
            raise UserError(
                f"`env.id: {self.config.env.id}` gives returns that are not finite even before "
                f"training: {evaluation.returns}. Mend the environment's rewards."
            )
        self.metrics.curve.append(self._row({}, evaluation))
        self._save()

    def _finish_epoch(self, summary: dict[str, Any], evaluation: Evaluation, seconds: float) -> bool:
        """Save it; return whether `judge` says that it was the last."""
        summary.pop("collecting_seconds")
        self.epoch += 1
        self.metrics.curve.append(self._row(summary, evaluation))
        self.metrics.seconds[self.epoch] = seconds
        stop = self.judge(self.metrics.curve)
        self._save()
        row = self.metrics.latest
        self._log.info(
            "epoch %d/%d  %s steps  return %.1f +- %.1f  %.0f steps/s",
            self.epoch,
            self.config.max_epochs,
            f"{row['env_steps']:,}",
            row["return_mean"],
            row["return_std"],
            self.config.task.steps_per_epoch / seconds,
        )
        self.events.emit("end_epoch", self, epoch=self.epoch, row=row)
        return stop

    def _row(self, summary: Mapping[str, Any], evaluation: Evaluation) -> dict[str, Any]:
        row = {
            "epoch": self.epoch,
            "env_steps": self.epoch * self.config.task.steps_per_epoch,
            **results.evaluation_columns(evaluation.returns, evaluation.lengths),
            **summary,
        }
        # A row that came back from a file must equal one that never went there.
        return dict(json.loads(json.dumps(row, allow_nan=False)))

    def _diverge(self, reason: str, env_steps: int) -> None:
        self.diverged = True
        self._diverged_steps = env_steps
        self._log.warning("diverged in %s: stopped; it scores as the worst of its evaluations", reason)
        self.events.emit("diverged", self, reason=reason)

    @property
    def env_steps(self) -> int:
        """Environment steps trained in the whole life of the trial; evaluations are not in it."""
        return self.epoch * self.config.task.steps_per_epoch + self._diverged_steps

    @property
    def seconds(self) -> float:
        """Wall seconds of all epochs, those before a checkpoint included."""
        return self._seconds_before + sum(self.metrics.seconds.values())

    # ------------------------------------------------- single steps of the method

    def compute_returns(self, value: np.ndarray[Any, Any], actions: Rollout) -> np.ndarray[Any, Any]:
        """What the critic learns to predict: advantages plus values, ``[T, N]``.

        Args:
            value: ``[N]`` values of the observations that follow the last step.
            actions: the rollout.
        """
        return self._advantage(actions, value) + actions.value

    def ppo(self, current_state: np.ndarray[Any, Any], replay_vector: Rollout) -> dict[str, float]:
        """One update of the networks: advantages, then epochs of clipped minibatch steps.

        Args:
            current_state: ``[N, D]`` normalised observations that follow the rollout.
            replay_vector: the rollout.

        Returns:
            Means over the minibatches; see `ppo_hpo.ppo.learner.UpdateStats`.
        """
        with BadResumeGuard(self):
            learner, config = self.agent.learner, self.config
            advantage = self._advantage(replay_vector, learner.values(current_state))
            samples = replay_vector.samples(advantage, advantage + replay_vector.value)
            progress = self.epoch / config.max_epochs
            optimizer, schedule = config.optimizer, config.lr_schedule
            lr = scheduled(schedule.name, optimizer.lr, optimizer.lr * schedule.final, progress)
            clip = scheduled(config.ppo.clip_range_schedule, config.ppo.clip_range, 0.0, progress)
            stream = randomness.make_rng(config.task.seed, "shuffle", self.epoch)
            return vars(learner.update(samples, stream, lr, clip)).copy()

    def eval_loss(self, batch: Samples) -> float:
        """The loss of one batch of samples (see `Rollout.samples`), without learning from it."""
        return self.agent.learner.loss(batch, self.config.ppo.clip_range)

    def _advantage(self, rollout: Rollout, last_value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        ppo = self.config.ppo
        return gae(
            rollout.reward, rollout.value, rollout.next_value(last_value),
            rollout.terminated, rollout.done, ppo.gamma, ppo.gae_lambda,
        )  # fmt: skip

    # -------------------------------------------------------------------- state

    def parameters(self) -> Iterator[nn.Parameter]:
        """The network's parameters."""
        return self.agent.learner.module.parameters()

    def state_dict(
        self, destination: State | None = None, prefix: str = "", keep_vars: bool = False
    ) -> State:
        """Everything that a new task with the same hyperparameters needs to go on, bit for bit.

        Args:
            destination: put the entries into this mapping.
            prefix: of every name.
            keep_vars: hand out the live tensors instead of copies.

        Returns:
            ``model.*``, ``optimizer.*``, ``observation_normalizer.*`` and ``reward_scaler.*``:
            tensors; ``progress``: plain data.
        """
        with BadResumeGuard(self):
            agent = self.agent
            state: State = {} if destination is None else destination
            for name, tensor in agent.learner.state().items():
                state[prefix + name] = tensor if keep_vars else tensor.detach().clone()
            for part, moments in self._moments():
                for name, array in moments.state().items():
                    state[f"{prefix}{part}.{name}"] = torch.from_numpy(np.asarray(array))
            state[prefix + "progress"] = self._progress()
            return state

    def load_state_dict(self, state: State, strict: bool = True) -> list[str]:
        """Take over what `state_dict` gave.

        Args:
            state: of a task with the same hyperparameters.
            strict: demand the same hyperparameters, every entry and no other. Without it, what fits is
                taken: entries that are missing, unknown or of another shape are left out.

        Returns:
            The names that were left out; empty when strict.

        Raises:
            CheckpointError: the state does not belong to this task.
        """
        with BadResumeGuard(self):
            try:
                return self._load(state, strict)
            except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
                if isinstance(error, CheckpointError):
                    raise
                reason = " ".join(str(error).split())
                raise CheckpointError(
                    f"The state does not fit this task ({type(error).__name__}: {reason})."
                ) from None

    def _load(self, state: State, strict: bool) -> list[str]:
        progress = state.get("progress") if isinstance(state, Mapping) else None
        if not isinstance(progress, Mapping):
            raise CheckpointError("The state has no `progress`: it is not a task's state dict.")
        tensors = {k: torch.as_tensor(v) for k, v in state.items() if k != "progress"}
        epoch, curve = int(progress["epoch"]), [dict(row) for row in progress["curve"]]
        lineage, seconds = [dict(item) for item in progress["lineage"]], float(progress["seconds"])
        if [row["epoch"] for row in curve] not in ([], list(range(epoch + 1))) or (epoch and not curve):
            raise CheckpointError(f"The state's learning curve does not lead to its epoch, {epoch}.")
        if not all(results.is_row(row) for row in curve):
            raise CheckpointError("The state's learning curve has a row that is none.")
        bad = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
        if bad:
            raise CheckpointError(f"The state is not finite: {', '.join(bad)}.")
        left_out: list[str] = []
        if strict:
            other = ownership.describe_differences(
                progress["hyperparameters"], self.config.identity_mapping()
            )
            if other:
                raise CheckpointError(f"The state belongs to other hyperparameters: {other}.")
            if unknown := set(tensors) - set(self.state_dict(keep_vars=True)):
                raise CheckpointError(f"The state has unknown entries: {', '.join(sorted(unknown))}.")
        else:
            tensors, left_out = self._fitting(tensors)
        self.agent.learner.load(tensors)
        for part, moments in self._moments():
            moments.load({name: tensors[f"{part}.{name}"].numpy() for name in ("mean", "var", "count")})
        self.epoch, self.metrics.curve, self.lineage = epoch, curve, lineage
        self._seconds_before = seconds
        return left_out

    def resumed(self) -> bool:
        """Whether `init` went on from a checkpoint."""
        return self._resumed

    def _moments(self) -> tuple[tuple[str, Any], tuple[str, Any]]:
        agent = self.agent
        return (
            ("observation_normalizer", agent.normalizer.moments),
            ("reward_scaler", agent.scaler.moments),
        )

    def _progress(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "curve": [dict(row) for row in self.metrics.curve],
            "hyperparameters": self.config.identity_mapping(),
            "identity": self.config.identity(),
            "lineage": [dict(item) for item in self.lineage],
            "seconds": self.seconds,
            "uid": self._uid,
        }

    def _save(self) -> None:
        if self._storage is None:
            return
        progress = self._progress()
        epoch = progress.pop("epoch")
        self._storage.save(Checkpoint(epoch, self._arrays(), progress))

    def _arrays(self) -> dict[str, NDArray[Any]]:
        state = self.state_dict(keep_vars=True)
        del state["progress"]
        return {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}

    def _take_over(self, checkpoint: Checkpoint) -> None:
        progress = {"epoch": checkpoint.epoch, **checkpoint.meta}
        own = self.config.identity_mapping()
        born = None
        if changed := ownership.describe_differences(progress["hyperparameters"], own):
            # `belonging.check` let it pass: a fork. The agent was made with the child's hyperparameters.
            born = {
                "uid": progress["uid"],
                "identity": progress["identity"],
                "epoch": checkpoint.epoch,
                "changed": changed,
            }
            progress["hyperparameters"] = own
        self.load_state_dict({**checkpoint.arrays, "progress": progress})
        if born is not None:
            # Of what is here now, not of what the file said: it shows that nothing was lost on the way.
            self.lineage.append(born | {"state_sha256": arrays_digest(self._arrays())})
            self._log.info("forked at epoch %d from %s: %s", self.epoch, born["uid"], changed)

    def _check_ours(self, checkpoint: Checkpoint) -> None:
        where = "memory" if self._storage is None else str(self._storage.directory)
        own = self.config.identity_mapping()
        ownership.check_owner(checkpoint.meta, checkpoint.epoch, own, self._uid, where)

    def _fitting(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """This task's own entries, replaced by those given ones that fit; and what did not."""
        own = {name: value for name, value in self.state_dict().items() if name != "progress"}
        fits = {k: v for k, v in tensors.items() if k in own and v.shape == own[k].shape}
        return {**own, **fits}, sorted((set(own) | set(tensors)) - set(fits))

    # ------------------------------------------------------------------ telling

    def report(self, epochs: int | None = None) -> dict[str, float]:
        """The objective, to be minimised, and the statistics of the evaluation it rests on.

        Args:
            epochs: the epoch to judge, at most the one reached; None is the one reached.
        """
        epochs = self.epoch if epochs is None else min(epochs, self.epoch)
        if not self.metrics.curve:
            raise RuntimeError("There is nothing to report yet: call fit(...) first.")
        curve, diverged = self.metrics.curve, self.diverged
        return {
            "objective": results.objective(curve, epochs, diverged=diverged),
            **results.statistics(curve, epochs, diverged=diverged),
        }

    def summary(self) -> str:
        """What is trained on what, and where, for people to read."""
        if self._agent is None:
            return f"PPO, not initialised yet: {self._model!r}, {self._components!r}"
        info, config = self.info, self.config
        count = sum(parameter.numel() for parameter in self.parameters())
        sides = " x ".join(map(str, info.obs_shape))
        observations = f"images of {sides}" if info.images else f"{info.obs_dim} observations"
        limit = f"at most {info.time_limit} steps" if info.time_limit else "no time limit"
        lines = [
            f"environment  {info.id}: {observations}, {info.action_dim} {info.kind} "
            f"actions, {limit}; {config.env.n_envs} side by side",
            f"network      {type(self.model).__name__}, {count:,} parameters, on {self.device}, "
            f"gradients by {self.agent.learner.engine}",
            f"epoch        {self.epoch} of {config.max_epochs} done, "
            f"{config.task.steps_per_epoch:,} steps each, in rollouts of {config.rollout_steps:,}",
            f"update       {config.ppo.n_epochs} passes in batches of {config.ppo.batch_size}, "
            f"lr {config.optimizer.lr:g} ({config.lr_schedule.name}), clip {config.ppo.clip_range:g}",
        ]
        return "\n".join(lines)

    def set_device(self, device: str | torch.device) -> None:
        """Move the network and its optimizer; further epochs run there.

        Raises:
            UserError: there is no such device.
        """
        self.device = resolve_device(device)
        if self._agent is not None:
            learner = self._agent.learner
            state = {name: value.detach().clone() for name, value in learner.state().items()}
            self._agent.learner = self._learner(learner.module)
            self._agent.learner.load(state)

    def finish(self) -> None:
        """Close the environments. `fit` opens them again."""
        if self._envs is not None:
            self._envs.close()
            self._envs = None
        if self._evaluator is not None:
            self._evaluator.close()
            self._evaluator = None


def build_network(config: TrialConfig, info: EnvInfo) -> nn.Module:
    """The one place that decides which network is trained: images take the convolutional one."""
    model = config.model
    common: dict[str, Any] = {
        "continuous": info.continuous,
        "ortho_init": model.ortho_init,
        "log_std_init": model.log_std_init,
        "seed": randomness.integer_seed(config.task.seed, "init"),
    }
    if info.images:
        return NatureCNN(
            info.obs_shape,
            info.action_dim,
            channels_last=info.channels_last,
            features_dim=model.features_dim,
            **common,
        )
    return MLPActorCritic(
        info.obs_dim,
        info.action_dim,
        width=model.width,
        depth=model.depth,
        activation=model.activation,
        **common,
    )

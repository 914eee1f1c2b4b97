"""The hyperparameters of a trial, as typed and frozen records with rules.

A trial's configuration is a nested mapping of seven groups: `env`, `task`, `model`, `optimizer`,
`lr_schedule`, `normalize` and `ppo`. `TrialConfig.from_mapping` turns it into records and checks every rule
before anything is built. No value is clipped or rounded to make it legal: an illegal value is an error.

To add a hyperparameter, add a field to its group's record here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from ppo_hpo.spec import rules
from ppo_hpo.spec.canonical import canonical_json
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.rules import Checked, Integer, OneOf, Real, Rule, field, flag

Vectorization = Literal["auto", "sync", "async", "native", "envpool"]
Wrapper = Literal["none", "atari"]
Aggregate = Literal["mean", "median", "iqm", "worst"]
Activation = Literal["tanh", "relu"]
Schedule = Literal["constant", "linear"]

#: Most epochs of a trial. A checkpoint holds its learning curve, with one row for each epoch.
MAX_EPOCHS = 10_000
#: Most episodes of an evaluation. So many seeds are kept for it, and never used by a test on fresh episodes.
MAX_EVAL_EPISODES = 100_000
_MAX_WEIGHTS = 1 << 27  # of one network, so that a checkpoint with Adam's two moments stays below 4 GiB
_MAX_SAMPLES = 1 << 27  # of one rollout
_VECTORIZATION, _WRAPPER = OneOf(get_args(Vectorization)), OneOf(get_args(Wrapper))
_AGGREGATE, _ACTIVATION = OneOf(get_args(Aggregate)), OneOf(get_args(Activation))
_SCHEDULE = OneOf(get_args(Schedule))
_POSITIVE = Real(0.0, math.inf, open_low=True)
_BOUND = Real(0.0, math.inf, open_low=True, optional=True)


@dataclass(frozen=True)
class EnvConfig(Checked):
    """The training environment."""

    group: ClassVar[str] = "env"
    id: str = field("CartPole-v1", rules.environment_id, "gymnasium id, also as `module:EnvId`")
    n_envs: int = field(8, Integer(1, 1 << 16), "number of environments that are stepped together")
    kwargs: Mapping[str, Any] = field(None, rules.environment_kwargs, "keyword arguments of the environment")
    max_episode_steps: int | None = field(
        None, Integer(1, 10**9, optional=True), "time limit in steps; none: the environment's own"
    )
    vectorization: Vectorization = field(
        "auto", _VECTORIZATION,
        "how environments are stepped: auto (the faster of sync and async), sync (one after another), async "
        "(each in its own process), native (the environment's own vector version), envpool (in C++)",
    )  # fmt: skip
    wrapper: Wrapper = field(
        "none", _WRAPPER, "atari: the preprocessing of the Arcade Learning Environment (details 14 to 20)"
    )
    one_at_a_time: bool = field(
        False, flag, "never make a second environment before the first one is closed; needs n_envs 1"
    )


@dataclass(frozen=True)
class TaskConfig(Checked):
    """How long a trial trains, counted in epochs, and how it is evaluated."""

    group: ClassVar[str] = "task"
    epochs: int = field(16, Integer(1, MAX_EPOCHS), "epochs to train in total, over all rungs: the fidelity")
    max_epochs: int | None = field(
        None, Integer(1, MAX_EPOCHS, optional=True), "epoch at which schedules end; none: `epochs`"
    )
    steps_per_epoch: int = field(20480, Integer(1, 10**10), "environment steps in one epoch, over all n_envs")
    seed: int = field(0, Integer(0, (1 << 63) - 1), "seed from which every rng of the trial derives")
    seeds: int = field(1, Integer(1, 1000), "number of seeds to train one after another: `seed` and others")
    aggregate: Aggregate = field(
        "mean", _AGGREGATE, "statistic that turns the returns of several seeds into one objective"
    )
    threads: int = field(1, Integer(1, 1024), "number of threads of torch and BLAS")
    eval_episodes: int = field(10, Integer(1, MAX_EVAL_EPISODES), "episodes of each evaluation")
    eval_deterministic: bool = field(True, flag, "evaluate the most probable action instead of a sample")


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The actor and the critic.

    For vector observations they are two separate multilayer perceptrons of the same shape, given by `width`,
    `depth` and `activation`. For images they are one convolutional network with two heads, given by
    `features_dim`.
    """

    group: ClassVar[str] = "model"
    width: int = field(64, Integer(1, 1 << 14), "units in each hidden layer, for vector observations")
    depth: int = field(2, Integer(1, 64), "number of hidden layers, for vector observations")
    activation: Activation = field("tanh", _ACTIVATION, "activation function, for vector observations")
    features_dim: int = field(
        512, Integer(1, 1 << 16), "units of the dense layer after the convolutions, for image observations"
    )
    ortho_init: bool = field(True, flag, "orthogonal initialisation with gains sqrt(2), 0.01 and 1")
    log_std_init: float = field(0.0, Real(-10.0, 4.0), "initial log standard deviation of continuous actions")


@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """Adam (Kingma & Ba 2015)."""

    group: ClassVar[str] = "optimizer"
    lr: float = field(3e-4, Real(0.0, 10.0, open_low=True), "learning rate")
    eps: float = field(1e-5, Real(1e-30, 1.0), "term that keeps the denominator of Adam's step above zero")


@dataclass(frozen=True)
class LRScheduleConfig(Checked):
    """How the learning rate changes between the first epoch and `task.max_epochs`."""

    group: ClassVar[str] = "lr_schedule"
    name: Schedule = field("constant", _SCHEDULE, "constant, or linear down to lr * final")
    final: float = field(0.0, Real(0.0, 1.0), "fraction of lr at the end of a linear schedule")


@dataclass(frozen=True)
class NormalizeConfig(Checked):
    """Running normalisation of observations and rewards (details 28 to 31)."""

    group: ClassVar[str] = "normalize"
    norm_obs: bool = field(False, flag, "normalise observations by their running mean and variance")
    norm_reward: bool = field(False, flag, "scale rewards by the standard deviation of the discounted return")
    clip_obs: float | None = field(10.0, _BOUND, "bound of a normalised observation; none: no bound")
    clip_reward: float | None = field(10.0, _BOUND, "bound of a scaled reward; none: no bound")


@dataclass(frozen=True)
class PPOConfig(Checked):
    """Hyperparameters of PPO itself (Schulman et al. 2017), with the names of Stable-Baselines3."""

    group: ClassVar[str] = "ppo"
    n_steps: int = field(256, Integer(1, 10**7), "steps of each environment in one rollout")
    batch_size: int = field(64, Integer(1, 10**9), "samples in one minibatch")
    n_epochs: int = field(10, Integer(1, 10_000), "passes over each rollout")
    gamma: float = field(0.99, Real(0.0, 1.0), "discount factor")
    gae_lambda: float = field(0.95, Real(0.0, 1.0), "lambda of generalised advantage estimation")
    clip_range: float = field(0.2, _POSITIVE, "bound of the policy ratio's change")
    clip_range_schedule: Schedule = field(
        "constant", _SCHEDULE, "constant, or linear down to 0 at max_epochs"
    )
    clip_range_vf: float | None = field(None, _BOUND, "bound of the value's change; none: no bound")
    ent_coef: float = field(0.0, Real(0.0, math.inf), "weight of the entropy bonus")
    vf_coef: float = field(0.5, Real(0.0, math.inf), "weight of the squared value error")
    max_grad_norm: float | None = field(0.5, _BOUND, "bound of the gradient's global norm; none: no bound")
    target_kl: float | None = field(
        None, _BOUND,
        "KL divergence; updates on a rollout stop at 1.5 times this value; none: they never stop early",
    )  # fmt: skip
    normalize_advantage: bool = field(True, flag, "standardise advantages in each minibatch")


_RECORDS: tuple[type[Any], ...] = (
    EnvConfig, TaskConfig, ModelConfig, OptimizerConfig, LRScheduleConfig, NormalizeConfig, PPOConfig,
)  # fmt: skip
GROUPS: dict[str, type[Any]] = {record.group: record for record in _RECORDS}

# Other spellings of a hyperparameter, for search spaces. A prior over 1 - gamma on a log scale is better than
# one over gamma, and a number of minibatches divides every rollout, which a batch size may not.
OTHER_SPELLINGS: dict[str, dict[str, str]] = {
    "ppo": {"one_minus_gamma": "gamma", "one_minus_gae_lambda": "gae_lambda", "n_minibatches": "batch_size"}
}
_SPELLING_RULES: dict[str, Rule] = {
    "one_minus_gamma": Real(0.0, 1.0), "one_minus_gae_lambda": Real(0.0, 1.0),
    "n_minibatches": Integer(1, 10**9),
}  # fmt: skip

#: Hyperparameters that have an effect only where another one of their group has a certain value.
NEEDS: dict[tuple[str, str], tuple[str, Any]] = {
    ("lr_schedule", "final"): ("name", "linear"),
    ("normalize", "clip_obs"): ("norm_obs", True),
    ("normalize", "clip_reward"): ("norm_reward", True),
}

# Hyperparameters that a fork of a trial may change. They affect updates, but not the shapes of arrays.
CHANGEABLE_BY_FORK: dict[str, tuple[str, ...]] = {
    "optimizer": ("lr", "eps"),
    "lr_schedule": ("name", "final"),
    "ppo": tuple(item.name for item in fields(PPOConfig)),
}


def no_bound_is_infinite(bound: float | None) -> float:
    """A bound as a number: none, which means no bound, is infinity."""
    return math.inf if bound is None else bound


def field_names(group: str) -> list[str]:
    """Names of all hyperparameters of a group, other spellings included."""
    return [item.name for item in fields(GROUPS[group])] + list(OTHER_SPELLINGS.get(group, {}))


def check_group(group: str, values: Any) -> None:
    """Raise `UserError` unless there is such a group, and its ``values`` are a mapping."""
    if group not in GROUPS:
        raise UserError(f"A group must be one of {', '.join(GROUPS)}, but got {group!r}.")
    if not isinstance(values, Mapping):
        raise UserError(f"Group `{group}` must map hyperparameters to values, but got {values!r}.")


def is_environment_argument(group: str, key: str) -> bool:
    """Whether this is one argument of the environment: ``env.kwargs.NAME``, where NAME may have dots."""
    return group == "env" and str(key).startswith("kwargs.") and all(key.split("."))


def check_key(group: str, key: str) -> None:
    """Raise `UserError` unless ``group.key`` is a hyperparameter."""
    check_group(group, {})
    if key not in field_names(group):
        import difflib

        close = difflib.get_close_matches(str(key)[:80], field_names(group), n=1)
        hint = f"Did you mean {close[0]}?" if close else f"It has {', '.join(field_names(group))}."
        raise UserError(f"Unknown hyperparameter `{group}.{key}`. {hint}")


def rule_of(group: str, key: str) -> Rule:
    """The rule of one hyperparameter; `UserError` if there is no such hyperparameter."""
    if is_environment_argument(group, key):
        return rules.environment_argument
    check_key(group, key)
    if key in OTHER_SPELLINGS.get(group, {}):
        return _SPELLING_RULES[key]
    rule: Rule = GROUPS[group].__dataclass_fields__[key].metadata["rule"]
    return rule


def check_value(group: str, key: str, value: Any) -> Any:
    """Apply the rule of one hyperparameter to a value, and return the value in its own type."""
    return rule_of(group, key)(f"{group}.{key}", value)


@dataclass(frozen=True)
class TrialConfig:
    """All hyperparameters of a trial: seven records that are legal together."""

    env: EnvConfig = dataclasses.field(default_factory=EnvConfig)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    lr_schedule: LRScheduleConfig = dataclasses.field(default_factory=LRScheduleConfig)
    normalize: NormalizeConfig = dataclasses.field(default_factory=NormalizeConfig)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)

    def __post_init__(self) -> None:
        self._check_effects()
        self._check_sizes()
        self._check_rollouts()
        if self.env.wrapper == "atari" and self.env.vectorization in ("native", "envpool"):
            raise UserError(
                f"`env.wrapper: atari` wraps gymnasium's environments, but `env.vectorization: "
                f"{self.env.vectorization}` has others. Choose auto, sync or async."
            )
        if self.env.one_at_a_time and (self.env.n_envs > 1 or self.env.vectorization not in ("auto", "sync")):
            raise UserError(
                f"`env.one_at_a_time` needs `env.n_envs: 1` and `env.vectorization: auto`, but got "
                f"{self.env.n_envs} and {self.env.vectorization}."
            )
        if self.task.epochs > self.max_epochs:
            raise UserError(
                f"`task.epochs <= task.max_epochs` must hold, but got {self.task.epochs} and "
                f"{self.max_epochs}. Schedules end at max_epochs: set it to the highest fidelity."
            )

    def _check_effects(self) -> None:
        for (group, key), (other, needed) in NEEDS.items():
            record = getattr(self, group)
            value = getattr(record, key)
            if getattr(record, other) != needed and value != getattr(GROUPS[group], key):
                raise UserError(
                    f"`{group}.{key}` has no effect unless `{group}.{other}` is {canonical_json(needed)}, "
                    f"but got {value!r}. Leave it out, or set {group}.{other}."
                )

    def _check_sizes(self) -> None:
        weights = self.model.width**2 * (self.model.depth - 1)
        if weights > _MAX_WEIGHTS:
            raise UserError(
                f"`model.width^2 * (model.depth - 1) <= {_MAX_WEIGHTS}` must hold, but got {weights}. "
                "Choose a smaller network."
            )
        if self.rollout_steps > _MAX_SAMPLES:
            raise UserError(
                f"`env.n_envs * ppo.n_steps <= {_MAX_SAMPLES}` must hold, but got {self.rollout_steps}. "
                "Choose smaller rollouts."
            )

    def _check_rollouts(self) -> None:
        ppo = self.ppo
        sizes = self.env.n_envs, ppo.n_steps, self.task.steps_per_epoch, ppo.batch_size
        if broken := broken_size_rule(*sizes, normalize_advantage=ppo.normalize_advantage):
            raise UserError(broken)

    @property
    def max_epochs(self) -> int:
        """The epoch at which schedules end."""
        return self.task.epochs if self.task.max_epochs is None else self.task.max_epochs

    @property
    def rollout_steps(self) -> int:
        """Environment steps in one rollout, over all environments."""
        return self.env.n_envs * self.ppo.n_steps

    @property
    def rollouts_per_epoch(self) -> int:
        """Number of rollouts in one epoch."""
        return self.task.steps_per_epoch // self.rollout_steps

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TrialConfig:
        """Check a nested mapping and make the records.

        Args:
            mapping: group to key to value. Missing keys take the defaults of the records.

        Raises:
            UserError: if a group or key is unknown, a value breaks its rule, values are illegal together, or
                one hyperparameter is given in two spellings.
        """
        if not isinstance(mapping, Mapping):
            raise UserError(f"A configuration must map groups to values, but got {mapping!r}.")
        groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        for group, values in mapping.items():
            check_group(group, values)
            for key, value in values.items():
                check_key(group, key)
                if isinstance(value, str) and value.startswith(rules.MARK):
                    raise rules.still_a_prior(f"{group}.{key}", value)
                groups[group][key] = check_value(group, key, value)
        _respell(groups)
        if groups["task"].get("max_epochs") is not None:
            groups["task"].setdefault("epochs", groups["task"]["max_epochs"])
        return cls(**{group: record(**groups[group]) for group, record in GROUPS.items()})

    def to_mapping(self) -> dict[str, dict[str, Any]]:
        """The nested mapping from which `from_mapping` makes this record again."""
        return dataclasses.asdict(self)

    def identity_mapping(self) -> dict[str, dict[str, Any]]:
        """The hyperparameters that decide which trial this is.

        Left out are `task.epochs`, because a promoted trial is still the same trial; `task.threads`, because
        it depends on the machine; `task.aggregate`, because it only summarises what was trained; and
        `env.vectorization` where it changes no result. Those that were added later are left out at their
        defaults, so that trials begun before they existed can still be resumed.
        """
        mapping = self.to_mapping()
        later = (("env", "wrapper"), ("env", "one_at_a_time"), ("model", "features_dim"), ("task", "seeds"))
        for group, key in later:
            if mapping[group][key] == getattr(GROUPS[group], key):
                del mapping[group][key]
        if mapping["env"]["vectorization"] in ("auto", "sync", "async"):
            del mapping["env"]["vectorization"]
        mapping["task"]["max_epochs"] = self.max_epochs
        del mapping["task"]["epochs"], mapping["task"]["threads"], mapping["task"]["aggregate"]
        return mapping

    def identity(self) -> str:
        """SHA-256 of `identity_mapping`, as 64 hexadecimal digits."""
        return hashlib.sha256(canonical_json(self.identity_mapping()).encode()).hexdigest()

    def replace(self, **groups: Mapping[str, Any]) -> TrialConfig:
        """A copy with some values changed and checked again: ``config.replace(task={"epochs": 4})``."""
        mapping = self.to_mapping()
        for group, values in groups.items():
            mapping[group] |= values
        return TrialConfig.from_mapping(mapping)


def broken_size_rule(
    n_envs: int, n_steps: int, steps_per_epoch: int, batch_size: int, *, normalize_advantage: bool
) -> str | None:
    """What is wrong with the sizes of rollouts and minibatches together; None if nothing is."""
    rollout = n_envs * n_steps
    product = f"env.n_envs * ppo.n_steps = {n_envs} * {n_steps} = {rollout}"
    if steps_per_epoch % rollout:
        lower, upper = steps_per_epoch // rollout * rollout, (steps_per_epoch // rollout + 1) * rollout
        fitting = f"{lower} or {upper}" if lower else f"{upper}"
        return (
            f"Rollouts must fill an epoch: {product} must divide task.steps_per_epoch, but got "
            f"{steps_per_epoch}. {fitting} would do."
        )
    if rollout % batch_size:
        return (
            f"Minibatches must fill a rollout: ppo.batch_size must divide {product}, but got "
            f"{batch_size}. Choose a divisor, or set ppo.n_minibatches instead."
        )
    if normalize_advantage and batch_size == 1:
        return (
            "`ppo.batch_size >= 2` must hold to normalise advantages, but got 1. "
            "Enlarge it, or set ppo.normalize_advantage to false."
        )
    return None


def without_effectless(
    groups: Mapping[str, Mapping[str, Any]], searched: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """A copy without hyperparameters that have no effect beside the others; of ``searched`` ones, if given.

    Orion has no conditional spaces. A space that searches `lr_schedule.name` and `lr_schedule.final` proposes
    an end of a schedule that is constant.
    """
    kept: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in groups.items()}
    for (group, key), (other, needed) in NEEDS.items():
        values = kept.get(group)
        if not isinstance(values, dict) or (searched is not None and key not in searched.get(group, {})):
            continue
        if values.get(other, getattr(GROUPS[group], other)) != needed:
            values.pop(key, None)
    return kept


def _respell(groups: dict[str, dict[str, Any]]) -> None:
    """Replace other spellings by the hyperparameter that they mean, in place."""
    for group, spellings in OTHER_SPELLINGS.items():
        values = groups[group]
        for other, name in spellings.items():
            if other not in values:
                continue
            if name in values:
                raise UserError(
                    f"`{group}.{name}` and `{group}.{other}` are two spellings of one quantity, but both "
                    "are given. Leave one of them out."
                )
            value = values.pop(other)
            values[name] = _batch_size(groups, value) if other == "n_minibatches" else 1.0 - value


def _batch_size(groups: dict[str, dict[str, Any]], n_minibatches: int) -> int:
    n_envs = groups["env"].get("n_envs", EnvConfig.n_envs)
    n_steps = groups["ppo"].get("n_steps", PPOConfig.n_steps)
    rollout: int = n_envs * n_steps
    if rollout % n_minibatches:
        raise UserError(
            "Minibatches must fill a rollout: ppo.n_minibatches must divide env.n_envs * ppo.n_steps = "
            f"{n_envs} * {n_steps} = {rollout}, but got {n_minibatches}."
        )
    return rollout // n_minibatches

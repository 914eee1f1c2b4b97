"""Hyperparameters of a trial as typed, frozen records with their rules.

A trial's configuration is a nested mapping of seven groups (`env`, `task`, `model`, `optimizer`,
`lr_schedule`, `normalize`, `ppo`). `TrialConfig.from_mapping` turns it into records and checks
every rule before anything is built. Nothing is clipped, rounded or shrunk: what was asked is what
runs, or it is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ppo_hpo.spec.canonical import canonical_json
from ppo_hpo.spec.errors import UserError

Rule = Callable[[str, Any], Any]

#: Of a trial. Its learning curve, a row for each, is part of every checkpoint.
MAX_EPOCHS = 10_000
# Weights of one network, so that its checkpoint, Adam's two moments included, stays below 4 GiB.
_MAX_WEIGHTS = 1 << 27
# Samples of one rollout.
_MAX_SAMPLES = 1 << 27


def _integer(default: Any, low: int, doc: str, *, high: int, optional: bool = False) -> Any:
    # Upper bounds are far above what anybody trains with: a file of somebody else's shall not ask for
    # memory or processes that no machine has.
    def rule(name: str, value: Any) -> Any:
        if optional and _is_none(value):
            return None
        # Orion's PBT computes its fidelities by powers: 45 comes as 44.99999999999997.
        if (
            isinstance(value, float)
            and math.isfinite(value)
            and abs(value - round(value)) <= 1e-12 * abs(value)
        ):
            value = round(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"`{name}` must be a whole number, but got {value!r}.")
        if value < low:
            raise UserError(f"`{name} >= {low}` must hold, but got {value!r}.")
        if value > high:
            raise UserError(f"`{name} <= {high}` must hold, but got {_shown(value)}.")
        return int(value)

    return _field(default, rule, doc)


def _real(
    default: Any,
    low: float,
    high: float,
    doc: str,
    *,
    open_low: bool = False,
    optional: bool = False,
) -> Any:
    def rule(name: str, value: Any) -> Any:
        if optional and _is_none(value):
            return None
        if optional and isinstance(value, str):
            # Choices of 'none' and numbers have to be strings throughout: Orion's EvolutionES makes
            # strings of them, and then does not find those among its numbers.
            with contextlib.suppress(ValueError):
                value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"`{name}` must be a number, but got {value!r}.")
        if not _is_finite(value):
            raise UserError(f"`{name}` must be finite, but got {value!r}.")
        if value > high or value < low or (open_low and value == low):
            relation = "<" if open_low else "<="
            upper = "" if math.isinf(high) else f" <= {high:g}"
            raise UserError(f"`{low:g} {relation} {name}{upper}` must hold, but got {value!r}.")
        return float(value)

    return _field(default, rule, doc)


def _shown(value: float) -> str:
    """A number to be read, however long: Python refuses to write the longest ones out."""
    return repr(value) if abs(value) < 1 << 64 else f"{value.__class__.__name__} beyond 2^64"


def _flag(default: bool, doc: str) -> Any:
    def rule(name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise UserError(f"`{name}` must be true or false, but got {value!r}.")
        return value

    return _field(default, rule, doc)


def _word(default: str, words: tuple[str, ...], doc: str) -> Any:
    def rule(name: str, value: Any) -> str:
        if value not in words:
            raise UserError(f"`{name}` must be one of {', '.join(words)}, but got {value!r}.")
        return str(value)

    return _field(default, rule, doc)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float holds
        return False


def _is_none(value: Any) -> bool:
    # Orion's categories are safest as strings, so that "none" has to mean the same as null.
    return value is None or value == "none"


def _field(default: Any, rule: Rule, doc: str) -> Any:
    return dataclasses.field(default=default, metadata={"rule": rule, "doc": doc})


class _Checked:
    """Runs each field's rule when a record is made, whoever makes it."""

    def __post_init__(self) -> None:
        group = GROUP_OF[type(self)]
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            rule = item.metadata.get("rule")
            if rule is not None:
                value = rule(f"{group}.{item.name}", getattr(self, item.name))
                object.__setattr__(self, item.name, value)


def _environment_id(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(
            f"`{name}` must be the id of a gymnasium environment, such as CartPole-v1, but got {value!r}."
        )
    module, colon, rest = value.rpartition(":")
    # A module by its dotted name, as in an import statement: no path, and not relative to this package.
    if not rest or (colon and not all(part.isidentifier() for part in module.split("."))):
        raise UserError(f"`{name}` must be EnvId or module:EnvId, but got {value!r}.")
    return value


def _environment_kwargs(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"`{name}` must map argument names to values, but got {value!r}.")
    if "max_episode_steps" in value:
        raise UserError(f"The time limit must be `env.max_episode_steps`, but `{name}` has it: {value!r}.")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        # config.yaml and the checkpoints hold them, and two trials are told apart by them.
        raise UserError(
            f"`{name}` must be plain data (words, finite numbers, lists, mappings), but got {value!r}."
        ) from None
    return dict(value)


@dataclass(frozen=True)
class EnvConfig(_Checked):
    """The environment that is trained on."""

    id: str = _field("CartPole-v1", _environment_id, "gymnasium id, also `module:EnvId`")
    n_envs: int = _integer(8, 1, "environments that are stepped side by side", high=1 << 16)
    kwargs: Mapping[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata={"rule": _environment_kwargs, "doc": "keyword arguments of the environment"},
    )
    max_episode_steps: int | None = _integer(
        None, 1, "time limit in steps that replaces the environment's own", high=10**9, optional=True
    )
    vectorization: Literal["auto", "sync", "async", "native", "envpool"] = _word(
        "auto",
        ("auto", "sync", "async", "native", "envpool"),
        "what steps them: auto (the faster of sync and async), sync (in turn), async (in processes of "
        "their own), native (the environment's own vector version), envpool (in C++)",
    )
    wrapper: Literal["none", "atari"] = _word(
        "none",
        ("none", "atari"),
        "atari: the usual treatment of games of the Arcade Learning Environment (details 14 to 20)",
    )


@dataclass(frozen=True)
class TaskConfig(_Checked):
    """How long, in epochs, and how a trial is judged."""

    epochs: int = _integer(16, 1, "epochs to train in all, over every rung: the fidelity", high=MAX_EPOCHS)
    max_epochs: int | None = _integer(
        None,
        1,
        "epochs at which schedules end: the highest fidelity; none: `epochs`",
        high=MAX_EPOCHS,
        optional=True,
    )
    steps_per_epoch: int = _integer(20480, 1, "environment steps in one epoch, over all n_envs", high=10**10)
    seed: int = _integer(0, 0, "every random stream of the trial derives from it", high=(1 << 63) - 1)
    seeds: int = _integer(1, 1, "seeds that are trained, one after another: `seed` and others", high=1000)
    aggregate: Literal["mean", "median", "iqm", "worst"] = _word(
        "mean", ("mean", "median", "iqm", "worst"), "what makes one objective of the seeds' returns"
    )
    threads: int = _integer(1, 1, "threads of torch and BLAS", high=1024)
    eval_episodes: int = _integer(10, 1, "episodes of each evaluation", high=100_000)
    eval_deterministic: bool = _flag(True, "evaluate the most probable action, not a sample")


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """The actor and the critic.

    For vectors two multilayer perceptrons of the same shape, which share nothing: `width`, `depth` and
    `activation`. For images one convolutional network with two heads: `features_dim`.
    """

    width: int = _integer(64, 1, "units in each hidden layer, where observations are vectors", high=1 << 14)
    depth: int = _integer(2, 1, "hidden layers, where observations are vectors", high=64)
    activation: Literal["tanh", "relu"] = _word(
        "tanh", ("tanh", "relu"), "activation function, where observations are vectors"
    )
    features_dim: int = _integer(
        512,
        1,
        "units of the dense layer behind the convolutions, where observations are images",
        high=1 << 16,
    )
    ortho_init: bool = _flag(True, "orthogonal initialisation with gains sqrt(2), 0.01 and 1")
    log_std_init: float = _real(0.0, -10.0, 4.0, "initial log standard deviation of continuous actions")


@dataclass(frozen=True)
class OptimizerConfig(_Checked):
    """Adam (Kingma & Ba 2015)."""

    lr: float = _real(3e-4, 0.0, 10.0, "learning rate", open_low=True)
    eps: float = _real(1e-5, 1e-30, 1.0, "term that keeps Adam's quotient finite")


@dataclass(frozen=True)
class LRScheduleConfig(_Checked):
    """How the learning rate moves between the first epoch and `task.max_epochs`."""

    name: Literal["constant", "linear"] = _word(
        "constant", ("constant", "linear"), "constant, or linear down to lr * final"
    )
    final: float = _real(0.0, 0.0, 1.0, "share of lr that a linear schedule ends at")


@dataclass(frozen=True)
class NormalizeConfig(_Checked):
    """Running normalisation of what the agent sees (details 28 to 31)."""

    norm_obs: bool = _flag(False, "normalise observations by running mean and variance")
    norm_reward: bool = _flag(False, "scale rewards by the deviation of the discounted return")
    clip_obs: float = _real(10.0, 0.0, math.inf, "bound of a normalised observation", open_low=True)
    clip_reward: float = _real(10.0, 0.0, math.inf, "bound of a scaled reward", open_low=True)


@dataclass(frozen=True)
class PPOConfig(_Checked):
    """PPO's own hyperparameters (Schulman et al. 2017), in Stable-Baselines3's words."""

    n_steps: int = _integer(256, 1, "steps of each environment in one rollout", high=10**7)
    batch_size: int = _integer(64, 1, "samples in one minibatch", high=10**9)
    n_epochs: int = _integer(10, 1, "passes over one rollout", high=10_000)
    gamma: float = _real(0.99, 0.0, 1.0, "discount factor")
    gae_lambda: float = _real(0.95, 0.0, 1.0, "horizon of generalised advantage estimation")
    clip_range: float = _real(0.2, 0.0, math.inf, "bound of the policy's ratio", open_low=True)
    clip_range_schedule: Literal["constant", "linear"] = _word(
        "constant", ("constant", "linear"), "constant, or linear down to 0 at max_epochs"
    )
    clip_range_vf: float | None = _real(
        None, 0.0, math.inf, "bound of the value's change; none: off", open_low=True, optional=True
    )
    ent_coef: float = _real(0.0, 0.0, math.inf, "weight of the entropy bonus")
    vf_coef: float = _real(0.5, 0.0, math.inf, "weight of the squared value error")
    max_grad_norm: float = _real(0.5, 0.0, math.inf, "bound of the gradient's global norm", open_low=True)
    target_kl: float | None = _real(
        None, 0.0, math.inf, "stop a rollout's updates at 1.5 times it", open_low=True, optional=True
    )
    normalize_advantage: bool = _flag(True, "standardise advantages in each minibatch")


GROUPS: dict[str, type[Any]] = {
    "env": EnvConfig,
    "task": TaskConfig,
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "lr_schedule": LRScheduleConfig,
    "normalize": NormalizeConfig,
    "ppo": PPOConfig,
}
GROUP_OF: dict[type[Any], str] = {record: group for group, record in GROUPS.items()}

# Other spellings of a quantity, for spaces: a prior over 1 - gamma on a log scale says more than one
# over gamma, and a number of minibatches divides every rollout where a batch size does not.
OTHER_SPELLINGS: dict[str, dict[str, str]] = {
    "ppo": {
        "one_minus_gamma": "gamma",
        "one_minus_gae_lambda": "gae_lambda",
        "n_minibatches": "batch_size",
    }
}

# Hyperparameters that a fork of a trial may change in mid-life: they shape updates, not arrays.
CHANGEABLE_IN_MID_LIFE: dict[str, tuple[str, ...]] = {
    "optimizer": ("lr", "eps"),
    "lr_schedule": ("name", "final"),
    "ppo": tuple(item.name for item in dataclasses.fields(PPOConfig)),
}


def field_names(group: str) -> list[str]:
    """Names of a group's fields, other spellings included."""
    names = [item.name for item in dataclasses.fields(GROUPS[group])]
    return names + list(OTHER_SPELLINGS.get(group, {}))


def check_value(group: str, key: str, value: Any) -> Any:
    """Apply the rule of one key to one value; return it in its own type.

    Raises:
        UserError: the key is unknown or the value breaks its rule.
    """
    check_key(group, key)
    name = f"{group}.{key}"
    if key == "n_minibatches":
        rule: Rule = _integer(1, 1, "", high=10**9).metadata["rule"]
    elif key in OTHER_SPELLINGS.get(group, {}):
        rule = _real(0.5, 0.0, 1.0, "").metadata["rule"]
    else:
        (item,) = (f for f in dataclasses.fields(GROUPS[group]) if f.name == key)
        rule = item.metadata["rule"]
    return rule(name, value)


def check_key(group: str, key: str) -> None:
    """Raise `UserError` unless ``group.key`` is a hyperparameter."""
    if group not in GROUPS:
        raise UserError(f"A group must be one of {', '.join(GROUPS)}, but got {group!r}.")
    if key not in field_names(group):
        import difflib

        close = difflib.get_close_matches(str(key)[:80], field_names(group), n=1)
        hint = f"Did you mean {close[0]}?" if close else f"It has {', '.join(field_names(group))}."
        raise UserError(f"PPO knows no hyperparameter `{group}.{key}`. {hint}")


@dataclass(frozen=True)
class TrialConfig:
    """Everything that a trial is: seven records whose combination has been checked."""

    env: EnvConfig = dataclasses.field(default_factory=EnvConfig)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    lr_schedule: LRScheduleConfig = dataclasses.field(default_factory=LRScheduleConfig)
    normalize: NormalizeConfig = dataclasses.field(default_factory=NormalizeConfig)
    ppo: PPOConfig = dataclasses.field(default_factory=PPOConfig)

    def __post_init__(self) -> None:
        rollout, steps = self.rollout_steps, self.task.steps_per_epoch
        weights = self.model.width**2 * (self.model.depth - 1)
        if weights > _MAX_WEIGHTS:
            raise UserError(
                f"`model.width^2 * (model.depth - 1) <= {_MAX_WEIGHTS}` must hold, but got {weights}. "
                f"Choose a smaller network."
            )
        if rollout > _MAX_SAMPLES:
            raise UserError(
                f"`env.n_envs * ppo.n_steps <= {_MAX_SAMPLES}` must hold, but got {rollout}. "
                f"Choose smaller rollouts."
            )
        product = f"env.n_envs * ppo.n_steps = {self.env.n_envs} * {self.ppo.n_steps} = {rollout}"
        if steps % rollout:
            lower, upper = steps // rollout * rollout, (steps // rollout + 1) * rollout
            fitting = f"{lower} or {upper}" if lower else f"{upper}"
            raise UserError(
                f"Rollouts must fill an epoch: {product} must divide task.steps_per_epoch, but got "
                f"{steps}. {fitting} would do."
            )
        if rollout % self.ppo.batch_size:
            raise UserError(
                f"Minibatches must fill a rollout: ppo.batch_size must divide {product}, but got "
                f"{self.ppo.batch_size}. Choose a divisor, or set ppo.n_minibatches instead."
            )
        if self.ppo.normalize_advantage and self.ppo.batch_size == 1:
            raise UserError(
                "`ppo.batch_size >= 2` must hold to normalise advantages, but got 1. "
                "Enlarge it, or set ppo.normalize_advantage to false."
            )
        if self.env.wrapper == "atari" and self.env.vectorization in ("native", "envpool"):
            raise UserError(
                f"`env.wrapper: atari` wraps gymnasium's environments, but `env.vectorization: "
                f"{self.env.vectorization}` has others. Choose auto, sync or async."
            )
        if self.task.epochs > self.max_epochs:
            raise UserError(
                f"`task.epochs <= task.max_epochs` must hold, but got {self.task.epochs} and "
                f"{self.max_epochs}. Schedules end at max_epochs: set it to the highest fidelity."
            )

    @property
    def max_epochs(self) -> int:
        """The epoch at which schedules end."""
        return self.task.epochs if self.task.max_epochs is None else self.task.max_epochs

    @property
    def rollout_steps(self) -> int:
        """Environment steps in one rollout."""
        return self.env.n_envs * self.ppo.n_steps

    @property
    def rollouts_per_epoch(self) -> int:
        """Rollouts in one epoch."""
        return self.task.steps_per_epoch // self.rollout_steps

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TrialConfig:
        """Check a nested mapping and make the records.

        Args:
            mapping: group to key to value; absent keys take the defaults of the records.

        Raises:
            UserError: an unknown group or key, a value that breaks a rule, a combination that
                cannot run, or one quantity given in two spellings.
        """
        if not isinstance(mapping, Mapping):
            raise UserError(f"A configuration must map groups to values, but got {mapping!r}.")
        groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        for group, values in mapping.items():
            if group not in GROUPS:
                raise UserError(
                    f"A group must be one of {', '.join(GROUPS)}, but the configuration has {group!r}."
                )
            if not isinstance(values, Mapping):
                raise UserError(f"Group `{group}` must map hyperparameters to values, but got {values!r}.")
            for key, value in values.items():
                check_key(group, key)
                if isinstance(value, str) and value.startswith("orion~"):
                    raise UserError(
                        f"`{group}.{key}` is still a prior, {value!r}. Let `orion hunt` fill it in, "
                        f"or fix it, as with --set {group}.{key}=VALUE."
                    )
                groups[group][key] = check_value(group, key, value)
        _respell(groups)
        if groups["task"].get("max_epochs") is not None:
            groups["task"].setdefault("epochs", groups["task"]["max_epochs"])
        return cls(**{group: record(**groups[group]) for group, record in GROUPS.items()})

    def to_mapping(self) -> dict[str, dict[str, Any]]:
        """The nested mapping that `from_mapping` turns back into this record."""
        return {
            group: {
                item.name: getattr(getattr(self, group), item.name) for item in dataclasses.fields(record)
            }
            for group, record in GROUPS.items()
        }

    def identity_mapping(self) -> dict[str, dict[str, Any]]:
        """What makes a trial the trial it is: everything but how far it is to go.

        `task.epochs` is left out, because a promoted trial is the same trial, and `task.threads`,
        because it is the machine's affair. So are `env.vectorization` where it changes no result, and
        `task.aggregate`, which says what is made of it.
        What came later, `env.wrapper`, `model.features_dim` and `task.seeds`, is left out at its default:
        trials begun before it was there go on.
        """
        mapping = self.to_mapping()
        for group, key in (("env", "wrapper"), ("model", "features_dim"), ("task", "seeds")):
            if mapping[group][key] == getattr(GROUPS[group](), key):
                del mapping[group][key]
        if mapping["env"]["vectorization"] in ("auto", "sync", "async"):
            del mapping["env"]["vectorization"]
        mapping["task"]["max_epochs"] = self.max_epochs
        del mapping["task"]["epochs"], mapping["task"]["threads"], mapping["task"]["aggregate"]
        return mapping

    def identity(self) -> str:
        """A hash, 64 hexadecimal digits, of `identity_mapping`."""
        return hashlib.sha256(canonical_json(self.identity_mapping()).encode()).hexdigest()

    def replace(self, **groups: Mapping[str, Any]) -> TrialConfig:
        """A copy with some values changed, checked anew: ``config.replace(task={"epochs": 4})``."""
        mapping = self.to_mapping()
        for group, values in groups.items():
            mapping[group] = {**mapping[group], **values}
        return TrialConfig.from_mapping(mapping)


def _respell(groups: dict[str, dict[str, Any]]) -> None:
    """Replace other spellings by their quantity, in place."""
    for group, spellings in OTHER_SPELLINGS.items():
        values = groups[group]
        for other, name in spellings.items():
            if other not in values:
                continue
            if name in values:
                raise UserError(
                    f"`{group}.{name}` and `{group}.{other}` are two spellings of one quantity, but "
                    f"both are given. Leave one of them out."
                )
            value = values.pop(other)
            if other != "n_minibatches":
                values[name] = 1.0 - value
                continue
            env, ppo = EnvConfig(**groups["env"]), PPOConfig(**values)
            rollout = env.n_envs * ppo.n_steps
            if rollout % value:
                raise UserError(
                    f"Minibatches must fill a rollout: ppo.n_minibatches must divide env.n_envs * "
                    f"ppo.n_steps = {env.n_envs} * {ppo.n_steps} = {rollout}, but got {value}."
                )
            values[name] = rollout // value

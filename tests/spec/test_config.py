"""Every rule of a configuration: what is refused, in which words, and what is taken."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import (
    CHANGEABLE_BY_FORK,
    GROUPS,
    OTHER_SPELLINGS,
    PPOConfig,
    TrialConfig,
    check_key,
    check_value,
    field_names,
    without_effectless,
)
from ppo_hpo.spec.errors import UserError

REFUSED: list[tuple[str, Any, list[str]]] = [
    # Names.
    ("no mapping", [1], ["A configuration must map groups to values", "[1]"]),
    ("unknown group", {"optimiser": {}}, ["env, task, model", "'optimiser'"]),
    ("group of one value", {"ppo": 3}, ["Group `ppo` must map hyperparameters to values", "3"]),
    ("group of nothing", {"ppo": None}, ["Group `ppo` must map hyperparameters to values", "None"]),
    ("misspelt key", {"ppo": {"gama": 0.9}}, ["`ppo.gama`", "Did you mean gamma?"]),
    ("misspelt key", {"ppo": {"n_minibatchs": 4}}, ["Did you mean n_minibatches?"]),
    ("unknown key", {"optimizer": {"zzz": 1}}, ["`optimizer.zzz`", "It has lr, eps."]),
    # Numbers.
    ("negative", {"optimizer": {"lr": -1e-3}}, ["`0 < optimizer.lr <= 10` must hold", "-0.001"]),
    ("open bound", {"optimizer": {"lr": 0}}, ["`0 < optimizer.lr <= 10` must hold", "got 0"]),
    ("beyond", {"ppo": {"gamma": 1.5}}, ["`0 <= ppo.gamma <= 1` must hold", "1.5"]),
    ("unbounded above", {"ppo": {"vf_coef": -1}}, ["`0 <= ppo.vf_coef` must hold", "-1"]),
    ("not a number", {"optimizer": {"lr": math.nan}}, ["`optimizer.lr` must be finite", "nan"]),
    ("infinity", {"optimizer": {"lr": math.inf}}, ["`optimizer.lr` must be finite", "inf"]),
    ("infinity, no bound", {"ppo": {"vf_coef": math.inf}}, ["`ppo.vf_coef` must be finite"]),
    ("negative infinity", {"model": {"log_std_init": -math.inf}}, ["must be finite", "-inf"]),
    ("beyond a float", {"optimizer": {"lr": 10**400}}, ["`optimizer.lr` must be finite"]),
    ("word", {"optimizer": {"lr": "fast"}}, ["`optimizer.lr` must be a number", "'fast'"]),
    ("nothing", {"optimizer": {"lr": None}}, ["`optimizer.lr` must be a number", "None"]),
    ("list", {"optimizer": {"lr": [1e-3]}}, ["`optimizer.lr` must be a number", "[0.001]"]),
    ("Python's none", {"ppo": {"target_kl": "None"}}, ["`ppo.target_kl` must be a number or none", "'None'"]),
    ("Python's none", {"env": {"max_episode_steps": "None"}}, ["must be a whole number or none", "'None'"]),
    ("boolean for a number", {"optimizer": {"lr": True}}, ["must be a number", "True"]),
    # Whole numbers.
    ("fraction", {"ppo": {"n_epochs": 13.57}}, ["`ppo.n_epochs` must be a whole number", "13.57"]),
    ("boolean", {"env": {"n_envs": True}}, ["`env.n_envs` must be a whole number", "True"]),
    ("digits in quotes", {"env": {"n_envs": "8"}}, ["`env.n_envs` must be a whole number", "'8'"]),
    ("infinity", {"task": {"epochs": math.inf}}, ["`task.epochs` must be a whole number", "inf"]),
    ("not a number", {"task": {"seed": math.nan}}, ["`task.seed` must be a whole number", "nan"]),
    ("nothing", {"task": {"epochs": "none"}}, ["`task.epochs` must be a whole number"]),
    ("too low", {"task": {"epochs": 0}}, ["`task.epochs >= 1` must hold", "got 0"]),
    ("too low", {"task": {"seed": -1}}, ["`task.seed >= 0` must hold", "got -1"]),
    ("too low", {"task": {"threads": 0}}, ["`task.threads >= 1` must hold", "got 0"]),
    ("too low", {"env": {"max_episode_steps": 0}}, ["`env.max_episode_steps >= 1` must hold"]),
    # Words and flags.
    ("unknown word", {"model": {"activation": "gelu"}}, ["must be one of tanh, relu", "'gelu'"]),
    ("unknown word", {"lr_schedule": {"name": None}}, ["must be one of constant, linear", "None"]),
    ("number for a flag", {"normalize": {"norm_obs": 1}}, ["must be true or false", "got 1"]),
    ("word for a flag", {"normalize": {"norm_obs": "yes"}}, ["must be true or false", "'yes'"]),
    # The environment.
    ("no id", {"env": {"id": ""}}, ["`env.id` must be the id", "CartPole-v1", "''"]),
    ("date for an id", {"env": {"id": 3}}, ["`env.id` must be the id", "got 3"]),
    ("two modules", {"env": {"id": "a:b:C-v0"}}, ["must be EnvId or module:EnvId", "'a:b:C-v0'"]),
    (
        "path for a module",
        {"env": {"id": "../../a:C-v0"}},
        ["must be EnvId or module:EnvId", "'../../a:C-v0'"],
    ),
    ("file for a module", {"env": {"id": "my_env.py:C-v0"}}, ["without .py", "Write my_env:C-v0."]),
    ("file", {"env": {"id": "sub/my_env.py"}}, ["without .py", "Write sub.my_env:EnvId."]),
    ("relative module", {"env": {"id": ".a:C-v0"}}, ["must be EnvId or module:EnvId"]),
    ("many environments", {"env": {"n_envs": 2**60}}, ["`env.n_envs <= 65536` must hold", str(2**60)]),
    ("wide", {"model": {"width": 2**14, "depth": 2}}, ["`model.width^2 * (model.depth - 1) <= 134217728`"]),
    ("many epochs", {"task": {"epochs": 10_001}}, ["`task.epochs <= 10000` must hold", "10001"]),
    ("threads", {"task": {"threads": 10**9}}, ["`task.threads <= 1024` must hold"]),
    ("no such integer", {"ppo": {"n_steps": 10**5000}}, ["`ppo.n_steps <= 10000000`", "int beyond 2^64"]),
    (
        "a rollout beyond memory",
        {"env": {"n_envs": 2**16}, "ppo": {"n_steps": 2**13}, "task": {"steps_per_epoch": 2**29}},
        ["`env.n_envs * ppo.n_steps <= 134217728` must hold"],
    ),
    ("no names", {"env": {"kwargs": 3}}, ["`env.kwargs` must map argument names to values", "3"]),
    ("number for a name", {"env": {"kwargs": {1: 2}}}, ["`env.kwargs` must map argument names"]),
    ("object", {"env": {"kwargs": {"f": len}}}, ["`env.kwargs` must be plain data"]),
    ("NaN inside", {"env": {"kwargs": {"g": math.nan}}}, ["`env.kwargs` must be plain data", "nan"]),
    (
        "two places of one quantity",
        {"env": {"kwargs": {"max_episode_steps": 5}}},
        ["must be `env.max_episode_steps`"],
    ),
    # Combinations.
    (
        "epoch that rollouts do not fill",
        {"env": {"n_envs": 8}, "task": {"steps_per_epoch": 1000}, "ppo": {"n_steps": 32}},
        ["8 * 32 = 256 must divide task.steps_per_epoch", "got 1000", "768 or 1024 would do"],
    ),
    (
        "epoch shorter than a rollout",
        {"env": {"n_envs": 8}, "task": {"steps_per_epoch": 100}, "ppo": {"n_steps": 32}},
        ["must divide task.steps_per_epoch", "got 100", ". 256 would do"],
    ),
    (
        "rollout that minibatches do not fill",
        {"env": {"n_envs": 8}, "ppo": {"n_steps": 32, "batch_size": 60}},
        ["ppo.batch_size must divide env.n_envs * ppo.n_steps = 8 * 32 = 256", "60", "n_minibatches"],
    ),
    (
        "minibatch larger than a rollout",
        {"env": {"n_envs": 8}, "ppo": {"n_steps": 32, "batch_size": 512}},
        ["ppo.batch_size must divide", "got 512"],
    ),
    (
        "number of minibatches that do not fill a rollout",
        {"env": {"n_envs": 8}, "ppo": {"n_steps": 32, "n_minibatches": 3}},
        ["ppo.n_minibatches must divide", "8 * 32 = 256", "got 3"],
    ),
    (
        "standardising one sample",
        {"ppo": {"batch_size": 1}},
        ["`ppo.batch_size >= 2` must hold to normalise advantages", "normalize_advantage to false"],
    ),
    (
        "standardising one sample, in the other spelling",
        {"env": {"n_envs": 1}, "task": {"steps_per_epoch": 64}, "ppo": {"n_steps": 4, "n_minibatches": 4}},
        ["`ppo.batch_size >= 2` must hold"],
    ),
    (
        "beyond the end of schedules",
        {"task": {"epochs": 17, "max_epochs": 16}},
        ["`task.epochs <= task.max_epochs` must hold", "17 and 16", "highest fidelity"],
    ),
    (
        "two spellings",
        {"ppo": {"gamma": 0.99, "one_minus_gamma": 0.01}},
        ["`ppo.gamma` and `ppo.one_minus_gamma` are two spellings of one quantity"],
    ),
    (
        "two spellings",
        {"ppo": {"gae_lambda": 0.95, "one_minus_gae_lambda": 0.05}},
        ["`ppo.gae_lambda` and `ppo.one_minus_gae_lambda` are two spellings"],
    ),
    (
        "two spellings",
        {"ppo": {"batch_size": 64, "n_minibatches": 4}},
        ["`ppo.batch_size` and `ppo.n_minibatches` are two spellings", "Leave one of them out"],
    ),
    ("other spelling", {"ppo": {"one_minus_gamma": 1.5}}, ["`0 <= ppo.one_minus_gamma <= 1`", "1.5"]),
    ("other spelling", {"ppo": {"n_minibatches": 2.5}}, ["`ppo.n_minibatches` must be a whole number"]),
    ("other spelling", {"ppo": {"n_minibatches": 0}}, ["`ppo.n_minibatches >= 1` must hold"]),
    # No effect.
    (
        "end of a constant schedule",
        {"lr_schedule": {"final": 0.1}},
        ['`lr_schedule.final` has no effect unless `lr_schedule.name` is "linear"', "0.1", "Leave it out"],
    ),
    ("bound of nothing", {"normalize": {"clip_obs": 5}}, ["no effect unless `normalize.norm_obs` is true"]),
    ("bound of nothing", {"normalize": {"clip_reward": 5}}, ["unless `normalize.norm_reward` is true"]),
    # Holes.
    (
        "open prior",
        {"optimizer": {"lr": "orion~loguniform(1e-5, 1e-2)"}},
        ["`optimizer.lr` is still a prior", "loguniform(1e-5, 1e-2)", "--set optimizer.lr=VALUE"],
    ),
]


@pytest.mark.parametrize(
    ("mapping", "parts"),
    [(mapping, parts) for _, mapping, parts in REFUSED],
    ids=[f"{index}-{name}" for index, (name, _, _) in enumerate(REFUSED)],
)
def test_refused_with_the_rule_and_the_value(mapping: Any, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        TrialConfig.from_mapping(mapping)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith((".", "?")), message
    for part in parts:
        assert part in message


def test_defaults_are_a_legal_trial() -> None:
    assert TrialConfig.from_mapping({}) == TrialConfig()


def test_whole_numbers_may_be_written_as_floats() -> None:
    config = TrialConfig.from_mapping({"ppo": {"n_epochs": 3.0}, "task": {"epochs": 4.0}})
    assert (config.ppo.n_epochs, config.task.epochs) == (3, 4)
    assert type(config.ppo.n_epochs) is int


def test_numbers_may_be_written_as_whole_ones() -> None:
    config = TrialConfig.from_mapping({"ppo": {"gamma": 1}})
    assert config.ppo.gamma == 1.0
    assert type(config.ppo.gamma) is float


@pytest.mark.parametrize("nothing", [None, "none"])
def test_optional_values_may_be_none(nothing: Any) -> None:
    config = TrialConfig.from_mapping(
        {
            "env": {"max_episode_steps": nothing, "kwargs": None},
            "task": {"max_epochs": nothing},
            "ppo": {"clip_range_vf": nothing, "target_kl": nothing},
        }
    )
    assert config == TrialConfig()
    assert config.ppo.clip_range_vf is config.ppo.target_kl is None


def test_records_check_their_rules_whoever_makes_them() -> None:
    with pytest.raises(UserError, match=r"0 <= ppo.gamma <= 1"):
        PPOConfig(gamma=2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig().gamma = 0.5  # type: ignore[misc]
    with pytest.raises(UserError, match="must divide"):
        TrialConfig(ppo=PPOConfig(batch_size=60))


def test_other_spellings_mean_their_quantity() -> None:
    config = TrialConfig.from_mapping(
        {
            "env": {"n_envs": 4},
            "task": {"steps_per_epoch": 512},
            "ppo": {"n_steps": 64, "one_minus_gamma": 0.25, "one_minus_gae_lambda": 0.5, "n_minibatches": 8},
        }
    )
    assert (config.ppo.gamma, config.ppo.gae_lambda, config.ppo.batch_size) == (0.75, 0.5, 4 * 64 // 8)
    assert (config.rollout_steps, config.rollouts_per_epoch) == (256, 2)


def test_number_of_minibatches_follows_the_default_of_what_is_absent() -> None:
    config = TrialConfig.from_mapping({"ppo": {"n_minibatches": 4}})
    assert config.ppo.batch_size == 8 * 256 // 4


def _other_value(group: str, item: dataclasses.Field[Any], value: Any) -> Any:
    """A legal value that differs from the one that is there."""
    special = {
        "env.id": "Pendulum-v1",
        "env.kwargs": {"g": 9.0},
        "env.max_episode_steps": 100,
        "task.steps_per_epoch": 1024,
        "task.aggregate": "iqm",
        "model.activation": "relu",
        "lr_schedule.name": "constant",
        "ppo.clip_range_schedule": "linear",
        "ppo.clip_range_vf": 0.3,
        "ppo.target_kl": 0.05,
        "ppo.gamma": 0.5,
        "env.vectorization": "sync",
        "env.wrapper": "atari",
    }
    if (name := f"{group}.{item.name}") in special:
        return special[name]
    if isinstance(value, bool):
        return not value
    return 2 * value if value else 1


BASE = TrialConfig.from_mapping(
    {
        "env": {"n_envs": 1},
        "task": {"epochs": 4, "max_epochs": 16, "steps_per_epoch": 512},
        "optimizer": {"eps": 1e-6},
        "lr_schedule": {"name": "linear"},
        "normalize": {"norm_obs": True, "norm_reward": True},
        "ppo": {"n_steps": 128, "batch_size": 16, "gae_lambda": 0.4},
    }
)
VECTORIZATIONS = ("auto", "sync", "async", "native", "envpool")
FIELDS = [(group, item) for group, record in GROUPS.items() for item in dataclasses.fields(record)]


@pytest.mark.parametrize(("group", "item"), FIELDS, ids=[f"{g}.{item.name}" for g, item in FIELDS])
def test_identity_is_everything_but_how_far_and_how_fast(group: str, item: dataclasses.Field[Any]) -> None:
    value = getattr(getattr(BASE, group), item.name)
    other = BASE.replace(**{group: {item.name: _other_value(group, item, value)}})
    assert getattr(getattr(other, group), item.name) != value
    # The other vectorization is sync, which changes no result.
    same = f"{group}.{item.name}" in ("task.epochs", "task.threads", "task.aggregate", "env.vectorization")
    assert (other.identity() == BASE.identity()) is same
    assert (other.identity_mapping() == BASE.identity_mapping()) is same


@pytest.mark.parametrize(("group", "item"), FIELDS, ids=[f"{g}.{item.name}" for g, item in FIELDS])
def test_every_field_survives_the_way_to_a_mapping_and_back(group: str, item: dataclasses.Field[Any]) -> None:
    other = _other_value(group, item, getattr(getattr(BASE, group), item.name))
    config = BASE.replace(**{group: {item.name: other}})
    mapping = config.to_mapping()
    assert mapping[group][item.name] == other
    assert TrialConfig.from_mapping(mapping) == config


def test_what_steps_the_environments_is_part_of_a_trial_where_it_changes_results() -> None:
    identities = {kind: BASE.replace(env={"vectorization": kind}).identity() for kind in VECTORIZATIONS}
    assert identities["auto"] == identities["sync"] == identities["async"]
    assert len(set(identities.values())) == 3


def test_identity_does_not_depend_on_how_a_value_is_written() -> None:
    written = [
        {"ppo": {"gamma": 1}},
        {"ppo": {"gamma": 1.0}},
        {"ppo": {"one_minus_gamma": 0}},
        {"ppo": {"gamma": 1.0, "clip_range_vf": "none"}, "task": {"max_epochs": 16}},
        {"task": {"seed": 0.0, "epochs": 16}, "ppo": {"gamma": 1, "n_minibatches": 32}},
    ]
    assert len({TrialConfig.from_mapping(mapping).identity() for mapping in written}) == 1


def test_identity_follows_the_end_of_schedules_where_none_is_given() -> None:
    short, long = (TrialConfig.from_mapping({"task": {"epochs": epochs}}) for epochs in (4, 16))
    assert (short.max_epochs, long.max_epochs) == (4, 16)
    assert short.identity() != long.identity()


def test_identity_is_the_same_in_every_process_and_release() -> None:
    # Checkpoints are found by it. If this number has to change, trials begun before start again:
    # say so in the changelog.
    assert TrialConfig().identity().startswith("0f5e82557b06")


def test_replace_checks_anew() -> None:
    with pytest.raises(UserError, match="must divide"):
        BASE.replace(ppo={"batch_size": 60})
    assert BASE.replace(ppo={"n_epochs": 3}).ppo == dataclasses.replace(BASE.ppo, n_epochs=3)


def test_the_environments_arguments_are_the_records_own() -> None:
    arguments = {"g": 9.0}
    config = TrialConfig.from_mapping({"env": {"kwargs": arguments}})
    before = config.identity()
    arguments["g"] = 1.0
    assert config.identity() == before


def test_check_value_takes_one_key_at_a_time() -> None:
    assert check_value("ppo", "n_epochs", 3.0) == 3
    assert check_value("ppo", "one_minus_gamma", 0.01) == 0.01
    assert check_value("ppo", "n_minibatches", 4) == 4
    assert check_value("ppo", "target_kl", "none") is None
    with pytest.raises(UserError, match=r"Unknown hyperparameter `ppo\.lr`"):
        check_value("ppo", "lr", 1e-3)
    with pytest.raises(UserError, match="A group must be one of"):
        check_key("nothing", "lr")


def test_names_that_other_tables_use_exist() -> None:
    for group, names in CHANGEABLE_BY_FORK.items():
        assert set(names) <= set(field_names(group))
    for group, spellings in OTHER_SPELLINGS.items():
        own = {item.name for item in dataclasses.fields(GROUPS[group])}
        assert set(spellings.values()) <= own
        assert not set(spellings) & own


def test_every_hyperparameter_says_what_it_is() -> None:
    for group, item in FIELDS:
        assert item.metadata["doc"], f"{group}.{item.name}"


def test_a_whole_number_that_was_computed_by_powers() -> None:
    """Orion's PBT asks for 45 epochs so; what is further off is no whole number."""
    config = TrialConfig.from_mapping({"task": {"epochs": 44.99999999999997, "max_epochs": 45}})
    assert config.task.epochs == 45
    assert type(config.task.epochs) is int
    with pytest.raises(UserError, match=r"must be a whole number, but got 44\.999"):
        TrialConfig.from_mapping({"task": {"epochs": 44.999, "max_epochs": 45}})


def test_numbers_of_numpys_are_numbers() -> None:
    """They become Python's, which can be written to YAML and hashed, inside of `env.kwargs` too."""
    kwargs = {
        "g": np.float32(0.5),
        "sizes": (np.int64(1), [np.float64(2.5)]),
        "words": {"on": np.bool_(True)},
    }
    written = {
        "env": {"id": np.str_("CartPole-v1"), "n_envs": np.int32(8), "kwargs": kwargs},
        "task": {"seed": np.uint64(3), "eval_deterministic": np.bool_(False)},
        "ppo": {"n_steps": np.int64(64), "gamma": np.float32(0.5), "n_epochs": np.float64(3.0)},
    }
    config = TrialConfig.from_mapping(written)
    again = TrialConfig.from_mapping(yamlio.parse(yamlio.dump(config.to_mapping()), "text"))
    assert again == config
    assert again.identity() == config.identity()
    assert (config.ppo.n_steps, config.ppo.gamma, config.task.seed) == (64, 0.5, 3)
    assert config.env.kwargs == {"g": 0.5, "sizes": [1, [2.5]], "words": {"on": True}}
    for bad in (np.array([1, 2]), np.datetime64("2020-01-01"), {1: 2}, np.float64("nan")):
        with pytest.raises(UserError, match="plain data"):
            TrialConfig.from_mapping({"env": {"kwargs": {"x": bad}}})
    with pytest.raises(UserError, match="must be a number"):
        TrialConfig.from_mapping({"optimizer": {"lr": np.array([1e-3])}})


@pytest.mark.parametrize("nothing", [None, "none", math.inf, np.inf, "inf"])
@pytest.mark.parametrize(
    "key", ["ppo.max_grad_norm", "ppo.target_kl", "normalize.clip_obs", "normalize.clip_reward"]
)
def test_no_bound_is_none_or_infinity(key: str, nothing: Any) -> None:
    group, _, name = key.partition(".")
    config = BASE.replace(**{group: {name: nothing}})
    assert getattr(getattr(config, group), name) is None
    assert TrialConfig.from_mapping(yamlio.parse(yamlio.dump(config.to_mapping()), "text")) == config


def test_what_is_searched_may_have_no_effect_in_some_trials() -> None:
    drawn = {
        "lr_schedule": {"name": "constant", "final": 0.3},
        "normalize": {"clip_obs": 3.0},
        "ppo": {"gamma": 1},
    }
    assert without_effectless(drawn) == {
        "lr_schedule": {"name": "constant"},
        "normalize": {},
        "ppo": {"gamma": 1},
    }
    # What was written as a fixed value stays, so that it is refused.
    assert without_effectless(drawn, {"normalize": {"clip_obs": "prior"}})["lr_schedule"]["final"] == 0.3
    linear = {"lr_schedule": {"name": "linear", "final": 0.3}}
    assert without_effectless(linear) == linear

"""Search spaces: what is shipped is legal at every point, and what people write is checked."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from ppo_hpo.cli.main import main
from ppo_hpo.envs.make import probe
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import CHANGEABLE_BY_FORK, OTHER_SPELLINGS, EnvConfig, TrialConfig
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.prior import parse_prior
from ppo_hpo.spec.space import (
    copy_space,
    fill,
    get_space,
    list_spaces,
    read_space,
    space_of,
    space_path,
    spaces_directory,
    to_document,
    with_fidelities,
)

POINTS = 1000
SHIPPED = list_spaces()
REPOSITORY = Path(__file__).parents[2]
SEARCHED = [name for name in SHIPPED if read_space(name).priors]
PRESETS = [name for name in SHIPPED if name not in SEARCHED]
EXPERIMENTS = sorted((REPOSITORY / "experiments").glob("*/space.yaml"))
SPACES = [*SHIPPED, *map(str, EXPERIMENTS)]
# What the comments of the shipped files say that they are for, beside their own env.id.
MEANT_FOR = {
    "classic-control": ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0"],
    "classic-control-pbt": ["CartPole-v1"],
    "default": ["Pendulum-v1"],
    "box2d": ["LunarLanderContinuous-v3"],
}


def sample(space: Mapping[str, Any], n: int = POINTS, seed: int = 1) -> list[dict[str, Any]]:
    """Points of a space as Orion itself draws them."""
    from orion.core.io.space_builder import SpaceBuilder

    return [trial.params for trial in SpaceBuilder().build(space).sample(n, seed=seed)]


def short(name: str) -> str:
    return Path(name).parent.name if name.endswith(".yaml") else name


# ---------------------------------------------------------------------- what is shipped


def test_the_shipped_spaces() -> None:
    assert sorted(path.stem for path in (REPOSITORY / "spaces").glob("*.yaml")) == SHIPPED
    assert {"default", "classic-control", "classic-control-pbt", "box2d"} <= set(SHIPPED)
    assert spaces_directory().samefile(REPOSITORY / "spaces")
    assert EXPERIMENTS


@pytest.mark.parametrize("name", SPACES, ids=short)
def test_read(name: str) -> None:
    space = read_space(name)
    assert set(get_space(name)) == set(space.priors)
    for group, values in space.priors.items():
        assert not set(values) & set(space.fixed.get(group, {})), "fixed and searched at once"
        for prior in values.values():
            assert not prior.startswith("orion~")


def assert_not_absurdly_slow(config: TrialConfig) -> None:
    assert config.ppo.n_epochs / config.ppo.batch_size <= 0.35, "gradient steps for one environment step"
    assert config.model.width**2 * config.model.depth <= 2**18, "a network too large for its task"
    assert config.rollouts_per_epoch >= 2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_trials(name: str) -> None:
    # Schedules have to end somewhere, also where the preset is run under Orion.
    config = TrialConfig.from_mapping(fill(read_space(name), {}))
    assert config.task.max_epochs == config.task.epochs
    assert_not_absurdly_slow(config)


@pytest.mark.parametrize("name", SEARCHED)
def test_every_point_is_legal_and_none_absurdly_slow(name: str) -> None:
    space = read_space(name)
    points = sample(get_space(name))
    assert len(points) == POINTS
    identities = set()
    for point in points:
        config = TrialConfig.from_mapping(fill(space, point))
        identities.add(config.identity())
        assert_not_absurdly_slow(config)
    assert len(identities) > 0.99 * POINTS


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.parent.name)
def test_every_point_of_an_experiment_is_legal(path: Path) -> None:
    space = read_space(str(path))
    for point in sample(space.priors, 200):
        TrialConfig.from_mapping(fill(space, point))
    untuned = read_space(str(path.with_name("untuned.yaml")))
    assert not untuned.priors
    TrialConfig.from_mapping(fill(untuned, {}))


@pytest.mark.parametrize("name", SEARCHED)
def test_algorithms_round_to_legal_points_too(name: str) -> None:
    # `sample` gives all digits; what an algorithm suggests is rounded to the priors' precision.
    from orion.algo.random import Random
    from orion.core.io.space_builder import SpaceBuilder
    from orion.core.worker.primary_algo import create_algo

    space = read_space(name)
    algorithm = create_algo(Random, SpaceBuilder().build(get_space(name)), seed=1)
    trials = algorithm.suggest(50)
    assert len(trials) == 50
    rates = [TrialConfig.from_mapping(fill(space, trial.params)).optimizer.lr for trial in trials]
    assert all(float(f"{rate:.3e}") == rate for rate in rates)


@pytest.mark.parametrize("name", SPACES, ids=short)
def test_epochs_hold_five_episodes_of_each_environment(name: str) -> None:
    fixed = read_space(name).fixed
    for env in {fixed["env"]["id"], *MEANT_FOR.get(name, [])}:
        if name == "box2d":  # the engine is an extra, and its import crashes where warnings are errors
            limit = gymnasium.spec(env).max_episode_steps
        else:
            limit = probe(EnvConfig(**{**fixed["env"], "id": env})).time_limit
        assert limit is not None
        needed = 5 * fixed["env"]["n_envs"] * limit
        assert fixed["task"]["steps_per_epoch"] >= needed, env


def test_the_default_space_is_for_episodes_of_a_thousand_steps() -> None:
    fixed = read_space("default").fixed
    assert fixed["task"]["steps_per_epoch"] >= 5 * fixed["env"]["n_envs"] * 1000


def test_population_based_training_searches_only_what_a_fork_may_change() -> None:
    for group, values in get_space("classic-control-pbt").items():
        for key in values:
            meant = OTHER_SPELLINGS.get(group, {}).get(key, key)
            assert f"{group}.{key}" == "task.epochs" or meant in CHANGEABLE_BY_FORK[group]


# -------------------------------------------------------------------------- fidelities


def test_fidelity_of_the_file() -> None:
    assert get_space("classic-control")["task"]["epochs"] == "fidelity(1, 16, base=2)"
    assert read_space("classic-control").max_epochs == 16


@pytest.mark.parametrize("value", ["fidelity(1, 64, base=4)", "orion~fidelity(1, 64, base=4)"])
@pytest.mark.parametrize("name", ["epochs", "task.epochs"])
def test_another_fidelity_moves_the_end_of_schedules(name: str, value: str) -> None:
    space = with_fidelities(read_space("classic-control"), {name: value})
    assert space.priors["task"]["epochs"] == "fidelity(1, 64, base=4)"
    assert space.max_epochs == space.fixed["task"]["max_epochs"] == 64
    point = sample(space.priors, 1)[0]
    assert TrialConfig.from_mapping(fill(space, point)).max_epochs == 64


def test_a_fixed_number_of_epochs_is_not_a_fidelity() -> None:
    space = with_fidelities(read_space("classic-control"), {"epochs": 8})
    assert "task" not in get_space("classic-control", epochs=8)
    assert space.max_epochs is None
    config = TrialConfig.from_mapping(fill(space, sample(get_space("classic-control", epochs=8), 1)[0]))
    assert (config.task.epochs, config.max_epochs) == (8, 8)


def test_the_space_itself_stays_as_it_was() -> None:
    space = read_space("classic-control")
    with_fidelities(space, {"epochs": 8})
    assert space == read_space("classic-control")
    assert with_fidelities(space, {}) is space


@pytest.mark.parametrize(
    ("fidelities", "parts"),
    [
        ({"steps": "fidelity(1, 4)"}, ["'classic-control' has no fidelity 'steps'", "It has `epochs`"]),
        ({"lr": "uniform(0, 1)"}, ["has no fidelity 'lr'"]),
        ({"epochs": "uniform(1, 4)"}, ["must be a fidelity or a whole number", "'uniform(1, 4)'"]),
        ({"epochs": "16"}, ["must be a fidelity or a whole number", "'16'"]),
        ({"epochs": "fidelity(4, 1)"}, ["1 <= low < high", "'fidelity(4, 1)'"]),
        ({"epochs": "fidelity(1"}, ["has a bad prior"]),
        ({"epochs": 0}, ["`task.epochs >= 1` must hold"]),
        ({"epochs": 2.5}, ["must be a whole number"]),
        ({"epochs": None}, ["must be a whole number"]),
    ],
)
def test_bad_fidelities(fidelities: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        get_space("classic-control", **fidelities)
    for part in parts:
        assert part in str(error.value)


def test_unknown_space() -> None:
    with pytest.raises(UserError) as error:
        get_space("clasic-control")
    assert "No space is called 'clasic-control'" in str(error.value)
    assert ", ".join(SHIPPED) in str(error.value)
    with pytest.raises(UserError, match=r"mine.yaml cannot be read: No such file"):
        get_space("mine.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        get_space("no/such/folder")


# --------------------------------------------------------------------- priors of people

BAD: list[tuple[str, str, str]] = [
    # Malformed.
    ("optimizer.lr", "loguniform(1e-5, 1e-2", "bad prior"),
    ("optimizer.lr", "", "bad prior"),
    ("optimizer.lr", "loguniform", "bad prior"),
    ("optimizer.lr", "1e-3", "bad prior"),
    ("optimizer.lr", "loguniform(1e-5, 1e-2) + 1", "bad prior"),
    ("optimizer.lr", "loguniform(1e-5, inf)", "bad prior"),
    ("optimizer.lr", "loguniform(*[1e-5, 1e-2])", "bad prior"),
    ("optimizer.lr", "np.loguniform(1e-5, 1e-2)", "bad prior"),
    ("optimizer.lr", "__import__('os').system('true')", "bad prior"),
    ("optimizer.lr", "uniform(__import__('os').system('true'), 1)", "bad prior"),
    ("optimizer.lr", "(" * 3000, "bad prior"),
    ("optimizer.lr", "uniform(" + "-" * 3000 + "1, 2)", "bad prior"),
    ("optimizer.lr", "uniform(" + "1+" * 1900 + "1, 2)", "bad prior"),
    ("optimizer.lr", "uniform(0, 1, discrete='yes')", "must be True or False"),
    ("optimizer.lr", "uniform(1e-4, 1e-3, precision=1000000000)", "digits, 1 to 17"),
    ("optimizer.lr", "(" * 5000, "a prior of 5000 characters; 4000 are read"),
    ("optimizer.lr", "uniform(" + "-" * 50_000 + "1, 2)", "a prior of 50013 characters"),
    ("task.epochs", f"fidelity(1, {10**12})", "`task.epochs <= 10000` must hold"),
    ("task.epochs", f"fidelity(1, 4, base={10**4000})"[:3999], "bad prior"),
    ("env.n_envs", f"choices([1, {2**60}])", "`env.n_envs <= 65536` must hold"),
    # Unknown to Orion, or to us.
    ("optimizer.lr", "lognormal(1e-5, 1e-2)", "unknown prior"),
    ("optimizer.lr", "LogUniform(1e-5, 1e-2)", "unknown prior"),
    ("optimizer.lr", "loguniform(low=1e-5, high=1e-2)", "unknown option 'low'"),
    ("optimizer.lr", "loguniform(1e-5, 1e-2, base=4)", "unknown option 'base'"),
    ("optimizer.lr", "loguniform(1e-5, 1e-2, shape=2)", "unknown option 'shape'"),
    ("optimizer.lr", "loguniform(1e-5, 1e-2, **{'precision': 4})", "unknown option"),
    # Bounds.
    ("optimizer.lr", "loguniform(1e-5)", "needs two finite numbers"),
    ("optimizer.lr", "uniform(0.1, 0.2, 0.3)", "needs two finite numbers"),
    ("optimizer.lr", "uniform('a', 'b')", "needs two finite numbers"),
    ("optimizer.lr", "uniform(True, 2)", "needs two finite numbers"),
    ("optimizer.lr", "uniform(1e-3, 1e999)", "needs two finite numbers"),
    ("optimizer.lr", f"uniform(1e-3, 1{'0' * 400})", "needs two finite numbers"),
    ("optimizer.lr", "loguniform(1e-2, 1e-5)", "`low < high` must hold"),
    ("optimizer.lr", "uniform(1e-2, 1e-2)", "`low < high` must hold"),
    ("normalize.clip_obs", "loguniform(0, 10)", "`low > 0` must hold in the loguniform"),
    ("model.log_std_init", "loguniform(-1, 1)", "`low > 0` must hold in the loguniform"),
    ("optimizer.lr", "uniform(-1, 1)", "`0 < optimizer.lr <= 10` must hold"),
    ("optimizer.lr", "uniform(0, 1)", "`0 < optimizer.lr <= 10` must hold"),
    ("optimizer.lr", "uniform(1, 11)", "`0 < optimizer.lr <= 10` must hold"),
    ("ppo.gamma", "uniform(0.9, 1.1)", "`0 <= ppo.gamma <= 1` must hold"),
    ("ppo.one_minus_gamma", "loguniform(0.1, 2)", "`0 <= ppo.one_minus_gamma <= 1` must hold"),
    ("optimizer.lr", "normal(0, 1)", "unbounded prior"),
    ("optimizer.lr", "normal(0.5, 0.1, discrete=True)", "unbounded prior"),
    # Whole numbers.
    ("ppo.n_epochs", "uniform(1, 10)", "Add discrete=True, or list the choices"),
    ("ppo.n_minibatches", "loguniform(1, 8)", "Add discrete=True"),
    ("ppo.n_epochs", "uniform(0, 10, discrete=True)", "`ppo.n_epochs >= 1` must hold"),
    ("ppo.n_epochs", "uniform(0.5, 3, discrete=True)", "needs whole bounds"),
    ("optimizer.lr", "loguniform(1e-5, 1e-2, discrete=True)", "needs whole bounds"),
    # Options.
    ("optimizer.lr", "loguniform(1e-5, 1e-2, precision=0)", "`precision` in the prior"),
    ("optimizer.lr", "loguniform(1e-5, 1e-2, precision=2.5)", "`precision` in the prior"),
    ("optimizer.lr", "loguniform(1e-5, 1e-2, default_value=1)", "`low <= default_value <= high`"),
    ("model.width", "choices([32, 64], default_value=16)", "`default_value` in the prior"),
    # Choices.
    ("model.activation", "choices([])", "needs a list of choices"),
    ("model.activation", "choices('tanh', 'relu')", "needs a list of choices"),
    ("model.activation", "choices(('tanh', 'relu'))", "needs a list of choices"),
    ("model.width", "choices(64)", "needs a list of choices"),
    ("model.activation", "choices(['tanh', 'gelu'])", "must be one of tanh, relu, but got 'gelu'"),
    ("model.activation", "choices([tanh, relu])", "bad prior"),
    ("model.width", "choices([32, 48.5])", "must be a whole number, but got 48.5"),
    ("model.width", "choices({32: 0.5, 64: 0.9})", "must add up to 1"),
    ("normalize.norm_obs", "choices([0, 1])", "must be true or false"),
    ("normalize.norm_obs", "uniform(0, 1, discrete=True)", "must be true or false"),
    ("env.id", "uniform(0, 1)", "must be the id of a gymnasium environment"),
    # Fidelities.
    ("optimizer.lr", "fidelity(1, 16)", "Only `task.epochs` can be a fidelity"),
    ("ppo.n_epochs", "fidelity(1, 16)", "Only `task.epochs` can be a fidelity"),
    ("task.epochs", "uniform(1, 16, discrete=True)", "is the fidelity and not searched otherwise"),
    ("task.epochs", "choices([1, 2])", "is the fidelity and not searched otherwise"),
    ("task.epochs", "fidelity(1, 16, base=1)", "b > 1"),
    ("task.epochs", "fidelity(1, 16, 1)", "b > 1"),
    ("task.epochs", "fidelity(1, 16, base='4')", "b > 1"),
    ("task.epochs", "fidelity(16, 1)", "1 <= low < high"),
    ("task.epochs", "fidelity(4, 4)", "1 <= low < high"),
    ("task.epochs", "fidelity(0, 16)", "1 <= low < high"),
    ("task.epochs", "fidelity(1.0, 16.0)", "1 <= low < high"),
    ("task.epochs", "fidelity(1)", "1 <= low < high"),
    ("task.epochs", "fidelity(low=1, high=16)", "1 <= low < high"),
    # The same for every trial.
    ("task.seed", "uniform(0, 9, discrete=True)", "must be the same for every trial"),
    ("task.steps_per_epoch", "choices([1024, 2048])", "must be the same for every trial"),
    ("task.max_epochs", "choices([4, 16])", "must be the same for every trial"),
    ("task.threads", "choices([1, 2])", "must be the same for every trial"),
]
GOOD: list[tuple[str, str]] = [
    ("optimizer.lr", "loguniform(1e-5, 1e-2)"),
    ("optimizer.lr", " loguniform( 1e-5,1e-2, precision = 3 ) "),
    ("optimizer.lr", "loguniform(1e-5, 1e-2, precision=None)"),
    ("optimizer.lr", "loguniform(1e-5, 1e-2, default_value=1e-3)"),
    ("optimizer.lr", "uniform(1e-5, 1e-2)"),
    ("optimizer.lr", "choices([1e-3, 3e-4])"),
    ("ppo.gamma", "uniform(0, 1)"),
    ("ppo.gamma", "uniform(0, 1, discrete=True)"),
    ("ppo.n_epochs", "uniform(1, 10, discrete=True)"),
    ("ppo.n_epochs", "loguniform(1, 10, discrete=True)"),
    ("ppo.n_epochs", "uniform(1.0, 10.0, discrete=True)"),
    ("model.width", "choices([32, 64], default_value=64)"),
    ("model.width", "choices({32: 0.25, 64: 0.75})"),
    ("model.activation", "choices(['tanh', 'relu'])"),
    ("normalize.norm_obs", "choices([True, False])"),
    ("ppo.target_kl", "choices(['none', 0.01])"),
    ("ppo.target_kl", "choices([None, 0.01])"),
    ("env.id", "choices(['CartPole-v1', 'Acrobot-v1'])"),
    ("env.max_episode_steps", "choices([100, 200])"),
]


def write(path: Path, key: str, prior: str) -> Path:
    group, _, name = key.partition(".")
    groups: dict[str, dict[str, Any]] = {"task": {"max_epochs": 16}}
    groups.setdefault(group, {})[name] = f"orion~{prior}"
    path.write_text(yamlio.dump(groups))
    return path


@pytest.mark.parametrize(
    ("key", "prior", "part"),
    BAD,
    ids=[f"{index}-{key}-{prior[:40]}" for index, (key, prior, _) in enumerate(BAD)],
)
def test_bad_priors_are_refused(tmp_path: Path, key: str, prior: str, part: str) -> None:
    path = write(tmp_path / "mine.yaml", key, prior)
    with pytest.raises(UserError) as error:
        read_space(str(path))
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert part in message
    assert key in message
    assert "\n" not in message


@pytest.mark.parametrize(("key", "prior"), GOOD)
def test_good_priors_are_what_orion_takes_and_draws_legally(tmp_path: Path, key: str, prior: str) -> None:
    space = read_space(str(write(tmp_path / "mine.yaml", key, prior)))
    for point in sample(space.priors, 50):
        TrialConfig.from_mapping(fill(space, point))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "ppo: {n_steps: 'orion~uniform(32, 512, discrete=True)'}",
            ["of 481 combinations of ppo.n_steps: uniform(32, 512, discrete=True), 472 break a rule",
             "such as ppo.n_steps=33: Rollouts must fill an epoch",
             "Write choices([32, 40, 64, 80, 128, 160, 256, 320, 512])"],
        ),
        (
            "env: {n_envs: 'orion~choices([4, 6])'}\nppo: {n_steps: 'orion~choices([64, 128])'}",
            ["of 4 combinations", "2 break a rule, such as env.n_envs=6, ppo.n_steps=64"],
        ),
        ("ppo: {batch_size: 'orion~choices([64, 96])'}", ["1 break a rule", "Write choices([64])."]),
        ("ppo: {n_minibatches: 'orion~uniform(1, 9, discrete=True)'}", ["5 break", "choices([1, 2, 4, 8])"]),
        ("ppo: {n_steps: 'orion~uniform(1, 10000000, discrete=True)'}", ["of 20000 combinations"]),
        ("ppo: {n_steps: 7}", ["Rollouts must fill an epoch"]),
        ("env: {wrapper: atari, vectorization: \"orion~choices(['auto', 'native'])\"}", ["wraps gym"]),
        ("model: {width: 'orion~choices([64, 16384])', depth: 'orion~choices([1, 2])'}", ["model.width^2"]),
        ("lr_schedule: {final: 'orion~uniform(0, 1)'}", ["is searched, but has no effect unless"]),
        ("lr_schedule: {final: 0.1}", ["`lr_schedule.final` has no effect unless"]),
    ],
)  # fmt: skip
def test_combinations_that_are_illegal_are_refused(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_space(str(path))
    for part in parts:
        assert part in str(error.value)


def test_what_depends_on_a_searched_value_may_be_searched(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "lr_schedule: {name: \"orion~choices(['constant', 'linear'])\", final: 'orion~uniform(0, 1)'}\n"
        "normalize: {norm_obs: 'orion~choices([True, False])', clip_obs: 'orion~loguniform(1, 100)'}\n"
    )
    space = read_space(str(path))
    for point in sample(space.priors, 20):
        config = TrialConfig.from_mapping(fill(space, point))
        linear = point["lr_schedule"]["name"] == "linear"
        assert config.lr_schedule.final == (point["lr_schedule"]["final"] if linear else 0.0)


def test_priors_run_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "touched"
    with pytest.raises(UserError, match="bad prior"):
        parse_prior("optimizer.lr", f"uniform(0, __import__('os').system('touch {victim}'))")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("optimiser: {lr: 1e-3}", "A group must be one of env, task"),
        ("optimiser: 3", "A group must be one of env, task"),
        ("optimizer: {rate: 1e-3}", "Unknown hyperparameter `optimizer.rate`"),
        ("optimizer: {lr: -1}", "`0 < optimizer.lr <= 10` must hold"),
        ("optimizer: 3", "Group `optimizer` must map hyperparameters to values"),
        ("optimizer:", "Group `optimizer` must map hyperparameters to values"),
        ("[1, 2]", "must map groups (env, task"),
        ("", "must map groups (env, task"),
        (
            "task: {epochs: 'orion~fidelity(1, 16, base=4)', max_epochs: 4}",
            "must equal the highest fidelity, 16",
        ),
        ("ppo: {gamma: 0.9, gamma: 0.8}", "key `gamma` is given twice"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_space(str(path))
    assert part in str(error.value)
    assert str(path) in str(error.value)


# --------------------------------------------------------------------- filling the holes


def test_fill_takes_nested_and_flat_names() -> None:
    space = read_space("classic-control")
    point = sample(space.priors, 1)[0]
    nested = fill(space, point)
    names = [(g, k, v) for g, values in point.items() for k, v in values.items()]
    assert fill(space, {f"{group}.{key}": value for group, key, value in names}) == nested
    assert fill(space, {f"/{group}/{key}": value for group, key, value in names}) == nested
    assert nested["env"]["id"] == "CartPole-v1"
    assert set(nested["ppo"]) == set(space.priors["ppo"])


def test_overrides_win() -> None:
    space = read_space("classic-control")
    point = sample(space.priors, 1)[0]
    filled = fill(space, point, {"env": {"id": "Acrobot-v1"}, "optimizer": {"lr": 0.5}})
    assert (filled["env"]["id"], filled["optimizer"]["lr"]) == ("Acrobot-v1", 0.5)
    assert space == read_space("classic-control")


def test_missing_values_are_named() -> None:
    space = read_space("classic-control")
    point = sample(space.priors, 1)[0]
    del point["ppo"]["ent_coef"]
    with pytest.raises(UserError, match=r"searches `ppo.ent_coef`, but no value was proposed"):
        fill(space, point)


# ----------------------------------------------------------------------- command line


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["space", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == SHIPPED
    row = next(line for line in lines if line.startswith("classic-control "))
    searched = sum(len(values) for values in get_space("classic-control").values())
    assert row.split() == [
        "classic-control", str(searched - 1), "hyperparameters,", "and", "epochs", "CartPole-v1"
    ]  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_show_prints_the_file(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["space", "show", name]) == 0
    assert capsys.readouterr().out == space_path(name).read_text(encoding="utf-8")


def test_copy_to_a_file_and_into_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    assert main(["space", "copy", "default", str(mine)]) == 0
    assert main(["space", "copy", "classic-control", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(mine), str(tmp_path / "classic-control.yaml")]
    assert mine.read_bytes() == space_path("default").read_bytes()
    assert main(["space", "copy", "default", f"{tmp_path}/none/"]) == 2
    assert "none/default.yaml cannot be written" in capsys.readouterr().err
    assert read_space(str(mine)).priors == read_space("default").priors
    assert (tmp_path / "classic-control.yaml").read_bytes() == space_path("classic-control").read_bytes()


def test_copy_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "default.yaml"
    mine.write_text("mine")
    for destination in (mine, tmp_path):
        assert main(["space", "copy", "default", str(destination)]) == 2
        assert "is there already. Choose another name" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_copy_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        copy_space("default", str(tmp_path / "nowhere" / "mine.yaml"))
    with pytest.raises(UserError, match=r"theirs.yaml cannot be copied: there is no such file"):
        copy_space("theirs.yaml", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["show", "nothing"], "No space is called 'nothing'"),
        (["copy", "nothing", "x.yaml"], "No space is called 'nothing'"),
        (["show", "no/such.yaml"], "no/such.yaml cannot be read: No such file or directory."),
    ],
)
def test_unknown_names_are_refused(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["space", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ppo-hpo: error: ")
    assert part in captured.err
    assert captured.err.count("\n") == 1


def test_show_what_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("größer".encode("latin-1"))
    assert main(["space", "show", str(path)]) == 2
    assert "latin.yaml cannot be read" in capsys.readouterr().err


def test_spaces_that_are_not_there_are_missed(tmp_path: Path) -> None:
    # A package without its data, as a broken build would give.
    shutil.copytree(
        REPOSITORY / "ppo_hpo", tmp_path / "ppo_hpo", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = "import sys; sys.path.insert(0, '.'); from ppo_hpo.cli.main import main; "
    code += "sys.exit(main(['space', 'list']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ppo-hpo: error: The shipped spaces are missing")
    assert done.stderr.count("\n") == 1


# ----------------------------------------------------------- arguments of the environment


KWARGS = """
env:
  id: CartPole-v1
  kwargs:
    leak: orion~uniform(0.01, 0.1)
    name: '12e3'
    inner: {size: 'orion~uniform(2, 9, discrete=True)', fixed: [1, 2]}
ppo: {gamma: 0.9}
"""


def kwargs_space(tmp_path: Path, text: str = KWARGS) -> str:
    path = tmp_path / "kwargs.yaml"
    path.write_text(text)
    return str(path)


def test_arguments_of_the_environment_are_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = kwargs_space(tmp_path)
    space = read_space(name)
    assert main(["space", "check", name]) == 0
    assert "searches 2 hyperparameters" in capsys.readouterr().out
    for point in sample(get_space(name), 20):
        kwargs = TrialConfig.from_mapping(fill(space, point)).env.kwargs
        assert 0.01 <= kwargs["leak"] <= 0.1
        assert (kwargs["name"], kwargs["inner"]["fixed"]) == ("12e3", [1, 2])
        assert 2 <= kwargs["inner"]["size"] <= 9
        # As JSON knows it, because it is a part of the trial's identity.
        assert type(kwargs["inner"]["size"]) is int
    assert space.fixed["env"]["kwargs"] == {"name": "12e3", "inner": {"fixed": [1, 2]}}
    assert space_of(to_document(space), name, Path(name)) == space
    with pytest.raises(UserError, match=r"searches `env.kwargs.inner.size`, but no value"):
        fill(space, {"env": {"kwargs": {"leak": 0.05}}})
    filled = fill(space, {}, {"env.kwargs.leak": 0.06, "env": {"kwargs.inner.size": 3}})
    assert filled["env"]["kwargs"] == {"leak": 0.06, "name": "12e3", "inner": {"size": 3, "fixed": [1, 2]}}
    # By hand a prior is no value.
    for config in (yamlio.load(Path(name)), {"env": {"kwargs": {"a": [{"b": "orion~uniform(0, 1)"}]}}}):
        with pytest.raises(UserError, match=r"`env.kwargs.[a-z0.]+` is still a prior"):
            TrialConfig.from_mapping(config)


@pytest.mark.parametrize(
    ("prior", "part"),
    [
        ("uniform(1, 9**9**9)", "has a bad prior"),
        ("normal(0, 1)", "unbounded prior"),
        ("fidelity(1, 4)", "Only `task.epochs` can be a fidelity"),
        ("uniform(0, 99999999999999999999, discrete=True)", "between -2^53 and 2^53"),
        ("choices([[1, 2], [3]])", "needs words, numbers or true and false"),
        ("choices(['a;b'])", "Orion takes none with ';' in it"),
        ("choices(['__a'])", "Orion takes none with '__' in it"),
        ("__import__('os').system('true')", "bad prior"),
    ],
)
def test_bad_priors_of_arguments_are_refused(tmp_path: Path, prior: str, part: str) -> None:
    for path in ({"leak": f"orion~{prior}"}, {"inner": {"leak": f"orion~{prior}"}}):
        name = kwargs_space(tmp_path, yamlio.dump({"env": {"kwargs": path}}))
        with pytest.raises(UserError) as error:
            read_space(name)
        assert part in str(error.value)
        assert "leak`" in str(error.value)


def test_names_that_cannot_be_searched_are_refused(tmp_path: Path) -> None:
    for kwargs, part in (
        ({"a b": "orion~uniform(0, 1)"}, "must be that of a Python variable"),
        ({"a/b": {"c": "orion~uniform(0, 1)"}}, "must be that of a Python variable"),
        ({"a": ["orion~uniform(0, 1)"]}, "has a prior inside a list"),
        ({"max_episode_steps": "orion~uniform(5, 9, discrete=True)"}, "must be `env.max_episode_steps`"),
    ):
        with pytest.raises(UserError, match=part):
            read_space(kwargs_space(tmp_path, yamlio.dump({"env": {"kwargs": kwargs}})))


def test_the_end_of_schedules_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for horizon in ("", ", max_epochs: none", ", max_epochs: 16"):
        path.write_text(f"task: {{epochs: 'orion~fidelity(1, 16, base=4)'{horizon}}}")
        assert read_space(str(path)).fixed["task"]["max_epochs"] == 16

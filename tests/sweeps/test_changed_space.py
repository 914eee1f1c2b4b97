"""Sweeps whose request changes: before anything was trained the last one counts, afterwards it is refused."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from orion.core.utils.exceptions import WaitingForTrials

import ppo_hpo
from ppo_hpo.orion import known_trials
from ppo_hpo.orion.experiment import open_experiment, params_of, statistics_of
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.space import read_configuration
from ppo_hpo.sweeps.plan import Plan, SweepRequest
from ppo_hpo.trial.options import RunOptions
from tests.orion.test_hunt_space import EDITS, SAME, SPACE, edited, orions_settings

# The rule is that of hunts, which are tried with every kind of edit.
KINDS = ("delete", "fix", "search", "narrow", "fidelity", "argument")
ASHA = {"asha": {"seed": 1, "num_rungs": 3, "num_brackets": 1}}
__all__ = ["orions_settings"]  # a fixture of this module, too


def request(**given: Any) -> SweepRequest:
    empty = dict.fromkeys(field.name for field in dataclasses.fields(SweepRequest))
    return SweepRequest(**{**empty, "progress": False, "options": RunOptions(), **given})


def opened(**given: Any) -> Any:
    """The experiment of a sweep, of which no trial is run."""
    plan = Plan.of(request(**given))
    space = plan.space()
    plan.check(space, [])
    return plan.open(space)


def write(space: dict[str, Any], name: str = "space.yaml") -> str:
    Path(name).write_text(yamlio.dump(space))
    return name


def small(**given: Any) -> ppo_hpo.SweepResult:
    return ppo_hpo.sweep(**{"name": "it", "executor": "single", "progress": False, "max_trials": 1, **given})


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    (place / "space.yaml").write_text(yamlio.dump(SPACE))
    small(space=str(place / "space.yaml"), directory=place / "it", algorithm=ASHA, max_trials=5)
    return place


@pytest.fixture
def trained(trained_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained_once)
    return trained_once


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_after_a_trial_has_trained_is_refused(kind: str, trained: Path) -> None:
    edit, part = EDITS[kind]
    before = (trained / "it" / "space.yaml").read_bytes()
    with pytest.raises(UserError) as error:
        small(space=write(edited(edit), "edited.yaml"))
    assert part in str(error.value)
    assert "Add --from it to give it the trials that lie in its space." in str(error.value)
    assert (trained / "it" / "space.yaml").read_bytes() == before
    assert len(small().trials) == 5


def test_another_way_to_write_the_same_is_no_edit(trained: Path) -> None:
    for kind in SAME:
        assert len(small(space=write(edited(SAME[kind]), "same.yaml")).trials) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_before_anything_was_trained_is_what_runs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client = opened(space=write(SPACE), name="it", max_trials=7)
    client.release(client.suggest())
    client = opened(space=write(edited(EDITS[kind][0])), name="it")
    assert client.fetch_trials() == []
    assert client.max_trials == 7
    written = yamlio.load(Path("it/space.yaml"))
    searched = {
        f"/{group}/{key}" for group, values in written.items() for key, value in values.items()
        if str(value).startswith("orion~")
    }  # fmt: skip
    assert set(client.space) == searched
    parser = client._experiment.metadata["parser"]
    assert parser["config_file_data"] == written
    client.release(client.suggest())
    # The file in the sweep's directory may be edited, too.
    content = (tmp_path / "it" / "space.yaml").read_text()
    (tmp_path / "it" / "space.yaml").write_text(content.replace("eval_episodes: 1", "eval_episodes: 2"))
    with pytest.raises(UserError, match=r"was changed, and would be overwritten: `task\.eval_episodes` is 2"):
        opened(space="space.yaml", name="it")
    assert opened(name="it")._experiment.metadata["parser"]["config_file_data"]["task"]["eval_episodes"] == 2


def test_a_mistake_that_stopped_the_first_trial_can_be_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(SPACE)
    with pytest.raises(UserError, match="nothing"):
        small(space="space.yaml", overrides={"env.kwargs.nothing": 1}, algorithm="random", max_trials=2)
    assert {trial.status for trial in open_experiment("it").fetch_trials()} <= {
        "interrupted", "new", "broken"
    }  # fmt: skip
    result = small(space="space.yaml", algorithm="asha")
    assert list(result.trials["status"]) == ["completed"]
    assert next(iter(result.client.algorithm.configuration)) == "asha"
    assert yamlio.load(Path("it/space.yaml"))["env"].get("kwargs", {}) == {}


def test_from_an_earlier_sweep(trained: Path) -> None:
    """What lies in the new space is there at once, and its promotions resume."""
    old = small()
    space = write(edited(EDITS["widen"][0]), "wide.yaml")
    new = small(space=space, name="wide", start_from="it", algorithm=ASHA, max_trials=9)
    frame = new.trials
    assert list(frame["status"]) == ["completed"] * 9
    there = {
        (trial.objective.value, tuple(sorted(params_of(trial).items())))
        for trial in old.client.fetch_trials()
    }
    here = {
        (trial.objective.value, tuple(sorted(params_of(trial).items())))
        for trial in new.client.fetch_trials()
    }
    assert there < here
    # A promotion resumes from the copied files of an old trial.
    copied = {trial.id for trial in new.client.fetch_trials() if trial.end_time <= max(
        t.end_time for t in old.client.fetch_trials())}  # fmt: skip
    promoted = [trial for trial in new.client.fetch_trials() if trial.parent in copied]
    for trial in promoted:
        assert statistics_of(trial)["continued_from_epoch"] >= 1
    assert promoted
    # The same call again adds nothing.
    assert len(small(space=space, name="wide", start_from="it", max_trials=9).trials) == 9
    # Without a space, the other sweep's is taken.
    fixed = small(
        name="fixed", start_from="it", overrides={"model.width": 8}, algorithm="random", max_trials=1
    )
    eights = sum(params_of(trial)["model.width"] == 8 for trial in old.client.fetch_trials())
    assert 0 < eights < 5
    assert len(fixed.trials) == eights
    with pytest.raises(UserError, match="names the experiment itself"):
        small(start_from="it")
    with pytest.raises(UserError, match=r"There is no experiment 'nothing'|does not exist"):
        small(name="another", start_from="nothing", space="space.yaml")
    assert not Path("another").exists()


def suggest(client: Any) -> Any:
    """Ask again while the algorithm proposes what is known, as a worker does."""
    for _ in range(20):
        with contextlib.suppress(WaitingForTrials):
            return client.suggest()
    raise AssertionError("the algorithm proposes nothing")


@pytest.mark.parametrize("name", ["random", "tpe", "gridsearch", "asha", "hyperband", "evolutiones", "pbt"])
def test_each_algorithm_goes_on_with_the_trials_of_another(
    name: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "gridsearch": {"n_values": 10},
        "pbt": {"population_size": 5},
        "evolutiones": {"nums_population": 4},
    }
    client = opened(
        space="space.yaml", name=name, directory=tmp_path / name, algorithm={name: options.get(name, {})},
        start_from=str(trained / "it"), max_trials=50,
    )  # fmt: skip
    plan = Plan.of(request(name=name, directory=tmp_path / name, start_from=str(trained / "it")))
    assert "5 of 5 completed trials" in known_trials.adopt(client._experiment, plan.space(), plan.old)
    known = {trial.id for trial in client.fetch_trials()}
    assert len(known) == 5
    for number in range(6):
        trial = suggest(client)
        assert trial.id not in known
        client.observe(trial, [{"name": "objective", "type": "objective", "value": float(number)}])
    with client._experiment.acquire_algorithm_lock() as algorithm:
        assert all(algorithm.has_observed(trial) for trial in client.fetch_trials_by_status("completed"))


def test_arguments_of_the_environment_are_searched_and_fixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In sweeps, from Python and by hand, by the same names."""
    monkeypatch.chdir(tmp_path)
    key = "env.kwargs.sutton_barto_reward"
    space = write(edited(lambda s: s["env"].update(kwargs={key[11:]: "orion~choices([True, False])"})))
    result = small(space=space, name="searched", algorithm="random", max_trials=2)
    for trial in result.client.fetch_trials():
        config = yamlio.load(Path(trial.working_dir) / "config.yaml")
        assert config["env"]["kwargs"] == {key[11:]: params_of(trial)[key]}
    assert f"{key}" in result.trials.columns
    for overrides in ({key: True}, {"env": {key[4:]: True}}, {"env": {"kwargs": {key[11:]: True}}}):
        planned = Plan.of(request(space=space, name="new", overrides=overrides)).space()
        assert planned.fixed["env"]["kwargs"] == {key[11:]: True}
        assert "env" not in planned.priors
        config = ppo_hpo.objective(space, overrides=overrides).config(
            {"task.epochs": 1, "model.width": 4, "optimizer.lr": 1e-3}
        )
        assert config.env.kwargs == {key[11:]: True}
    # A prior may be given the same way.
    planned = Plan.of(
        request(space=space, name="new", overrides={"ppo.gamma": "orion~uniform(0.8, 0.9)"})
    ).space()
    assert planned.priors["ppo"] == {"gamma": "uniform(0.8, 0.9)"}
    content = read_configuration(
        space, [f"{key}=false", "optimizer.lr=1e-3", "model.width=4", "task.epochs=1"]
    )
    assert TrialConfig.from_mapping(content).env.kwargs == {key[11:]: False}
    for wrong in ({"env": 3}, {"env.nothing": 3}, {"ppo.gama": 1}, {"env.kwargs.max_episode_steps": 5}):
        with pytest.raises(UserError):
            Plan.of(request(space=space, name="new", overrides=wrong)).space()
    with pytest.raises(UserError, match="Did you mean gamma"):
        ppo_hpo.objective(space, overrides={"ppo.gama": 1})
    assert not Path("new").exists()

"""The file of a hunt as it stands is what runs, or the hunt is refused: every kind of edit is tried.

The experiments are real, and so is Orion's command line, which runs in this process. One trial is trained.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo.orion.experiment import params_of
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError

SPACE: dict[str, Any] = {
    "env": {"id": "CartPole-v1", "n_envs": 2},
    "task": {
        "epochs": "orion~fidelity(1, 4, base=2)", "max_epochs": 4, "steps_per_epoch": 64, "eval_episodes": 1,
    },
    "model": {"width": "orion~choices([4, 8])", "depth": 1},
    "optimizer": {"lr": "orion~loguniform(1e-4, 1e-2)"},
    "ppo": {"n_steps": 32, "n_epochs": 1, "gamma": 0.9, "n_minibatches": 2},
}  # fmt: skip
Edit = Callable[[dict[str, Any]], Any]
# Each kind of edit, and what the refusal names.
EDITS: dict[str, tuple[Edit, str]] = {
    "rename": (lambda s: s["ppo"].update(gae_lambda=s["ppo"].pop("gamma")), "`ppo.gae_lambda` is 0.95 (the"),
    "delete": (lambda s: s["ppo"].pop("gamma"), "`ppo.gamma` is 0.9, but 0.99 (the default) was asked for"),
    "delete a searched one": (lambda s: s["optimizer"].pop("lr"), "`optimizer.lr` is orion~loguniform(1e-4"),
    "delete a group": (lambda s: s.pop("model"), "`model.depth` is 1, but 2 (the default)"),
    "add": (lambda s: s["ppo"].update(ent_coef=0.1), "`ppo.ent_coef` is 0.0 (the default), but 0.1 was"),
    "change": (lambda s: s["ppo"].update(gamma=0.95), "`ppo.gamma` is 0.9, but 0.95 was asked for"),
    "fix": (lambda s: s["optimizer"].update(lr=1e-3), "is orion~loguniform(1e-4, 1e-2), but 0.001"),
    "search": (lambda s: s["ppo"].update(gamma="orion~uniform(0.8, 0.99)"), "is 0.9, but orion~uniform"),
    "widen": (lambda s: s["optimizer"].update(lr="orion~loguniform(1e-5, 0.1)"), "but orion~loguniform(1e-5"),
    "narrow": (lambda s: s["optimizer"].update(lr="orion~uniform(1e-3, 2e-3)"), "but orion~uniform(1e-3"),
    "choices": (lambda s: s["model"].update(width="orion~choices([4])"), "but orion~choices([4])"),
    "fidelity": (
        lambda s: s["task"].update(epochs="orion~fidelity(1, 8)", max_epochs=8), "but orion~fidelity(1, 8)",
    ),
    "argument": (lambda s: s["env"].update(kwargs={"render_mode": None}), "render_mode` is not given, but"),
}  # fmt: skip
# Other ways to write the same.
SAME: dict[str, Edit] = {
    "prior": lambda s: s["optimizer"].update(lr="orion~loguniform( 0.0001,0.01 )"),
    "default": lambda s: s["ppo"].update(ent_coef=0.0),
    "order": lambda s: s.update(dict(reversed(list(s.items())))),
    "horizon": lambda s: s["task"].pop("max_epochs"),
    "threads": lambda s: s["task"].update(threads=2),
}


class Hunt:
    """A directory with a space file, a database and the directories of trials."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.database = {"type": "sqlitedb", "host": str(place / "orion.sqlite")}
        os.environ.update(ORION_DB_TYPE="sqlitedb", ORION_DB_ADDRESS=str(place / "orion.sqlite"))

    def write(self, space: Any = SPACE) -> Hunt:
        text = space if isinstance(space, str) else yamlio.dump(space)
        (self.place / "space.yaml").write_text(text)
        return self

    def hunt(self, *options: str, name: str = "mine", command: tuple[str, ...] | None = None) -> int:
        """Run `orion hunt` in this process; the exit code."""
        from orion.core.cli import main

        command = ("ppo-hpo", "run", "--config", "space.yaml") if command is None else command
        fixed = ("--exp-max-trials", "3", "--working-dir", str(self.place / "trials"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of benchmarks whose extras are missing
            return int(main(["hunt", "-n", name, *fixed, *options, *command]) or 0)

    def init(self, *options: str, **kwargs: Any) -> int:
        """Make or open the experiment only."""
        return self.hunt("--init-only", *options, **kwargs)

    def client(self, name: str = "mine", mode: str = "r") -> Any:
        from orion.client import get_experiment

        return get_experiment(name, storage={"type": "legacy", "database": self.database}, mode=mode)

    def trial_files(self, count: int = 2, name: str = "mine") -> list[dict[str, Any]]:
        """What Orion writes for the next trials."""
        from orion.client.experiment import ExperimentClient
        from orion.core.io.experiment_builder import ExperimentBuilder
        from orion.core.worker.consumer import Consumer

        builder = ExperimentBuilder({"type": "legacy", "database": self.database})
        client = ExperimentClient(builder.build(name))
        found, trials = [], [client.suggest() for _ in range(count)]
        for number, trial in enumerate(trials):
            path = self.place / f"trial-{number}.conf"
            Consumer(client._experiment).template_builder.format(str(path), trial, client)
            client.release(trial)
            found.append(yamlio.load(path))
        return found


@pytest.fixture(scope="module", autouse=True)
def orions_settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ORION_DB_TYPE", "ORION_DB_ADDRESS"):
            patch.setenv(name, "")
            patch.delenv(name)
        patch.setenv("ORION_EXECUTOR", "singleexecutor")
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        yield


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of which one trial has trained an epoch."""
    place = tmp_path_factory.mktemp("trained")
    hunt, before = Hunt(place).write(), Path.cwd()
    os.chdir(place)
    try:
        assert hunt.hunt("--worker-max-trials", "1") == 0
    finally:
        os.chdir(before)
    (trial,) = hunt.client().fetch_trials()
    assert trial.status == "completed"
    return place


@pytest.fixture
def hunt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hunt:
    monkeypatch.chdir(tmp_path)
    return Hunt(tmp_path).write()


@pytest.fixture
def trained(trained_once: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hunt]:
    """The trained experiment, which is put back afterwards. Paths are absolute, so a copy would not do."""
    monkeypatch.chdir(trained_once)
    kept = (trained_once / "orion.sqlite").read_bytes()
    yield Hunt(trained_once).write()
    (trained_once / "orion.sqlite").write_bytes(kept)
    for extra in trained_once.iterdir():
        if extra.is_dir() and extra.name != "trials":
            shutil.rmtree(extra)


def edited(edit: Edit) -> dict[str, Any]:
    space = copy.deepcopy(SPACE)
    edit(space)
    return space


def assert_runs(hunt: Hunt, space: dict[str, Any], name: str = "mine") -> None:
    """Each trial gets what the file fixes, values for what it searches, and nothing else."""
    for content in hunt.trial_files(name=name):
        TrialConfig.from_mapping(content)
        assert {g: set(values) for g, values in content.items()} == {
            g: set(values) for g, values in space.items() if values
        }
        for group, values in space.items():
            for key, value in values.items():
                if not str(value).startswith("orion~"):
                    assert content[group][key] == value


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_before_anything_was_trained_is_what_runs(kind: str, hunt: Hunt) -> None:
    assert hunt.init() == 0
    assert_runs(hunt, SPACE)  # Two trials are proposed, and would stay.
    space = edited(EDITS[kind][0])
    hunt.write(space)
    assert hunt.init() == 0
    assert hunt.client().fetch_trials() == []
    assert_runs(hunt, space)
    assert hunt.client().max_trials == 3
    assert hunt.init() == 0  # The same file again changes nothing.
    assert len(hunt.client().fetch_trials()) == 2


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_after_a_trial_has_trained_is_refused(
    kind: str, trained: Hunt, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, part = EDITS[kind]
    trained.write(edited(edit))
    assert trained.init() == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: The experiment 'mine' has another space: ")
    assert error.count("\n") == 1
    assert part in error
    assert "has trained" in error
    assert error.endswith("ppo-hpo run --config " + str(trained.place / "space.yaml") + " --from mine\n")
    if kind == "narrow":  # Orion's version control would fail on the trial that is outside.
        assert trained.init("--enable-evc") == 1
        assert part in capsys.readouterr().err
    trained.write(SPACE)
    assert trained.init() == 0
    assert [trial.status for trial in trained.client().fetch_trials()] == ["completed"]
    assert_runs(trained, SPACE)


def test_an_edit_while_a_first_trial_runs_is_refused(hunt: Hunt, capsys: pytest.CaptureFixture[str]) -> None:
    from orion.client.experiment import ExperimentClient
    from orion.core.io.experiment_builder import ExperimentBuilder

    assert hunt.init() == 0
    builder = ExperimentBuilder({"type": "legacy", "database": hunt.database})
    client = ExperimentClient(builder.build("mine"))
    trial = client.suggest()  # This reserves it, as a worker that has just started.
    hunt.write(edited(EDITS["change"][0]))
    assert hunt.init() == 1
    assert f"and trial {trial.id[:8]} is running" in capsys.readouterr().err
    # A worker that is gone leaves a lock that nobody holds.
    (Path(trial.working_dir)).mkdir(parents=True)
    (Path(trial.working_dir) / "lock").touch()
    assert hunt.init() == 0
    assert hunt.client().fetch_trials() == []
    client._pacemakers.pop(trial.id).stop()


@pytest.mark.parametrize("kind", SAME)
def test_another_way_to_write_the_same_is_no_edit(kind: str, trained: Hunt) -> None:
    trained.write(edited(SAME[kind]))
    assert trained.init() == 0
    assert len(trained.client().fetch_trials()) == 1
    for content in trained.trial_files():
        assert TrialConfig.from_mapping(content).max_epochs == 4
        assert content["task"].get("threads", 1) == (2 if kind == "threads" else 1)


def test_options_of_the_command_count_as_lines_of_the_file(
    trained: Hunt, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("ppo-hpo", "run", "--config", "space.yaml")
    for options, part in (
        (("--set", "ppo.gamma=0.5"), "`ppo.gamma` is 0.9, but 0.5 was"),
        (("--seed", "3"), "`task.seed` is 0 (the default), but 3 was"),
        (("--epochs", "2"), "`task.epochs` is orion~fidelity(1, 4, base=2), but 2 was"),
    ):
        assert trained.init(command=(*command, *options)) == 1
        assert part in capsys.readouterr().err
    # A new one searches no value that the command fixes.
    assert trained.init(name="fixed", command=(*command, "--set", "optimizer.lr=1e-3")) == 0
    assert set(trained.client("fixed").space) == {"/task/epochs", "/model/width"}
    assert trained.init(name="fixed") == 0  # Without the option it is searched again.
    assert "/optimizer/lr" in trained.client("fixed").space


def test_an_edited_file_counts_without_the_command_too(
    trained: Hunt, capsys: pytest.CaptureFixture[str]
) -> None:
    space = edited(EDITS["delete"][0])
    trained.write(space)
    assert trained.init(command=()) == 1
    assert "`ppo.gamma` is 0.9" in capsys.readouterr().err
    trained.write(SPACE)
    assert trained.init(command=()) == 0
    assert trained.init(name="other") == 0
    trained.write(space)
    assert trained.init(name="other", command=()) == 0
    assert_runs(trained, space, name="other")


# A space with a mistake is refused when the hunt starts, and nothing is stored.
MISTAKES = {
    "horizon": (
        "{task: {epochs: 'orion~fidelity(1, 4)', max_epochs: 16}}",
        "must equal the highest fidelity, 4, but",
    ),
    "key": ("{optimizer: {lr: 'orion~uniform(1e-4, 1e-3)'}, ppo: {gama: 0.5}}", "Did you mean gamma?"),
    "value": (
        "{optimizer: {lr: 'orion~uniform(1e-4, 1e-3)'}, ppo: {gamma: 5}}",
        "`0 <= ppo.gamma <= 1` must hold",
    ),
    "duplicate": ("{optimizer: {lr: 'orion~uniform(1e-4, 1e-3)', lr: 1e-3}}", "key `lr` is given twice"),
    "code": ("{optimizer: {lr: 'orion~uniform(0, open(chr(47)))'}}", "bad prior"),
    "power": ("{env: {kwargs: {leak: 'orion~uniform(1, 9**9**9)'}}}", "`env.kwargs.leak` has a bad prior"),
    "list": (
        "{env: {kwargs: {leak: ['orion~uniform(0, 1)']}}}",
        "`env.kwargs.leak` has a prior inside a list",
    ),
    "comma": ("{task: {epochs: orion~fidelity(1, 4, base=2)}}", "Put quotes around a value that has commas"),
    "nothing": ("{ppo: {gamma: 0.5}}", "Nothing is searched in"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_told_when_the_hunt_starts(
    kind: str, hunt: Hunt, capsys: pytest.CaptureFixture[str]
) -> None:
    text, part = MISTAKES[kind]
    hunt.write(text)
    assert hunt.hunt() == 1
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    hunt.write()
    assert hunt.init() == 0
    assert_runs(hunt, SPACE)


def test_the_end_of_schedules_follows_from_the_space(hunt: Hunt) -> None:
    for name, epochs, horizon in (("a", "orion~fidelity(1, 8, base=2)", 8), ("b", 5, 5)):
        space = edited(
            lambda s, epochs=epochs: (s["task"].pop("max_epochs"), s["task"].update(epochs=epochs))
        )
        hunt.write(space)
        assert hunt.init(name=name) == 0
        (content,) = hunt.trial_files(1, name)
        assert TrialConfig.from_mapping(content).max_epochs == horizon


# What YAML readers take for something else, in both directions.
WORDS = [
    "12e3", "1e-4", "0.03", "7", "0x10", "1_000", "1:30", "2001-01-01", "null", "~", "yes", "on", "true", "=",
    "<<", ".inf", "", " a ", "a: b", "a~b(c)", "{x}", "\u00e9", "\u2028", "'", '"', "# x", "- x", "!x",
    "*x", "&x",
]  # fmt: skip


def test_words_and_numbers_reach_the_trial_as_they_were_written(hunt: Hunt) -> None:
    """The file goes through Orion, its database and the trial's file, and stays what our reader reads."""
    kwargs = {f"word{number}": word for number, word in enumerate(WORDS)}
    kwargs |= {"nested": {"tags": WORDS, "deep": {"number": 1e-4, "whole": 12, "none": None, "flag": True}}}
    space = edited(lambda s: s["env"].update(kwargs=kwargs))
    space["ppo"]["target_kl"] = "0.03"
    hunt.write(space)
    assert hunt.init() == 0
    for content in hunt.trial_files():
        assert content["env"]["kwargs"] == kwargs
        assert TrialConfig.from_mapping(content).ppo.target_kl == 0.03
    # Numbers without a dot or a sign, of which Orion's reader makes words.
    hunt.write(yamlio.dump(SPACE) + "normalize: {clip_obs: 1e1}\n")
    assert hunt.init() == 0
    assert hunt.trial_files()[0]["normalize"]["clip_obs"] == 10.0


def test_arguments_of_the_environment_are_searched(hunt: Hunt) -> None:
    kwargs = {
        "leak": "orion~uniform(0.01, 0.1)",
        "name": "12e3",
        "inner": {"size": "orion~uniform(2, 9, discrete=True)"},
        "kind": "orion~choices(['1e3', 'b'])",
    }
    hunt.write(edited(lambda s: s["env"].update(kwargs=kwargs)))
    assert hunt.init() == 0
    for content in hunt.trial_files(6):
        found = TrialConfig.from_mapping(content).env.kwargs
        assert set(found) == set(kwargs)
        assert 0.01 <= found["leak"] <= 0.1
        assert found["name"] == "12e3"
        assert found["kind"] in ("1e3", "b")
        assert type(found["inner"]["size"]) is int
    trial = hunt.client().fetch_trials()[0]
    assert {"env.kwargs.leak", "env.kwargs.inner.size", "env.kwargs.kind"} < set(params_of(trial))


def test_from_an_earlier_experiment(trained: Hunt, capsys: pytest.CaptureFixture[str]) -> None:
    (old,) = trained.client().fetch_trials()
    command = ("ppo-hpo", "run", "--config", "space.yaml", "--from", "mine")
    trained.write(edited(EDITS["widen"][0]))
    assert trained.init(name="wide", command=command) == 1
    assert "Give the new experiment a directory of its own" in capsys.readouterr().err
    options = ("--working-dir", str(trained.place / "wide"))
    for added in (1, 0):
        assert trained.init(*options, name="wide", command=command) == 0
        assert f"{added} of 1 completed trials of 'mine' were added to 'wide'" in capsys.readouterr().err
        (new,) = trained.client("wide").fetch_trials()
        assert (new.status, new.objective.value, new.params) == ("completed", old.objective.value, old.params)
    for name in ("config.yaml", "curve.jsonl", "results.json"):
        there, here = (Path(trial.working_dir) / name for trial in (old, new))
        assert there != here
        assert there.read_bytes() == here.read_bytes()
    # A trial whose value is outside, or that another fixed value would train otherwise, is left out.
    outside: Edit = lambda s: s["optimizer"].update(lr="orion~uniform(5, 6)")  # noqa: E731
    for kind, edit in (("change", EDITS["change"][0]), ("outside", outside)):
        trained.write(edited(edit))
        options = ("--working-dir", str(trained.place / kind))
        assert trained.init(*options, name=kind, command=command) == 0
        assert "1 would train otherwise in the new space" in capsys.readouterr().err
        assert trained.client(kind).fetch_trials() == []
    assert trained.init(*options, name="none", command=(*command[:-1], "nothing")) == 1
    assert "There is no experiment 'nothing'" in capsys.readouterr().err


def test_from_python_it_is_a_user_error(trained: Hunt) -> None:
    from orion.core.io import resolve_config
    from orion.core.io.experiment_builder import ExperimentBuilder

    trained.write(edited(EDITS["change"][0]))
    metadata = resolve_config.fetch_metadata(user_args=["ppo-hpo", "run", "--config", "space.yaml"])
    builder = ExperimentBuilder({"type": "legacy", "database": trained.database})
    with pytest.raises(UserError, match="has another space"):
        builder.build("mine", space=metadata["priors"], metadata=metadata)


def test_other_commands_are_left_to_orion(hunt: Hunt) -> None:
    """Orion merges the files of other scripts, as it does without us."""
    script = hunt.place / "other.py"
    script.write_text("")
    command = ("python", str(script), "--config", "space.yaml")
    hunt.write("{ppo: {gama: 0.5}, x: 'orion~uniform(0, 1)'}")
    assert hunt.init(command=command) == 0
    hunt.write("{ppo: {gamma: 0.5}, x: 'orion~uniform(0, 1)'}")
    assert hunt.init(command=command) == 0
    assert hunt.trial_files(1)[0]["ppo"] == {"gama": 0.5, "gamma": 0.5}

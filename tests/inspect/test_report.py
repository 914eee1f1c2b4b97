"""What an experiment found: counted by hand on trials made up, and read from one that was really run."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo.cli.main import main
from ppo_hpo.inspect.report import report, sparkline, summarise, to_text
from ppo_hpo.orion.experiment import statistics_of
from ppo_hpo.orion.objective import objective
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.results import entries, evaluation_columns
from ppo_hpo.spec.space import get_space
from ppo_hpo.state.curve import read_curve

REPOSITORY = Path(__file__).parents[2]
SPACE = {
    "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
    "task": {
        "epochs": "orion~fidelity(1, 4, base=2)",
        "max_epochs": 4,
        "steps_per_epoch": 256,
        "eval_episodes": 2,
    },
    "model": {"width": 8, "depth": 1},
    "optimizer": {"lr": "orion~loguniform(1e-4, 1e-2, precision=3)"},
    "ppo": {"n_steps": 64, "batch_size": 32, "n_epochs": 2},
}
# A name that a page has to escape.
NAME = "tiny<i>"


def storage(path: Path) -> dict[str, Any]:
    return {"type": "legacy", "database": {"type": "pickleddb", "host": str(path)}}


def experiment(root: Path, space: dict[str, Any], **options: Any) -> Any:
    """A new experiment of Orion's in a database of its own."""
    from orion.client import build_experiment

    return build_experiment(
        NAME,
        space=space,
        algorithm=options.pop("algorithm", {"random": {"seed": 1}}),
        storage=storage(root / "orion.pkl"),
        working_dir=str(root / "trials"),
        **options,
    )


# --------------------------------------------------------------- trials that were run


@pytest.fixture(scope="module")
def hunted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment with three trials, all of them trained."""
    root = tmp_path_factory.mktemp("hunted")
    (root / "space.yaml").write_text(yamlio.dump(SPACE))
    (root / "orion.yaml").write_text(yamlio.dump({"storage": storage(root / "orion.pkl")}))
    space = str(root / "space.yaml")
    client = experiment(root, get_space(space, epochs=2), max_trials=3)
    function = objective(space, epochs=2, device="cpu", console=False)
    with client.tmp_executor("singleexecutor", n_workers=1):
        assert client.workon(function, trial_arg="trial", max_trials=3, n_workers=1) == 3
    client.close()
    return root


def test_report_of_a_hunt(hunted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", NAME, "-c", str(hunted / "orion.yaml")]) == 0
    text = capsys.readouterr().out
    assert f"experiment  {NAME} (version 1), tuned by random: 3 completed; 3 configurations" in text
    # Two epochs of 256 steps in each of three trials; each trial is in full, and nothing was promoted.
    assert "steps       1,536 trained for 3 configurations" in text
    assert "not trained" not in text
    assert "after 2 of 2 epochs, 512 steps" in text
    best = next(line.split()[-1] for line in text.splitlines() if line.startswith("best trial"))
    (directory,) = (
        Path(line[len("directory") :].strip()) for line in text.splitlines() if line.startswith("directory")
    )
    assert directory.parent == hunted / "trials"
    assert directory.name.endswith(best)
    lr = yamlio.load(directory / "config.yaml")["optimizer"]["lr"]
    assert any(line.split() == ["optimizer.lr", str(lr)] for line in text.splitlines())
    # It is the best one: no other ends higher.
    ends = {
        path.parent: read_curve(path.parent)[-1]["return_mean"]
        for path in hunted.glob("trials/*/curve.jsonl")
    }
    assert len(ends) == 3
    assert ends[directory] == max(ends.values())
    assert f"return {ends[directory]:.1f} +- " in text
    assert sparkline([row["return_mean"] for row in read_curve(directory)]) in text


def test_page_of_a_hunt(hunted: Path, tmp_path: Path) -> None:
    # As a person would ask for it, in a process of its own.
    page = tmp_path / "page.html"
    command = [
        sys.executable,
        "-m",
        "ppo_hpo",
        "report",
        NAME,
        "-c",
        str(hunted / "orion.yaml"),
        "--html",
        str(page),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.rstrip().endswith(f"page        {page}")
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert html.rstrip().endswith("</html>")
    assert "<h1>tiny&lt;i&gt; (version 1)</h1>" in html
    assert "<h1>tiny<i>" not in html
    assert "steps       1,536 trained" in html
    # All in one file: nothing is fetched when it is opened.
    assert "<script src" not in html
    assert "<link" not in html.partition("<script")[0]
    assert html.count('class="plotly-graph-div"') == 2
    best = next(line.split()[-1] for line in done.stdout.splitlines() if line.startswith("best trial"))
    assert f"best: {best[:8]}" in html


def test_page_that_cannot_be_written(
    hunted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "nowhere" / "page.html"
    assert main(["report", NAME, "-c", str(hunted / "orion.yaml"), "--html", str(page)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"ppo-hpo: error: {page} cannot be written: No such file or directory.\n"


def test_unknown_experiment(hunted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (hunted / "orion.pkl").read_bytes()
    assert main(["report", "other", "-c", str(hunted / "orion.yaml")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"ppo-hpo: error: There is no experiment 'other' in the database pickleddb {hunted / 'orion.pkl'} "
        f"(from {hunted / 'orion.yaml'}), which has {NAME}.\n"
    )
    assert (hunted / "orion.pkl").read_bytes() == before


def test_the_sweep_in_this_directory_comes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ppo_hpo.orion.experiment import open_experiment

    (tmp_path / "own").mkdir()
    experiment(tmp_path / "own", small_space())
    here = tmp_path / "sweeps" / NAME
    here.mkdir(parents=True)
    insert(experiment(here, small_space()), 0.1, 1, -1.0)
    (here / "orion.yaml").write_text(yamlio.dump({"storage": storage(here / "orion.pkl")}))
    monkeypatch.setenv("ORION_DB_TYPE", "pickleddb")
    monkeypatch.setenv("ORION_DB_ADDRESS", str(tmp_path / "own" / "orion.pkl"))
    monkeypatch.chdir(tmp_path)
    assert open_experiment(NAME).fetch_trials() == []
    # The path of a sweep's directory names the sweep too, also after the directory was renamed.
    assert len(open_experiment(f"sweeps/{NAME}/").fetch_trials()) == 1
    renamed = here.rename(tmp_path / "sweeps" / "renamed")
    (renamed / "orion.yaml").write_text(yamlio.dump({"storage": storage(renamed / "orion.pkl")}))
    monkeypatch.chdir(tmp_path / "sweeps")
    for name in ("renamed", "renamed/", str(renamed)):
        assert len(open_experiment(name).fetch_trials()) == 1
    # A file that says nothing about the storage is passed over.
    (renamed / "orion.yaml").write_text("worker: {n_workers: 1}")
    with pytest.raises(UserError, match=r"no experiment 'renamed' .* ORION_DB_ADDRESS"):
        open_experiment("renamed")


def test_a_password_of_the_database_is_not_printed() -> None:
    from ppo_hpo.orion.experiment import Database

    address = "mongodb://me:secret@host:27017/orion"
    database = Database({"type": "legacy", "database": {"type": "mongodb", "host": address}}, "orion.yaml")
    assert str(database) == "mongodb mongodb://***@host:27017/orion (from orion.yaml)"


def test_unknown_experiment_where_no_database_was_named(tmp_path: Path) -> None:
    from orion.core.io.database.ephemeraldb import EphemeralDB

    # What a PickledDB is.
    (tmp_path / "orion.pkl").write_bytes(pickle.dumps(EphemeralDB()))
    own = {**os.environ, "ORION_DB_TYPE": "pickleddb", "ORION_DB_ADDRESS": str(tmp_path / "orion.pkl")}
    command = [sys.executable, "-m", "ppo_hpo", "report", "other"]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=own, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"ppo-hpo: error: There is no experiment 'other' in the database pickleddb {tmp_path / 'orion.pkl'} "
        f"(from ORION_DB_TYPE and ORION_DB_ADDRESS), which has none. Name another one"
    )
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "part"), [(None, "cannot be read: No such file"), ("a: [", "is not valid YAML")]
)
def test_bad_configuration_of_orion(text: str | None, part: str, tmp_path: Path) -> None:
    path = tmp_path / "orion.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=part):
        report(NAME, str(path))


# ------------------------------------------------------------- trials that are made up


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("storage: 3", "cannot be opened (AttributeError"),
        ("storage: {type: legacy, database: {type: foo, host: x}}", "cannot be opened (NotImplementedError"),
        ("storage: {type: legacy, database: {type: pickleddb, host: torn.pkl}}", "cannot be opened ("),
        ("storage: {type: legacy, database: {type: pickleddb, host: no/a.pkl}}", "no/a.pkl does not exist"),
        ("storage: {type: legacy, database: {type: sqlitedb, host: no/a.db}}", "no/a.db does not exist"),
    ],
)  # fmt: skip
def test_a_database_that_cannot_be_opened(
    text: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orion.yaml").write_text(text)
    (tmp_path / "torn.pkl").write_bytes(b"\x80\x04" + bytes(range(200)))
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", "mine", "-c", "orion.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ppo-hpo: error: The database ")
    assert part in line
    # Orion would make the file of a mistyped name; it leaves a lock beside one that is there.
    assert {path for path in tmp_path.rglob("*") if path.suffix != ".lock"} == set(before)


def insert(client: Any, lr: float, fidelity: int | None, objective_value: float, **more: float) -> None:
    """A completed trial, as Orion would have stored it: an epoch has 100 steps."""
    groups: dict[str, dict[str, Any]] = {"optimizer": {"lr": lr}}
    if fidelity is not None:
        groups["task"] = {"epochs": fidelity}
    done = more.get("epochs", fidelity) or 0
    statistics = {
        "return_mean": -objective_value,
        "return_std": 1.5,
        "epochs": float(done),
        "diverged": 0.0,
        "env_steps": done * 100.0,
        "env_steps_here": done * 100.0,
        **more,
    }
    client.insert(groups, results=entries(objective_value, statistics))


def small_space() -> dict[str, Any]:
    return {"optimizer": {"lr": "loguniform(1e-4, 1)"}, "task": {"epochs": "fidelity(1, 4, base=2)"}}


def test_promoted_trials_are_counted_once(tmp_path: Path) -> None:
    client = experiment(tmp_path, small_space(), algorithm={"asha": {"seed": 1, "num_rungs": 3}})
    for epochs, value in ((1, -10.0), (2, -20.0), (4, -40.0)):
        insert(client, 0.1, epochs, value, continued_from_epoch=float(epochs // 2))
    for epochs, value in ((1, -5.0), (2, -15.0)):
        insert(client, 0.2, epochs, value, continued_from_epoch=float(epochs // 2))
    insert(client, 0.3, 1, -1.0)
    client.insert({"optimizer": {"lr": 0.4}, "task": {"epochs": 1}})  # Orion calls it interrupted
    summary = summarise(client, client.fetch_trials())
    assert summary.by_status == {"completed": 6, "interrupted": 1}
    assert (summary.title, summary.algorithm) == (f"{NAME} (version 1)", "asha")
    assert summary.configurations == 3
    assert summary.max_epochs == 4
    # Epochs reached: 4, 2 and 1, of 100 steps each; starting again would be (1+2+4) + (1+2) + 1.
    assert summary.steps == 700
    assert summary.cost.saved_steps == 400
    assert summary.steps_in_full == 3 * 4 * 100
    assert summary.best.objective.value == -40.0
    text = to_text(summary)
    assert "6 completed, 1 interrupted; 3 configurations" in text
    assert "return 40.0 +- 1.5 after 4 of 4 epochs, 400 steps" in text
    assert (
        "500 not trained, because not every configuration reached 4 epochs "
        "(42% of the 1,200 steps that 3 full trainings would take)" in text
    )
    assert "400 not trained again, because promoted trials resumed" in text


def test_among_equals_the_longest_trained_is_the_best(tmp_path: Path) -> None:
    client = experiment(tmp_path, small_space())
    insert(client, 0.1, 1, -500.0)
    insert(client, 0.1, 4, -500.0)
    insert(client, 0.2, 2, -500.0)
    assert statistics_of(summarise(client, client.fetch_trials()).best)["epochs"] == 4.0


def test_forks_are_counted_by_what_each_process_trained(tmp_path: Path) -> None:
    # A child with another learning rate went on from its parent's second epoch.
    client = experiment(tmp_path, small_space())
    insert(client, 0.1, 2, -10.0, forked=0.0)
    insert(client, 0.2, 4, -20.0, forked=1.0, env_steps_here=200.0)
    summary = summarise(client, client.fetch_trials())
    assert summary.steps == 200 + 200


def test_a_diverged_trial_does_not_say_how_long_an_epoch_is(tmp_path: Path) -> None:
    client = experiment(tmp_path, small_space())
    insert(client, 0.9, 4, 7.0, diverged=1.0, epochs=0.0, env_steps=30.0)
    insert(client, 0.1, 4, -10.0)
    summary = summarise(client, client.fetch_trials())
    assert summary.steps == 430
    assert summary.steps_in_full == 800
    assert summary.best.objective.value == -10.0


def test_that_trials_diverged_is_said(tmp_path: Path) -> None:
    client = experiment(tmp_path, small_space())
    for n, lr in ((1, 0.9), (2, 0.8)):
        insert(client, lr, 1, 0.0, diverged=1.0, epochs=0.0)
        text = to_text(summarise(client, client.fetch_trials()))
        assert f"diverged    all {n} completed trials" in text
    insert(client, 0.1, 1, -5.0)
    text = to_text(summarise(client, client.fetch_trials()))
    assert "diverged    2 of 3 completed trials; log.txt of each says why" in text


def test_what_ending_trials_saved_is_counted_once(tmp_path: Path) -> None:
    client = experiment(tmp_path, small_space(), algorithm={"asha": {"seed": 1, "num_rungs": 3}})
    insert(client, 0.9, 4, 7.0, diverged=1.0, epochs=0.0, env_steps=30.0, env_steps_not_trained=370.0)
    insert(client, 0.2, 4, -5.0, stopped=1.0, epochs=3.0, env_steps=300.0, env_steps_not_trained=100.0)
    # Stopped after one of two epochs, but promoted all the same: then it trained what it had saved.
    insert(client, 0.1, 2, -8.0, stopped=1.0, epochs=1.0, env_steps=100.0, env_steps_not_trained=100.0)
    insert(client, 0.1, 4, -10.0, continued_from_epoch=1.0, env_steps_not_trained=0.0)
    insert(client, 0.3, 4, -9.0)  # of an older version, which did not say
    summary = summarise(client, client.fetch_trials())
    assert summary.cost.stopped_steps == 370 + 100
    text = to_text(summary)
    assert "470 steps not trained because trials diverged or were poor" in text
    # Four configurations in full are 1,600 steps: these 470 are what early stopping saved, no further ones.
    assert (summary.steps_in_full, summary.steps) == (1600, 30 + 300 + 400 + 400)
    assert (
        "470 not trained, because not every configuration reached 4 epochs "
        "(29% of the 1,600 steps that 4 full trainings would take)" in text
    )
    assert text.count("not trained again") == 1  # by continuing


def test_without_fidelity_the_epochs_are_those_of_the_trials(tmp_path: Path) -> None:
    client = experiment(tmp_path, {"optimizer": {"lr": "loguniform(1e-4, 1)"}})
    insert(client, 0.1, None, -10.0, epochs=3.0)
    insert(client, 0.2, None, -11.0, epochs=3.0)
    summary = summarise(client, client.fetch_trials())
    assert (summary.max_epochs, summary.configurations) == (3, 2)
    assert (summary.steps, summary.steps_in_full, summary.cost.saved_steps) == (600, 600, 0)
    assert "not trained" not in to_text(summary)


def test_nothing_completed_yet(tmp_path: Path) -> None:
    client = experiment(tmp_path, small_space())
    with pytest.raises(UserError, match=r"No trial of 'tiny<i>' is completed yet \(no trial\)"):
        summarise(client, client.fetch_trials())
    client.insert({"optimizer": {"lr": 0.1}, "task": {"epochs": 1}})
    with pytest.raises(UserError, match=r"No trial of 'tiny<i>' is completed yet \(1 interrupted\)"):
        summarise(client, client.fetch_trials())


# ------------------------------------------------------------------------------ parts


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], "▁▂▃▄▅▆▇█"),
        ([7.0, 0.0, 7.0], "█▁█"),
        ([-500.0, -100.0], "▁█"),
        ([3.0, 3.0], "▁▁"),
        ([1.0, math.nan, 2.0], "▁█"),
    ],
)
def test_sparkline(values: list[float], bars: str) -> None:
    assert sparkline(values) == bars


def test_curve_up_to_the_line_that_is_torn(tmp_path: Path) -> None:
    assert read_curve(tmp_path) == []
    path = tmp_path / "curve.jsonl"
    rows = [{"epoch": epoch, "env_steps": 9 * epoch, **evaluation_columns([1.5], [4])} for epoch in range(3)]
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines)[:-30])
    assert read_curve(tmp_path) == rows[:2]
    # Of somebody else: what is no row ends it, whatever it is.
    damaged = [lines[2].replace("1.5", wrong) for wrong in ("NaN", "1e999", "9" * 5000, '"x"')]
    for bad in ("[" * 100_000, "3", "{}", "x" * (1 << 20), *damaged):
        path.write_text("\n".join([*lines[:2], bad, lines[2]]))
        assert read_curve(tmp_path) == rows[:2], bad[:20]
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no room
    assert read_curve(tmp_path) == []
    path.write_bytes(b"\xff\xfe")
    assert read_curve(tmp_path) == []

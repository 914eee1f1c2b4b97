"""A sweep's directory: what the user wrote into it stays, it can be moved, and secrets are its owner's."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import gymnasium
import pytest

import ppo_hpo
from ppo_hpo import UserError
from ppo_hpo.cli.main import main
from ppo_hpo.inspect import doctor
from ppo_hpo.orion import hunt_file
from ppo_hpo.orion.experiment import find_database, in_short, open_experiment
from ppo_hpo.orion.objective import Objective
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.errors import hide_secrets
from ppo_hpo.spec.printing import encodable
from ppo_hpo.spec.space import Space
from ppo_hpo.state.remote_store import Store
from ppo_hpo.sweeps.plan import storage_of
from ppo_hpo.sweeps.progress import BatchProgress, SweepProgress, fitted, speed_of
from ppo_hpo.sweeps.registered import with_registration
from ppo_hpo.trial import failure
from tests.sweeps.test_batch import job

REPOSITORY = Path(__file__).parents[2]
SPACE: dict[str, Any] = {
    "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
    "task": {"epochs": "orion~fidelity(1, 2, base=2)", "max_epochs": 2, "steps_per_epoch": 64,
             "eval_episodes": 1},
    "model": {"width": 4, "depth": 1},
    "optimizer": {"lr": "orion~loguniform(1e-4, 1e-2, precision=4)"},
    "ppo": {"n_steps": 32, "n_epochs": 1, "batch_size": 64},
}  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a sweep of two trials. Its name is that of the sweep."""
    root = tmp_path_factory.mktemp("swept")
    (root / "space.yaml").write_text(yamlio.dump(SPACE))
    sweep(root / "sw", space=str(root / "space.yaml"), max_trials=2)
    return root / "sw"


def sweep(directory: Path, **arguments: Any) -> ppo_hpo.SweepResult:
    return ppo_hpo.sweep(
        name="sw", directory=directory, executor="single", device="cpu", progress=False, **arguments
    )


def epochs_and_places(directory: Path) -> list[tuple[float, Path]]:
    trials = open_experiment("sw", str(directory / "orion.yaml")).fetch_trials_by_status("completed")
    return sorted((trial.params["/task/epochs"], Path(trial.working_dir).parent) for trial in trials)


# ----------------------------------------------------------------------- what the user wrote


def test_settings_of_the_user_stay_and_are_obeyed(swept: Path, tmp_path: Path) -> None:
    place = tmp_path / "sw"
    shutil.copytree(swept, place)
    sweep(place)  # which corrects the paths of the copy
    file = place / "orion.yaml"
    text = "# Mine.\n" + file.read_text().replace(
        "n_workers: ", "heartbeat: 30\n  max_broken: 5\n  n_workers: 1  # was "
    )
    text += "experiment: {max_broken: 7}\n"
    file.write_text(text)
    result = sweep(place)
    assert file.read_text() == text
    assert result.client.heartbeat == 30
    assert result.client.max_broken == 7
    assert hunt_file.settings(place) == {
        "experiment.max_broken": 7, "worker.max_broken": 5, "worker.heartbeat": 30, "worker.n_workers": 1,
    }  # fmt: skip
    file.write_text(text.replace("heartbeat: 30", "heartbeat: soon"))
    with pytest.raises(UserError, match=r"`worker\.heartbeat` in .* must be a whole number .* got 'soon'"):
        sweep(place)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("worker: {n_workers: 3}  # mine\n", "worker: {n_workers: 3}  # mine\nstorage: {a: 1}\n"),
        ("{worker: {n_workers: 3}}\n", "worker: {n_workers: 3}\nstorage: {a: 1}\n"),  # cannot be continued
        ("storage: {a: 0} # old\nevc: {x: 1}\n", "storage: {a: 1}\nevc: {x: 1}\nworker: {n_workers: 2}\n"),
        ("", "storage: {a: 1}\nworker: {n_workers: 2}\n"),
    ],
)
def test_only_what_is_missing_is_written(before: str, after: str, tmp_path: Path) -> None:
    file = tmp_path / "orion.yaml"
    file.write_text(before)
    hunt_file.write(tmp_path, {"a": 1}, {"n_workers": 2})
    assert yamlio.load(file) == yamlio.parse(after, "expected")
    assert ("# mine" in file.read_text()) == ("# mine" in after)
    first = file.stat().st_mtime_ns
    hunt_file.write(tmp_path, {"a": 1}, {"n_workers": 9})
    assert file.stat().st_mtime_ns == first


# ---------------------------------------------------------------------------- moved and copied


def test_a_moved_sweep_goes_on_where_it_is(swept: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    shutil.copytree(swept, first)
    sweep(first)
    for number, ask in enumerate((lambda place: main(["report", str(place)]), sweep)):
        place = tmp_path / f"moved-{number}"
        os.rename(first, place)
        with (place / "orion.yaml").open("a") as file:
            file.write("# mine\n")
        ask(place)
        assert not first.exists(), "a database was left behind"
        assert {where for _, where in epochs_and_places(place)} == {place / "trials"}
        assert (place / "orion.yaml").read_text().endswith("# mine\n" * (number + 1))
        first = place
    # Its trials resume, and a hunt gets the new paths.
    found = sweep(first, max_trials=4)
    assert len(found.trials) == 4
    (document,) = found.client.storage.fetch_experiments({"name": "sw"})
    assert str(swept) not in json.dumps(document, default=str)
    assert str(first / "space.yaml") in document["metadata"]["user_args"]


def test_a_copy_is_a_sweep_of_its_own(swept: Path, tmp_path: Path) -> None:
    before = (swept / "orion.sqlite").read_bytes()
    copy = tmp_path / "copy"
    shutil.copytree(swept, copy)
    assert len(sweep(copy, max_trials=3).trials) == 3
    assert (swept / "orion.sqlite").read_bytes() == before
    assert {where for _, where in epochs_and_places(copy)} == {copy / "trials"}
    # A link is no other place.
    (tmp_path / "link").symlink_to(swept)
    text = (swept / "orion.yaml").read_text()
    main(["report", str(tmp_path / "link")])
    assert (swept / "orion.yaml").read_text() == text
    assert (swept / "orion.sqlite").read_bytes() == before


def test_databases_that_are_not_the_directorys_own_stay(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "here").mkdir()
    for folder in ("shared", "here"):
        (tmp_path / folder / "orion.sqlite").touch()
    storage = {"type": "legacy", "database": {"type": "sqlitedb", "host": f"{tmp_path}/shared/orion.sqlite"}}
    file = tmp_path / "here" / "orion.yaml"
    for content in (
        {"storage": storage},
        {"storage": {"type": "legacy", "database": {"type": "mongodb"}}},
        {},
    ):
        text = yamlio.dump(content)
        file.write_text(text)
        assert hunt_file.storage_in(file) == content.get("storage")
        assert file.read_text() == text


def test_a_hunt_with_the_former_address_leaves_no_database_behind(tmp_path: Path) -> None:
    from orion.core.io.database import DatabaseError

    from ppo_hpo.orion.sqlitedb import SQLiteDB

    with pytest.raises(
        DatabaseError, match=r"directory .*/gone of the database does not exist. If it was moved"
    ):
        SQLiteDB(host=str(tmp_path / "gone" / "orion.sqlite"))
    assert not (tmp_path / "gone").exists()


# ----------------------------------------------------------------------------------- secrets

SECRET = "hunter2"
LEAKS = [
    f"mongodb://me:{SECRET}@host:1/db", f"postgresql://me:a/b@{SECRET}@host/db", f"s3://bucket/x?token={SECRET}",
    f"https://host/x?sig=1&key={SECRET}", f"{{'host': 'x', 'password': '{SECRET}'}}", f"password: {SECRET}",
    f"--token={SECRET}", f'"api_key": "{SECRET} {SECRET}"', f"AWS_SECRET_ACCESS_KEY={SECRET}",
]  # fmt: skip


@pytest.mark.parametrize("text", LEAKS)
def test_secrets_are_hidden_in_every_message(text: str) -> None:
    for shown in (hide_secrets(text), str(UserError(f"It fails: {text}.")), failure.one_line(OSError(text))):
        assert SECRET not in shown
        assert "***" in shown


def test_other_text_stays() -> None:
    text = "s3://bucket/path, tcp://host:8786, `--set env.kwargs.tokens=5`, me@host, what? module:Env-v0"
    assert hide_secrets(text.replace("tokens", "n")) == text.replace("tokens", "n")


def test_nothing_written_or_printed_has_a_secret(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything that the sweep and the commands leave or say, but for files that only the owner reads."""
    (tmp_path / "space.yaml").write_text(yamlio.dump(SPACE))
    place, store = tmp_path / "sw", f"memory://bucket/x?token={SECRET}"
    sweep(place, space=str(tmp_path / "space.yaml"), max_trials=1, checkpoint_store=store)
    # An address with a password, as of a database that cannot be reached.
    address = f"postgresql://me:{SECRET}@localhost:1/db"
    hunt_file.write(place, storage_of(address, place), {})
    assert stat.S_IMODE((place / "orion.yaml").stat().st_mode) == 0o600
    assert stat.S_IMODE((place / "orion.sqlite").stat().st_mode) == 0o600
    (tmp_path / "mongo.yaml").write_text(
        f"storage: {{type: legacy, database: {{type: nodb, host: '{address}'}}}}"
    )
    store_that_fails = ["--checkpoint-store", f"x::y?k={SECRET}"]
    for command in (["report", "sw"], ["retry", "sw"], ["clean", "sw", *store_that_fails]):
        for file in (place / "orion.yaml", tmp_path / "mongo.yaml"):
            assert main([*command, "-c", str(file)]) == 2
    with pytest.raises(NotImplementedError) as failed:
        doctor._check_database(doctor.Report(), str(tmp_path / "mongo.yaml"))
    print(in_short(failed.value), find_database(str(tmp_path / "mongo.yaml")), Store(store))
    with pytest.raises(UserError) as error:
        sweep(tmp_path / "other", space=str(tmp_path / "space.yaml"), storage=address)
    print(error.value)
    said = capsys.readouterr()
    assert "***" in said.out + said.err
    assert SECRET not in said.out + said.err
    for path in place.rglob("*"):
        if path.is_file() and SECRET.encode() in path.read_bytes():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


# --------------------------------------------------------------------------------- progress


def test_a_status_line_fits_the_terminal() -> None:
    running = [(f"aaaaaaa{n}", n, 16) for n in range(4)]
    whole = fitted("2 running: ", running[:2], 200)
    assert whole == "2 running: aaaaaaa0 (epoch 0 of 16), aaaaaaa1 (epoch 1 of 16)"
    for columns in range(12, 120):
        line = fitted("4 running: ", running, columns)
        assert len(line) <= columns
        names, more = line.count("aaaaaaa"), line.rpartition(", ")[2]
        assert names == 4 or more.endswith(f"{4 - names} more") or names == 0
    assert fitted("4 running: ", running, 79) == (
        "4 running: aaaaaaa0 0/16, aaaaaaa1 1/16, aaaaaaa2 2/16, aaaaaaa3 3/16"
    )
    assert fitted("4 running: ", running, 11) == "4 running"


def test_progress_of_a_resumed_batch_counts_what_is_trained_here(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    one, stream = job(tmp_path), Terminal()
    one.directory.mkdir()

    def have(epochs: int) -> None:
        rows = [{"epoch": epoch, "env_steps": epoch * 256} for epoch in range(epochs + 1)]
        (one.directory / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    have(1)
    show = BatchProgress(stream, [one])
    show.tick([one])
    assert stream.getvalue().endswith("0/1 trials  seed 0 (epoch 1 of 2)")
    have(2)
    show._display._began -= 64
    show.tick([one])
    assert stream.getvalue().endswith("0/1 trials  4 steps/s  0 s left  seed 0 (epoch 2 of 2)")


def test_a_resumed_sweep_shows_its_speed(swept: Path) -> None:
    trials = open_experiment(str(swept), None).fetch_trials()
    assert speed_of([]) == 0.0
    assert speed_of(trials) > 0.0
    progress = SweepProgress(4, 2, 1.0, 2)
    progress.speed_before = speed_of(trials)
    assert f"  {speed_of(trials):,.0f} steps/s  " in progress.text()


def test_orions_warnings_are_shown_only_if_asked_for() -> None:
    code = "from ppo_hpo.orion.quiet import quiet\nwith quiet(): import orion.client"
    command = [sys.executable, "-c", code]
    own = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}
    hidden, shown = (
        subprocess.run(
            command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=True, timeout=120
        )
        for env in (own, own | {"PYTHONWARNINGS": "default"})
    )
    assert hidden.stderr == ""
    assert "pkg_resources is deprecated" in shown.stderr


# ------------------------------------------------------------------------------- any terminal


class Strict(io.TextIOWrapper):
    """Standard output that raises at what it cannot encode."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_every_terminal_can_print(encoding: str, swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = sweep(swept)
    for ask in (
        lambda: print(result),
        lambda: main(["report", str(swept)]),
        lambda: main(["lineage", str(swept)]),
    ):
        monkeypatch.setattr(sys, "stdout", out := Strict(encoding))
        ask()
        assert out.text()
    monkeypatch.setattr(sys, "stdout", out := Strict(encoding))
    assert main(["report", "\u65e5\udcff"]) == 2
    assert main(["space", "show", str(swept / "space.yaml")]) == 0
    progress = SweepProgress(1, 0, None, 1, Strict(encoding))
    progress.ended(open_experiment(str(swept)).fetch_trials()[0], None, ValueError("\u65e5\udcff"), "\u65e5")
    assert encodable("\u2581\u2588 \u65e5", Strict(encoding)).endswith(" \\u65e5")


def test_bars_and_trees_are_drawn_in_ascii() -> None:
    assert encodable("\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588", Strict("ascii")) == "_.:-=+*#"
    tree = "\u251c\u2500 a\n\u2502  \u2514\u2500 b"
    assert encodable(tree, Strict("ascii")) == "|- a\n|  `- b"
    assert encodable(tree, Strict("utf-8")) == tree
    assert encodable(tree, io.StringIO()) == tree


# ------------------------------------------------- an environment of the running script or notebook

SCRIPT = """
import gymnasium, ppo_hpo, sys
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

class Mine(CartPoleEnv):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, 7.0, *rest

gymnasium.register("Mine-v0", Mine)
result = ppo_hpo.sweep("Mine-v0", "space.yaml", max_trials=1, n_workers=1, name="mine", progress=False)
assert result.trials["return_mean"][0] == 7 * result.trials["episode_length"][0], result
"""


def test_an_environment_of_the_script_is_known_to_workers(tmp_path: Path) -> None:
    """A real worker process, so this takes some seconds."""
    (tmp_path / "space.yaml").write_text(yamlio.dump(SPACE))
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "script.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_an_entry_point_in_the_main_module_is_found_in_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    main_module = types.ModuleType("__main__")
    main_module.Mine = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", main_module)
    spec = gymnasium.spec("CartPole-v1")
    monkeypatch.setitem(gymnasium.registry, "Mine-v0", copy.copy(spec))
    gymnasium.registry["Mine-v0"].id = "Mine-v0"
    gymnasium.registry["Mine-v0"].entry_point = "__main__:Mine"
    space = Space("mine", Path(), {"env": {"id": "Mine-v0"}}, {})
    function = pickle.loads(pickle.dumps(with_registration(Objective(space))))
    assert function.spec.entry_point is object
    # Names that this process does not know are left to the worker.
    unknown = Objective(Space("mine", Path(), {"env": {"id": "tests.envs:Late-v0"}}, {}))
    assert with_registration(unknown) is unknown


# --------------------------------------------------------------------- messages name what was typed


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sweep CartPole-v1 --workers 0", "argument --workers: must be a whole number"),
        ("sweep CartPole-v1 --seeds 2000", "`--seeds <= 1000` must hold, but got 2000"),
        ("sweep CartPole-v1 --epochs 20000", "`--epochs <= 10000` must hold, but got 20000"),
        (
            "sweep CartPole-v1 --fidelity uniform(1,4)",
            '`--fidelity` must be a fidelity .* as `--fidelity="fid',
        ),
        ("sweep CartPole-v1 --set task.seeds=2000", "`task.seeds <= 1000` must hold, but got 2000"),
        ("sweep CartPole-v1 --stop-poor --seeds 2", "`--stop-poor` "),
        ("run --config cartpole --checkpoint-store x::y", "`--checkpoint-store` must be one URL"),
        ("run --config cartpole --epochs 0", "`--epochs >= 1` must hold, but got 0"),
        ("run --config cartpole --seed -1", "`--seed >= 0` must hold, but got -1"),
        ("run --config cartpole --set task.seed=-1", "`task.seed >= 0` must hold, but got -1"),
        ("run --config cartpole --retries 1001", "`0 <= --retries <= 1000` must hold, but got 1001"),
    ],
)
def test_messages_name_the_option(
    command: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"n_workers": 0}, "`n_workers` must be a whole number"),
        ({"seeds": 2000}, "`task.seeds <= 1000` must hold"),
        ({"epochs": "uniform(1, 4)"}, "`epochs` must be a fidelity"),
        ({"stop_poor": True, "seeds": 2}, "`stop_poor` "),
    ],
)
def test_messages_name_the_argument(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        ppo_hpo.sweep("CartPole-v1", directory=tmp_path / "sw", progress=False, **arguments)

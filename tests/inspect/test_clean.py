"""What `ppo-hpo clean` removes, and what it never does: on trials made up, with real checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_hpo.cli.main import main
from ppo_hpo.inspect.clean import _why_done, clean, forking, obsolete
from ppo_hpo.orion.experiment import highest_epochs, open_experiment
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.results import entries
from ppo_hpo.state import lock
from ppo_hpo.state.checkpoint import Checkpoint, Storage
from ppo_hpo.state.mirror import MirroredStorage, part_key
from ppo_hpo.state.remote_store import Store

ASHA = {"asha": {"seed": 1, "num_rungs": 3, "num_brackets": 1}}
SPACE = {"optimizer": {"lr": "loguniform(1e-4, 1)"}, "task": {"epochs": "fidelity(1, 4, base=2)"}}
# Of one checkpoint in the tests: two of them are 0.25 MiB.
SIZE = 1 << 17


def experiment(root: Path, algorithm: dict[str, Any] = ASHA, space: dict[str, Any] = SPACE) -> Any:
    from orion.client import build_experiment

    storage = {"type": "legacy", "database": {"type": "pickleddb", "host": str(root / "orion.pkl")}}
    (root / "orion.yaml").write_text(yamlio.dump({"storage": storage}))
    return build_experiment(
        "it",
        space=space,
        algorithm=algorithm,
        storage=storage,
        working_dir=str(root / "trials"),
        max_trials=6,
    )


def insert(
    client: Any,
    lr: float,
    epochs: int | None,
    value: float | None,
    store: Store | None = None,
    parts: tuple[str, ...] = ("",),
) -> Any:
    """A trial with two checkpoints, of each seed where it has several; completed, if it has a value."""
    groups: dict[str, Any] = {"optimizer": {"lr": lr}}
    if epochs is not None:
        groups["task"] = {"epochs": epochs}
    done = epochs or 3
    statistics = {"return_mean": -(value or 0.0), "return_std": 0.0, "epochs": float(done), "diverged": 0.0,
                  "env_steps": 100.0 * done, "env_steps_here": 100.0}  # fmt: skip
    client.insert(groups, results=None if value is None else entries(value, statistics))
    (trial,) = (t for t in client.fetch_trials() if (t.params["optimizer"]["lr"], _epochs(t)) == (lr, epochs))
    directory = Path(trial.working_dir)
    for part in parts:
        storage = MirroredStorage(directory / part, store, part_key(trial.id, part))
        for epoch in (done - 1, done):
            content = Checkpoint(epoch, {"w": np.zeros(SIZE - 500, np.uint8)}, {"uid": trial.id})
            storage.save(content)
    with lock.hold(directory):
        pass  # as a trial that was here and ended
    return trial


def _epochs(trial: Any) -> int | None:
    found = trial.params.get("task", {}).get("epochs")
    return None if found is None else int(found)


def names(trial: Any) -> list[str]:
    return [path.name[-14:-12] for path in sorted(Path(trial.working_dir).glob("checkpoint-*"))]


def test_only_what_can_not_be_promoted_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = experiment(tmp_path)
    one, two, four = (insert(client, 0.1, n, -10.0 * n) for n in (1, 2, 4))  # went all the way: the best
    waits = insert(client, 0.2, 1, -5.0)  # may be promoted
    worse = insert(client, 0.3, 4, -1.0)  # at the top, and not the best
    first, second = insert(client, 0.4, 1, -3.0), insert(client, 0.4, 2, None)  # promoted, and not done yet
    everything = [one, two, four, waits, worse, first, second]
    config = ["-c", str(tmp_path / "orion.yaml")]
    assert main(["clean", "it", *config, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert all(len(names(trial)) == 2 for trial in everything)
    assert main(["clean", "it", *config]) == 0
    said = capsys.readouterr().out
    assert said == dry.replace("would remove", "removed").replace("would stay", "stay")
    assert [len(names(trial)) for trial in everything] == [0, 0, 1, 2, 0, 2, 2]
    assert [path.name for path in Storage(four.working_dir).paths()] == ["checkpoint-000004.safetensors"]
    lines = said.splitlines()
    assert f"removed  {one.id[:8]}  2 checkpoints, 0.25 MiB  promoted, and completed as" in said
    assert f"removed  {worse.id[:8]}  2 checkpoints, 0.25 MiB  has the highest fidelity" in said
    assert (
        f"removed  {four.id[:8]}  1 checkpoint, 0.12 MiB  has the highest fidelity; one of the best" in said
    )
    assert lines[-1] == "removed 7 checkpoints, 0.87 MiB in all; 7 checkpoints, 0.87 MiB of 4 trials stay"
    assert main(["clean", "it", *config]) == 0
    assert "removed 0 checkpoints" in capsys.readouterr().out


def test_a_trial_that_a_process_has_is_left_alone(tmp_path: Path) -> None:
    client = experiment(tmp_path)
    insert(client, 0.1, 4, -10.0)
    held = insert(client, 0.2, 4, -5.0)
    with lock.hold(Path(held.working_dir)):
        said = clean("it", str(tmp_path / "orion.yaml"))
    assert f"kept     {held.id[:8]}  2 checkpoints, 0.25 MiB  a process is training it" in said
    assert len(names(held)) == 2
    clean("it", str(tmp_path / "orion.yaml"))
    assert names(held) == []


def test_the_best_keeps_its_newest_that_is_whole(tmp_path: Path) -> None:
    client = experiment(tmp_path)
    best, second = insert(client, 0.1, 4, -10.0), insert(client, 0.2, 4, -5.0)
    newest = Storage(best.working_dir).paths()[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    config = str(tmp_path / "orion.yaml")
    clean("it", config, keep=2)
    assert (names(best), names(second)) == (["03"], ["04"])
    clean("it", config)
    assert (names(best), names(second)) == (["03"], [])
    with pytest.raises(UserError, match="`--keep >= 1` must hold, but got 0"):
        clean("it", config, keep=0)


def test_the_best_that_has_one_keeps_it_where_a_better_ones_directory_is_gone(tmp_path: Path) -> None:
    client = experiment(tmp_path)
    best, second, third = (
        insert(client, lr, 4, value) for lr, value in ((0.1, -10.0), (0.2, -5.0), (0.3, -1.0))
    )
    shutil.rmtree(best.working_dir)
    assert "one of the best: its newest stays" in clean("it", str(tmp_path / "orion.yaml"))
    assert (names(second), names(third)) == (["04"], [])


def test_population_based_training_may_have_children_of_any_trial(tmp_path: Path) -> None:
    pbt = {"pbt": {"seed": 1, "population_size": 5, "generations": 2}}
    client = experiment(tmp_path, pbt)
    assert forking(client)
    assert not forking(experiment_at(tmp_path / "other"))
    one = insert(client, 0.1, 1, -1.0)
    insert(client, 0.1, 2, -2.0)
    top = insert(client, 0.1, 4, -4.0)
    found = obsolete(client.fetch_trials(), highest_epochs(client), forking(client))
    assert list(found) == [top.id]
    assert list(obsolete(client.fetch_trials(), 4.0, False)) != [top.id]
    assert names(one) == ["00", "01"]


def experiment_at(root: Path) -> Any:
    root.mkdir()
    return experiment(root)


def test_without_fidelity_nothing_is_promoted(tmp_path: Path) -> None:
    client = experiment(tmp_path, {"random": {"seed": 1}}, {"optimizer": SPACE["optimizer"]})
    best, other = insert(client, 0.1, None, -2.0), insert(client, 0.2, None, -1.0)
    said = clean("it", str(tmp_path / "orion.yaml"))
    assert "there are no promotions" in said
    assert (names(best), names(other)) == (["03"], [])


def test_finished_takes_the_word_of_the_user_only_where_it_can_be_true(tmp_path: Path) -> None:
    client, config = experiment(tmp_path), str(tmp_path / "orion.yaml")
    trials = [insert(client, 0.1 * n, 1, -float(n)) for n in range(1, 6)]
    with pytest.raises(UserError, match=r"not finished: 5 of 6 trials are completed"):
        clean("it", config, finished=True)
    waiting = insert(client, 0.6, 1, None)
    with pytest.raises(UserError, match=r"not finished: 1 interrupted\. Leave --finished out"):
        clean("it", config, finished=True)
    client.storage.set_trial_status(waiting, "broken")
    trials.append(insert(client, 0.7, 1, -7.0))
    clean("it", config)
    assert all(len(names(trial)) == 2 for trial in trials)
    clean("it", config, finished=True)
    # Of the best, and of one that is not completed.
    assert [len(names(trial)) for trial in [*trials, waiting]] == [0, 0, 0, 0, 0, 1, 2]


def test_nothing_is_promoted_once_the_algorithm_has_ended(tmp_path: Path) -> None:
    """By the state in the database. That `max_trials` is reached does not count: the user may raise it."""
    pbt = {"pbt": {"seed": 1, "population_size": 2, "generations": 1}}
    for algorithm, count, ended in ((pbt, 4, "the algorithm is done"), (ASHA, 6, "")):
        root = tmp_path / next(iter(algorithm))
        root.mkdir()
        client = experiment(root, algorithm)
        for _ in range(count):
            trial = client.suggest()
            lr, epochs = trial.params["optimizer"]["lr"], _epochs(trial)
            client.observe(trial, entries(-lr, {"return_mean": lr, "epochs": float(epochs or 0)}))
        assert client.is_done
        trials = client.fetch_trials()
        is_done = _why_done(open_experiment("it", str(root / "orion.yaml")), trials, False)
        assert is_done == ended
        reasons = obsolete(trials, 4.0, forking(client), is_done=is_done)
        assert (len(reasons) == count) is bool(ended)


def test_the_store_is_cleaned_too(tmp_path: Path) -> None:
    client, store = experiment(tmp_path), Store(str(tmp_path / "store"))
    best, other, low = (
        insert(client, lr, n, -v, store) for lr, n, v in ((0.1, 4, 9.0), (0.2, 4, 8.0), (0.3, 1, 1.0))
    )
    counts = [len(store.names("trials", trial.id)) for trial in (best, other, low)]
    assert counts == [2, 2, 2]
    said = clean("it", str(tmp_path / "orion.yaml"), store=store, dry_run=True)
    assert f"would remove  {other.id[:8]}  4 checkpoints, 0.50 MiB" in said
    assert [len(store.names("trials", trial.id)) for trial in (best, other, low)] == counts
    clean("it", str(tmp_path / "orion.yaml"), store=store)
    assert [len(store.names("trials", trial.id)) for trial in (best, other, low)] == [1, 0, 2]
    assert [len(names(trial)) for trial in (best, other, low)] == [1, 0, 2]


def test_of_several_seeds_each_is_cleaned(tmp_path: Path) -> None:
    client, store = experiment(tmp_path), Store(str(tmp_path / "store"))
    parts = ("seed-1", "seed-2")
    best, other = (insert(client, lr, 4, -v, store, parts) for lr, v in ((0.1, 9.0), (0.2, 8.0)))
    waits = insert(client, 0.3, 1, None, store, parts)
    for folder in ("seed-2-backup", "seed-x"):
        Storage(Path(other.working_dir) / folder).save(Checkpoint(4, {}, {"uid": other.id}))
    # The newest of the best's second seed is torn here: the one before stays, here and there.
    newest = Storage(Path(best.working_dir) / "seed-2").path_of(4)
    newest.write_bytes(newest.read_bytes()[:-1])
    said = clean("it", str(tmp_path / "orion.yaml"), store=store)
    assert f"removed  {other.id[:8]}  8 checkpoints, 1.00 MiB" in said
    assert f"removed  {best.id[:8]}  4 checkpoints, 0.50 MiB" in said
    kept = {"seed-1": "04", "seed-2": "03"}
    for part, epoch in kept.items():
        name = f"checkpoint-0000{epoch}.safetensors"
        assert [path.name for path in Storage(Path(best.working_dir) / part).paths()] == [name]
        assert store.names("trials", f"{best.id}-{part}") == [name]
        assert len(store.names("trials", f"{waits.id}-{part}")) == 2
        assert len(Storage(Path(waits.working_dir) / part).paths()) == 2
    assert {path.parent.name for path in Path(other.working_dir).rglob("checkpoint-*")} == {
        "seed-2-backup",
        "seed-x",
    }


def test_files_of_others_stay(tmp_path: Path) -> None:
    client = experiment(tmp_path)
    insert(client, 0.1, 4, -10.0)
    directory = Path(insert(client, 0.2, 4, -5.0).working_dir)
    outside = tmp_path / "mine"
    outside.write_text("mine")
    (directory / "checkpoint-000009.safetensors").symlink_to(outside)
    (directory / "checkpoint-best").write_text("mine")
    clean("it", str(tmp_path / "orion.yaml"))
    assert outside.read_text() == "mine"
    assert {"checkpoint-best", "checkpoint-000009.safetensors"} <= {path.name for path in directory.iterdir()}
    assert not (directory / "checkpoint-000004.safetensors").exists()

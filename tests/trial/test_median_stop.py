"""Poor trials that stop between two rungs: the rule by hand, the record, and a sweep."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ppo_hpo
from ppo_hpo import UserError
from ppo_hpo.cli.main import main
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.state import checkpoint
from ppo_hpo.state.curve import read_curve
from ppo_hpo.trial import median_stop, runner, trial_files
from ppo_hpo.trial.median_stop import median_to_reach
from ppo_hpo.trial.restore import INDEX
from tests.runs import run_quietly

REPOSITORY = Path(__file__).parents[2]
STEPS = 128
CONFIG = TrialConfig.from_mapping({
    "env": {"id": "tests.envs:Target-v0", "n_envs": 2},
    "task": {"epochs": 4, "max_epochs": 8, "steps_per_epoch": STEPS, "eval_episodes": 2},
    "model": {"width": 8, "depth": 1},
    "ppo": {"n_steps": 32, "batch_size": 32, "n_epochs": 1},
})  # fmt: skip


# ------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(
    ("epoch", "others", "median"),
    [
        # Means up to epoch 2: 15, 3, 50, -1, 7; the third of them in order is 7.
        (2, [[10, 20, 900], [2, 4], [100, 0], [-1, -1, -1], [7, 7]], 7.0),
        # The same in epoch 1: 10, 2, 100, -1, 7.
        (1, [[10, 20, 900], [2, 4], [100, 0], [-1, -1, -1], [7, 7]], 7.0),
        # In epoch 3 only two have come as far.
        (3, [[10, 20, 900], [2, 4], [100, 0], [-1, -1, -1], [7, 7]], None),
        # Of an even number, the middle between 7 and 15.
        (2, [[10, 20], [2, 4], [100, 0], [-1, -1], [7, 7], [60, 60]], 11.0),
        (2, [[10, 20], [2, 4], [100, 0], [-1, -1]], None),
        # Those that have not come as far are none of the five.
        (2, [[10, 20], [2, 4], [100, 0], [-1, -1], [7]], None),
        (1, [], None),
    ],
)
def test_the_median_of_running_averages(epoch: int, others: list[list[float]], median: float | None) -> None:
    assert median_to_reach(epoch, others) == median


def test_fewer_than_five_may_be_enough_where_it_is_said() -> None:
    assert median_to_reach(2, [[1, 3], [5, 5], [6, 8]], min_siblings=3) == 5.0
    assert median_to_reach(2, [], min_siblings=0) is None


def a_curve(returns: Sequence[float]) -> list[dict[str, Any]]:
    """The first of the returns is the untrained policy's."""
    return [
        {"epoch": epoch, "env_steps": epoch * STEPS, "eval_steps": 20, "return_mean": float(value),
         "return_std": 0.0, "return_median": float(value), "episode_length": 10.0}
        for epoch, value in enumerate(returns)
    ]  # fmt: skip


def a_sibling(
    place: Path, lr: float, returns: Sequence[float], *, identity: str | None = None, **groups: Any
) -> Path:
    """The directory of a trial of the experiment in ``place``, as far as others look into it."""
    config = CONFIG.replace(**{"optimizer": {"lr": lr}, **groups})
    directory = place / f"{lr:g}-{len(returns)}"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_bytes(trial_files.config_bytes(config))
    (directory / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in a_curve(returns)))
    index = place / INDEX / (identity or config.identity()[:32])
    index.mkdir(parents=True, exist_ok=True)
    (index / directory.name).touch()
    return directory


def five(place: Path, value: float = 1e6) -> list[Path]:
    return [a_sibling(place, lr, [0.0, value, value + 1]) for lr in (0.1, 0.2, 0.3, 0.4, 0.5)]


def test_when_a_trial_is_stopped(tmp_path: Path) -> None:
    """Five siblings of running averages 8, ..., 12 in epoch 2, and 10 in the middle."""
    for number, lr in enumerate((0.1, 0.2, 0.3, 0.4, 0.5)):
        a_sibling(tmp_path, lr, [100.0, 7.0 + number, 9.0 + number])
    siblings = median_stop.Siblings(tmp_path, CONFIG)
    poor = median_stop.decide(CONFIG, a_curve([50.0, 9.0, 8.0]), siblings)
    # Its untrained policy's 50 is not what it learned.
    assert poor == median_stop.Stop(CONFIG.identity(), 4, 2, 9.0, 10.0, 5)
    # Its best counts, so that a valley is no reason; and so does a draw.
    assert median_stop.decide(CONFIG, a_curve([0.0, 11.0, -99.0]), siblings) is None
    assert median_stop.decide(CONFIG, a_curve([0.0, 10.0, -99.0]), siblings) is None
    # Not in the first epoch, not in its last, and not where none has come as far.
    assert median_stop.decide(CONFIG, a_curve([0.0, -99.0]), siblings) is None
    last = CONFIG.replace(task={"epochs": 2})
    assert median_stop.decide(last, a_curve([0.0, -99.0, -99.0]), siblings) is None
    assert median_stop.decide(CONFIG, a_curve([0.0, -99.0, -99.0, -99.0]), siblings) is None


def test_who_is_a_sibling(tmp_path: Path) -> None:
    """Only what is whole, of the same experiment, and not the trial itself; each configuration once."""
    a_sibling(tmp_path, 0.1, [0.0, 1.0, 2.0])
    a_sibling(tmp_path, 0.1, [0.0, 1.0, 2.0, 3.0])  # its higher rung
    a_sibling(tmp_path, CONFIG.optimizer.lr, [0.0, 9.0])  # the trial itself, of a lower rung
    a_sibling(tmp_path, 0.2, [0.0, 5.0], env={"id": "tests.envs:RandomWalk-v0"})
    a_sibling(tmp_path, 0.3, [0.0, 5.0], task={"steps_per_epoch": 256})
    a_sibling(tmp_path, 0.4, [0.0, 5.0], task={"seeds": 3})
    a_sibling(tmp_path, 0.5, [0.0, 5.0], identity="0" * 32)  # not what the index says
    a_sibling(tmp_path, 0.6, [0.0])  # it has only begun
    (a_sibling(tmp_path, 0.7, [0.0, 5.0]) / "curve.jsonl").unlink()
    (a_sibling(tmp_path, 0.8, [0.0, 5.0]) / "config.yaml").write_text("- [")
    os.mkfifo(tmp_path / "pipe")
    gone = a_sibling(tmp_path, 0.9, [0.0, 5.0])
    shutil.rmtree(gone)
    gone.symlink_to(a_sibling(tmp_path / "elsewhere", 0.9, [0.0, 5.0]))
    piped = a_sibling(tmp_path, 0.11, [0.0, 5.0]) / "curve.jsonl"
    piped.unlink()
    os.mkfifo(piped)
    torn = a_sibling(tmp_path, 0.12, [0.0, 6.0, 7.0]) / "curve.jsonl"
    torn.write_text(torn.read_text()[:-20])
    holes = a_sibling(tmp_path, 0.13, [0.0, 6.0, 7.0]) / "curve.jsonl"
    holes.write_text("".join(holes.read_text().splitlines(keepends=True)[::2]))
    siblings = median_stop.Siblings(tmp_path, CONFIG)
    assert sorted(siblings.returns()) == [[1.0, 2.0, 3.0], [6.0]]
    # What has come since is seen.
    torn.write_text("".join(json.dumps(row) + "\n" for row in a_curve([0.0, 6.0, 8.0])))
    assert sorted(siblings.returns()) == [[1.0, 2.0, 3.0], [6.0, 8.0]]
    assert median_stop.Siblings(tmp_path / "nowhere", CONFIG).returns() == []


def test_no_more_siblings_are_read_than_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(median_stop, "_MAX_SIBLINGS", 3)
    five(tmp_path)
    assert len(median_stop.Siblings(tmp_path, CONFIG).returns()) == 3


# ------------------------------------------------------------------------ the record


STOP = median_stop.Stop(CONFIG.identity(), 4, 2, -5.0, 1.5, 7)


def test_a_record_comes_back(tmp_path: Path) -> None:
    assert median_stop.read(tmp_path, CONFIG) is None
    (tmp_path / median_stop.RECORD).write_bytes(median_stop.to_bytes(STOP))
    assert median_stop.read(tmp_path, CONFIG) == STOP
    # For another fidelity, or of a fork, it says nothing.
    assert median_stop.read(tmp_path, CONFIG.replace(task={"epochs": 8})) is None
    assert median_stop.read(tmp_path, CONFIG.replace(optimizer={"lr": 0.5})) is None


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "null", "{}", "[" * 3000, json.dumps(vars(STOP) | {"more": 1}), "x" * 5000,
        *(json.dumps(vars(STOP) | change) for change in (
            {"epoch": 1}, {"epoch": 4}, {"epoch": 2.0}, {"epoch": True}, {"siblings": "7"},
            {"median": float("nan")}, {"best": float("inf")}, {"best": None}, {"identity": ["a"]},
        )),
    ],
)  # fmt: skip
def test_invalid_records_are_ignored(content: str, tmp_path: Path) -> None:
    (tmp_path / median_stop.RECORD).write_text(content)
    assert median_stop.read(tmp_path, CONFIG) is None


# ------------------------------------------------------------------------ a trial


def train(directory: Path, *, stop_poor: bool = True, config: TrialConfig = CONFIG, **more: Any) -> Any:
    return run_quietly(
        config, directory, trial_id=directory.name, siblings=directory.parent,
        stop_poor=stop_poor, **more,
    )  # fmt: skip


def state(directory: Path) -> dict[str, bytes]:
    """What a trial leaves that no clock decides: its curve, its record, and its state's arrays."""
    newest = checkpoint.read(checkpoint.Storage(directory).paths()[0])
    return {
        "epoch": str(newest.epoch).encode(),
        "curve": (directory / "curve.jsonl").read_bytes(),
        "record": (directory / median_stop.RECORD).read_bytes(),
        **{name: array.tobytes() for name, array in newest.arrays.items()},
    }


def kept(outcome: runner.Outcome) -> dict[str, float]:
    """Statistics that do not say what this very process did."""
    own = ("here", "seconds", "second", "continued")
    return {k: v for k, v in outcome.statistics.items() if not any(word in k for word in own)}


def test_a_poor_trial_stops(tmp_path: Path) -> None:
    five(tmp_path)
    outcome = train(tmp_path / "poor")
    stop = median_stop.read(tmp_path / "poor", CONFIG)
    assert stop is not None
    assert (stop.epoch, stop.epochs, stop.siblings) == (2, 4, 5)
    assert stop.median == 1e6 + 0.5
    curve = read_curve(tmp_path / "poor")
    assert [row["epoch"] for row in curve] == [0, 1, 2]
    assert stop.best == max(row["return_mean"] for row in curve[1:])
    # The worse of its last return and the median.
    assert outcome.objective == -curve[2]["return_mean"] == max(-curve[2]["return_mean"], -stop.median)
    values = outcome.statistics
    assert (values["stopped"], values["diverged"], values["epochs"]) == (1.0, 0.0, 2.0)
    assert (values["env_steps"], values["env_steps_not_trained"]) == (2 * STEPS, 2 * STEPS)
    assert "is below 1000000.5, the median of 5 other trials" in (tmp_path / "poor" / "log.txt").read_text()
    # Up to there it is the trial that was not stopped.
    alone = tmp_path / "alone" / "whole"  # where it finds no checkpoint of the other
    whole = train(alone, stop_poor=False)
    assert whole.statistics["continued"] == 0.0
    assert read_curve(alone)[:3] == curve
    assert (whole.statistics["stopped"], whole.statistics["env_steps_not_trained"]) == (0.0, 0.0)
    assert not (alone / median_stop.RECORD).exists()


def test_a_good_trial_continues(tmp_path: Path) -> None:
    five(tmp_path, value=-1e6)
    outcome = train(tmp_path / "good")
    assert (outcome.statistics["stopped"], outcome.statistics["epochs"]) == (0.0, 4.0)
    assert not (tmp_path / "good" / median_stop.RECORD).exists()


@pytest.mark.parametrize("stop_poor", [True, False])
@pytest.mark.parametrize("lost", ["nothing", "the epoch", "two epochs"])
def test_a_decision_is_obeyed_whatever_has_become_of_the_siblings(
    tmp_path: Path, lost: str, stop_poor: bool
) -> None:
    """As if it had been killed after the record: before the epoch was saved, and after."""
    siblings = five(tmp_path)
    outcome, before = train(tmp_path / "poor"), state(tmp_path / "poor")
    for path in siblings:
        shutil.rmtree(path)
    (tmp_path / "poor" / "results.json").unlink()
    newest, older = checkpoint.Storage(tmp_path / "poor").paths()
    for path in {"nothing": [], "the epoch": [newest], "two epochs": [newest, older]}[lost]:
        path.unlink()
    again = train(tmp_path / "poor", stop_poor=stop_poor)
    assert again.objective == outcome.objective
    assert kept(again) == kept(outcome)
    assert state(tmp_path / "poor") == before


def test_a_trial_that_was_not_stopped_in_time_continues(tmp_path: Path) -> None:
    """Whoever finds a checkpoint without a record does not decide on its epoch again."""

    class Enough(Exception):
        """Ends the first process in its third epoch."""

    directory, curve = tmp_path / "late", tmp_path / "late" / "curve.jsonl"

    def tick() -> None:
        if curve.exists() and len(read_curve(directory)) == 3:
            raise Enough

    with pytest.raises(Enough):
        train(directory, tick=tick)
    five(tmp_path)  # that have come to epoch 2 by now, and no further
    assert train(directory).statistics["epochs"] == 4.0
    assert not (directory / median_stop.RECORD).exists()


KILLED = """
import os, signal, sys
from pathlib import Path

def watch(event, arguments):
    if event == "os.rename" and os.fsdecode(arguments[1]).endswith(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
sys.path.insert(0, sys.argv[1])
from tests.trial.test_median_stop import train
train(Path(sys.argv[2]))
"""


@pytest.mark.parametrize("file", ["checkpoint-000002.safetensors", "results.json"])
def test_a_trial_that_is_killed_after_the_decision(tmp_path: Path, file: str) -> None:
    """By SIGKILL, just before the epoch is saved, and before the result is."""
    directory, whole = tmp_path / "here" / "killed", tmp_path / "there" / "whole"
    siblings = five(directory.parent)
    five(whole.parent)
    outcome = train(whole)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ORION_")}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, REPOSITORY, directory, file], env=environment, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert (directory / median_stop.RECORD).exists()
    assert not (directory / file).exists()
    for path in siblings:
        shutil.rmtree(path)
    again = train(directory)
    assert again.objective == outcome.objective
    assert state(directory) == state(whole)


def test_a_stopped_trial_that_is_promoted_resumes_from_there(tmp_path: Path) -> None:
    """Orion copies the directory, the record too, which is for the fidelity below."""
    five(tmp_path)
    train(tmp_path / "parent")
    shutil.copytree(tmp_path / "parent", tmp_path / "child")
    config = CONFIG.replace(task={"epochs": 8})
    child = train(tmp_path / "child", config=config)
    # No sibling has come beyond epoch 2.
    assert child.statistics["continued_from_epoch"] == 2.0
    assert (child.statistics["stopped"], child.statistics["epochs"]) == (0.0, 8.0)
    alone = tmp_path / "alone" / "whole"
    whole = train(alone, config=config, stop_poor=False)
    assert (whole.statistics["continued"], whole.objective) == (0.0, child.objective)
    child_state, whole_state = (
        checkpoint.read(checkpoint.Storage(path).paths()[0]) for path in (tmp_path / "child", alone)
    )
    assert all(np.array_equal(v, whole_state.arrays[k]) for k, v in child_state.arrays.items())


@pytest.mark.parametrize(
    ("change", "more", "part"),
    [
        ({"task": {"seeds": 2}}, {}, "takes trials of one seed, but `task.seeds` is 2"),
        ({}, {"checkpoint_store": "/somewhere"}, "a store is for machines"),
        ({}, {"siblings": None}, "but this one has none"),
    ],
)  # fmt: skip
def test_what_it_is_not_for(tmp_path: Path, change: Any, more: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        run_quietly(
            CONFIG.replace(**change), tmp_path / "it", stop_poor=True, **{"siblings": tmp_path, **more}
        )
    assert not (tmp_path / "it").exists()


def test_by_hand_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--config", "cartpole", "--stop-poor"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ppo-hpo: error: `--stop-poor` compares a trial with the others")


def test_a_sweep_of_several_seeds_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="takes trials of one seed"):
        ppo_hpo.sweep("CartPole-v1", space="classic-control", seeds=2, stop_poor=True, name="it")
    assert not (tmp_path / "it" / "space.yaml").exists()


# ------------------------------------------------------------------------ a sweep

SPACE: dict[str, Any] = {
    **CONFIG.to_mapping(),
    "task": {"epochs": 4, "max_epochs": 4, "steps_per_epoch": 2560, "eval_episodes": 2},
    "optimizer": {"lr": "orion~loguniform(1e-8, 1e-1, precision=4)"},
}
# Five that learn, and one that cannot. They are tried in the order of their numbers.
LRS = [1e-2, 1.1e-2, 1.2e-2, 1.3e-2, 1.4e-2, 1e-8]


def sweep(space: str, name: str, **more: Any) -> ppo_hpo.SweepResult:
    return ppo_hpo.sweep(
        space=space, algorithm="random", name=name, max_trials=len(LRS), executor="single", progress=False,
        warm_start=[{**CONFIG.to_mapping(), "optimizer": {"lr": lr}} for lr in LRS], **more,
    )  # fmt: skip


def test_a_sweep_stops_its_poor_trial_and_counts_what_that_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "space.yaml").write_text(yamlio.dump(SPACE))
    result = sweep("space.yaml", "it", stop_poor=True)
    frame = result.trials.set_index("optimizer.lr")
    assert sorted(frame.index) == sorted(LRS)
    assert set(frame["status"]) == {"completed"}
    assert {lr for lr in LRS if frame.loc[lr, "stopped"]} == {1e-8}
    # By the rule, from the curves: after which epoch its best is below the third of five means.
    curves = {
        lr: [row["return_mean"] for row in read_curve(Path(frame.loc[lr, "working_dir"]))][1:] for lr in LRS
    }
    means = {e: sorted(sum(curves[lr][:e]) / e for lr in LRS[:5]) for e in (2, 3)}
    epoch = min(e for e in (2, 3) if max(curves[1e-8][:e]) < means[e][2])
    poor = frame.loc[1e-8]
    assert (poor["epochs"], poor["env_steps"]) == (epoch, epoch * 2560)
    assert poor["objective"] == -curves[1e-8][epoch - 1]
    saved = (4 - epoch) * 2560
    assert result.cost.stopped_steps == saved
    assert result.cost.env_steps - result.cost.eval_steps == (5 * 4 + epoch) * 2560
    assert f"{saved:,} steps not trained because trials diverged or were poor" in str(result)
    # A process that resumes it from a shell stops as well.
    stored = result.client._experiment.metadata["user_args"]
    assert stored[-1] == "--stop-poor"
    # Of the best, each is taken as it was judged.
    (candidate,) = (c for c in candidates_of(result) if c.config.optimizer.lr == 1e-8)
    assert (candidate.config.task.epochs, candidate.config.max_epochs) == (epoch, 4)
    # Without it, nothing of that is there.
    other = sweep("space.yaml", "other")
    assert not list((tmp_path / "other").rglob(median_stop.RECORD))
    assert set(other.trials["stopped"]) == {0.0}
    assert other.cost.stopped_steps == 0
    assert "diverged or were poor" not in str(other)
    assert "--stop-poor" not in other.client._experiment.metadata["user_args"]


def candidates_of(result: ppo_hpo.SweepResult) -> Any:
    from ppo_hpo.sweeps.candidates import candidates

    return candidates(result.client.fetch_trials(), 10, "it")

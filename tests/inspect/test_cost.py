"""What trials cost, worked out by hand for processes that are killed, fail, and do epochs again."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo import TrialConfig
from ppo_hpo.inspect.cost import Cost, cost_of, costs_of
from ppo_hpo.inspect.report import report, summarise
from ppo_hpo.spec import yamlio
from ppo_hpo.state import worklog
from ppo_hpo.state.checkpoint import Storage, arrays_digest, read
from ppo_hpo.state.curve import read_curve
from tests.runs import run_quietly

REPOSITORY = Path(__file__).parents[2]
# An epoch is 64 ticks of two environments.
STEPS, ENVS, EPOCHS = 128, 2, 3
GROUPS: dict[str, dict[str, Any]] = {
    "env": {"id": "CartPole-v1", "n_envs": ENVS, "max_episode_steps": 20},
    "task": {"epochs": EPOCHS, "max_epochs": EPOCHS, "steps_per_epoch": STEPS, "eval_episodes": 2},
    "model": {"width": 8, "depth": 1},
    "optimizer": {"lr": 1e-3},
    "ppo": {"n_steps": 32, "batch_size": 32, "n_epochs": 1},
}
CONFIG = TrialConfig.from_mapping(GROUPS)
KILLED = """
import json, os, signal, sys
from pathlib import Path
from ppo_hpo import TrialConfig
from ppo_hpo.trial import runner
from ppo_hpo.trial.options import OrionContext, RunOptions

ticks = 0

def tick():
    global ticks
    ticks += 1
    if ticks == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

config = TrialConfig.from_mapping(json.loads(sys.argv[1]))
orion = OrionContext(trial_id=sys.argv[4] or None)
runner.run(config, Path(sys.argv[2]), RunOptions("cpu"), orion, console=False, tick=tick)
"""


class Fault(Exception):
    pass


def killed_at(tick: int, directory: Path, uid: str = "", groups: dict[str, dict[str, Any]] = GROUPS) -> None:
    """Train in a process that kills itself just before that tick."""
    command = [sys.executable, "-c", KILLED, json.dumps(groups), str(directory), str(tick), uid]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def fails_at(tick: int, directory: Path, uid: str | None = None) -> None:
    """Train, and fail just before that tick."""
    left = iter(range(tick - 1))

    def count() -> None:
        if next(left, None) is None:
            raise Fault

    with pytest.raises(Fault):
        run_quietly(CONFIG, directory, trial_id=uid, tick=count)


def spent(directory: Path, uid: str = "") -> tuple[int, int, int]:
    """Steps trained, steps of evaluations, and steps that are kept nowhere."""
    lines = worklog.read(directory, uid)
    return (
        sum(line.steps for line in lines),
        sum(line.eval_steps for line in lines),
        worklog.wasted_steps(lines),
    )


def test_every_process_is_counted(tmp_path: Path) -> None:
    killed_at(64 + 11, tmp_path)
    first = read_curve(tmp_path)[:2]
    # The ten ticks of the second epoch are in nobody's books: that is what `unended` is for.
    assert spent(tmp_path) == (STEPS, sum(row["eval_steps"] for row in first), 0)
    assert [line.state for line in worklog.read(tmp_path, "")] == ["epoch"]
    # The next one resumes from epoch 1, and fails before its fifth tick: four ticks of two steps are lost.
    fails_at(5, tmp_path)
    assert spent(tmp_path) == (STEPS + 8, sum(row["eval_steps"] for row in first), 8)
    outcome = run_quietly(CONFIG, tmp_path)
    curve = read_curve(tmp_path)
    every = sum(row["eval_steps"] for row in curve)
    assert spent(tmp_path) == (STEPS + 8 + 2 * STEPS, every, 8)
    assert outcome.statistics["env_steps_here"] == 2 * STEPS
    # Its third epoch is lost, and done again: one epoch and one evaluation more.
    Storage(tmp_path).path_of(3).unlink()
    run_quietly(CONFIG, tmp_path)
    assert read_curve(tmp_path) == curve
    assert spent(tmp_path) == (STEPS + 8 + 3 * STEPS, every + curve[3]["eval_steps"], 8 + STEPS)
    lines = worklog.read(tmp_path, "")
    assert [(line.state, line.began, line.epoch) for line in lines] == [
        ("epoch", 0, 1), ("failed", 1, 1), ("done", 1, 3), ("done", 2, 3),
    ]  # fmt: skip
    assert all(line.wall_seconds > 0 and line.cpu_seconds > 0 for line in lines)
    # And it is the trial that nothing happened to.
    run_quietly(CONFIG, tmp_path / "undisturbed")
    digests = {
        arrays_digest(read(Storage(place).path_of(3)).arrays)
        for place in (tmp_path, tmp_path / "undisturbed")
    }
    assert len(digests) == 1


def test_each_seed_has_its_own_account(tmp_path: Path) -> None:
    """Killed ten ticks into the second seed's second epoch, then trained to the end by another process."""
    groups = {**GROUPS, "task": {**GROUPS["task"], "seeds": 2}}
    killed_at(EPOCHS * 64 + 64 + 11, tmp_path, groups=groups)
    outcome = run_quietly(TrialConfig.from_mapping(groups), tmp_path)
    lines = worklog.read(tmp_path, "")
    assert [(line.part, line.state, line.began, line.epoch, line.steps) for line in lines] == [
        ("seed-1", "done", 0, 3, 3 * STEPS), ("seed-2", "epoch", 0, 1, STEPS),
        ("seed-1", "done", 3, 3, 0), ("seed-2", "done", 1, 3, 2 * STEPS),
    ]  # fmt: skip
    curves = [read_curve(tmp_path / part) for part in ("seed-1", "seed-2")]
    every = sum(row["eval_steps"] for curve in curves for row in curve)
    assert spent(tmp_path) == (2 * EPOCHS * STEPS, every, 0)
    assert outcome.statistics["env_steps"] == 2 * EPOCHS * STEPS
    assert outcome.statistics["env_steps_here"] == 2 * STEPS


def test_a_retry_in_one_process_counts_what_was_done_twice(tmp_path: Path) -> None:
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 64 + 11:
            raise MemoryError

    outcome = run_quietly(CONFIG, tmp_path, tick=tick, retries=1)
    # Ten ticks of the second epoch were done twice; no evaluation was.
    every = sum(row["eval_steps"] for row in read_curve(tmp_path))
    assert spent(tmp_path) == (3 * STEPS + 20, every, 20)
    assert outcome.statistics["env_steps_here"] == 3 * STEPS + 20
    assert outcome.statistics["eval_steps_here"] == every


def test_lines_of_others_and_torn_lines_are_left_out(tmp_path: Path) -> None:
    row = worklog.Line("mine", "a:1:1", "", "done", 0, 1, STEPS, STEPS, 9, 1.5, 1.0)
    worklog.append(tmp_path, row, logging.getLogger())
    path = tmp_path / worklog.FILE
    good = path.read_text()
    path.write_text(
        good.replace('"mine"', '"parent"') + "3\n{}\n[[[\n" + good.replace("128", "-1")
        + good.replace("128", "true") + good.replace("1.5", "NaN") + good + good[:-20]
    )  # fmt: skip
    assert worklog.read(tmp_path, "mine") == [row]
    assert worklog.read(tmp_path / "nowhere", "mine") == []


def test_report_counts_a_broken_and_a_killed_trial(tmp_path: Path) -> None:
    """Through Orion: one completed at once, one killed and broken, one that failed and went on."""
    from orion.client import build_experiment
    from orion.client.runner import prepare_trial_working_dir

    database = {"type": "pickleddb", "host": str(tmp_path / "orion.pkl")}
    storage = {"type": "legacy", "database": database}
    client = build_experiment(
        "costs", space={"optimizer": {"lr": "uniform(0, 1)"}}, algorithm={"random": {"seed": 1}},
        storage=storage, working_dir=str(tmp_path / "trials"),
    )  # fmt: skip
    (tmp_path / "orion.yaml").write_text(yamlio.dump({"storage": storage}))

    def suggest() -> tuple[Any, Path]:
        found = client.suggest()
        prepare_trial_working_dir(client, found)
        return found, Path(found.working_dir)

    whole, at = suggest()
    client.observe(whole, run_quietly(CONFIG, at, trial_id=whole.id).entries)
    broken, killed_dir = suggest()
    killed_at(2 * 64 + 1, killed_dir, broken.id)
    client.release(broken, status="broken")
    again, failed_dir = suggest()
    fails_at(3, failed_dir, again.id)
    client.observe(again, run_quietly(CONFIG, failed_dir, trial_id=again.id).entries)
    evaluated = [sum(row["eval_steps"] for row in read_curve(p)) for p in (at, killed_dir, failed_dir)]
    trials = {one.id: one for one in client.fetch_trials()}
    each = dict(zip(trials, costs_of(list(trials.values())), strict=True))

    def counts(cost: Cost) -> tuple[int, int, int, int]:
        return cost.env_steps, cost.eval_steps, cost.unkept_steps, cost.unended

    assert trials[broken.id].status == "broken"
    assert counts(each[whole.id]) == (3 * STEPS + evaluated[0], evaluated[0], 0, 0)
    assert counts(each[broken.id]) == (2 * STEPS + evaluated[1], evaluated[1], 0, 1)
    # The untrained policy was evaluated and saved before the first tick; two ticks were lost.
    begun = read_curve(failed_dir)[0]["eval_steps"]
    assert evaluated[2] > begun > 0
    assert counts(each[again.id]) == (3 * STEPS + 4 + evaluated[2], evaluated[2], 4, 0)
    total = cost_of(list(trials.values()))
    assert counts(total) == (8 * STEPS + 4 + sum(evaluated), sum(evaluated), 4, 1)
    assert summarise(client, list(trials.values())).cost == total
    assert total.saved_steps == 0
    client.close()
    # The report and its page say the same; the cost of each trial is in the page.
    page = tmp_path / "page.html"
    text = report("costs", str(tmp_path / "orion.yaml"), str(page))
    assert f"cost        {total.env_steps:,} steps, of which {total.eval_steps:,} in evaluations; " in text
    assert "4 were repeated, or in epochs that did not end" in text
    assert "less than an epoch of each of 1 processes that were killed or still run" in text
    html = page.read_text(encoding="utf-8")
    assert str(total) in html
    for uid, cost in each.items():
        assert (
            f"<tr><td>{uid[:8]}<td>{trials[uid].status}<td>{cost.env_steps:,}<td>{cost.eval_steps:,}" in html
        )
    # It was completed on another machine, and here is only what failed.
    path = failed_dir / worklog.FILE
    lines = path.read_text().splitlines(keepends=True)
    failed = json.loads(lines[0])["process"]
    path.write_text("".join(line for line in lines if json.loads(line)["process"] == failed))
    assert costs_of([trials[again.id]])[0].env_steps == each[again.id].env_steps
    # Where the directories are not, what was reported to Orion is left: the two completed trials'.
    for path in (tmp_path / "trials").glob(f"*/{worklog.FILE}"):
        path.unlink()
    assert cost_of(list(trials.values())).env_steps == 6 * STEPS + evaluated[0] + evaluated[2] - begun

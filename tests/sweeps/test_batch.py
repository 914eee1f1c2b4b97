"""Many trials on worker processes: what they come to, what is not done again, processes that are killed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo import TrialConfig, UserError
from ppo_hpo.state import lock
from ppo_hpo.sweeps.batch import Job, Result, result_of, run_all
from ppo_hpo.sweeps.progress import BatchProgress, epochs_of
from tests.runs import run_quietly
from tests.waiting import wait_for

REPOSITORY = Path(__file__).parents[2]
TINY: dict[str, dict[str, Any]] = {
    "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
    "task": {"epochs": 2, "steps_per_epoch": 256, "eval_episodes": 2},
    "model": {"width": 8, "depth": 1},
    "ppo": {"n_steps": 64, "batch_size": 32, "n_epochs": 1},
}


def job(place: Path, seed: int = 0, **groups: dict[str, Any]) -> Job:
    merged = {g: {**TINY.get(g, {}), **groups.get(g, {})} for g in {*TINY, *groups}}
    merged["task"]["seed"] = seed
    return Job(f"seed {seed}", TrialConfig.from_mapping(merged), place / f"seed-{seed}")


# A hundredth of a second for each step of each environment: an epoch takes more than a second.
SLOW: dict[str, dict[str, Any]] = {
    "env": {"id": "tests.envs:Sleeps-v0", "max_episode_steps": None},
    "task": {"epochs": 3, "steps_per_epoch": 128},
}


def curve(one: Job) -> bytes:
    return (one.directory / "curve.jsonl").read_bytes()


def test_trials_come_to_what_they_come_to_alone_and_only_once(tmp_path: Path) -> None:
    jobs = [job(tmp_path / "batch", seed) for seed in (5, 6, 7)]
    # One is done already, and one is asked for twice.
    alone = [job(tmp_path / "alone", seed) for seed in (5, 6, 7)]
    outcomes = [run_quietly(one.config, one.directory) for one in alone]
    run_quietly(jobs[1].config, jobs[1].directory)
    seen: list[tuple[str, bool]] = []
    told = io.StringIO()

    class Seen(BatchProgress):
        def ended(self, job: Job, result: Result) -> None:
            seen.append((job.label, result.read))
            super().ended(job, result)

    show = Seen(told, jobs)
    results = run_all([*jobs, jobs[0]], n_workers=2, device="cpu", progress=show)
    show.close()
    assert [curve(one) for one in jobs] == [curve(one) for one in alone]
    assert len({curve(one) for one in jobs}) == 3
    assert [r.score for r in results] == [-o.objective for o in [*outcomes, outcomes[0]]]
    for result, outcome in zip(results, outcomes, strict=False):
        assert result.statistics.keys() == outcome.statistics.keys()
        assert result.statistics["return_mean"] == outcome.statistics["return_mean"]
    assert seen[0] == ("seed 6", True)
    assert set(seen[1:]) == {("seed 5", False), ("seed 7", False)}
    lines = told.getvalue().splitlines()
    assert lines[0] == "1 of 3 trials were done before"
    assert [" 2 of 3 " in lines[1], " 3 of 3 " in lines[2], len(lines)] == [True, True, 3]
    assert f"return {results[0].score:8.1f}" in told.getvalue()

    # Once more: nothing is run, and no file is touched.
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "batch").rglob("*")}
    again = run_all(jobs, n_workers=2, device="cpu")
    assert [(r.score, r.read) for r in again] == [(r.score, True) for r in results[:3]]
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "batch").rglob("*")}


def test_what_counts_as_done(tmp_path: Path) -> None:
    one = job(tmp_path, task={"max_epochs": 4})
    assert (result_of(one), epochs_of(one)) == (None, 0)
    outcome = run_quietly(one.config, one.directory)
    found = result_of(one)
    assert found is not None
    assert (found.score, found.read, epochs_of(one)) == (-outcome.objective, True, 2)
    # Further, or another trial, is not.
    assert result_of(Job("", one.config.replace(task={"epochs": 4}), one.directory)) is None
    assert result_of(Job("", one.config.replace(task={"seed": 1}), one.directory)) is None
    for content in (b"", b"[", b"{}", b'[{"name": "objective", "value": "x"}]', b"[" * 100_000):
        (one.directory / "results.json").write_bytes(content)
        assert result_of(one) is None, content[:20]


def test_a_test_on_fresh_episodes_trains_nothing_again(tmp_path: Path) -> None:
    one = job(tmp_path, task={"max_epochs": 4})
    outcome = run_quietly(one.config, one.directory)
    assert result_of(one, 3) is None
    before = curve(one)
    for episodes in (3, 5):
        tested = run_quietly(one.config, one.directory, fresh_episodes=episodes)
        assert tested.objective == outcome.objective
        assert tested.statistics["env_steps_here"] == 0
        content = json.loads((one.directory / "test.json").read_text())
        assert tested.statistics["eval_steps_here"] == sum(content["returns"])  # each step pays 1
        found = result_of(one, episodes)
        assert found is not None
        assert found.score == content["score"] == pytest.approx(sum(content["returns"]) / episodes)
        assert result_of(one, episodes + 1) is None
        assert result_of(one) == replace(found, score=-outcome.objective)
    assert curve(one) == before
    # Another epoch's policy is not the one that is to be tested.
    run_quietly(one.config.replace(task={"epochs": 3}), one.directory)
    with pytest.raises(
        UserError, match="needs the policy after epoch 2, but this directory has that of epoch 3"
    ):
        run_quietly(one.config, one.directory, fresh_episodes=4)
    for text in ("", "[]", "{}", '{"score": 1, "returns": "x"}'):
        (one.directory / "test.json").write_text(text)
        assert result_of(one, 5) is None


def test_a_trial_that_diverged_is_tested_by_its_worst_evaluation(tmp_path: Path) -> None:
    env = {"id": "tests.envs:BecomesNaN-v0", "kwargs": {"after": 150}, "max_episode_steps": 50}
    one = job(tmp_path, env=env)
    outcome = run_quietly(one.config, one.directory, fresh_episodes=3)
    found = result_of(one, 3)
    assert found is not None
    assert (found.score, found.statistics["diverged"]) == (-outcome.objective, 1.0)
    assert json.loads((one.directory / "test.json").read_text())["returns"] == []


def fails(place: Path, how: str, notes: Path, at: int = 300) -> Job:
    kwargs = {"how": how, "at": at, "notes": str(notes)}
    env = {"id": "tests.envs:Fails-v0", "kwargs": kwargs, "max_episode_steps": None}
    return job(place, env=env)


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    undisturbed = fails(tmp_path / "one", "", tmp_path / "notes")
    run_quietly(undisturbed.config, undisturbed.directory)
    killed = fails(tmp_path / "other", "kill:1", tmp_path / "notes")
    (result,) = run_all([killed], n_workers=1, device="cpu")
    assert (tmp_path / "notes-kill:1").stat().st_size == 1
    assert curve(killed) == curve(undisturbed)
    assert result.score == result.statistics["return_mean"]


def test_a_worker_that_is_killed_each_time(tmp_path: Path) -> None:
    one = fails(tmp_path, "kill", tmp_path / "notes", at=100)
    death = r"seed-0 failed: the worker process \d+ ended in mid-trial, by signal SIGKILL\. Finished"
    with pytest.raises(UserError, match=death):
        run_all([one], n_workers=2, device="cpu")
    assert (tmp_path / "notes-kill").stat().st_size == 3


def test_a_trial_that_fails_stops_the_others(tmp_path: Path) -> None:
    slow = job(tmp_path, 1, env={"id": "tests.envs:Sleeps-v0"}, task={"epochs": 1000, "max_epochs": 1000})
    bad = fails(tmp_path, "short", tmp_path / "notes")
    with pytest.raises(
        UserError, match=r"returned an observation of shape \(1,\), .* Rerun the command to resume\."
    ):
        run_all([slow, bad], n_workers=2, device="cpu")
    assert lock.active_writer(slow.directory) is None


def test_too_few_workers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`n_workers >= 1` must hold, but got 0"):
        run_all([job(tmp_path)], n_workers=0)


def test_killed_with_its_workers_it_goes_on(tmp_path: Path) -> None:
    jobs = [job(tmp_path / "batch", seed, **SLOW) for seed in (0, 1)]
    code = """
import sys
from pathlib import Path
from ppo_hpo.sweeps.batch import run_all
from tests.sweeps.test_batch import SLOW, job
run_all([job(Path(sys.argv[1]), seed, **SLOW) for seed in (0, 1)], n_workers=2, device="cpu")
"""
    # No guard against being imported again is needed: workers are no copies of this script.
    leader = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "batch")], cwd=REPOSITORY)
    wait_for(lambda: all(epochs_of(one) >= 1 for one in jobs), 300)
    holders = [lock.active_writer(one.directory) for one in jobs]
    leader.kill()
    leader.wait()
    # Nobody is left behind: each worker ends by itself at its next step.
    wait_for(lambda: all(lock.active_writer(one.directory) is None for one in jobs), 300)
    assert None not in holders
    assert all(result_of(one) is None for one in jobs)
    before = [epochs_of(one) for one in jobs]
    results = run_all(jobs, n_workers=2, device="cpu")
    assert [r.statistics["continued_from_epoch"] for r in results] == before
    # The same environment without the sleep.
    quick = {**SLOW, "env": {**SLOW["env"], "id": "tests.envs:EndlessReward-v0"}}
    alone = [job(tmp_path / "alone", seed, **quick) for seed in (0, 1)]
    for one in alone:
        run_quietly(one.config, one.directory)
    assert [curve(one) for one in jobs] == [curve(one) for one in alone]

"""Trials of several seeds: each of them is the trial that it would be alone, whatever happens on the way."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo import PPO, objective
from ppo_hpo.inspect.clean import clean
from ppo_hpo.ppo.components import ActorCritic, LRSchedule, Optimizer, RolloutLoader
from ppo_hpo.spec import randomness, results, trial_seeds, yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import CheckpointError, UserError
from ppo_hpo.spec.space import get_space
from ppo_hpo.state.checkpoint import Storage, arrays_digest, read
from ppo_hpo.state.remote_store import Store
from ppo_hpo.trial import failure, runner
from tests.envs import Fails
from tests.runs import run_quietly

REPOSITORY = Path(__file__).parents[2]
EPOCHS, STEPS = 3, 128
PARTS = ["seed-1", "seed-2", "seed-3"]
# Of `task.seed` 0.
TUNING, TEST = [0, 4057327236, 3224012862], [5681183425, 4591701212]
GROUPS: dict[str, dict[str, Any]] = {
    "env": {"id": "tests.envs:RandomWalk-v0", "n_envs": 2},
    "task": {"epochs": EPOCHS, "max_epochs": EPOCHS, "steps_per_epoch": STEPS, "eval_episodes": 3,
             "seed": 7, "seeds": 3},
    "model": {"width": 8, "depth": 1},
    "optimizer": {"lr": 1e-2},
    "lr_schedule": {"name": "linear"},
    "normalize": {"norm_obs": True, "norm_reward": True},
    "ppo": {"n_steps": 32, "batch_size": 32, "n_epochs": 2},
}  # fmt: skip
CONFIG = TrialConfig.from_mapping(GROUPS)


def run(directory: Path, groups: dict[str, Any] | None = None, **options: Any) -> runner.Outcome:
    return run_quietly(CONFIG.replace(**(groups or {})), directory, **options)


def state(directory: Path, epoch: int = EPOCHS) -> tuple[str, Any]:
    checkpoint = read(Storage(directory).path_of(epoch))
    return arrays_digest(checkpoint.arrays), checkpoint.meta["curve"]


def told(directory: Path) -> dict[str, float]:
    return {entry["name"]: entry["value"] for entry in json.loads((directory / "results.json").read_text())}


def assert_equal(one: Path, other: Path) -> None:
    for part in PARTS:
        assert state(one / part) == state(other / part)
        assert (one / part / "curve.jsonl").read_bytes() == (other / part / "curve.jsonl").read_bytes()
    assert (one / "curve.jsonl").read_bytes() == (other / "curve.jsonl").read_bytes()
    assert (one / "config.yaml").read_bytes() == (other / "config.yaml").read_bytes()
    # All but what the clock says, and what tells how it came here.
    here = {"env_steps_here", "eval_steps_here", "wall_seconds", "cpu_seconds", "steps_per_second"}
    here |= {"continued", "continued_from_epoch"}
    left, right = told(one), told(other)
    assert left.keys() == right.keys() >= here
    assert {n: v for n, v in left.items() if n not in here} == {
        n: v for n, v in right.items() if n not in here
    }


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a trial that nobody disturbed."""
    directory = tmp_path_factory.mktemp("seeds") / "through"
    run(directory)
    return directory


# ------------------------------------------------------------------------- which they are


def test_the_numbers_stay_what_they_are() -> None:
    # Checkpoints are found by them, and published results rest on them.
    config = TrialConfig().replace(task={"seeds": 3})
    assert trial_seeds.tuning_seeds(config) == TUNING
    assert trial_seeds.fresh_seeds(config, 2) == TEST


@pytest.mark.parametrize("seed", [0, 7, TUNING[1], TEST[0], 2**31, 2**32, 2**63 - 1])
def test_tuning_and_test_seeds_are_disjoint(seed: int) -> None:
    config = TrialConfig().replace(task={"seed": seed, "seeds": 1000})
    tuning, test = trial_seeds.tuning_seeds(config), trial_seeds.fresh_seeds(config, 1000)
    assert tuning[0] == seed
    assert len({*tuning, *test}) == 2000
    # By construction, and not by luck: also where `task.seed` is of the other kind.
    assert all(2**31 <= number < 2**32 for number in tuning[1:])
    assert all(2**32 <= number < 2**32 + 2**31 for number in test)
    # Each list begins as a longer one, and what is tested does not depend on what was tuned.
    assert trial_seeds.tuning_seeds(config.replace(task={"seeds": 3})) == tuning[:3]
    assert trial_seeds.fresh_seeds(config.replace(task={"seeds": 1}, ppo={"gamma": 0.5}), 5) == test[:5]


def test_a_number_that_comes_twice_or_is_the_seed_itself_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = [5, 9, 5, 2**31 + 9, 6]  # only the last 31 bits count
    monkeypatch.setattr(randomness, "integer_seed", lambda seed, purpose, index: draws[index])
    for seed, expected in ((0, [5, 9, 6]), (2**32 + 9, [5, 6])):
        config = TrialConfig().replace(task={"seed": seed})
        assert [number - 2**32 for number in trial_seeds.fresh_seeds(config, len(expected))] == expected
    config = TrialConfig().replace(task={"seed": 2**31 + 5, "seeds": 3})
    assert [number - 2**31 for number in trial_seeds.tuning_seeds(config)] == [5, 9, 6]


def test_seeds_that_are_searched_are_refused() -> None:
    from ppo_hpo.spec.prior import check_prior

    for key, prior in (("seeds", "uniform(1, 3, discrete=True)"), ("aggregate", "choices(['mean', 'iqm'])")):
        with pytest.raises(UserError, match=f"`task.{key}` must be the same for every trial"):
            check_prior("task", key, prior)


def test_a_task_has_one_seed() -> None:
    parts = ActorCritic(), RolloutLoader("CartPole-v1"), Optimizer(), LRSchedule()
    task = PPO(*parts, "cpu", task={"seeds": 2})
    with pytest.raises(UserError, match=r"`task\.seeds` must be 1 for a PPO task, but got 2"):
        task.init()


# ---------------------------------------------------------------------------- one number


@pytest.mark.parametrize(
    ("scores", "mean", "median", "iqm", "worst"),
    [
        ([5.0], 5.0, 5.0, 5.0, 5.0),
        ([9.0, 1.0, 2.0], 4.0, 2.0, 4.0, 1.0),  # a quarter of 3 is no whole seed: nothing is cut
        ([8.0, 100.0, 4.0, -2.0], 27.5, 6.0, 6.0, -2.0),  # of 4, one each side
        ([1.0, 2.0, 3.0, 7.0, 100.0], 22.6, 3.0, 4.0, 1.0),  # of 5, one each: (2 + 3 + 7) / 3
        ([0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 50.0], 71 / 7, 4.0, 4.2, 0.0),  # of 7, one each: 21 / 5
        ([0.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 64.0], 12.0, 4.0, 4.5, 0.0),  # of 8, two each: 18 / 4
    ],
)
def test_aggregates_by_hand(
    scores: list[float], mean: float, median: float, iqm: float, worst: float
) -> None:
    from scipy.stats import trim_mean

    for how, expected in (("mean", mean), ("median", median), ("iqm", iqm), ("worst", worst)):
        assert results.aggregate(scores, how) == pytest.approx(expected)
        # The order in which seeds were trained is not in it, not even by rounding.
        assert results.aggregate(scores[::-1], how) == results.aggregate(scores, how)
    assert results.aggregate(scores, "iqm") == pytest.approx(trim_mean(scores, 0.25))


def test_statistics_of_seeds_by_hand() -> None:
    # The second seed diverged after one epoch: it counts with its worst evaluation, -6, not its last, 2.
    each = [
        {"return_mean": 10.0, "return_std": 1.0, "epochs": 3.0, "diverged": 0.0, "env_steps": 300.0,
         "retries": 0.0, "wall_seconds": 4.0, "steps_per_second": 0.0, "continued": 1.0,
         "continued_from_epoch": 3.0},
        {"return_mean": 2.0, "return_std": 4.0, "epochs": 1.0, "diverged": 1.0, "env_steps": 150.0,
         "retries": 2.0, "wall_seconds": 5.0, "steps_per_second": 70.0, "continued": 0.0,
         "continued_from_epoch": 0.0},
    ]  # fmt: skip
    value, found = results.combine([-10.0, 6.0], each, "mean")
    assert value == -2.0
    assert found == {
        "return_mean": 6.0, "return_std": 2.5, "epochs": 1.0, "diverged": 1.0, "env_steps": 450.0,
        "retries": 2.0, "wall_seconds": 9.0, "steps_per_second": 70.0, "continued": 1.0,
        "continued_from_epoch": 1.5, "seeds": 2.0, "seeds_std": 8.0, "seed_1": 10.0, "seed_2": -6.0,
    }  # fmt: skip
    assert results.combine([-10.0, 6.0], each, "worst")[0] == 6.0
    assert results.seeds_text(found) == "of 2 seeds: 10.0, -6.0; standard deviation 8.0"
    assert results.seeds_text(each[0]) == ""


def test_a_curve_of_seeds_goes_as_far_as_all_have_one() -> None:
    def row(epoch: int, value: float) -> dict[str, Any]:
        columns = {"return_mean": value, "return_std": 2 * value, "return_median": value - 1}
        return {"epoch": epoch, "env_steps": 100 * epoch, "eval_steps": 5, "episode_length": 9.0} | columns

    curve = results.combine_curves([[row(0, 1.0), row(1, 2.0), row(2, 3.0)], [row(0, 4.0), row(1, 6.0)]])
    assert curve == [
        {"epoch": 0, "env_steps": 0, "eval_steps": 10, "return_mean": 2.5, "return_std": 5.0,
         "return_median": 1.5, "episode_length": 9.0},
        {"epoch": 1, "env_steps": 200, "eval_steps": 10, "return_mean": 4.0, "return_std": 8.0,
         "return_median": 3.0, "episode_length": 9.0},
    ]  # fmt: skip
    assert all(results.is_row(line) for line in curve)


# ------------------------------------------------------------------------------ real runs


def test_each_seed_is_the_trial_of_that_one_seed(through: Path, tmp_path: Path) -> None:
    numbers = trial_seeds.tuning_seeds(CONFIG)
    assert len(set(numbers)) == 3
    scores, curves = [], []
    for part, number in zip(PARTS, numbers, strict=True):
        alone = run(tmp_path / part, {"task": {"seed": number, "seeds": 1}})
        assert state(tmp_path / part) == state(through / part)
        assert (tmp_path / part / "curve.jsonl").read_bytes() == (through / part / "curve.jsonl").read_bytes()
        assert (tmp_path / part / "config.yaml").read_bytes() == (through / part / "config.yaml").read_bytes()
        assert told(through / part)["objective"] == alone.objective
        assert "seeds" not in alone.statistics
        scores.append(-alone.objective)
        curves.append(state(through / part)[1])
    assert len({state(through / part)[0] for part in PARTS}) == 3
    found = told(through)
    assert [found[f"seed_{number}"] for number in (1, 2, 3)] == scores
    assert -found["objective"] == found["return_mean"] == pytest.approx(sum(scores) / 3)
    squares = [(score - sum(scores) / 3) ** 2 for score in scores]
    assert found["seeds_std"] == pytest.approx(math.sqrt(sum(squares) / 3))
    assert found["seeds_std"] > 0
    assert found["env_steps"] == found["env_steps_here"] == 3 * EPOCHS * STEPS
    assert found["eval_steps"] == sum(row["eval_steps"] for curve in curves for row in curve)
    lines = [json.loads(line) for line in (through / "curve.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    assert [line["env_steps"] for line in lines] == [0, 3 * STEPS, 6 * STEPS, 9 * STEPS]
    assert lines[-1]["return_mean"] == found["return_mean"]
    rows = [json.loads(line) for line in (through / "timing.jsonl").read_text().splitlines()]
    assert [(row["part"], row["epoch"]) for row in rows] == [(p, e) for p in PARTS for e in (1, 2, 3)]


def test_one_seed_is_what_it_was(tmp_path: Path) -> None:
    run(tmp_path, {"task": {"seeds": 1, "aggregate": "worst"}})
    assert not list(tmp_path.glob("seed-*"))
    assert not {"seeds", "aggregate"} & yamlio.load(tmp_path / "config.yaml")["task"].keys()
    assert not {name for name in told(tmp_path) if name.startswith("seed")}
    assert '"part"' not in (tmp_path / "timing.jsonl").read_text()


def test_another_aggregate_trains_nothing(through: Path, tmp_path: Path) -> None:
    shutil.copytree(through, tmp_path / "copy")
    scores = sorted(told(through)[f"seed_{number}"] for number in (1, 2, 3))
    for how, expected in (("worst", scores[0]), ("median", scores[1])):
        outcome = run(tmp_path / "copy", {"task": {"aggregate": how}})
        assert -outcome.objective == expected
        assert outcome.statistics["env_steps_here"] == 0
        # What the seeds had done before all of them: 3 epochs each.
        assert outcome.statistics["continued_from_epoch"] == EPOCHS
    # More seeds: those that are there are kept.
    more = run(tmp_path / "copy", {"task": {"seeds": 4}})
    assert more.statistics["env_steps_here"] == EPOCHS * STEPS
    assert [state(tmp_path / "copy" / part) for part in PARTS] == [state(through / part) for part in PARTS]


def test_killed_at_random_moments(through: Path, tmp_path: Path) -> None:
    config, directory, kills = tmp_path / "config.yaml", tmp_path / "trial", 16
    config.write_text(yamlio.dump(CONFIG.to_mapping()))
    command = [sys.executable, "-m", "tests.trial.kill_loop", config, directory, str(kills), "seeds", "2"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == kills
    assert_equal(through, directory)
    # The kills came in every seed: each was begun or continued by more than one process.
    log = (directory / "log.txt").read_text()
    assert all(log.count(f"{part} of 3: task.seed ") >= 2 for part in PARTS)


@pytest.mark.parametrize("how", ["stopped", "taken over"])
def test_a_trial_resumes_at_its_seed(how: str, through: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yamlio.dump(CONFIG.to_mapping()))
    for directory in (tmp_path / f"trial-{number}" for number in range(20)):
        command = [sys.executable, "-m", "ppo_hpo", "run", "--config", str(config), "--dir", str(directory)]
        command += ["--device", "cpu"]
        first = subprocess.Popen(
            command, cwd=REPOSITORY, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while not (directory / "seed-2" / "checkpoint-000001.safetensors").exists() and first.poll() is None:
            time.sleep(0.001)
        # Stopped for good, or so that another process asks it to give way and wakes it.
        first.send_signal(signal.SIGTERM if how == "stopped" else signal.SIGSTOP)
        if how == "stopped":
            first.wait()
        if not (directory / "seed-3").exists() and not (directory / "results.json").exists():
            break
        first.kill()  # The signal came too late: the machine had something else to do.
        first.wait()
    left = {part: len(Storage(directory / part).paths()) for part in PARTS}
    assert (left["seed-1"], left["seed-3"]) == (2, 0)
    if how == "stopped":
        assert first.wait() == 143
    else:
        command.append("--takeover")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "has done epoch 3 already" in done.stderr
    assert "of 3 seeds: " in done.stdout
    here = told(directory)
    if how == "taken over":
        assert first.wait() == 0
        last = told(directory)
        if "lost the trial" in (directory / "log.txt").read_text():
            # The first one reports what the second left, and its own steps: of one seed and at least an epoch
            # of the next. It came to the third when all was done, or had just begun with it.
            assert (EPOCHS + 1) * STEPS <= last["env_steps_here"] < (2 * EPOCHS + 1) * STEPS
            assert last["continued_from_epoch"] in (0.0, (0 + 0 + EPOCHS) / 3)
        else:  # it did the rest before it saw that it was asked
            assert (last["env_steps_here"], last["continued_from_epoch"]) == (0, EPOCHS)
    else:
        assert 0 < here["env_steps_here"] < 2 * EPOCHS * STEPS
    assert here["continued"] == 1.0
    assert_equal(through, directory)


@pytest.mark.parametrize("how", ["asha", "hyperband", "store"])
def test_promotions_continue_every_seed(how: str, through: Path, tmp_path: Path) -> None:
    """As each algorithm does it; all of it under Orion below."""
    lower, upper = tmp_path / "trials" / "1a", tmp_path / "trials" / "2a"
    store = str(tmp_path / "store") if how == "store" else None
    run(lower, {"task": {"epochs": 1}}, trial_id="1a", siblings=lower.parent, checkpoint_store=store)
    if how == "asha":
        shutil.copytree(lower, upper)
    if how == "store":
        shutil.rmtree(lower.parent)
    outcome = run(upper, trial_id="2a", siblings=upper.parent, checkpoint_store=store)
    assert outcome.statistics["env_steps_here"] == 3 * (EPOCHS - 1) * STEPS
    assert outcome.statistics["continued_from_epoch"] == 1.0
    for part in PARTS:
        assert state(upper / part) == state(through / part)
        assert store is None or len(Store(store).names("trials", f"2a-{part}")) == 2
    assert (upper / "curve.jsonl").read_bytes() == (through / "curve.jsonl").read_bytes()


@pytest.mark.parametrize("store", [False, True])
def test_a_fork_takes_every_seed_of_its_parent(store: bool, tmp_path: Path) -> None:
    there = str(tmp_path / "store") if store else None
    parent, child = tmp_path / "trials" / "1a", tmp_path / "trials" / "2a"
    run(parent, {"task": {"epochs": 1}}, trial_id="1a", checkpoint_store=there)
    if not store:
        shutil.copytree(parent, child)
    outcome = run(
        child,
        {"optimizer": {"lr": 1e-3}},
        trial_id="2a",
        checkpoint_store=there,
        parent="1a" if store else None,
    )
    assert outcome.statistics["forked"] == 1.0
    assert outcome.statistics["env_steps_here"] == 3 * (EPOCHS - 1) * STEPS
    for part in PARTS:
        (born,) = read(Storage(child / part).path_of(EPOCHS)).meta["lineage"]
        assert (born["uid"], born["epoch"]) == ("1a", 1)
        assert born["state_sha256"] == state(parent / part, 1)[0]


def test_a_torn_checkpoint_costs_its_seed_one_epoch(through: Path, tmp_path: Path) -> None:
    shutil.copytree(through, tmp_path / "trial")
    newest = Storage(tmp_path / "trial" / "seed-2").path_of(EPOCHS)
    newest.write_bytes(newest.read_bytes()[:-1])
    outcome = run(tmp_path / "trial")
    assert outcome.statistics["env_steps_here"] == STEPS
    assert_equal(through, tmp_path / "trial")


def test_a_seed_that_diverges_counts_as_its_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = str(tmp_path / "notes")
    env = {"id": "tests.envs:Fails-v0", "kwargs": {"how": "", "notes": notes}}
    monkeypatch.setattr(Fails, "steps_of_all", 0)
    second, begins = tmp_path / "sound" / "seed-2", list[int]()

    def tick() -> None:
        if not begins and Storage(second).path_of(1).exists():
            begins.append(Fails.steps_of_all)

    sound = run(second.parent, {"env": env}, tick=tick)
    monkeypatch.setattr(Fails, "steps_of_all", 0)
    # In the second epoch of the second seed a reward is NaN, once.
    env["kwargs"] = {"how": "nan:1", "at": begins[0] + 5, "notes": notes}
    outcome = run(tmp_path / "nan", {"env": env})
    worst = min(row["return_mean"] for row in state(tmp_path / "nan" / "seed-2", 1)[1])
    assert outcome.statistics["seed_2"] == worst
    for number in (1, 3):
        assert outcome.statistics[f"seed_{number}"] == sound.statistics[f"seed_{number}"]
    scores = [outcome.statistics[f"seed_{number}"] for number in (1, 2, 3)]
    assert outcome.objective == pytest.approx(-sum(scores) / 3)
    assert (outcome.statistics["diverged"], outcome.statistics["epochs"]) == (1.0, 1.0)
    assert len((tmp_path / "nan" / "curve.jsonl").read_text().splitlines()) == 2
    assert 2 * EPOCHS * STEPS + STEPS < outcome.statistics["env_steps"] < 3 * EPOCHS * STEPS


def test_an_error_where_another_seed_had_one_is_another(tmp_path: Path) -> None:
    fails = {"seed-1": 1, "seed-2": 1}

    def tick() -> None:
        # Before the first step of the second epoch, by the records of the trial.
        timing = tmp_path / "timing.jsonl"
        rows = [json.loads(line) for line in timing.read_text().splitlines()] if timing.exists() else []
        if rows and rows[-1]["epoch"] == 1 and fails.get(rows[-1]["part"]):
            fails[rows[-1]["part"]] -= 1
            raise ValueError("a hiccup")

    with pytest.raises(ValueError, match="a hiccup") as caught:
        run(tmp_path, tick=tick)
    failure.stops_the_hunt(caught.value, tmp_path, tmp_path)
    record = failure.read_record(tmp_path)
    assert record is not None
    assert (record.place or "").startswith("seed-1, epoch 2, step 0, ValueError, ")
    # The second seed fails at the very same step, which for one seed would mean that it does each time.
    outcome = run(tmp_path, tick=tick, retries=1)
    assert outcome.statistics["retries"] == 1
    assert "a hiccup (seed-2, epoch 2, step 0, ValueError" in (tmp_path / "log.txt").read_text()
    assert outcome.statistics["continued_from_epoch"] == pytest.approx(1 / 3)
    assert sum(fails.values()) == 0


def test_a_directory_is_of_one_seed_or_of_several(through: Path, tmp_path: Path) -> None:
    run(tmp_path, {"task": {"seeds": 1, "epochs": 1}})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=r"of a trial of one seed, but `task\.seeds` is 3"):
        run(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    with pytest.raises(CheckpointError, match=r"of a trial of several seeds, but `task\.seeds` is 1"):
        run(through, {"task": {"seeds": 1}})
    with pytest.raises(CheckpointError, match=r"task\.seed is 7 there and 8 here"):
        run(through, {"task": {"seed": 8}})


def test_a_link_in_the_place_of_a_seed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    directory = tmp_path / "trial"
    directory.mkdir()
    (directory / "seed-3").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="seed-3 is a link"):
        run(directory)
    # Nor is one followed that a sibling has.
    shutil.rmtree(directory)
    run(tmp_path / "1a", {"task": {"epochs": 1}}, trial_id="1a", siblings=tmp_path)
    (tmp_path / "1a" / "seed-2").rename(tmp_path / "elsewhere" / "seed-2")
    (tmp_path / "1a" / "seed-2").symlink_to(tmp_path / "elsewhere" / "seed-2")
    outcome = run(tmp_path / "2a", trial_id="2a", siblings=tmp_path)
    assert outcome.statistics["env_steps_here"] == (3 * EPOCHS - 2) * STEPS
    one, two = tmp_path / "others" / "1a", tmp_path / "others" / "2a"
    run(one, {"task": {"epochs": 1}}, trial_id="1a", siblings=one.parent)
    one.rename(tmp_path / "elsewhere" / "1a")
    one.symlink_to(tmp_path / "elsewhere" / "1a")
    assert run(two, trial_id="2a", siblings=one.parent).statistics["continued"] == 0.0


# ---------------------------------------------------------------------------- under Orion

SPACE = """
env: {id: "tests.envs:RandomWalk-v0", n_envs: 2}
task:
  epochs: orion~fidelity(1, 4, base=2)
  max_epochs: 4
  steps_per_epoch: 128
  eval_episodes: 2
  seeds: 3
  aggregate: median
model: {width: 4, depth: 1}
optimizer: {lr: "orion~loguniform(1e-4, 1e-1, precision=4)"}
ppo: {n_steps: 32, n_epochs: 1, n_minibatches: 1}
"""


@pytest.mark.parametrize(
    "algorithm",
    [{"asha": {"seed": 1, "num_rungs": 3, "num_brackets": 1}}, {"hyperband": {"seed": 1}},
     {"pbt": {"seed": 1, "population_size": 5, "generations": 2}}],
    ids=lambda value: next(iter(value)),
)  # fmt: skip
def test_orion_promotes_every_seed(algorithm: dict[str, Any], tmp_path: Path) -> None:
    from orion.client import build_experiment

    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    storage = {"type": "legacy", "database": {"type": "pickleddb", "host": str(tmp_path / "db.pkl")}}
    (tmp_path / "orion.yaml").write_text(yamlio.dump({"storage": storage}))
    client = build_experiment(
        "seeds", space=get_space(str(space)), algorithm=algorithm, storage=storage,
        working_dir=str(tmp_path / "trials"), max_trials=10,
    )  # fmt: skip
    client.workon(objective(str(space), console=False), trial_arg="trial", n_workers=1)
    lives: dict[float, list[Any]] = {}
    for found in client.fetch_trials_by_status("completed"):
        lives.setdefault(found.params["optimizer"]["lr"], []).append(found)
    promoted = 0
    for life in lives.values():
        life.sort(key=lambda found: found.params["task"]["epochs"])
        for lower, higher in zip([None, *life], life, strict=False):
            values = {entry.name: entry.value for entry in higher.statistics}
            epochs = higher.params["task"]["epochs"]
            parent = lower
            if "pbt" in algorithm:
                parent = client.get_trial(uid=higher.parent) if higher.parent else None
            began = parent.params["task"]["epochs"] if parent else 0
            assert values["env_steps"] == 3 * epochs * STEPS
            assert values["env_steps_here"] == 3 * (epochs - began) * STEPS
            assert values["continued_from_epoch"] == began
            scores = sorted(values[f"seed_{number}"] for number in (1, 2, 3))
            assert higher.objective.value == -scores[1]
            promoted += began > 0
            if began and not values["forked"]:
                # To the bit what it is by itself.
                own = Path(higher.working_dir)
                alone = TrialConfig.from_mapping(yamlio.load(own / "seed-2" / "config.yaml"))
                run_quietly(alone, tmp_path / higher.id)
                assert state(tmp_path / higher.id, int(epochs)) == state(own / "seed-2", int(epochs))
    assert promoted
    if "asha" not in algorithm:
        return
    told_best = report_of("seeds", tmp_path)
    assert "of 3 seeds: " in told_best
    # Nobody goes on from the trials of the highest rung: of each seed of the best, the newest stays.
    clean("seeds", str(tmp_path / "orion.yaml"))
    top = [found for life in lives.values() for found in life if found.params["task"]["epochs"] == 4]
    top.sort(key=lambda found: found.objective.value)
    assert [path.relative_to(top[0].working_dir) for path in files(top[0])] == [
        Path(part) / "checkpoint-000004.safetensors" for part in PARTS
    ]
    assert not any(files(found) for found in top[1:])


def files(found: Any) -> list[Path]:
    return sorted(Path(found.working_dir).rglob("checkpoint-*"))


def report_of(name: str, directory: Path) -> str:
    from ppo_hpo.inspect.report import report

    return report(name, str(directory / "orion.yaml"))

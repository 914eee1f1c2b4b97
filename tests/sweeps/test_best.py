"""The best trials again on fresh seeds, as a preset and as a policy: from a hunt that was really run."""

from __future__ import annotations

import json
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from ppo_hpo import TrialConfig, UserError, export_policy, load_policy
from ppo_hpo.cli.main import main
from ppo_hpo.orion.experiment import open_experiment, params_of
from ppo_hpo.orion.objective import objective
from ppo_hpo.ppo.policy import Policy
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.randomness import fresh_episode_seeds
from ppo_hpo.spec.results import entries
from ppo_hpo.spec.space import fill, get_space, read_space
from ppo_hpo.spec.stats import advantage_interval, iqm_interval
from ppo_hpo.spec.trial_seeds import fresh_seeds, tuning_seeds
from ppo_hpo.sweeps.batch import Result
from ppo_hpo.sweeps.best import best
from ppo_hpo.sweeps.candidates import Candidate, as_preset, candidates
from ppo_hpo.sweeps.retrain import baseline, conclusions, jobs_of, preset_of, summarise, table
from tests.runs import run_quietly

REPOSITORY = Path(__file__).parents[2]
NAME = "tiny<i>"
SPACE = {
    "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 300},
    "task": {
        "epochs": "orion~fidelity(1, 4, base=2)",
        "max_epochs": 4,
        "steps_per_epoch": 512,
        "eval_episodes": 2,
        "seed": 3,
    },
    "model": {"width": 8, "depth": 1},
    "optimizer": {"lr": "orion~loguniform(1e-4, 1e-2, precision=3)"},
    "ppo": {"n_steps": 64, "batch_size": 32, "n_epochs": 4},
}


@pytest.fixture(scope="module")
def hunted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment with three trials, all of them trained."""
    from orion.client import build_experiment

    root = tmp_path_factory.mktemp("hunted")
    (root / "space.yaml").write_text(yamlio.dump(SPACE))
    database = {"type": "pickleddb", "host": str(root / "orion.pkl")}
    (root / "orion.yaml").write_text(yamlio.dump({"storage": {"type": "legacy", "database": database}}))
    space = str(root / "space.yaml")
    client = build_experiment(
        NAME,
        space=get_space(space, epochs="fidelity(1, 2, base=2)"),
        algorithm={"random": {"seed": 1}},
        storage={"type": "legacy", "database": database},
        working_dir=str(root / "trials"),
        max_trials=3,
    )
    function = objective(space, device="cpu", console=False)
    with client.tmp_executor("singleexecutor", n_workers=1):
        client.workon(function, trial_arg="trial", max_trials=3, n_workers=1)
    client.close()
    return root


def trials_of(root: Path) -> list[Any]:
    """The trials, best first."""
    trials = open_experiment(NAME, str(root / "orion.yaml")).fetch_trials()
    return sorted(trials, key=lambda t: t.objective.value)


def ask(root: Path, *options: str | Path) -> int:
    return main(["best", NAME, "-c", str(root / "orion.yaml"), *map(str, options)])


# ------------------------------------------------------------------------- the command


def test_the_best_and_how_to_train_them_again(hunted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(hunted, "--top", "2") == 0
    text = capsys.readouterr().out
    first, second, _ = trials_of(hunted)
    assert re.findall(r"^\d\. (\w+)  return (\S+) after 2 of 4 epochs, 1,024 steps$", text, re.M) == [
        (t.id[:8], f"{-t.objective.value:.1f}") for t in (first, second)
    ]
    lr = yamlio.load(Path(first.working_dir) / "config.yaml")["optimizer"]["lr"]
    lines = [line.split() for line in text.splitlines()]
    assert ["optimizer.lr", str(lr)] in lines
    assert ["model.width", "8"] in lines
    assert not any(line[:1] == ["ppo.gamma"] for line in lines)  # it has its default
    assert f"ppo-hpo run --config {first.working_dir}/config.yaml --seed 4" in text
    assert text.rstrip().endswith("--test-seeds 10")
    assert not (hunted / "trials" / "best").exists()


def test_on_fresh_seeds(hunted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, place = tmp_path / "page.html", tmp_path / "best"
    options = ["--top", "2", "--test-seeds", "4", "--test-episodes", "6", "--dir", place, "--html", page]
    options += ["--device", "cpu", "--workers", "2"]
    assert ask(hunted, *options) == 0
    said = capsys.readouterr()
    first, second, _ = trials_of(hunted)
    about = json.loads((place / "best.json").read_text())
    one, two, rival = about["tested"]
    assert [item["trial"] for item in (one, two, rival)] == [first.id, second.id, None]
    assert (one["claimed"], two["claimed"]) == (-first.objective.value, -second.objective.value)
    assert rival["label"] == "preset cartpole"
    # 1,024 steps each: 512 are two rollouts of the preset's 256.
    assert [item["steps"] for item in (one, two, rival)] == [1024] * 3

    # The trials are ordinary ones, each on its own seed, and none on a seed of tuning.
    found = [TrialConfig.from_mapping(yamlio.load(p)) for p in place.glob("*/config.yaml")]
    assert len(found) == 12
    assert {config.task.seed for config in found} == set(fresh_seeds(found[0].replace(task={"seed": 3}), 4))
    assert {config.task.epochs for config in found} == {2}
    config = TrialConfig.from_mapping(yamlio.load(Path(first.working_dir) / "config.yaml"))
    assert one["scores"] == pytest.approx(by_hand(config, 4, place, tmp_path))
    assert len(set(one["scores"])) > 1

    # What is told of them.
    assert one["interval"] == list(iqm_interval(one["scores"]))
    assert one["iqm"] == pytest.approx(np.mean(sorted(one["scores"])[1:3]))
    assert one["kept"] == pytest.approx(one["iqm"] - rival["iqm"])
    assert one["kept_interval"] == list(advantage_interval(one["scores"], rival["scores"]))
    assert rival["kept"] is None
    row = next(line for line in said.out.splitlines() if line.startswith(one["label"]))
    assert row.split()[2:5] == ["1,024", f"{one['claimed']:.1f}", f"{one['iqm']:.1f}"]
    assert row.split()[-1] == f"{one['claimed'] - one['iqm']:.1f}"
    assert f"over preset cartpole: claimed {one['claimed'] - rival['iqm']:+.1f}, measured" in said.out
    plan, steps, *runs = said.err.splitlines()
    assert re.fullmatch(
        r"plan        12 runs \(3 configurations, 4 fresh seeds\), 2 at a time, about \d+ s", plan
    )
    assert steps == "            12,288 environment steps, then 6 fresh episodes a run"
    assert len(runs) == 12
    html = page.read_text(encoding="utf-8")
    assert "<h1>tiny&lt;i&gt; (version 1)</h1>" in html
    assert "<script src" not in html
    assert html.count('class="plotly-graph-div"') == 1
    assert "preset cartpole" in html

    # Again, and with one seed more: nothing is trained twice.
    stamps = {path: path.stat().st_mtime_ns for path in place.rglob("curve.jsonl")}
    assert ask(hunted, *options) == 0
    again = capsys.readouterr()
    assert again.out == said.out
    assert again.err == "12 of 12 trials were done before\n"
    more = ["--top", "1", "--test-seeds", "5", "--test-episodes", "6", "--dir", place, "--against", "none"]
    assert ask(hunted, *more, "--device", "cpu") == 0
    text = capsys.readouterr()
    assert text.err.startswith("plan        1 run (1 configuration, 5 fresh seeds), 1 at a time")
    assert text.err.splitlines()[2] == "4 of 5 trials were done before"
    assert "advantage" not in text.out
    assert json.loads((place / "best.json").read_text())["tested"][0]["scores"][:4] == one["scores"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def by_hand(config: TrialConfig, seeds: int, place: Path, tmp_path: Path) -> list[float]:
    """Scores of trials that are trained as ever, and played on episodes that tuning does not have."""
    scores, in_tuning = [], []
    for seed in fresh_seeds(config, seeds):
        own, alone = config.replace(task={"seed": seed}), tmp_path / "alone" / str(seed)
        tested = place / own.identity()[:32]
        in_tuning.append(-run_quietly(own, alone).objective)
        assert (tested / "curve.jsonl").read_bytes() == (alone / "curve.jsonl").read_bytes()
        returns = played(export_policy(tested, tmp_path / "policy"), fresh_episode_seeds(seed, 6))
        assert json.loads((tested / "test.json").read_text())["returns"] == returns
        scores.append(sum(returns) / 6)
    assert scores != in_tuning
    return scores


def played(policy: Policy, seeds: list[int]) -> list[float]:
    """The returns of a policy on episodes of CartPole, one after the other."""
    env, returns = gymnasium.make("CartPole-v1", max_episode_steps=300), []
    for seed in seeds:
        obs, _ = env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(policy.act(obs))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return returns


def test_stopped_it_goes_on(hunted: Path, tmp_path: Path) -> None:
    # Slow trials in the place of the hunt's: the configuration is read from the trial's directory.
    first = Path(trials_of(hunted)[0].working_dir)
    config = yamlio.load(first / "config.yaml")
    config["env"] |= {"id": "tests.envs:Sleeps-v0", "max_episode_steps": None}
    config["task"] |= {"steps_per_epoch": 128, "epochs": 3}
    before = (first / "config.yaml").read_bytes()
    place = tmp_path / "best"
    command = [
        sys.executable, "-m", "ppo_hpo", "best", NAME, "-c", str(hunted / "orion.yaml"), "--top", "1",
        "--test-seeds", "2", "--test-episodes", "1", "--against", "none", "--device", "cpu",
        "--dir", str(place),
    ]  # fmt: skip
    try:
        (first / "config.yaml").write_text(yamlio.dump(config))
        running = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        ends = time.monotonic() + 300
        while sum(path.read_bytes().count(b"\n") > 1 for path in place.glob("*/curve.jsonl")) < 2:
            assert time.monotonic() < ends
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        _, said = running.communicate(timeout=120)
        assert running.returncode == 143
        assert "stopped by SIGTERM. Everything saved is whole. Rerun the command to resume" in said
        assert "Traceback" not in said
        assert not list(place.glob("*/results.json"))
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=300
        )
    finally:
        (first / "config.yaml").write_bytes(before)
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in place.glob("*/results.json")]
    values = [{entry["name"]: entry["value"] for entry in result} for result in results]
    assert [one["continued"] for one in values] == [1.0, 1.0]
    assert all(one["continued_from_epoch"] >= 1 for one in values)


def test_a_preset_is_the_trial(hunted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    assert ask(hunted, "--export", path) == 0
    assert f"trial file  {path}: ppo-hpo run --config {path}" in capsys.readouterr().out
    space = read_space(str(path))
    assert not any(space.priors.values())
    config = TrialConfig.from_mapping(fill(space, {}))
    first = trials_of(hunted)[0]
    own = TrialConfig.from_mapping(yamlio.load(Path(first.working_dir) / "config.yaml"))
    assert config == own.replace(task={"max_epochs": 4})
    assert config.identity() == own.identity()
    text = path.read_text()
    assert text.startswith("# Preset: CartPole-v1 in 1,024 steps. Nothing is searched.\n")
    assert f"trial {first.id}, which claimed {-first.objective.value:.1f}." in text
    assert "after 2 of 4 epochs; --epochs 4 trains it to the end" in text
    # It comes to what the trial came to.
    outcome = run_quietly(config, tmp_path / "again")
    assert outcome.objective == first.objective.value
    assert ask(hunted, "--export", path) == 2
    assert capsys.readouterr().err.endswith("exists already. Choose another name, or remove it.\n")
    assert path.read_text() == text


def test_a_title_cannot_leave_its_comment() -> None:
    text = as_preset(Candidate("1", TrialConfig(), 1.0, "abc"), "a\nppo: {gamma: 2}")
    assert yamlio.parse(text, "preset")["ppo"]["gamma"] == 0.99


def test_the_policy_of_the_best(hunted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "policy.safetensors"
    assert ask(hunted, "--policy", path) == 0
    assert f"policy      {path}" in capsys.readouterr().out
    policy = load_policy(path)
    first = trials_of(hunted)[0]
    own = TrialConfig.from_mapping(yamlio.load(Path(first.working_dir) / "config.yaml"))
    assert policy.config.identity_mapping() == own.identity_mapping()
    assert (policy.epoch, policy.info.id) == (2, "CartPole-v1")
    assert policy.act(np.zeros(4)) in (0, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--html", "page.html"], "`--html` draws test scores. Add --test-seeds N."),
        (
            ["--test-seeds", "1", "--against", "classic-control"],
            "classic-control is a search space, not a preset",
        ),
        (["--test-seeds", "1", "--against", "nothing"], "No space is called 'nothing'."),
        (["--policy", "/nowhere/policy"], "/nowhere/policy cannot be written: No such file or directory."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(
    options: list[str], said: str, hunted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(hunted, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ppo-hpo: error: {said}")
    assert error.count("\n") == 1


# ----------------------------------------------------------------------- made-up trials


def test_the_best_of_each_configuration(tmp_path: Path) -> None:
    from orion.client import build_experiment

    client = build_experiment(
        "made-up",
        space={"optimizer": {"lr": "loguniform(1e-4, 1)"}, "task": {"epochs": "fidelity(1, 4, base=2)"}},
        algorithm={"random": {"seed": 1}},
        storage={"type": "legacy", "database": {"type": "pickleddb", "host": str(tmp_path / "orion.pkl")}},
        working_dir=str(tmp_path / "trials"),
    )
    # 0.1 at three rungs, the second of them best; 0.2 and 0.3 as good, and of 0.3 the longer one.
    for lr, epochs, value, forked in (
        (0.1, 1, -10.0, 0.0), (0.1, 2, -40.0, 1.0), (0.1, 4, -30.0, 0.0), (0.2, 1, -20.0, 0.0),
        (0.3, 1, -20.0, 0.0), (0.3, 4, -20.0, 0.0), (0.4, 4, -5.0, 0.0),
    ):  # fmt: skip
        statistics = {"epochs": float(epochs), "forked": forked}
        params = {"optimizer": {"lr": lr}, "task": {"epochs": epochs}}
        client.insert(params, results=entries(value, statistics))
    client.insert({"optimizer": {"lr": 0.5}, "task": {"epochs": 1}})
    trials = client.fetch_trials()
    with pytest.raises(
        UserError, match=r"config\.yaml is missing: the files of trial \w+ are on another machine"
    ):
        candidates(trials, 1, "made-up")
    for one in trials:
        config = {"optimizer": {"lr": params_of(one)["optimizer.lr"]}}
        config["task"] = {"epochs": params_of(one)["task.epochs"], "max_epochs": 4, "steps_per_epoch": 2048}
        Path(one.working_dir).mkdir(parents=True)
        (Path(one.working_dir) / "config.yaml").write_text(yamlio.dump(config))
    found = candidates(trials, 10, "made-up")
    told = [(c.config.optimizer.lr, c.config.task.epochs, c.claimed, c.forked) for c in found]
    assert told == [(0.1, 2, 40.0, True), (0.3, 4, 20.0, False), (0.2, 1, 20.0, False), (0.4, 4, 5.0, False)]
    assert found[0].steps == 2 * 2048
    assert [c.label[:2] for c in candidates(trials, 2, "made-up")] == ["1.", "2."]
    with pytest.raises(UserError, match="No trial of 'made-up' is completed yet"):
        candidates([one for one in trials if one.status != "completed"], 1, "made-up")
    text = best("made-up", config=orion_file(tmp_path))
    assert f"hyperparameters of {found[0].label} changed during training" in text


def orion_file(root: Path) -> str:
    database = {"type": "pickleddb", "host": str(root / "orion.pkl")}
    (root / "orion.yaml").write_text(yamlio.dump({"storage": {"type": "legacy", "database": database}}))
    return str(root / "orion.yaml")


def test_nothing_is_hunted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = orion_file(tmp_path)
    assert main(["best", "other", "-c", file]) == 2
    assert f"The database {tmp_path / 'orion.pkl'} does not exist" in capsys.readouterr().err
    from orion.core.io.database.ephemeraldb import EphemeralDB

    (tmp_path / "orion.pkl").write_bytes(pickle.dumps(EphemeralDB()))
    assert main(["best", "other", "-c", file]) == 2
    assert "There is no experiment 'other' in the database pickleddb" in capsys.readouterr().err


# -------------------------------------------------------------------------------- parts


def test_one_seed_each_that_tuning_has_not(tmp_path: Path) -> None:
    config = winner().replace(task={"seeds": 3, "aggregate": "worst"})
    found = jobs_of(Candidate("1. aaaa", config, 1.0, "aaaa"), 4, tmp_path)
    assert [one.config.task.seed for one in found] == fresh_seeds(config, 4)
    assert {one.config.task.seeds for one in found} == {1}
    assert not set(tuning_seeds(config)) & {one.config.task.seed for one in found}
    assert len({one.directory for one in found}) == 4
    # More of them: the first stay where they are.
    more = jobs_of(Candidate("1. aaaa", config, 1.0, "aaaa"), 5, tmp_path)
    assert [one.config for one in more[:4]] == [one.config for one in found]
    assert [one.directory for one in more[:4]] == [one.directory for one in found]


def winner(**groups: dict[str, Any]) -> TrialConfig:
    task = {
        "epochs": 3,
        "max_epochs": 9,
        "steps_per_epoch": 20480,
        "seed": 7,
        "eval_episodes": 5,
        "threads": 2,
    }
    return TrialConfig.from_mapping({"task": task, **groups})


def test_the_preset_beside_it_has_equal_steps() -> None:
    found = baseline(winner(env={"id": "CartPole-v1", "n_envs": 4}))
    assert found is not None
    preset = TrialConfig.from_mapping(fill(read_space("cartpole"), {}))
    assert found.label == "preset cartpole"
    assert (found.config.ppo, found.config.optimizer, found.config.lr_schedule) == (
        preset.ppo, preset.optimizer, preset.lr_schedule,
    )  # fmt: skip
    assert found.config.env.n_envs == 8  # the preset's own
    task = found.config.task
    assert (task.epochs, task.max_epochs, task.steps_per_epoch) == (3, 3, 20480)
    assert (task.seed, task.eval_episodes, task.threads) == (7, 5, 2)
    assert (found.claimed, found.trial, found.directory) == (None, None, None)


def test_the_default_where_there_is_no_preset() -> None:
    env = {"id": "Acrobot-v1", "n_envs": 4, "kwargs": {"render_mode": None}, "max_episode_steps": 30}
    assert preset_of(winner(env=env)) is None  # the shipped one has no arguments
    assert preset_of(winner(env={"id": "Acrobot-v1"})) == "acrobot"
    found = baseline(winner(env=env))
    assert found is not None
    assert found.label == "default"
    assert (found.config.ppo, found.config.optimizer) == (TrialConfig().ppo, TrialConfig().optimizer)
    assert found.config.env == TrialConfig.from_mapping({"env": {**env, "n_envs": 8}}).env
    # Whole rollouts of 8 x 256: the nearest to 5,000 steps are 2 of them, to 100 one.
    for steps, nearest in ((5000, 4096), (100, 2048), (20480, 20480)):
        task = {"epochs": 2, "steps_per_epoch": steps}
        odd = TrialConfig.from_mapping(
            {"env": {"n_envs": 1}, "task": task, "ppo": {"n_steps": 20, "batch_size": 20}}
        )
        other = baseline(odd, "default")
        assert other is not None
        assert other.config.task.steps_per_epoch == nearest


def test_what_to_compare_with_can_be_chosen(tmp_path: Path) -> None:
    assert baseline(winner(), "none") is None
    path = tmp_path / "mine.yaml"
    path.write_text(yamlio.dump({"optimizer": {"lr": 0.005}}))
    found = baseline(winner(), str(path))
    assert found is not None
    assert found.config.optimizer.lr == 0.005


def runs(*scores: float, diverged: float = 0.0) -> list[Result]:
    return [Result(score, {"diverged": diverged}) for score in scores]


def test_a_table_by_hand() -> None:
    one = Candidate("1. aaaa", winner(), 50.0, "aaaa")
    other = Candidate("default", winner())
    # Of four, the middle two: 20 and 30 for the one, 24 and 24 for the other.
    rival = runs(24.0, 24.0, 24.0, 24.0)
    tested = [summarise(one, runs(0.0, 20.0, 40.0, 30.0), rival), summarise(other, rival, rival)]
    assert (tested[0].iqm, tested[0].drop, tested[0].kept) == (25.0, 25.0, 1.0)
    assert tested[0].quartiles == (15.0, 32.5)
    assert (tested[1].iqm, tested[1].interval, tested[1].drop, tested[1].kept) == (
        24.0,
        (24.0, 24.0),
        None,
        None,
    )
    low, high = tested[0].interval
    assert tested[0].kept_interval == pytest.approx((low - 24.0, high - 24.0))
    span = f"{low:.1f} to {high:.1f}"
    assert [re.split(r"  +", line) for line in table(tested)] == [
        ["configuration", "steps", "claimed", "test IQM", "95 % interval", "quartiles", "drop"],
        ["1. aaaa", "61,440", "50.0", "25.0", span, "15.0 to 32.5", "25.0"],
        ["default", "61,440", "24.0", "24.0 to 24.0", "24.0 to 24.0"],
    ]
    assert conclusions(tested) == [
        f"winner      claimed 50.0, measured 25.0 on 4 fresh seeds (95 % interval {span})",
        f"advantage   over default: claimed +26.0, measured +1.0 (95 % interval {low - 24:.1f} to "
        f"{high - 24:.1f}); the interval contains 0, so this shows no difference",
    ]


def test_conclusions_that_are_not_always_there() -> None:
    first = Candidate("1. aaaa", winner(), 50.0, "aaaa")
    second = Candidate("2. bbbb", winner(), 45.0, "bbbb")
    rival = runs(1.0, 1.0, 1.0)
    tested = [
        summarise(first, runs(20.0, 21.0, 22.0), rival),
        summarise(second, runs(30.0, 31.0, 32.0, diverged=1.0), rival),
        summarise(Candidate("default", winner().replace(task={"epochs": 2})), rival, rival),
    ]
    assert conclusions(tested)[1:] == [
        "advantage   over default: claimed +49.0, measured +20.0 (95 % interval 19.0 to 21.0)",
        "            default has 40,960 steps, in whole rollouts of its own",
        "best now    2. bbbb with 31.0, which is again the best of several",
        "diverged    2. bbbb: 3 of 3 runs",
    ]
    assert len(conclusions(tested[:1])) == 1

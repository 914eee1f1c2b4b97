"""Faults of the environment in a trial: what is told, what is kept, and what ends well all the same."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_hpo.ppo.task import PPO
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import (
    DeterministicFailure,
    EnvironmentFault,
    ExitOfEnvironment,
    NotFinite,
    UserError,
)
from ppo_hpo.trial import failure, runner
from ppo_hpo.trial.options import RunOptions
from ppo_hpo.trial.retries import Work, place_of, with_retries
from tests.envs import OnlyOne

REPOSITORY = Path(__file__).parents[2]


def config(name: str, n_envs: int = 2, steps: int = 32, **kwargs: Any) -> TrialConfig:
    env = {"id": f"tests.envs:{name}-v0", "n_envs": n_envs, "kwargs": kwargs}
    return TrialConfig.from_mapping({
        "env": env, "task": {"epochs": 2, "steps_per_epoch": steps, "eval_episodes": 3},
        "model": {"width": 4, "depth": 1}, "ppo": {"n_steps": 8, "batch_size": 8, "n_epochs": 1},
    })  # fmt: skip


def run(one: TrialConfig, directory: Path, retries: int = 0) -> runner.Outcome:
    return runner.run(one, directory, RunOptions(device="cpu", retries=retries), console=False)


# ---------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("what", ["nan", "1e39", "reward nan"])
def test_before_the_first_update_it_is_the_environments_fault(what: str, tmp_path: Path) -> None:
    # The first look, and the first rollout.
    for at, name in ((0, "early"), (40, "rollout")):
        with pytest.raises(NotFinite, match="must be finite"):
            run(config("Odd", steps=512, what=what, at=at), tmp_path / name)
    assert not list(tmp_path.glob("*/results.json"))


def test_after_it_the_trial_has_diverged_and_the_log_names_the_environment(tmp_path: Path) -> None:
    outcome = run(config("Odd", steps=256, what="nan", at=100), tmp_path)
    assert outcome.statistics["diverged"] == 1
    assert outcome.objective == -50.0
    said = (tmp_path / "log.txt").read_text()
    assert "of epoch 1: `env.id: tests.envs:Odd-v0` returned the observation [nan, 0.0]" in said


def test_actions_that_are_always_the_same_are_refused() -> None:
    with pytest.raises(UserError, match=r"actions from 500 to 1000, .*RescaleAction\(env, -1, 1\)"):
        PPO.from_config(config("Far"), "cpu")


# --------------------------------------------------------------- ends that are no ends


def test_an_environment_that_cannot_be_closed_changes_no_result(tmp_path: Path) -> None:
    outcome = run(config("Fallible", where="close", how="RuntimeError"), tmp_path / "fails")
    assert outcome.objective == run(config("EndlessReward"), tmp_path / "closes").objective
    said = (tmp_path / "fails" / "log.txt").read_text()
    assert said.count("raised RuntimeError('of its own') as it was closed. This changes no result.") == 2
    assert "in _fail" in said
    assert not (tmp_path / "fails" / "failure.json").exists()


@pytest.mark.parametrize("where", ["init", "reset"])
def test_a_fault_that_comes_again_in_the_first_look_stops_the_hunt(where: str, tmp_path: Path) -> None:
    """It is retried, as one in a step is, and is then told in one sentence."""
    with pytest.raises(UserError, match="of its own") as caught:
        run(config("Fallible", where=where, how="RuntimeError"), tmp_path / "trial", retries=1)
    if where == "reset":
        assert isinstance(caught.value, DeterministicFailure)
        assert "failed again at the same step (first look at the environment, RuntimeError, " in str(
            caught.value
        )
    assert failure.stops_the_hunt(caught.value, tmp_path / "trial", tmp_path)
    kept = (tmp_path / "trial" / "traceback.txt").read_text()
    assert "in _fail" in kept
    record = json.loads((tmp_path / "trial" / "failure.json").read_text())
    assert record["stopped"]
    # Once it is mended the trial runs, and nothing of it is left.
    run(config("Fallible", where="never"), tmp_path / "trial")
    assert not (tmp_path / "trial" / "traceback.txt").exists()


PLACES = """
import sys
def {function}(error):
    raise error
"""


@pytest.mark.parametrize(
    ("module", "function", "epoch", "step", "said"),
    [
        ("ppo_hpo.ppo.evaluate", "step", 0, 0, "evaluation before epoch 1, RuntimeError"),
        ("ppo_hpo.ppo.evaluate", "step", 0, 256, "evaluation after epoch 1, RuntimeError"),
        ("ppo_hpo.envs.make", "probe", 0, 0, "first look at the environment, RuntimeError"),
        ("tests.envs", "step", 1, 7, "epoch 2, step 7, RuntimeError"),
    ],
)
def test_places(module: str, function: str, epoch: int, step: int, said: str) -> None:
    """A function of that module and name raises, as far as its traceback tells."""
    names: dict[str, Any] = {"__name__": module}
    exec(compile(PLACES.format(function=function), "user.py", "exec"), names)
    work = Work(epoch=epoch, step=step)
    with pytest.raises(RuntimeError) as caught:
        names[function](RuntimeError("boom"))
    assert place_of(caught.value, work) == f"{said}, user.py:4"


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("bye"), GeneratorExit()])
def test_an_exit_is_a_failure(error: BaseException) -> None:
    def attempt() -> None:
        raise error

    with pytest.raises(ExitOfEnvironment, match="would end the process as if all were well"):
        with_retries(attempt, Work(), 0)
    with pytest.raises(DeterministicFailure, match="failed again at the same step"):
        with_retries(attempt, Work(), 2, sleep=lambda seconds: None)


def test_what_fails_after_every_retry_is_told_in_one_sentence() -> None:
    def attempt() -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(DeterministicFailure, match="Connection refused: failed again after 2 retries"):
        with_retries(attempt, Work(), 2, sleep=lambda seconds: None)
    with pytest.raises(ConnectionRefusedError):
        with_retries(attempt, Work(), 0)


ENDS = """
import json, sys
from ppo_hpo.spec import yamlio
from ppo_hpo.trial.run_command import RunRequest, run_and_exit_code
found = {}
for where in ("init", "step"):
    for how in ("exit", "keyboard"):
        name = f"{where}-{how}"
        options = [f"env.kwargs.where={where}", f"env.kwargs.how={how}"]
        try:
            found[name] = run_and_exit_code(RunRequest(sys.argv[1], options, dir=f"{sys.argv[2]}/{name}"))
        except Exception as error:
            found[name] = type(error).__name__
print(json.dumps(found))
"""


def test_no_end_looks_like_a_good_one_to_the_shell(tmp_path: Path) -> None:
    from ppo_hpo.spec import yamlio

    (tmp_path / "trial.yaml").write_text(yamlio.dump(config("Fallible").to_mapping()))
    done = subprocess.run(
        [sys.executable, "-c", ENDS, tmp_path / "trial.yaml", tmp_path], cwd=REPOSITORY, capture_output=True,
        text=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    own = "ExitOfEnvironment"
    assert found == {"init-exit": 2, "init-keyboard": own, "step-exit": own, "step-keyboard": own}, (
        done.stderr
    )
    assert "ended the process (SystemExit(0)) as it was imported or made" in done.stderr
    for name in found:
        assert "in _fail" in (tmp_path / name / "traceback.txt").read_text()


def command(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "ppo-hpo", "run", "--config", "cartpole", "--dir", "trial", *options],
        cwd=directory, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["gymnasium", "torch"])
def test_a_file_that_hides_a_package_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("")
    done = command(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"ppo-hpo: error: The current directory has a file {name}.py, which hides the package {name} from "
        f"Python. Rename the file.\n"
    )


def test_a_module_that_parses_arguments_when_it_is_imported(tmp_path: Path) -> None:
    """A file called random.py beside it hides nothing from the libraries that import Python's own."""
    (tmp_path / "random.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "mine.py").write_text("import argparse\nargparse.ArgumentParser('mine').parse_args()\n")
    done = command(tmp_path, "--set", "env.id=mine:Env-v0")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "ppo-hpo: error: `env.id: mine:Env-v0` ended the process (SystemExit(2)) as it was imported or made."
    )
    assert "mine.py" in done.stderr


CRASHES = """
import ctypes, gymnasium
from gymnasium.envs.classic_control import CartPoleEnv

class Crashes(CartPoleEnv):
    steps = 0

    def step(self, action):
        Crashes.steps += 1
        return super().step(action) if Crashes.steps < 50 else ctypes.string_at(0)

gymnasium.register("Crashes-v0", Crashes, max_episode_steps=9)
"""


def test_a_crash_in_c_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CRASHES)
    done = command(tmp_path, "--set", "env.id=mine:Crashes-v0")
    assert done.returncode == -signal.SIGSEGV
    said = (tmp_path / "trial" / "log.txt").read_text()
    assert "Fatal Python error: Segmentation fault" in said
    assert "mine.py" in said


# -------------------------------------------------------------------------- repeating


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("Remembers", {"how": "state"}, "the observation of step 1 differed"),
        ("Remembers", {"how": "seed"}, "the observation of step 1 differed"),
        ("RandomWalk", {}, None),
        ("Target", {}, None),
    ],
)
def test_an_environment_that_does_not_repeat_is_warned_of_once(
    name: str, kwargs: dict[str, Any], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    task = PPO.from_config(config(name, **kwargs), "cpu", logger=logging.getLogger("tests.faults"))
    with caplog.at_level(logging.WARNING):
        task.fit(1)
        task.fit(2)
    warnings = [text for text in caplog.messages if "does not repeat itself" in text]
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


# ------------------------------------------------------------------------ one at a time


def test_an_environment_of_which_only_one_can_exist(tmp_path: Path) -> None:
    one = config("OnlyOne", n_envs=1)
    with pytest.raises(RuntimeError, match="the robot is in use"):
        run(one, tmp_path / "many")
    assert OnlyOne.alive == 0
    made = OnlyOne.made
    outcome = run(one.replace(env={"one_at_a_time": True}), tmp_path / "one")
    assert outcome.objective == -5.0
    assert OnlyOne.alive == 0
    # Two looks; then for each of two epochs one to train in and one to evaluate in, and those before.
    assert OnlyOne.made - made == 2 + 2 + 2 * 2
    with pytest.raises(UserError, match=r"`env\.one_at_a_time` needs `env\.n_envs: 1`"):
        one.replace(env={"one_at_a_time": True, "n_envs": 2})


def test_one_at_a_time_evaluates_the_same_episodes() -> None:
    curves = []
    for alone in (False, True):
        one = config("RandomWalk", n_envs=1).replace(env={"one_at_a_time": alone})
        task = PPO.from_config(one, "cpu")
        task.fit(2)
        curves.append([(row["return_mean"], row["episode_length"]) for row in task.metrics.curve])
        task.finish()
    assert curves[0] == curves[1]


def test_an_environment_fault_keeps_its_cause() -> None:
    with pytest.raises(EnvironmentFault) as caught:
        PPO.from_config(config("Fallible", where="init", how="exit"), "cpu")
    assert isinstance(caught.value.__cause__, SystemExit)

"""The copy of a parent's directory is whole or not there, and a fork never starts from nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ppo_hpo.orion import trial_directory
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import MachineError
from ppo_hpo.state.checkpoint import arrays_digest, read
from ppo_hpo.trial.runner import Outcome
from tests.orion.test_fixes import run
from tests.runs import run_quietly

# A child process copies the parent's directory for a trial, and is killed in the middle of a file, by the
# kernel. Prints what is there then, and after the same was tried again.
INTERRUPTED = """
import os, resource, signal, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
from orion.algo.base import algo_factory
algo_factory.get_class("random")  # which loads the entry points, as every command of Orion's does
from orion.client.runner import prepare_trial_working_dir
from orion.core.worker.trial import Trial

root = Path(sys.argv[1])

def trial(lr, parent=None):
    params = [{"name": "lr", "type": "real", "value": lr}]
    return Trial(experiment=1, params=params, parent=parent, exp_working_dir=str(root))

parent = trial(0.1)
child = trial(0.2, parent.id)

class Client:
    metadata = {}
    def get_trial(self, uid):
        return parent

source = Path(parent.working_dir)
(source / "seed-1").mkdir(parents=True)
(source / "seed-1" / "checkpoint").write_bytes(bytes(100_000))
(source / "curve").write_bytes(b"x" * 500)
pid = os.fork()
if not pid:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    prepare_trial_working_dir(Client(), child)
    os._exit(0)
assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGXFSZ
print(os.path.exists(child.working_dir))
prepare_trial_working_dir(Client(), child)
files = [path for path in Path(child.working_dir).rglob("*") if path.is_file()]
print(sorted((path.name, path.stat().st_size) for path in files))
print(sorted(path.name for path in root.iterdir()) == sorted([parent.id, child.id]))
"""


def test_a_worker_that_is_killed_while_it_copies_leaves_no_half_a_directory(tmp_path: Path) -> None:
    without, fixed = (run(on, INTERRUPTED, str(tmp_path / str(on)), cwd=tmp_path) for on in (False, True))
    there, files, tidy = fixed.stdout.splitlines()
    assert (there, tidy) == ("False", "True"), fixed.stderr[-2000:]
    assert files == "[('checkpoint', 100000), ('curve', 500)]"
    # Orion alone takes what it finds for the whole.
    there, kept, _ = without.stdout.splitlines()
    assert there == "True", without.stderr[-2000:]
    assert kept != files


def test_two_workers_make_the_same_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orion may hand a trial to a second worker while the first one still copies."""
    source, target = tmp_path / "parent", tmp_path / "child"
    source.mkdir()
    (source / "a").write_text("whole")
    copytree = shutil.copytree

    def copy() -> None:
        trial_directory._make_whole(target, lambda aside: shutil.copytree(source, aside))

    def copy_after_the_other(*paths: Path) -> None:
        monkeypatch.undo()
        copytree(*paths)
        copy()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["child", "parent"]

    monkeypatch.setattr(shutil, "copytree", copy_after_the_other)
    copy()
    assert (target / "a").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child", "parent"]


CONFIG = TrialConfig.from_mapping(
    {
        "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
        "task": {"epochs": 3, "max_epochs": 4, "steps_per_epoch": 128, "eval_episodes": 2},
        "model": {"width": 8, "depth": 1},
        "ppo": {"n_steps": 64, "batch_size": 64, "n_epochs": 1},
    }
)
NEWEST = "checkpoint-000003.safetensors"


def fork(directory: Path, parent: str | None = "aa01", store: str = "") -> Outcome:
    config = CONFIG.replace(optimizer={"lr": 1e-3}, task={"epochs": 4})
    return run_quietly(
        config, directory, trial_id="bb01", parent=parent, siblings=directory.parent, checkpoint_store=store
    )


def last(directory: Path) -> str:
    return arrays_digest(read(directory / "checkpoint-000004.safetensors").arrays)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A parent, with its checkpoints in a store too, and how a fork of it ends."""
    root = tmp_path_factory.mktemp("family")
    run_quietly(CONFIG, root / "aa01", trial_id="aa01", siblings=root, checkpoint_store=str(root / "store"))
    shutil.copytree(root / "aa01", root / "bb01")
    assert fork(root / "bb01").statistics["continued_from_epoch"] == 3.0
    return root, last(root / "bb01")


def nothing(copy: Path) -> None:
    for path in copy.iterdir():
        if path.is_file():
            path.unlink()


def an_older_one(copy: Path) -> None:
    (copy / NEWEST).unlink()


def half_a_checkpoint(copy: Path) -> None:
    (copy / NEWEST).write_bytes((copy / NEWEST).read_bytes()[:1000])


@pytest.mark.parametrize("interrupt", [nothing, an_older_one, half_a_checkpoint])
def test_a_fork_of_an_incomplete_copy_begins_as_its_parent_ended(
    interrupt: Callable[[Path], None], family: tuple[Path, str], tmp_path: Path
) -> None:
    """A copy that an Orion without the fix left: the parent's own directory has what it lacks."""
    for name in ("aa01", "bb01"):
        shutil.copytree(family[0] / "aa01", tmp_path / name)
    interrupt(tmp_path / "bb01")
    outcome = fork(tmp_path / "bb01")
    assert (outcome.statistics["continued_from_epoch"], outcome.statistics["forked"]) == (3.0, 1.0)
    assert last(tmp_path / "bb01") == family[1]


class Trial:
    def __init__(self, uid: str, root: Path, *, parent: str | None = None, params: str = "lr") -> None:
        self.id, self.parent, self.hash_params = uid, parent, params
        self.working_dir = str(root / uid)


class Client:
    def __init__(self, parent: Trial) -> None:
        self.parent = parent

    def get_trial(self, uid: str) -> Trial:
        return self.parent


def test_a_fork_without_its_parent_never_starts_from_scratch(
    family: tuple[Path, str], tmp_path: Path
) -> None:
    parent, child = Trial("aa01", tmp_path), Trial("bb01", tmp_path, parent="aa01", params="other")
    trial_directory.make(Client(parent), child, without_parent=True)
    # Nobody gave `--parent`.
    with pytest.raises(MachineError, match="is a fork of aa01, whose checkpoint is neither on this"):
        fork(tmp_path / "bb01", parent=None)
    with pytest.raises(MachineError, match="must not start from scratch"):
        fork(tmp_path / "bb01", parent=None, store=str(tmp_path / "unmounted"))
    outcome = fork(tmp_path / "bb01", parent=None, store=str(family[0] / "store"))
    assert outcome.statistics["continued_from_epoch"] == 3.0
    assert last(tmp_path / "bb01") == family[1]
    # A promotion computes the same numbers from scratch.
    promoted = Trial("cc01", tmp_path, parent="aa01")
    trial_directory.make(Client(parent), promoted, without_parent=True)
    outcome = run_quietly(CONFIG, tmp_path / "cc01", trial_id="cc01", siblings=tmp_path)
    assert outcome.statistics["continued"] == 0.0

"""What is imported when: trials without Orion, Orion's workers without torch, mistakes found before torch.

Each test asks a fresh process for its `sys.modules`.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_hpo.spec import yamlio

REPOSITORY = Path(__file__).parents[2]
TINY = {
    "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
    "task": {"epochs": 1, "steps_per_epoch": 256, "eval_episodes": 2},
    "model": {"width": 8, "depth": 1},
    "ppo": {"n_steps": 64, "batch_size": 32, "n_epochs": 1},
}

# What each room may load of the libraries below, when all of its modules are imported. `import-linter` holds
# which room imports which (pyproject.toml).
MAY: dict[str, set[str]] = {
    "spec": {"numpy", "yaml"},
    "state": {"numpy", "yaml"},
    "envs": {"numpy", "yaml", "gymnasium"},
    "ppo": {"numpy", "yaml", "gymnasium", "torch"},
    "trial": {"numpy", "yaml"},
    "inspect": {"yaml"},
    "sweeps": {"yaml"},
    "cli": set(),
}
# Orion imports these by their entry points, for every user of it, whatever they do.
LOADED_BY_ORION = ["plugin", "orion.ray", "orion.sqlitedb", "orion.workers"]
WATCHED = {
    "numpy", "yaml", "torch", "gymnasium", "safetensors", "threadpoolctl", "pandas", "plotly",
    "matplotlib", "tensorboard", "sklearn", "scipy", "sympy", "pygame", "stable_baselines3",
}  # fmt: skip


def modules_after(code: str, *arguments: str | Path, cwd: Path = REPOSITORY) -> set[str]:
    """Names of the modules that a new interpreter has imported for ``code``.

    Orion is installed with a path file that puts empty packages `orion` and `orion.algo` into every
    interpreter of the environment; what was there before ``code`` does not count.
    """
    whole = (
        "import json, sys; before = set(sys.modules)\n"
        f"{code}\n"
        "print('MODULES', json.dumps(sorted(set(sys.modules) - before)))"
    )
    own = {key: value for key, value in os.environ.items() if not key.startswith("ORION_")}
    done = subprocess.run(
        [sys.executable, "-c", whole, *map(str, arguments)],
        cwd=cwd,
        # `plugin` would import Orion's algorithms, which is where it is imported from.
        env={**own, "PYTHONPATH": str(REPOSITORY), "PPO_HPO_LEAN": "0", "PPO_HPO_FIXES": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rpartition("MODULES ")[2]))


def roots(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def own(modules: set[str]) -> set[str]:
    return {name.removeprefix("ppo_hpo.") for name in modules if name.startswith("ppo_hpo.")}


def test_the_watch_sees_what_is_imported() -> None:
    modules = modules_after("import orion.client, gymnasium, yaml")
    assert {"orion.client", "orion.core"} <= modules
    assert {"gymnasium", "yaml", "numpy"} <= roots(modules)


def modules_of(room: str) -> list[str]:
    return [f"{room}.{path.stem}" for path in (REPOSITORY / "ppo_hpo" / room).glob("[a-z]*.py")]


def test_every_room_is_watched() -> None:
    rooms = {path.parent.name for path in (REPOSITORY / "ppo_hpo").glob("*/__init__.py")}
    assert rooms == {*MAY, "orion"}


@pytest.mark.parametrize("room", MAY)
def test_what_a_room_loads(room: str) -> None:
    modules = modules_after("\n".join(f"import ppo_hpo.{name}" for name in modules_of(room)))
    assert own(modules) >= set(modules_of(room))
    assert roots(modules) & WATCHED <= MAY[room]
    assert not {name for name in modules if name.startswith("orion")}


def test_what_orion_loads_is_light() -> None:
    modules = modules_after("\n".join(f"import ppo_hpo.{name}" for name in LOADED_BY_ORION))
    assert roots(modules) & WATCHED <= {"yaml", "numpy"}
    assert not {"ray", "dask", "distributed", "cloudpickle"} & roots(modules)
    assert "orion.client" not in modules
    # Orion's own package of benchmark tasks imports all that Orion has, and does without `profet`.
    without = "import sys; sys.modules['orion.benchmark.task.profet'] = None; import ppo_hpo.orion.benchmark"
    assert not {"torch", "gymnasium", "ray"} & roots(modules_after(without))


def test_the_rest_of_the_orion_room_loads_neither_orion_nor_torch() -> None:
    names = set(modules_of("orion")) - {*LOADED_BY_ORION, "orion.benchmark"}
    modules = modules_after("\n".join(f"import ppo_hpo.{name}" for name in names))
    assert roots(modules) & WATCHED <= {"yaml"}
    assert not {name for name in modules if name.startswith("orion")}


def test_what_orions_workers_import_is_light() -> None:
    modules = modules_after(
        "import ppo_hpo, ppo_hpo.orion.objective, ppo_hpo.spec.space\n"
        "ppo_hpo.get_space('classic-control', epochs='fidelity(1, 4)')\n"
        "ppo_hpo.objective('classic-control', env='Acrobot-v1', epochs='fidelity(1, 4)')"
    )
    assert not {"torch", "gymnasium", "numpy"} & roots(modules)
    assert not {name for name in modules if name.startswith("orion")}


def test_the_package_itself_imports_nothing() -> None:
    modules = modules_after("import ppo_hpo; dir(ppo_hpo); ppo_hpo.__version__")
    assert roots(modules) - sys.stdlib_module_names == {"ppo_hpo"}
    assert own(modules) == set()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]], ids=" ".join)
def test_help_costs_nothing(arguments: list[str]) -> None:
    modules = modules_after(
        f"""
from ppo_hpo.cli.main import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert not stop.code
"""
    )
    assert not roots(modules) & WATCHED
    light = {"trial", "trial.process", "spec", "spec.errors", "spec.printing"}
    assert {name for name in own(modules) if not name.startswith("cli")} <= light


def test_a_trial_imports_no_orion_and_nothing_for_looking_at_results(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yamlio.dump(TINY))
    code = """
from ppo_hpo.cli.main import main
assert main(["run", "--config", sys.argv[1], "--dir", sys.argv[2], "--device", "cpu"]) == 0
"""
    modules = modules_after(code, config, tmp_path / "trial")
    assert (tmp_path / "trial" / "results.json").is_file()
    assert {"torch", "gymnasium", "safetensors"} <= roots(modules)
    assert not {name for name in modules if name.startswith("orion")}
    forbidden = {
        "pandas",
        "plotly",
        "matplotlib",
        "tensorboard",
        "sklearn",
        "scipy",
        "pygame",
        "stable_baselines3",
    }
    assert not roots(modules) & forbidden
    # Half a second each, in every trial; torch imports them for what a trial does not do.
    assert not {"sympy", "torch._dynamo", "torch._inductor"} & modules
    assert not {"inspect", "orion", "sweeps"} & {name.partition(".")[0] for name in own(modules)}


def test_mistakes_are_found_before_torch_is_imported(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yamlio.dump(TINY))
    directory = ["--dir", str(tmp_path / "trial")]
    mistakes = [
        ["--set", "ppo.gama=0.9"],
        ["--set", "optimizer.lr=-1"],
        ["--set", "ppo.batch_size=60"],
        ["--set", "ppo.n_minibatches=4"],
        ["--epochs", "2"],
        ["--seed", "-1"],
        ["--device", "gpu"],
        ["--set", "env.id=Nothing-v0"],
        ["--set", "env.id=nosuchmodule:Env-v0"],
        ["--set", "env.id=tests.envs:Image-v0"],
        ["--set", "env.id=tests.envs:Switches-v0"],
        ["--set", "env.kwargs.gravity=1"],
        ["--dir", str(config / "trial")],
    ]
    code = """
import contextlib, io
from ppo_hpo.cli.main import main
for number, options in enumerate(json.loads(sys.argv[2])):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(["run", "--config", sys.argv[1], *options])
    assert code == 2, (options, code)
    assert said.getvalue().startswith("ppo-hpo: error: "), said.getvalue()
    assert "torch" not in sys.modules, options
"""
    modules = modules_after(code, config, json.dumps([[*directory, *options] for options in mistakes]))
    assert "gymnasium" in roots(modules)
    assert "torch" not in roots(modules)


def test_a_report_imports_no_torch(tmp_path: Path) -> None:
    code = """
from ppo_hpo.cli.main import main
assert main(["report", "nothing", "-c", sys.argv[1]]) == 2
"""
    from orion.core.io.database.ephemeraldb import EphemeralDB

    (tmp_path / "orion.pkl").write_bytes(pickle.dumps(EphemeralDB()))
    config = tmp_path / "orion.yaml"
    database = {"type": "pickleddb", "host": str(tmp_path / "orion.pkl")}
    config.write_text(yamlio.dump({"storage": {"type": "legacy", "database": database}}))
    modules = modules_after(code, config, cwd=tmp_path)
    assert "orion.client" in modules
    assert not {"torch", "gymnasium"} & roots(modules)

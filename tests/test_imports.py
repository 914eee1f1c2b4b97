"""What is imported when: trials without Orion, Orion's workers without torch, mistakes found before torch.

Each test asks a fresh process for its `sys.modules`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_hpo import yamlio

REPOSITORY = Path(__file__).parent.parent
TINY = {
    "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
    "task": {"epochs": 1, "steps_per_epoch": 256, "eval_episodes": 2},
    "model": {"width": 8, "depth": 1},
    "ppo": {"n_steps": 64, "batch_size": 32, "n_epochs": 1},
}

# Every module of the package, lowest layer first; each may import those of its own layer and below.
LAYERS = {
    "plain": ["errors", "config", "yamlio", "space", "results", "seeding", "stats", "components", "seeds",
        "rundir", "gpus",
    ],
    "numbers": ["gae", "normalize", "losses", "networks", "adam"],
    "loop": [
        "device", "atari", "envs", "vector", "rollout", "autograd", "fast", "learner", "evaluate", "train",
        "events", "checkpoint", "store", "belonging", "guard", "task", "policy",
    ],
    "trial": ["failure", "ledger", "lock", "sources", "stopping", "trial"],
    "Orion edge": [
        "client", "experiment", "cost", "lineage", "clean", "report", "batch", "best", "retry", "doctor",
        "progress", "worker", "executors", "lean", "orionfixes", "promote", "warmstart", "sweepplan",
        "sweeps",
    ],
    # What Orion imports by its entry points: for every user of it, whatever they do.
    "Orion plugins": ["plugin", "rayexecutor", "sqlitedb", "workers"],
    # What Orion imports when it makes a benchmark; its own package of tasks brings all that Orion has.
    "Orion benchmark": ["benchmark"],
    "command line": ["cli", "warm", "warmserver"],
}  # fmt: skip
BELOW = {layer: list(LAYERS)[: index + 1] for index, layer in enumerate(LAYERS)}
# Orion's edge and the command line import the rest of the package when a function needs it.
MAY: dict[str, set[str]] = {
    "plain": {"numpy", "yaml"},
    "numbers": {"numpy", "torch"},
    "loop": {"gymnasium", "numpy", "torch", "yaml"},
    "trial": {"numpy", "yaml"},
    "Orion edge": {"yaml"},
    "Orion plugins": {"yaml", "numpy"},
    "Orion benchmark": {
        "numpy",
        "yaml",
        "pandas",
        "plotly",
        "scipy",
        "sklearn",
        "matplotlib",
        "threadpoolctl",
    },
    "command line": set(),
}
WATCHED = {
    "numpy", "yaml", "torch", "gymnasium", "safetensors", "filelock", "threadpoolctl", "pandas", "plotly",
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


def test_every_module_has_a_layer() -> None:
    found = {path.stem for path in (REPOSITORY / "ppo_hpo").glob("*.py")} - {"__init__", "__main__"}
    assert sorted(found) == sorted(name for names in LAYERS.values() for name in names)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    lines = [f"import ppo_hpo.{name}" for name in LAYERS[layer]]
    if layer == "Orion benchmark":
        # This one of Orion's own tasks imports torch, and Orion does without it where it cannot be imported.
        lines.insert(0, "sys.modules['orion.benchmark.task.profet'] = None")
    modules = modules_after("\n".join(lines))
    assert roots(modules) & WATCHED <= MAY[layer]
    if layer == "Orion plugins":
        assert not {"ray", "dask", "distributed", "cloudpickle"} & roots(modules)
        assert "orion.client" not in modules
    elif layer != "Orion benchmark":
        assert not {name for name in modules if name.startswith("orion")}
    assert own(modules) <= {name for below in BELOW[layer] for name in LAYERS[below]}
    assert own(modules) >= set(LAYERS[layer])


def test_what_orions_workers_import_is_light() -> None:
    modules = modules_after(
        "import ppo_hpo, ppo_hpo.client, ppo_hpo.space\n"
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
from ppo_hpo.cli import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert not stop.code
"""
    )
    assert not roots(modules) & WATCHED
    assert own(modules) == {"cli", "errors"}


def test_a_trial_imports_no_orion_and_nothing_for_looking_at_results(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yamlio.dump(TINY))
    code = """
from ppo_hpo.cli import main
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
    assert not {"report", "client"} & own(modules)


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
from ppo_hpo.cli import main
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
from ppo_hpo.cli import main
assert main(["report", "nothing", "-c", sys.argv[1]]) == 2
"""
    config = tmp_path / "orion.yaml"
    database = {"type": "pickleddb", "host": str(tmp_path / "orion.pkl")}
    config.write_text(yamlio.dump({"storage": {"type": "legacy", "database": database}}))
    modules = modules_after(code, config, cwd=tmp_path)
    assert "orion.client" in modules
    assert not {"torch", "gymnasium"} & roots(modules)

"""The package as it is installed, not the folder it is developed in."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ppo_hpo
from ppo_hpo.spec.space import list_spaces

REPOSITORY = Path(__file__).parents[2]
SOURCES = ["ppo_hpo", "spaces", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]


def run(*command: str | Path, cwd: Path, **extra: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **extra},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was built from a source distribution, as a package index would serve them."""
    root = tmp_path_factory.mktemp("package")
    tree = root / "tree"
    tree.mkdir()
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('../dist'))"
    run(sys.executable, "-c", build, cwd=tree)
    (archive,) = (root / "dist").glob("*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", root / "wheels"]
    run(sys.executable, "-m", "pip", "wheel", *options, archive, cwd=root)
    (found,) = (root / "wheels").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """A folder into which the wheel alone was installed."""
    folder = wheel.parent.parent / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, wheel, cwd=wheel.parent)
    return folder


def test_the_wheel_holds_the_package_its_spaces_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        message = email.message_from_bytes(archive.read(metadata))
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "ppo-hpo = ppo_hpo.__main__:main" in archive.read(entry_points).decode()
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "ppo_hpo").rglob("*.py")}
    spaces = {f"ppo_hpo/spaces/{path.name}" for path in (REPOSITORY / "spaces").glob("*.yaml")}
    assert names == modules | spaces | {"ppo_hpo/py.typed"}
    assert (message["Name"], message["Version"]) == ("ppo-hpo", ppo_hpo.__version__)
    assert message["Requires-Python"] == "<3.12,>=3.11"
    needs = message.get_all("Requires-Dist") or []
    assert "orion==0.2.7" in needs
    # What every installation needs has no `extra` marker; tests and pictures are not in it.
    always = {re.split(r"[ ;<>=\[!~]", need)[0] for need in needs if "extra" not in need}
    assert always == {
        "gymnasium", "numpy", "orion", "PyYAML", "safetensors", "threadpoolctl", "torch",
        "setuptools", "typing_extensions",
    }  # fmt: skip


def test_installed_elsewhere_it_lists_and_reads_every_space(site: Path, tmp_path: Path) -> None:
    code = """
import sys
import ppo_hpo
from ppo_hpo.spec.space import get_space, read_space, spaces_directory
assert ppo_hpo.__file__.startswith(sys.argv[1]), ppo_hpo.__file__
assert str(spaces_directory()).startswith(sys.argv[1]), spaces_directory()
for name in ppo_hpo.list_spaces():
    space = read_space(name)
    assert get_space(name) == {group: dict(values) for group, values in space.priors.items()}
    print(name)
"""
    out = run(sys.executable, "-P", "-c", code, site, cwd=tmp_path, PYTHONPATH=str(site))
    assert out.split() == list_spaces()


def test_installed_elsewhere_the_command_works(site: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", site / "bin" / "ppo-hpo"]
    out = run(*command, "space", "list", cwd=tmp_path, PYTHONPATH=str(site))
    assert [line.split()[0] for line in out.splitlines()] == list_spaces()
    out = run(*command, "--version", cwd=tmp_path, PYTHONPATH=str(site))
    assert out == f"ppo-hpo {ppo_hpo.__version__}\n"
    run(*command, "space", "copy", "default", "mine.yaml", cwd=tmp_path, PYTHONPATH=str(site))
    assert (tmp_path / "mine.yaml").read_bytes() == (REPOSITORY / "spaces" / "default.yaml").read_bytes()


def test_the_command_is_the_module(site: Path, tmp_path: Path) -> None:
    out = run(sys.executable, "-P", "-m", "ppo_hpo", "--version", cwd=tmp_path, PYTHONPATH=str(site))
    assert out == f"ppo-hpo {ppo_hpo.__version__}\n"


# -------------------------------------------------------------------- the public names


def test_all_is_what_can_be_imported() -> None:
    assert sorted(ppo_hpo.__all__) == sorted(set(ppo_hpo.__all__))
    found: dict[str, object] = {}
    exec("from ppo_hpo import *", found)
    assert sorted(set(found) - {"__builtins__"}) == sorted(ppo_hpo.__all__)
    for name in ppo_hpo.__all__:
        value = getattr(ppo_hpo, name)
        assert value is found[name]
        assert value.__name__ == name
        assert value.__module__.startswith("ppo_hpo."), "its own, and no import that leaked"
        assert value.__doc__
    assert set(ppo_hpo.__all__) <= set(dir(ppo_hpo))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((REPOSITORY / "ppo_hpo" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    assert sorted(seen) == sorted(ppo_hpo.__all__)
    for name, module in seen.items():
        assert module == f"ppo_hpo.{ppo_hpo._HOMES[name]}"


def test_other_names_are_missed() -> None:
    with pytest.raises(AttributeError, match="module 'ppo_hpo' has no attribute 'nothing'"):
        _ = ppo_hpo.nothing
    with pytest.raises(ImportError):
        exec("from ppo_hpo import nothing")

"""Orion without its copies: the suggestions and the stored state are those of Orion as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lean_sweeps
import pytest

CASES = [f"{algorithm}:{order}" for algorithm in lean_sweeps.ALGORITHMS for order in lean_sweeps.STEPS]


def sweeps(folder: Path, lean: bool, part: int, cases: list[str]) -> dict[str, list[Any]]:
    """All sweeps in one process, with Orion as it is or without its copies."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ORION_")}
    # Orion's own registry holds sets of names, whose order would differ between processes.
    environment.update(PPO_HPO_LEAN="1" if lean else "0", PYTHONHASHSEED="0")
    command = [sys.executable, lean_sweeps.__file__, str(folder), str(part), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[Any]]]:
    """Each sweep by Orion as it is and by ours, and each gone on with by the other and by itself."""
    folder = tmp_path_factory.mktemp("lean")
    for name in ("stock", "lean"):
        (folder / name).mkdir()
    result = {name: sweeps(folder / name, name == "lean", 1, CASES) for name in ("stock", "lean")}
    again = [case for case in CASES if case.endswith(":one")]
    shutil.copytree(folder / "stock", folder / "stock2")
    result["stock, stock"] = sweeps(folder / "stock", False, 2, again)
    result["stock, lean"] = sweeps(folder / "stock2", True, 2, again)
    result["lean, stock"] = sweeps(folder / "lean", False, 2, again)
    return result


@pytest.mark.parametrize("case", CASES)
def test_suggestions_and_state_are_those_of_orion(found: dict[str, Any], case: str) -> None:
    told, _, trials, _ = found["stock"][case]
    assert sum(isinstance(item, list) for item in told) >= 5  # trials, and not only waiting
    assert any(status == "completed" for _, status, *_ in trials)
    assert found["lean"][case] == found["stock"][case]


@pytest.mark.parametrize("algorithm", lean_sweeps.ALGORITHMS)
def test_a_sweep_goes_on_whoever_began_it(found: dict[str, Any], algorithm: str) -> None:
    case = f"{algorithm}:one"
    assert len(found["stock, stock"][case][2]) > len(found["stock"][case][2])
    assert found["stock, lean"][case] == found["stock, stock"][case]
    assert found["lean, stock"][case] == found["stock, stock"][case]

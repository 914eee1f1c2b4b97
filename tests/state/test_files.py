"""Lines of logs: one that cannot be written is left out, and spoils no other."""

from __future__ import annotations

import logging
import resource
from pathlib import Path

import pytest

from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.state.files import append_line, read_json_lines
from tests.runs import run_quietly

LOG = logging.getLogger("ppo_hpo")
TINY = TrialConfig.from_mapping(
    {
        "env": {"id": "CartPole-v1", "n_envs": 2, "max_episode_steps": 25},
        "task": {"epochs": 2, "steps_per_epoch": 128, "eval_episodes": 2},
        "model": {"width": 8, "depth": 1},
        "ppo": {"n_steps": 64, "batch_size": 64, "n_epochs": 1},
    }
)


def test_a_line_that_a_full_disk_cut_short_spoils_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    append_line(path, '{"a": 1}', LOG)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (15, before[1])
    )  # Python ignores the signal that comes with it.
    try:
        append_line(path, '{"a": 2222222}', LOG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == '{"a": 1}\n{"a": '
    assert "log.jsonl cannot be written: File too large" in caplog.text
    append_line(path, '{"a": 3}', LOG)
    append_line(path, '{"a": 4}', LOG)
    assert list(read_json_lines(path, 1 << 20, 1 << 20)) == [{"a": 1}, None, {"a": 3}, {"a": 4}]


@pytest.mark.parametrize("name", ["timing.jsonl", "work.jsonl"])
def test_a_log_that_cannot_be_written_ends_no_trial(name: str, tmp_path: Path) -> None:
    """One rule for all logs. What the trial computes is in other files."""
    path = tmp_path / "trial" / name

    def tick() -> None:
        if not path.is_dir() and (tmp_path / "trial" / "checkpoint-000001.safetensors").exists():
            path.unlink()
            path.mkdir()

    run_quietly(TINY, tmp_path / "undisturbed")
    outcome = run_quietly(TINY, tmp_path / "trial", tick=tick)
    assert outcome.statistics["epochs"] == 2.0
    log = (tmp_path / "trial" / "log.txt").read_text()
    assert f"{name} cannot be written: Is a directory. It lacks a line" in log
    curves = [(tmp_path / one / "curve.jsonl").read_bytes() for one in ("undisturbed", "trial")]
    assert curves[0] == curves[1]

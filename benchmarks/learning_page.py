"""What `learning.py` found, as a table, a page and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
import numpy as np

if TYPE_CHECKING:
    from learning import Beside, Run, Summary
    from learning_peer import PeerRun


@dataclass(frozen=True)
class Found:
    """All that `learning.py` found; `lines` are those of its tables."""

    runs: list[Run]
    peer_runs: list[PeerRun]
    summaries: list[Summary]
    beside: list[Beside]
    lines: list[str]


def table(summaries: list[Summary]) -> list[str]:
    """Lines of a markdown table, a row for each preset."""
    head = (
        "environment", "steps", "final return", "std", "95% interval", "each seed",
        "trial's own", "target", "reached", "s", "steps/s",
    )  # fmt: skip
    rows = [head, tuple("---" for _ in head)]
    for item in summaries:
        rows.append(
            (
                item.env,
                f"{item.env_steps:,}",
                f"{item.mean:.1f}",
                "-" if item.std is None else f"{item.std:.1f}",
                f"{item.interval[0]:.1f} to {item.interval[1]:.1f}",
                ", ".join(f"{value:.1f}" for value in item.final),
                f"{item.own_mean:.1f}",
                "none" if item.target is None else f">= {item.target:g}",
                {True: "yes", False: "NO", None: "-"}[item.reached],
                f"{item.seconds:.0f}",
                f"{item.steps_per_second:,.0f}",
            )
        )
    return aligned(rows)


def beside_table(both: list[Beside]) -> list[str]:
    """The same presets beside Stable-Baselines3."""
    head = (
        "environment", "ours", "95% interval", "Stable-Baselines3", "95% interval", "its seeds",
        "ours minus it", "95% interval", "s, ours", "s, its",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [head, tuple("---" for _ in head)]
    span = "{0[0]:.1f} to {0[1]:.1f}".format
    for item in both:
        rows.append(
            (
                item.env,
                f"{np.mean(item.ours):.1f}",
                span(item.ours_interval),
                f"{np.mean(item.theirs):.1f}",
                span(item.theirs_interval),
                ", ".join(f"{value:.1f}" for value in item.theirs),
                f"{item.difference:+.1f}",
                span(item.difference_interval),
                f"{item.ours_seconds:.0f}",
                f"{item.theirs_seconds:.0f}",
            )
        )
    return aligned(rows) if both else []


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a markdown table whose columns stand under each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]


def write(out: Path, found: Found, **how: int) -> None:
    """Write the numbers, the tables and the picture into a directory.

    Args:
        how: `jobs` side by side, fresh `episodes` of a run, `resamples` of an interval.
    """
    out.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": machine.commit(),
        "machine": machine.describe(),
        **how,
    }
    content = about | {
        "presets": [asdict(item) for item in found.summaries],
        "beside": [asdict(item) for item in found.beside],
        "runs": [asdict(run) for run in found.runs],
        "peer_runs": [asdict(run) for run in found.peer_runs],
    }
    (out / "learning.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    picture = plot(out / "learning.png", found.runs, found.summaries)
    (out / "learning.md").write_text(page(about, found, picture))
    print(f"\nwritten: learning.json, learning.md{', learning.png' if picture else ''}")


def page(about: dict[str, Any], found: Found, picture: bool) -> str:
    """The markdown page: the tables, the picture, and how they came about."""
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in found.runs}))
    image = "![Learning curves: every seed and their mean](learning.png)\n\n" if picture else ""
    versions = ", ".join(sorted({run.version for run in found.peer_runs})) or "left out"
    return f"""# Learning: what the presets reach

Written by `python benchmarks/learning.py` on {about["date"]}, commit {about["commit"]}.

{chr(10).join(found.lines)}

{image}- **final return**: mean over seeds {seeds} of the final policy's mean return in
  {about["episodes"]} episodes, most probable actions, on episode seeds that neither training nor tuning's
  evaluations use.
- **std**: sample standard deviation over the seeds. **95% interval**: percentile bootstrap of the mean over
  the seeds, {about["resamples"]:,} resamples; of so few seeds it is rather too narrow. That of the
  difference resamples both sides.
- **trial's own**: mean over the seeds of the trial's own last evaluation (`task.eval_episodes` episodes, the
  same for every trial), which is what Orion is told. The curves show these evaluations.
- **Stable-Baselines3** ({versions}): the same hyperparameters, as many seeds, and the same fresh episodes,
  normalised by `VecNormalize` where the preset normalises.
- **s**: wall seconds of one run, ours with its evaluations, Stable-Baselines3 without any. **steps/s**:
  environment steps of training for each of them. {about["jobs"]} runs at a time, one thread each, on
  a machine that was not kept free: no measure of speed.
- Presets: `spaces/`. Every number and curve: `learning.json`.

Machine: {machine.sentence(about["machine"])}.
"""


def plot(path: Path, runs: list[Run], summaries: list[Summary]) -> bool:
    """Draw every seed's learning curve and their mean; False where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        print("\nno picture: matplotlib is not installed")
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(summaries))
    rows = -(-len(summaries) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 3.1 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(summaries) :]:
        axis.set_visible(False)
    for axis, item in zip(axes.flat, summaries, strict=False):
        curves = [run.curve for run in runs if run.preset == item.preset and not run.diverged]
        for index, curve in enumerate(curves):
            axis.plot(
                [row["env_steps"] / 1000 for row in curve],
                [row["return_mean"] for row in curve],
                color="#8fb3d9",
                linewidth=1,
                label="each seed" if index == 0 else None,
            )
        if curves:
            mean = np.mean([[row["return_mean"] for row in curve] for curve in curves], axis=0)
            steps = [row["env_steps"] / 1000 for row in curves[0]]
            axis.plot(steps, mean, color="#1f4e8c", linewidth=2, marker="o", markersize=3, label="mean")
        if item.target is not None:
            axis.axhline(item.target, color="#555555", linewidth=1, linestyle="--", label="target")
        axis.set_title(item.env, fontsize=10)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("evaluation return", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("thousand environment steps", fontsize=8)
    axes[0, 0].legend(fontsize=8, loc="lower right", frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return True

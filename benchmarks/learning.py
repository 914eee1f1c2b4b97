"""Does PPO learn? Every preset on several seeds, judged on episodes that nothing else has seen.

    python benchmarks/learning.py                                  # all presets, seeds 0 to 4, as committed
    python benchmarks/learning.py --env cartpole --seeds 2         # a quick look; writes nothing
    python benchmarks/learning.py --env cartpole --out DIR         # the same, with files in DIR

Each run trains a preset of `spaces/` to its last epoch and then plays 100 episodes with the final policy,
most probable actions, on seeds that belong neither to training nor to the evaluations that tuning sees; their
mean is the run's final return. Targets are for the mean over the seeds. Prints a line for each run and a
table, writes `learning.json`, `learning.md` and `learning.png` (the last where matplotlib is installed), and
exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import machine
import numpy as np

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
# Mean final returns that the presets have to reach; None: whatever it is, it is stated.
TARGETS: dict[str, float | None] = {
    "cartpole": 490.0,
    "acrobot": -90.0,
    "pendulum": -220.0,
    "mountain-car-continuous": None,
}
SEEDS = 5
EPISODES = 100
# Training's seeds lie below 2**30 and those of tuning's evaluations below 2**31 (ppo_hpo/seeding.py).
FIRST_EPISODE_SEED = 2**31
RESAMPLES = 10_000


@dataclass(frozen=True)
class Run:
    """One preset on one seed.

    Attributes:
        final: mean return of the final policy over `EPISODES` fresh episodes.
        final_std: standard deviation over those episodes.
        own_final: mean return of the trial's own last evaluation, which is what Orion would see.
        seconds: wall seconds of training, evaluations after each epoch included.
        curve: a row for the untrained policy and one for each epoch.
    """

    preset: str
    env: str
    seed: int
    final: float
    final_std: float
    own_final: float
    diverged: bool
    env_steps: int
    seconds: float
    curve: list[dict[str, float]]


@dataclass(frozen=True)
class Summary:
    """One preset over its seeds; `std` is the sample's, and None for one seed."""

    preset: str
    env: str
    env_steps: int
    mean: float
    std: float | None
    interval: tuple[float, float]
    final: list[float]
    own_mean: float
    seconds: float
    steps_per_second: float
    target: float | None
    reached: bool | None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds 0 to N-1 (default: %(default)s)")
    parser.add_argument("--env", nargs="+", choices=list(TARGETS), default=list(TARGETS), metavar="NAME",
                        help=f"presets (default: all of {', '.join(TARGETS)})")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where the files go (default: benchmarks/results for all "
                        "presets and at least 5 seeds, else nowhere)")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    presets = [name for name in TARGETS if name in arguments.env]
    out = arguments.out
    if out is None and presets == list(TARGETS) and arguments.seeds >= SEEDS:
        out = RESULTS

    runs = run_all(presets, arguments.seeds, arguments.jobs)
    summaries = [summarise([run for run in runs if run.preset == name]) for name in presets]
    lines = table(summaries)
    print("\n" + "\n".join(lines))
    if out is not None:
        write(out, runs, summaries, lines, arguments.jobs)
    missed = [summary.preset for summary in summaries if summary.reached is False]
    if missed:
        print(f"\nmissed: {', '.join(missed)}")
    return 1 if missed else 0


def run_all(presets: list[str], seeds: int, jobs: int) -> list[Run]:
    """Train every preset on every seed, a line for each as it ends; sorted by preset and seed."""
    started = time.perf_counter()
    runs = []
    # Spawned: a fork would inherit the thread pools of what the parent has imported.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(run_one, name, seed) for name in presets for seed in range(seeds)]
        for future in as_completed(waiting):
            run = future.result()
            runs.append(run)
            print(
                f"{time.perf_counter() - started:5.0f} s  {len(runs):2}/{len(waiting)}  {run.env:24}  "
                f"seed {run.seed}  return {run.final:7.1f}  {run.env_steps:,} steps in {run.seconds:.0f} s"
                + ("  diverged" if run.diverged else ""),
                flush=True,
            )
    return sorted(runs, key=lambda run: (presets.index(run.preset), run.seed))


def run_one(preset: str, seed: int) -> Run:
    """Train one preset on one seed, then play the fresh episodes."""
    from ppo_hpo import PPO, TrialConfig
    from ppo_hpo.space import fill, read_space

    config = TrialConfig.from_mapping(fill(read_space(preset), {})).replace(task={"seed": seed})
    task = PPO.from_config(config, "cpu")
    started = time.perf_counter()
    task.fit(config.task.epochs)
    seconds = time.perf_counter() - started
    task.finish()
    own_final = -task.report()["objective"]
    # A network that is not finite cannot play: such a run scores as its trial does.
    returns = [own_final] if task.diverged else fresh_returns(task)
    return Run(
        preset=preset,
        env=config.env.id,
        seed=seed,
        final=float(np.mean(returns)),
        final_std=float(np.std(returns)),
        own_final=own_final,
        diverged=task.diverged,
        env_steps=task.env_steps,
        seconds=seconds,
        curve=[{key: row[key] for key in ("env_steps", "return_mean")} for row in task.metrics.curve],
    )


def fresh_returns(task: Any) -> tuple[float, ...]:
    """Returns of a fitted task's policy, one for each of `EPISODES` seeds that nothing else uses."""
    from ppo_hpo.device import limited_threads
    from ppo_hpo.evaluate import Evaluator

    seeds = list(range(FIRST_EPISODE_SEED, FIRST_EPISODE_SEED + EPISODES))
    evaluator = Evaluator(task.config.env, task.info, seeds, task.info.time_limit)
    with limited_threads(task.config.task.threads):
        evaluation = evaluator(task.agent.learner, task.agent.normalizer, None)
    evaluator.close()
    return evaluation.returns


def summarise(runs: list[Run]) -> Summary:
    """What the runs of one preset come to."""
    final = np.array([run.final for run in runs])
    # Percentiles of the means of resampled seeds, from a fixed stream: the same runs give the same interval.
    picks = np.random.default_rng(0).integers(len(final), size=(RESAMPLES, len(final)))
    low, high = np.percentile(final[picks].mean(axis=1), (2.5, 97.5))
    steps, seconds = sum(run.env_steps for run in runs), sum(run.seconds for run in runs)
    mean, target = float(final.mean()), TARGETS[runs[0].preset]
    return Summary(
        preset=runs[0].preset,
        env=runs[0].env,
        env_steps=max(run.env_steps for run in runs),
        mean=mean,
        std=float(final.std(ddof=1)) if len(final) > 1 else None,
        interval=(float(low), float(high)),
        final=final.tolist(),
        own_mean=float(np.mean([run.own_final for run in runs])),
        seconds=seconds / len(runs),
        steps_per_second=steps / seconds,
        target=target,
        reached=None if target is None else mean >= target,
    )


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
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]


def write(out: Path, runs: list[Run], summaries: list[Summary], lines: list[str], jobs: int) -> None:
    """Write the numbers, the table and the picture into a directory."""
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine.describe(),
        "jobs": jobs,
        "fresh_episodes": EPISODES,
    }
    content = about | {"presets": [asdict(s) for s in summaries], "runs": [asdict(run) for run in runs]}
    (out / "learning.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    picture = plot(out / "learning.png", runs, summaries)
    (out / "learning.md").write_text(page(about, lines, [run.seed for run in runs], picture))
    print(f"\nwritten: learning.json, learning.md{', learning.png' if picture else ''}")


def page(about: dict[str, Any], lines: list[str], run_seeds: list[int], picture: bool) -> str:
    """The markdown page: the table, the picture, and how they came about."""
    seeds = ", ".join(str(seed) for seed in sorted(set(run_seeds)))
    image = "![Learning curves: every seed and their mean](learning.png)\n\n" if picture else ""
    return f"""# Learning: what the presets reach

Written by `python benchmarks/learning.py` on {about["date"]}, commit {about["commit"]}.

{chr(10).join(lines)}

{image}- **final return**: mean over seeds {seeds} of the final policy's mean return in {EPISODES} episodes,
  most probable actions, on episode seeds that neither training nor tuning's evaluations use.
- **std**: sample standard deviation over the seeds. **95% interval**: percentile bootstrap of the mean over
  the seeds, {RESAMPLES:,} resamples; of so few seeds it is rather too narrow.
- **trial's own**: mean over the seeds of the trial's own last evaluation (`task.eval_episodes` episodes, the
  same for every trial), which is what Orion is told. The curves show these evaluations.
- **s**: wall seconds of one run, evaluations included. **steps/s**: environment steps of training for each of
  them. {about["jobs"]} runs at a time, one thread each, on a machine that was not kept free: no measure of
  speed.
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


def commit() -> str:
    """The commit of this source tree, ``-dirty`` where it has changes, or ``unknown``."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

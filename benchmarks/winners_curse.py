"""The winner's curse: how much of the best score of 32 is luck, and what more tuning seeds do about it.

    python benchmarks/winners_curse.py                      # all of it, as committed; an hour of CPU
    python benchmarks/winners_curse.py --env CartPole-v1    # one environment; writes nothing
    python benchmarks/winners_curse.py --redraw             # pages and picture from the stored runs

Random configurations of the space `classic-control` are drawn by Orion's own sampler, and each is trained
once on each of ten seeds. A repetition then takes 1, 3 or 5 of the seeds for tuning, the same for all
configurations, picks the configuration of the best mean, and looks at its mean on the seeds that are left:
the score claimed, and the score kept. Repetitions differ in which seeds are for tuning.

Every run is an ordinary trial in a directory of its own below `--dir`: stopped, the same command goes on, and
finished runs are not run again. 640 runs of 81,920 and 163,840 steps: an hour of CPU, or somewhat less.
Prints a table, and writes `winners_curse.json`, `winners_curse.md` and `winners_curse.png`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import machine
import numpy as np

from ppo_hpo import TrialConfig, UserError
from ppo_hpo.spec.space import fill, get_space, read_space
from ppo_hpo.spec.stats import claimed_and_kept
from ppo_hpo.sweeps.batch import Job, Result, run_all
from ppo_hpo.sweeps.progress import BatchProgress

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SPACE = "classic-control"
# Epochs of 20,480 steps: what the shipped presets take, within an epoch.
EPOCHS = {"CartPole-v1": 4, "Pendulum-v1": 8}
CONFIGURATIONS, SEEDS, REPETITIONS = 32, 10, 10
TUNING_SEEDS = (1, 3, 5)
# How many draws of tuning seeds the expected values are taken over.
DRAWS = 10_000


@dataclass(frozen=True)
class Row:
    """One environment with one number of tuning seeds; lists have a number for each repetition.

    Attributes:
        tuning_seeds: how many.
        claimed: the winner's mean on the tuning seeds.
        kept: the winner's mean on the others.
        winners: the configuration that won, by its number.
        expected_claimed: mean over `DRAWS` draws of tuning seeds.
        expected_kept: likewise.
    """

    env: str
    tuning_seeds: int
    claimed: list[float]
    kept: list[float]
    winners: list[int]
    expected_claimed: float
    expected_kept: float


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", nargs="+", choices=list(EPOCHS), default=list(EPOCHS), metavar="ID",
                        help=f"environments (default: all of {', '.join(EPOCHS)})")  # fmt: skip
    parser.add_argument("--configurations", type=int, default=CONFIGURATIONS, metavar="N")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="runs of each configuration")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, metavar="N")
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=list(TUNING_SEEDS), metavar="N")
    parser.add_argument("--epochs", type=int, metavar="N", help="in the place of the environments' own")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--dir", type=Path, default=HERE / ".winners-curse", help="of the runs")
    parser.add_argument("--out", type=Path, help="where the files go (default: benchmarks/results for all of "
                        "it, else nowhere)")  # fmt: skip
    parser.add_argument("--redraw", action="store_true", help="take the runs from the stored results")
    arguments = parser.parse_args()
    if min(arguments.configurations, arguments.repetitions, *arguments.tuning_seeds) < 1:
        parser.error("--configurations, --repetitions and --tuning-seeds must be at least 1")
    if max(arguments.tuning_seeds) >= arguments.seeds:
        parser.error("--seeds must be more than the tuning seeds: what wins is judged by those that are left")
    envs = [env for env in EPOCHS if env in arguments.env]
    whole = envs == list(EPOCHS) and (arguments.configurations, arguments.seeds) == (CONFIGURATIONS, SEEDS)
    whole = whole and arguments.epochs is None
    out = arguments.out or (RESULTS if whole or arguments.redraw else None)
    if arguments.redraw:
        stored = json.loads((RESULTS / "winners_curse.json").read_text())
        about, scores = stored["about"], {env: np.array(rows) for env, rows in stored["scores"].items()}
    else:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "commit": machine.commit(),
            "machine": machine.describe(),
            "epochs": {env: arguments.epochs or EPOCHS[env] for env in envs},
        }
        try:
            scores = {env: run_env(env, arguments) for env in envs}
        except UserError as error:
            print(f"{error}", file=sys.stderr)
            return 2
    rows = [
        evaluate(env, table, k, arguments.repetitions)
        for env, table in scores.items()
        for k in arguments.tuning_seeds
    ]
    lines = table_lines(rows)
    print("\n" + "\n".join(lines))
    if out is not None:
        write(out, about, scores, rows, lines)
    return 0


class RemovesCheckpoints(BatchProgress):
    """Nobody resumes a run that is done, and two checkpoints of each of 640 runs are 300 MB."""

    def ended(self, job: Job, result: Result) -> None:
        super().ended(job, result)
        for path in job.directory.glob("checkpoint-*.safetensors"):
            path.unlink()


def run_env(env: str, arguments: argparse.Namespace) -> Any:
    """The scores of one environment, ``[C, S]``."""
    jobs = jobs_of(
        env, arguments.configurations, arguments.seeds, arguments.epochs or EPOCHS[env], arguments.dir
    )
    progress = RemovesCheckpoints(sys.stderr, jobs)
    try:
        results = run_all(jobs, n_workers=arguments.workers, device="cpu", progress=progress)
    finally:
        progress.close()
    return np.array([result.score for result in results]).reshape(-1, arguments.seeds)


def jobs_of(env: str, configurations: int, seeds: int, epochs: int, place: Path) -> list[Job]:
    """Every configuration on every seed, a configuration after the other."""
    space, found = read_space(SPACE), []
    for number, params in enumerate(draw(configurations)):
        own = {"env": {"id": env}, "task": {"epochs": epochs, "max_epochs": epochs}}
        config = TrialConfig.from_mapping(fill(space, params, own))
        for seed in range(seeds):
            one = config.replace(task={"seed": seed})
            found.append(
                Job(f"{env}, {number:2}, seed {seed}", one, place / env / f"{number:03}" / str(seed))
            )
    return found


def draw(n: int) -> list[dict[str, Any]]:
    """``n`` random points of the space, by Orion's own sampler: the same for every environment."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pkg_resources announces its end
        from orion.core.io.space_builder import SpaceBuilder
    priors = {
        f"{group}.{key}": prior
        for group, values in get_space(SPACE, epochs=1).items()
        for key, prior in values.items()
    }
    return [dict(trial.params) for trial in SpaceBuilder().build(priors).sample(n, seed=1)]


def evaluate(env: str, scores: Any, tuning_seeds: int, repetitions: int) -> Row:
    """Tune ``repetitions`` times on so many of the seeds, and judge the winners by the others.

    Args:
        scores: ``[C, S]``.
    """
    stream = np.random.default_rng([tuning_seeds, repetitions])
    seeds = scores.shape[1]
    found = []
    for _ in range(repetitions + DRAWS):
        # Many reach CartPole's 500. Which of equals comes first is luck too.
        order = stream.permutation(len(scores))
        tuning = stream.permutation(seeds)[:tuning_seeds].tolist()
        winner, claimed, kept = claimed_and_kept(scores[order], tuning)
        found.append((int(order[winner]), claimed, kept))
    shown, many = found[:repetitions], np.array([pair[1:] for pair in found[repetitions:]]).mean(axis=0)
    return Row(
        env=env,
        tuning_seeds=tuning_seeds,
        claimed=[claimed for _, claimed, _ in shown],
        kept=[kept for _, _, kept in shown],
        winners=[winner for winner, _, _ in shown],
        expected_claimed=float(many[0]),
        expected_kept=float(many[1]),
    )


def table_lines(rows: list[Row]) -> list[str]:
    lines = [
        "| environment | tuning seeds | claimed | kept | drop | least, most | over all draws |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        drops = np.array(row.claimed) - np.array(row.kept)
        lines.append(
            f"| {row.env} | {row.tuning_seeds} | {np.mean(row.claimed):.1f} | {np.mean(row.kept):.1f} | "
            f"{drops.mean():.1f} | {drops.min():.1f} to {drops.max():.1f} | "
            f"{row.expected_claimed:.1f}, {row.expected_kept:.1f} |"
        )
    return lines


def write(
    out: Path, about: dict[str, Any], scores: dict[str, Any], rows: list[Row], lines: list[str]
) -> None:
    """Write the numbers, the page and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "about": about,
        "rows": [asdict(row) for row in rows],
        "scores": {env: table.tolist() for env, table in scores.items()},
    }
    (out / "winners_curse.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    picture = plot(out / "winners_curse.png", rows)
    (out / "winners_curse.md").write_text(page(about, scores, rows, lines, picture))
    print(f"\nwritten to {out}: winners_curse.json, .md{', .png' if picture else ''}")


def page(
    about: dict[str, Any], scores: dict[str, Any], rows: list[Row], lines: list[str], picture: bool
) -> str:
    first = next(iter(scores.values()))
    image = "![Claimed and kept, by the number of tuning seeds](winners_curse.png)\n\n" if picture else ""
    epochs = ", ".join(f"{count * 20480:,} on {env}" for env, count in about["epochs"].items())
    return f"""# The winner's curse: what the best score keeps on other seeds

Written by `python benchmarks/winners_curse.py` on {about["date"]}, commit {about["commit"]}.

{chr(10).join(lines)}

{image}- **{first.shape[0]} random configurations** of the space `{SPACE}`, each trained on the same
  {first.shape[1]} seeds; environment steps of each run: {epochs}. A run's score is the mean return of its
  last evaluation (10 episodes, the same for all), which is what Orion is told.
- **claimed**: tuning sees some of the seeds; the configuration of the best mean over them wins, and this mean
  is what tuning claims. **kept**: the winner's mean over the other seeds. **drop**: claimed less kept. Means
  over {len(rows[0].claimed)} repetitions, which differ in the seeds that tuning sees (of equals any one
  wins); then the least drop and the most.
- Repetitions share their runs, so their spread is no confidence interval. **Over all draws**: claimed
  and kept, means over {DRAWS:,} draws of tuning seeds from the same runs.
- Every score: `winners_curse.json`. `ppo-hpo best NAME --test-seeds 10` says the same of a sweep of your own
  (`docs/how-to/best-trials.md`).

Machine: {machine.sentence(about["machine"])}.
"""


def plot(path: Path, rows: list[Row]) -> bool:
    """Draw claimed and kept; False where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        print("\nno picture: matplotlib is not installed")
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    envs = list(dict.fromkeys(row.env for row in rows))
    figure, axes = pyplot.subplots(
        1, len(envs), figsize=(4.6 * len(envs), 3.4), squeeze=False, layout="constrained"
    )
    for axis, env in zip(axes[0], envs, strict=True):
        own = [row for row in rows if row.env == env]
        for index, row in enumerate(own):
            for claimed, kept in zip(row.claimed, row.kept, strict=True):
                axis.plot(
                    [index - 0.18, index + 0.18], [claimed, kept], color="#cccccc", linewidth=0.8, zorder=1
                )
            for offset, values, color, label in (
                (-0.18, row.claimed, "#c2410c", "claimed"),
                (0.18, row.kept, "#1f4e8c", "kept on other seeds"),
            ):
                x = [index + offset] * len(values)
                axis.scatter(x, values, color=color, s=14, alpha=0.5, linewidths=0, zorder=2)
                axis.plot(
                    [index + offset - 0.12, index + offset + 0.12], [np.mean(values)] * 2, color=color,
                    linewidth=2.5, zorder=3, label=label if index == 0 else None,
                )  # fmt: skip
        axis.set_title(env, fontsize=10)
        axis.set_xticks(range(len(own)), [str(row.tuning_seeds) for row in own])
        axis.set_xlabel("tuning seeds", fontsize=8)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0][0].set_ylabel("return of the winner", fontsize=8)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    return True


if __name__ == "__main__":
    sys.exit(main())

"""Does PPO learn? Every preset on several seeds, judged on episodes that nothing else has seen.

    python benchmarks/learning.py                                  # all presets, seeds 0 to 4, as committed
    python benchmarks/learning.py --keep-peer                      # trains only ours anew
    python benchmarks/learning.py --env cartpole --seeds 2         # a quick look; writes nothing
    python benchmarks/learning.py --env cartpole --out DIR         # the same, with files in DIR

Each run trains a preset of `spaces/` to its last epoch and then plays 100 episodes with the final policy,
most probable actions, on seeds that belong neither to training nor to the evaluations that tuning sees; their
mean is the run's final return. Targets are for the mean over the seeds. Stable-Baselines3 does the same with
the same hyperparameters, seeds and episodes, in an environment of its own (`peers/`); what it reaches is told
side by side. Prints a line for each run and two tables, writes `learning.json`, `learning.md` and
`learning.png` (the last where matplotlib is installed), and exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import learning_page
import learning_peer
import numpy as np
import peers
from learning_peer import PeerRun

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
# Training's seeds lie below 2**30 and those of tuning's evaluations below 2**31 (ppo_hpo/spec/randomness.py).
FIRST_EPISODE_SEED = 2**31
RESAMPLES = 10_000
PEER = "sb3"


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
class Beside:
    """One preset, ours and Stable-Baselines3 side by side; intervals are at 95 %.

    Attributes:
        difference: of the means, ours minus theirs, with its interval.
    """

    env: str
    ours: list[float]
    ours_interval: tuple[float, float]
    theirs: list[float]
    theirs_interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    ours_seconds: float
    theirs_seconds: float


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
    parser.add_argument("--keep-peer", action="store_true", help="take Stable-Baselines3's runs from the "
                        "stored results wherever it would be given the same")  # fmt: skip
    parser.add_argument("--out", type=Path, help="where the files go (default: benchmarks/results for all "
                        "presets and at least 5 seeds, else nowhere)")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    presets = [name for name in TARGETS if name in arguments.env]
    out = arguments.out
    if out is None and presets == list(TARGETS) and arguments.seeds >= SEEDS:
        out = RESULTS

    runs, peer_runs = run_all(presets, arguments.seeds, arguments.jobs, keep_peer=arguments.keep_peer)
    summaries = [summarise([run for run in runs if run.preset == name]) for name in presets]
    both = [
        beside([a for a in runs if a.preset == name], theirs)
        for name in presets
        if (theirs := [b for b in peer_runs if b.preset == name])
    ]
    lines = [*learning_page.table(summaries), "", *learning_page.beside_table(both)]
    print("\n" + "\n".join(lines))
    if out is not None:
        found = learning_page.Found(runs, peer_runs, summaries, both, lines)
        learning_page.write(out, found, jobs=arguments.jobs, episodes=EPISODES, resamples=RESAMPLES)
    missed = [summary.preset for summary in summaries if summary.reached is False]
    if missed:
        print(f"\nmissed: {', '.join(missed)}")
    return 1 if missed else 0


def run_all(presets: list[str], seeds: int, jobs: int, *, keep_peer: bool) -> tuple[list[Run], list[PeerRun]]:
    """Ours and the peer on every preset and seed, a line for each as it ends; sorted by preset and seed."""
    started = time.perf_counter()
    runs: list[Run] = []
    stored = learning_peer.stored_runs(RESULTS) if keep_peer else []
    peer_runs: list[PeerRun] = []
    try:
        python = peers.python_of(PEER)
    except peers.PeerError as error:
        python = None
        print(f"Stable-Baselines3 is left out, it does not install: {error}")
    # Spawned: a fork would inherit the thread pools of what the parent has imported.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(run_one, name, seed) for name in presets for seed in range(seeds)]
        for name in presets if python is not None else []:
            for seed in range(seeds):
                task = learning_peer.task_of(name, seed, FIRST_EPISODE_SEED, EPISODES)
                kept = [run for run in stored if run.task == task]
                if kept:
                    peer_runs.append(kept[0])
                else:
                    waiting.append(pool.submit(learning_peer.run_one, str(python), name, task))
        for count, future in enumerate(as_completed(waiting), start=1):
            run = future.result()
            ours = isinstance(run, Run)
            (runs if ours else peer_runs).append(run)
            diverged = "  diverged" if ours and run.diverged else ""
            print(
                f"{time.perf_counter() - started:5.0f} s  {count:2}/{len(waiting)}  "
                f"{'ours' if ours else PEER:4}  {run.preset:23}  seed {run.seed}  return {run.final:7.1f}  "
                f"{run.env_steps:,} steps in {run.seconds:.0f} s{diverged}",
                flush=True,
            )
    order = lambda run: (presets.index(run.preset), run.seed)  # noqa: E731
    return sorted(runs, key=order), sorted(peer_runs, key=order)


def run_one(preset: str, seed: int) -> Run:
    """Train one preset on one seed, then play the fresh episodes."""
    from ppo_hpo import PPO, TrialConfig
    from ppo_hpo.spec.space import fill, read_space

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
    from ppo_hpo.ppo.device import limited_threads
    from ppo_hpo.ppo.evaluate import Evaluator

    seeds = list(range(FIRST_EPISODE_SEED, FIRST_EPISODE_SEED + EPISODES))
    evaluator = Evaluator(task.config.env, task.info, seeds, task.info.time_limit)
    with limited_threads(task.config.task.threads):
        evaluation = evaluator(task.agent.learner, task.agent.normalizer, None)
    evaluator.close()
    return evaluation.returns


def summarise(runs: list[Run]) -> Summary:
    """What the runs of one preset come to."""
    final = np.array([run.final for run in runs])
    steps, seconds = sum(run.env_steps for run in runs), sum(run.seconds for run in runs)
    mean, target = float(final.mean()), TARGETS[runs[0].preset]
    return Summary(
        preset=runs[0].preset,
        env=runs[0].env,
        env_steps=max(run.env_steps for run in runs),
        mean=mean,
        std=float(final.std(ddof=1)) if len(final) > 1 else None,
        interval=interval(resampled_means(final, 0)),
        final=final.tolist(),
        own_mean=float(np.mean([run.own_final for run in runs])),
        seconds=seconds / len(runs),
        steps_per_second=steps / seconds,
        target=target,
        reached=None if target is None else mean >= target,
    )


def beside(runs: list[Run], peer_runs: list[PeerRun]) -> Beside:
    """Ours and the peer's runs of one preset, side by side."""
    ours, theirs = (np.array([run.final for run in of]) for of in (runs, peer_runs))
    means = resampled_means(ours, 0), resampled_means(theirs, 1)
    return Beside(
        env=runs[0].env,
        ours=ours.tolist(),
        ours_interval=interval(means[0]),
        theirs=theirs.tolist(),
        theirs_interval=interval(means[1]),
        difference=float(ours.mean() - theirs.mean()),
        difference_interval=interval(means[0] - means[1]),
        ours_seconds=float(np.mean([run.seconds for run in runs])),
        theirs_seconds=float(np.mean([run.seconds for run in peer_runs])),
    )


def resampled_means(values: Any, stream: int) -> Any:
    """Means of `RESAMPLES` resamples, from a fixed stream: the same runs give the same interval."""
    picks = np.random.default_rng(stream).integers(len(values), size=(RESAMPLES, len(values)))
    return values[picks].mean(axis=1)


def interval(means: Any) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


if __name__ == "__main__":
    sys.exit(main())

"""Retrains configurations on fresh seeds, beside a baseline.

The best of many noisy scores is too good: it won by its configuration and by its luck (the winner's curse).
What remains of its score shows when it is trained from scratch on seeds that tuning has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.space import fill, list_spaces, read_space
from ppo_hpo.sweeps.batch import Job, Result, run_all
from ppo_hpo.sweeps.candidates import Candidate
from ppo_hpo.sweeps.progress import BatchProgress


@dataclass(frozen=True)
class Tested:
    """Scores of a configuration on fresh seeds. Intervals are at 95 %.

    Attributes:
        label: label of the candidate.
        trial: Orion's id of the trial. None for a baseline.
        steps: environment steps of each run.
        claimed: score that tuning saw. None for a baseline.
        scores: for each fresh seed, the mean return of the run's last evaluation.
        diverged: how many runs diverged.
        iqm: interquartile mean of the scores.
        interval: confidence interval of ``iqm``.
        quartiles: first and third quartile of the scores.
        kept: advantage over the baseline: the difference of the two ``iqm``.
        kept_interval: confidence interval of ``kept``.
    """

    label: str
    trial: str | None
    steps: int
    claimed: float | None
    scores: list[float]
    diverged: int
    iqm: float
    interval: tuple[float, float]
    quartiles: tuple[float, float]
    kept: float | None
    kept_interval: tuple[float, float] | None

    @property
    def drop(self) -> float | None:
        """How much lower the score is than tuning claimed."""
        return None if self.claimed is None else self.claimed - self.iqm


def baseline(winner: TrialConfig, name: str | None = None) -> Candidate | None:
    """What anybody gets without tuning, for as many steps as the winner has.

    A preset keeps its hyperparameters. Its epochs become the winner's, rounded to whole rollouts of its own,
    and its schedules end with them.

    Args:
        winner: the configuration to compare with.
        name: a preset's name, a file, ``default``, or ``none`` for no baseline. None means the shipped preset
            of the environment, or PPO's defaults if there is none.

    Raises:
        UserError: there is no such preset, or it is a space.
    """
    if name == "none":
        return None
    if name is None:
        name = preset_of(winner) or "default"
    groups: dict[str, dict[str, Any]] = {}
    if name != "default":
        space = read_space(name)
        if any(space.priors.values()):
            raise UserError(f"{name} is a search space, not a preset. Name a preset.")
        groups = fill(space, {})
    own = TrialConfig.from_mapping(groups)
    task, env = winner.task, winner.env
    rollout = own.rollout_steps
    config = own.replace(
        env={
            "id": env.id,
            "kwargs": env.kwargs,
            "max_episode_steps": env.max_episode_steps,
            "wrapper": env.wrapper,
        },
        task={
            "seeds": 1,
            "epochs": task.epochs,
            "max_epochs": task.epochs,
            "steps_per_epoch": max(1, round(task.steps_per_epoch / rollout)) * rollout,
            "seed": task.seed,
            "threads": task.threads,
            "eval_episodes": task.eval_episodes,
            "eval_deterministic": task.eval_deterministic,
        },
    )
    return Candidate("default" if name == "default" else f"preset {name}", config)


def preset_of(config: TrialConfig) -> str | None:
    """The name of the shipped preset for a trial's environment, or None."""

    def environment(env: Any) -> tuple[Any, ...]:
        return env.id, dict(env.kwargs), env.wrapper

    for name in list_spaces():
        space = read_space(name)
        if any(space.priors.values()):
            continue
        if environment(TrialConfig.from_mapping(fill(space, {})).env) == environment(config.env):
            return name
    return None


def jobs_of(candidate: Candidate, seeds: int, place: Path) -> list[Job]:
    """The runs of one configuration, one for each fresh seed, in directories named after their identity."""
    from ppo_hpo.spec.trial_seeds import fresh_seeds  # imports numpy

    found = []
    for number, seed in enumerate(fresh_seeds(candidate.config, seeds), 1):
        config = candidate.config.replace(task={"seed": seed, "seeds": 1})
        found.append(
            Job(f"{candidate.label}, fresh seed {number} of {seeds}", config, place / config.identity()[:32])
        )
    return found


def retrain(
    everybody: Sequence[Candidate],
    seeds: int,
    place: Path,
    *,
    n_workers: int = 2,
    device: str = "auto",
    progress: TextIO | None = None,
) -> list[Tested]:
    """Train every configuration on fresh seeds. Runs that are finished already are only read.

    Args:
        everybody: the configurations. The first baseline is what the others are compared with.
        seeds: how many fresh seeds.
        place: directory that holds the directories of the runs.
        n_workers: how many runs are trained at a time.
        device: device of each run.
        progress: where to print progress.

    Raises:
        UserError: see `ppo_hpo.sweeps.batch.run_all`.
    """
    jobs = [job for candidate in everybody for job in jobs_of(candidate, seeds, place)]
    show = BatchProgress(progress, jobs)
    try:
        results = run_all(jobs, n_workers=n_workers, device=device, progress=show)
    finally:
        show.close()
    runs = [results[index * seeds : (index + 1) * seeds] for index in range(len(everybody))]
    rival = next((own for who, own in zip(everybody, runs, strict=True) if who.trial is None), None)
    return [summarise(who, own, rival) for who, own in zip(everybody, runs, strict=True)]


def summarise(candidate: Candidate, runs: Sequence[Result], rival: Sequence[Result] | None) -> Tested:
    """Summarise the runs of one configuration, compared with those of the baseline."""
    from ppo_hpo.spec import stats

    scores = [run.score for run in runs]
    others = None if rival is None or candidate.trial is None else [run.score for run in rival]
    iqm = float(stats.iqm(scores))
    return Tested(
        label=candidate.label,
        trial=candidate.trial,
        steps=candidate.steps,
        claimed=candidate.claimed,
        scores=scores,
        diverged=sum(bool(run.statistics["diverged"]) for run in runs),
        iqm=iqm,
        interval=stats.iqm_interval(scores),
        quartiles=stats.quartiles(scores),
        kept=None if others is None else iqm - float(stats.iqm(others)),
        kept_interval=None if others is None else stats.advantage_interval(scores, others),
    )

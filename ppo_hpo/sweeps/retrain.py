"""Retrains configurations on fresh seeds, beside a baseline, and describes what that found.

The best of many noisy scores is too good: it won by its configuration and by its luck (the winner's curse).
What remains of its score shows when it is trained from scratch on seeds that tuning has not seen, and then
evaluated on episodes that tuning has not seen either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.space import fill, list_spaces, read_space
from ppo_hpo.sweeps.batch import Job, Result, result_of, run_all
from ppo_hpo.sweeps.candidates import Candidate
from ppo_hpo.sweeps.progress import BatchProgress, duration


@dataclass(frozen=True)
class Retraining:
    """How to retrain the best trials from scratch."""

    seeds: int  # how many fresh seeds
    episodes: int = 100  # how many fresh episodes evaluate the policy of each seed
    against: str | None = None  # what to compare with; see `baseline`
    n_workers: int | None = None  # None means the number of usable cores.
    device: str = "auto"
    directory: str | None = None  # None means `best` in the experiment's working directory.
    html: str | None = None  # file for a web page with a plot of the scores
    progress: TextIO | None = None


@dataclass(frozen=True)
class Tested:
    """Scores of a `Candidate` on fresh seeds. Intervals are confidence intervals at 95 %."""

    label: str
    trial: str | None
    steps: int  # environment steps of each run
    claimed: float | None
    scores: list[float]  # for each fresh seed, the mean return of its fresh episodes
    diverged: int  # how many runs diverged
    iqm: float  # interquartile mean of the scores
    interval: tuple[float, float]  # of `iqm`
    quartiles: tuple[float, float]  # first and third quartile of the scores
    kept: float | None  # advantage over the baseline: the difference of the two `iqm`
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
    task, rollout = winner.task, own.rollout_steps
    env_keys = ("id", "kwargs", "max_episode_steps", "wrapper")
    task_keys = ("epochs", "seed", "threads", "eval_episodes", "eval_deterministic")
    config = own.replace(
        env={key: getattr(winner.env, key) for key in env_keys},
        task={
            **{key: getattr(task, key) for key in task_keys},
            "seeds": 1,
            "max_epochs": task.epochs,
            "steps_per_epoch": max(1, round(task.steps_per_epoch / rollout)) * rollout,
        },
    )
    return Candidate("default" if name == "default" else f"preset {name}", config)


def preset_of(config: TrialConfig) -> str | None:
    """The name of the shipped preset for a trial's environment, or None."""
    for name in list_spaces():
        space = read_space(name)
        if not any(space.priors.values()):
            env = TrialConfig.from_mapping(fill(space, {})).env
            if all(getattr(env, key) == getattr(config.env, key) for key in ("id", "kwargs", "wrapper")):
                return name
    return None


def jobs_of(candidate: Candidate, seeds: int, place: Path) -> list[Job]:
    """The runs of one configuration, one for each fresh seed, in directories named after their identity."""
    from ppo_hpo.spec.trial_seeds import fresh_seeds  # imports numpy

    found = []
    for number, seed in enumerate(fresh_seeds(candidate.config, seeds), 1):
        config = candidate.config.replace(task={"seed": seed, "seeds": 1})
        label = f"{candidate.label}, fresh seed {number} of {seeds}"
        found.append(Job(label, config, place / config.identity()[:32]))
    return found


def plan_of(everybody: Sequence[Candidate], jobs: Sequence[Job], episodes: int, n_workers: int) -> str:
    """What `retrain` is about to do, and about how long it takes; empty if all of it is done.

    The baseline was not trained yet, so it is taken to be as fast as the winner.
    """
    each = len(jobs) // len(everybody)
    seconds = steps = runs = 0.0
    for candidate, first in zip(everybody, range(0, len(jobs), each), strict=True):
        left = sum(result_of(job, episodes) is None for job in jobs[first : first + each])
        known = candidate if candidate.seconds_per_step else everybody[0]
        runs, steps = runs + left, steps + left * candidate.steps
        seconds += left * (candidate.steps + episodes * known.episode_length) * known.seconds_per_step
    if not runs:
        return ""
    n_workers = min(n_workers, int(runs))
    time = f", about {duration(seconds / n_workers)}" if seconds else ""
    return (
        f"plan        {_counted(int(runs), 'run')} ({_counted(len(everybody), 'configuration')}, "
        f"{_counted(each, 'fresh seed')}), {n_workers} at a time{time}\n"
        f"            {steps:,.0f} environment steps, then {_counted(episodes, 'fresh episode')} a run"
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def retrain(everybody: Sequence[Candidate], place: Path, how: Retraining) -> list[Tested]:
    """Train every configuration on fresh seeds, in directories below ``place``.

    Runs that are finished already are only read. The others are compared with the baseline among them.
    """
    from ppo_hpo.orion.workers import usable_cores

    seeds, n_workers = how.seeds, how.n_workers or usable_cores()
    jobs = [job for candidate in everybody for job in jobs_of(candidate, seeds, place)]
    show = BatchProgress(how.progress, jobs, plan_of(everybody, jobs, how.episodes, n_workers))
    try:
        results = run_all(
            jobs, n_workers=n_workers, device=how.device, progress=show, fresh_episodes=how.episodes
        )
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
        candidate.label, candidate.trial, candidate.steps, candidate.claimed, scores,
        diverged=sum(bool(run.statistics["diverged"]) for run in runs),
        iqm=iqm, interval=stats.iqm_interval(scores), quartiles=stats.quartiles(scores),
        kept=None if others is None else iqm - float(stats.iqm(others)),
        kept_interval=None if others is None else stats.advantage_interval(scores, others),
    )  # fmt: skip


def table(tested: Sequence[Tested]) -> list[str]:
    """A row for each configuration."""
    rows = [("configuration", "steps", "claimed", "test IQM", "95 % interval", "quartiles", "drop")]
    for item in tested:
        claimed = "" if item.claimed is None else f"{item.claimed:.1f}"
        drop = "" if item.drop is None else f"{item.drop:.1f}"
        intervals = _span(item.interval), _span(item.quartiles)
        rows.append((item.label, f"{item.steps:,}", claimed, f"{item.iqm:.1f}", *intervals, drop))
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, others, strict=True)]
        lines.append("  ".join([label.ljust(first), *padded]).rstrip())
    return lines


def conclusions(tested: Sequence[Tested]) -> list[str]:
    """What the numbers show, in sentences. The first configuration is the winner."""
    winner = tested[0]
    assert winner.claimed is not None
    lines = [
        f"winner      claimed {winner.claimed:.1f}, measured {winner.iqm:.1f} on {len(winner.scores)} fresh "
        f"seeds (95 % interval {_span(winner.interval)})"
    ]
    rival = next((item for item in tested if item.trial is None), None)
    if rival is not None and winner.kept is not None and winner.kept_interval is not None:
        low, high = winner.kept_interval
        sure = "" if low > 0 or high < 0 else "; the interval contains 0, so this shows no difference"
        lines.append(
            f"advantage   over {rival.label}: claimed {winner.claimed - rival.iqm:+.1f}, measured "
            f"{winner.kept:+.1f} (95 % interval {_span(winner.kept_interval)}){sure}"
        )
        if rival.steps != winner.steps:
            lines.append(f"            {rival.label} has {rival.steps:,} steps, in whole rollouts of its own")
    ahead = max((item for item in tested if item.trial is not None), key=lambda item: item.iqm)
    if ahead.iqm > winner.iqm:
        lines.append(f"best now    {ahead.label} with {ahead.iqm:.1f}, which is again the best of several")
    for item in tested:
        if item.diverged:
            lines.append(f"diverged    {item.label}: {item.diverged} of {len(item.scores)} runs")
    return lines


def _span(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.1f} to {ends[1]:.1f}"


def page(title: str, tested: Sequence[Tested], text: str) -> str:
    """A web page that needs no network, with the printed ``text`` and a plot of all scores.

    Each run is a dot, each claim a cross, and each IQM a diamond with its interval.
    """
    import html

    import plotly.graph_objects as go

    labels = [item.label for item in tested]
    claims = [item for item in tested if item.claimed is not None]
    figure = go.Figure()
    figure.add_scatter(
        x=[score for item in tested for score in item.scores],
        y=[item.label for item in tested for _ in item.scores],
        mode="markers", marker={"color": "rgba(110,110,110,0.5)", "size": 8}, name="a run on a fresh seed",
    )  # fmt: skip
    figure.add_scatter(
        x=[item.iqm for item in tested], y=labels, mode="markers",
        marker={"color": "#1f4e8c", "size": 12, "symbol": "diamond"}, name="IQM, 95 % interval",
        error_x={"type": "data", "symmetric": False,
                 "array": [item.interval[1] - item.iqm for item in tested],
                 "arrayminus": [item.iqm - item.interval[0] for item in tested]},
    )  # fmt: skip
    figure.add_scatter(
        x=[item.claimed for item in claims], y=[item.label for item in claims], mode="markers",
        marker={"color": "#c2410c", "size": 12, "symbol": "x"}, name="score in tuning",
    )  # fmt: skip
    figure.update_layout(
        title="Scores on fresh seeds", xaxis_title="mean evaluation return", template="simple_white",
        yaxis={"autorange": "reversed", "categoryorder": "array", "categoryarray": labels},
    )  # fmt: skip
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        f'<body style="font-family: sans-serif; max-width: 70em; margin: 2em auto">'
        f"<h1>{name}</h1><pre>{html.escape(text)}</pre>"
        f"{figure.to_html(full_html=False, include_plotlyjs=True)}</body></html>\n"
    )

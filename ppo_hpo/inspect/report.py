"""What an experiment of Orion's found, told from its trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_hpo.inspect.cost import Cost, cost_of, costs_of
from ppo_hpo.orion.experiment import (
    completed_trials,
    configuration_of,
    open_experiment,
    params_of,
    ranking_key,
    statistics_of,
)
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.results import seeds_text
from ppo_hpo.state.curve import read_curve

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Summary:
    """An experiment in numbers.

    Attributes:
        name: of the experiment.
        version: of the experiment.
        algorithm: Orion's name of it.
        working_dir: where the trials lie.
        by_status: Orion's status to number of trials.
        best: the completed trial of the lowest objective; among equals, the longest trained.
        configurations: distinct sets of hyperparameters that were completed at some fidelity.
        steps: environment steps trained; what a promoted trial had done before counts once.
        steps_in_full: had every configuration been trained to the highest fidelity.
        steps_restarted: had every promotion that went on started again.
        max_epochs: the highest fidelity, or the epochs of every trial.
        reached: the most epochs that a completed trial has.
        cost: of all trials, whatever became of them.
    """

    name: str
    version: int
    algorithm: str
    working_dir: Path
    by_status: Mapping[str, int]
    best: Any
    configurations: int
    steps: int
    steps_in_full: int
    steps_restarted: int
    max_epochs: int
    reached: int
    cost: Cost


def report(name: str, config: str | None = None, html: str | None = None) -> str:
    """A summary of an experiment, to be read.

    Args:
        name: the experiment's name.
        config: Orion's configuration file of the hunt, for its storage; None uses Orion's own
            configuration, which `ORION_DB_TYPE` and `ORION_DB_ADDRESS` set.
        html: write a page with pictures to this file.

    Raises:
        UserError: there is no such experiment, or nothing is completed yet.
    """
    client = open_experiment(name, config)
    trials = client.fetch_trials()
    summary = summarise(client, trials)
    text = to_text(summary)
    if html is not None:
        path = Path(html)
        try:
            path.write_text(_page(client, summary, trials, text), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from None
        text += f"\npictures    {path}"
    return text


def summarise(client: Any, trials: Sequence[Any]) -> Summary:
    """Count an experiment.

    Raises:
        UserError: no trial is completed yet.
    """
    by_status: dict[str, int] = {}
    for trial in trials:
        by_status[trial.status] = by_status.get(trial.status, 0) + 1
    completed = completed_trials(trials)
    if not completed:
        counts = ", ".join(f"{n} {status}" for status, n in by_status.items()) or "no trial"
        raise UserError(f"Nothing is completed in {client.name!r} yet ({counts}).")
    rungs: dict[str, list[Any]] = {}
    for trial in completed:
        rungs.setdefault(configuration_of(trial), []).append(trial)
    forked = any(statistics_of(trial).get("forked") for trial in completed)
    steps_of = [[int(statistics_of(trial)["env_steps"]) for trial in group] for group in rungs.values()]
    if forked:  # a child's life contains its parent's: only what each process trained adds up
        steps = sum(int(statistics_of(trial)["env_steps_here"]) for trial in completed)
    else:
        steps = sum(max(group) for group in steps_of)
    cost = cost_of(trials)
    some = next((t for t in completed if not statistics_of(t)["diverged"]), completed[0])
    per_epoch = statistics_of(some)["env_steps"] / max(statistics_of(some)["epochs"], 1.0)
    max_epochs = _max_epochs(client, completed)
    return Summary(
        name=client.name,
        version=client.version,
        algorithm=", ".join(client.algorithm.configuration),
        working_dir=Path(client.working_dir),
        by_status=by_status,
        best=min(completed, key=ranking_key),
        configurations=len(rungs),
        steps=steps,
        steps_in_full=int(len(rungs) * max_epochs * per_epoch),
        steps_restarted=steps + cost.saved_steps,
        max_epochs=max_epochs,
        reached=int(max(statistics_of(trial)["epochs"] for trial in completed)),
        cost=cost,
    )


def to_text(summary: Summary) -> str:
    """The summary as lines."""
    best, stats = summary.best, statistics_of(summary.best)
    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary.by_status.items()))
    lines = [
        f"experiment  {summary.name}-v{summary.version} ({summary.algorithm}): {counts}; "
        f"{summary.configurations} configurations",
        f"best trial  {best.id}",
        f"            return {stats['return_mean']:.1f} +- {stats['return_std']:.1f} after "
        f"{stats['epochs']:.0f} of {summary.max_epochs} epochs, {stats['env_steps']:,.0f} steps",
    ]
    if seeds := seeds_text(stats):
        lines.append(f"            {seeds}")
    curve = read_curve(Path(best.working_dir))
    if len(curve) > 1:
        lines.append(f"            return by epoch {curve_text([row['return_mean'] for row in curve])}")
    params = params_of(best)
    width = max(len(name) for name in params)
    lines += [f"            {name:{width}}  {value}" for name, value in sorted(params.items())]
    lines.append(f"steps       {summary.steps:,} trained for {summary.configurations} configurations")
    if summary.steps_in_full > summary.steps:
        saved = summary.steps_in_full - summary.steps
        # Before the first trial is at the top, the hunt has only just begun.
        how = "saved by early stopping" if summary.reached == summary.max_epochs else "not trained so far"
        lines.append(
            f"            {saved:,} ({saved / summary.steps_in_full:.0%}) {how}: all of "
            f"them in full are {summary.steps_in_full:,}"
        )
    again = summary.cost.saved_steps
    if again > 0:
        lines.append(
            f"            {again:,} ({again / summary.steps_restarted:.0%}) more saved by continuing "
            f"promoted trials instead of starting them again"
        )
    lines.append(str(summary.cost))
    lines.append(f"lies in     {best.working_dir}")
    return "\n".join(lines)


def curve_text(values: Sequence[float]) -> str:
    """A learning curve in one line: bars, and the numbers where they are few."""
    numbers = values if len(values) <= 8 else [values[0], values[len(values) // 2], values[-1]]
    between = ", " if len(values) <= 8 else " ... "
    return f"{sparkline(values)}  {between.join(f'{value:.0f}' for value in numbers)}"


def sparkline(values: Sequence[float]) -> str:
    """Numbers as a row of bars, the lowest to the highest of them."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in finite)


def _max_epochs(client: Any, completed: Sequence[Any]) -> int:
    from ppo_hpo.orion.objective import epochs_prior
    from ppo_hpo.spec.prior import highest_fidelity

    prior = epochs_prior(client.space)
    if prior is not None:
        return highest_fidelity(prior)
    return int(max(statistics_of(trial)["epochs"] for trial in completed))


def _page(client: Any, summary: Summary, trials: Sequence[Any], text: str) -> str:
    """One HTML file that needs no network: learning curves, and Orion's own regret plot."""
    import html

    import plotly.graph_objects as go

    figure = go.Figure()
    for trial in trials:
        curve = read_curve(Path(trial.working_dir)) if trial.status == "completed" else []
        if not curve or trial.id == summary.best.id:
            continue
        figure.add_scatter(
            x=[row["env_steps"] for row in curve], y=[row["return_mean"] for row in curve],
            mode="lines+markers", line={"color": "rgba(110,110,110,0.45)", "width": 1},
            marker={"size": 4}, name=trial.id[:8], showlegend=False,
        )  # fmt: skip
    curve = read_curve(Path(summary.best.working_dir))
    figure.add_scatter(
        x=[row["env_steps"] for row in curve], y=[row["return_mean"] for row in curve],
        mode="lines+markers", line={"color": "#c2410c", "width": 3}, name=f"best: {summary.best.id[:8]}",
    )  # fmt: skip
    figure.update_layout(
        title="Learning curves: a line that ends early was stopped early",
        xaxis_title="environment steps", yaxis_title="mean evaluation return", template="simple_white",
    )  # fmt: skip
    pictures = [figure.to_html(full_html=False, include_plotlyjs=True)]
    regret = client.plot.regret()
    regret.update_layout(template="simple_white")
    pictures.append(regret.to_html(full_html=False, include_plotlyjs=False))
    title = html.escape(f"{summary.name}-v{summary.version}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<body style="font-family: sans-serif; max-width: 70em; margin: 2em auto">'
        f"<h1>{title}</h1><pre>{html.escape(text)}</pre>{''.join(pictures)}{_cost_table(trials)}</body></html>\n"
    )


def _cost_table(trials: Sequence[Any]) -> str:
    """What each trial cost, as a table of the page."""
    import html

    names = ("trial", "status", "steps", "of evaluation", "repeated or not ended", "wall s", "CPU s")
    rows = "".join(
        f"<tr><td>{html.escape(trial.id[:8])}<td>{html.escape(trial.status)}<td>{cost.env_steps:,}"
        f"<td>{cost.eval_steps:,}<td>{cost.unkept_steps:,}<td>{cost.wall_seconds:.1f}<td>{cost.cpu_seconds:.1f}"
        for trial, cost in zip(trials, costs_of(trials), strict=True)
    )
    head = "".join(f"<th>{name}" for name in names)
    return f'<table class="cost" cellpadding="6"><tr>{head}{rows}</table>'

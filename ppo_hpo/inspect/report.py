"""The report of an experiment: its best trial, the steps that early stopping saved, and the cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_hpo.inspect.cost import Cost, cost_of, costs_of
from ppo_hpo.orion import experiment
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.results import seeds_text
from ppo_hpo.state.curve import read_curve

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Summary:
    """An experiment in numbers."""

    title: str  # Name and version.
    algorithm: str
    by_status: Mapping[str, int]  # Number of trials of each of Orion's statuses.
    best: Any  # The completed trial of the lowest objective; among equals, the longest trained.
    configurations: int  # Number of different configurations that completed at some fidelity.
    steps: int  # Environment steps trained. What a promoted trial resumed from counts once.
    steps_in_full: int  # If every configuration were trained to the highest fidelity.
    max_epochs: int  # The highest fidelity, or the epochs of every trial.
    reached: int  # The most epochs of a completed trial.
    cost: Cost  # Of all trials, however they ended.
    completed: int  # Number of completed trials, promotions included.
    diverged: int  # Number of those that diverged.


def report(name: str, config: str | None = None, html: str | None = None) -> str:
    """Summarize an experiment as text, and as a web page.

    Args:
        name: name of the experiment, or path of a sweep's directory.
        config: Orion's configuration file; None looks in the places that `ppo_hpo.orion.experiment` lists.
        html: file to write a page with plots to; None writes none.
    """
    client = experiment.open_experiment(name, config)
    trials = client.fetch_trials()
    summary = summarise(client, trials)
    text = to_text(summary)
    if html is not None:
        path = Path(html)
        try:
            path.write_text(_page(client, summary, trials, text), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}.") from None
        text += f"\npage        {path}"
    return text


def summarise(client: Any, trials: Sequence[Any]) -> Summary:
    """Summarize an experiment in numbers; UserError if no trial is completed yet."""
    by_status = dict(Counter(trial.status for trial in trials))
    completed = experiment.completed_trials(trials)
    if not completed:
        counts = ", ".join(f"{n} {status}" for status, n in by_status.items()) or "no trial"
        raise UserError(f"No trial of {client.name!r} is completed yet ({counts}).")
    configurations = len({experiment.configuration_of(trial) for trial in completed})
    reached = int(max(experiment.statistics_of(trial)["epochs"] for trial in completed))
    max_epochs = experiment.highest_epochs(client) or reached
    # A trial that diverged in its first epoch would give a wrong number of steps per epoch.
    typical = next((found for t in completed if not (found := experiment.statistics_of(t))["diverged"]), None)
    typical = typical or experiment.statistics_of(completed[0])
    steps_per_epoch = typical["env_steps"] / max(typical["epochs"], 1.0)
    return Summary(
        title=f"{client.name} (version {client.version})",
        algorithm=", ".join(client.algorithm.configuration),
        by_status=by_status,
        best=min(completed, key=experiment.ranking_key),
        configurations=configurations,
        steps=_trained_steps(completed),
        steps_in_full=int(configurations * max_epochs * steps_per_epoch),
        max_epochs=max_epochs,
        reached=reached,
        cost=cost_of(trials),
        completed=len(completed),
        diverged=sum(bool(experiment.statistics_of(trial)["diverged"]) for trial in completed),
    )


def _trained_steps(completed: Sequence[Any]) -> int:
    """Environment steps of completed trials. Steps that several trials share count once."""
    statistics = [experiment.statistics_of(trial) for trial in completed]
    if any(found.get("forked") for found in statistics):
        # A fork's steps contain its parent's, so only what each process trained can be added up.
        return sum(int(found["env_steps_here"]) for found in statistics)
    longest: dict[str, int] = {}
    for trial, found in zip(completed, statistics, strict=True):
        key = experiment.configuration_of(trial)
        longest[key] = max(int(found["env_steps"]), longest.get(key, 0))
    return sum(longest.values())


def to_text(summary: Summary) -> str:
    """The summary as lines of text."""
    best, stats = summary.best, experiment.statistics_of(summary.best)
    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary.by_status.items()))
    lines = [
        f"experiment  {summary.title}, tuned by {summary.algorithm}: {counts}; "
        f"{summary.configurations} configurations",
        f"best trial  {best.id}",
        f"            return {stats['return_mean']:.1f} +- {stats['return_std']:.1f} after "
        f"{stats['epochs']:.0f} of {summary.max_epochs} epochs, {stats['env_steps']:,.0f} steps",
    ]
    if summary.diverged:
        how_many = "all" if summary.diverged == summary.completed else f"{summary.diverged} of"
        lines.insert(
            1, f"diverged    {how_many} {summary.completed} completed trials; log.txt of each says why"
        )
    if seeds := seeds_text(stats):
        lines.append(f"            {seeds}")
    curve = read_curve(Path(best.working_dir))
    if len(curve) > 1:
        returns = curve_text([row["return_mean"] for row in curve])
        lines.append(
            f"            return after epochs {curve[0]['epoch']} to {curve[-1]['epoch']}  {returns}"
        )
    params = experiment.params_of(best)
    width = max(len(name) for name in params)
    for name, value in sorted(params.items()):
        derived = f" ({name.replace('one_minus_', '')} {1 - value:.6g})" if ".one_minus_" in name else ""
        lines.append(f"            {name:{width}}  {value}{derived}")
    lines += [f"directory   {best.working_dir}", *_steps_text(summary), str(summary.cost)]
    return "\n".join(lines)


def _steps_text(summary: Summary) -> list[str]:
    lines = [f"steps       {summary.steps:,} trained for {summary.configurations} configurations"]
    missing = summary.steps_in_full - summary.steps
    if missing > 0:
        # Before a trial has reached the highest fidelity, the hunt has only begun and saved nothing yet.
        how = (
            "not every configuration reached" if summary.reached == summary.max_epochs else "none has reached"
        )
        lines.append(
            f"            {missing:,} not trained, because {how} {summary.max_epochs} epochs "
            f"({missing / summary.steps_in_full:.0%} of the {summary.steps_in_full:,} steps that "
            f"{summary.configurations} full trainings would take)"
        )
    if (saved := summary.cost.saved_steps) > 0:
        lines.append(
            f"            {saved:,} not trained again, because promoted trials resumed instead of starting "
            f"from scratch"
        )
    return lines


def curve_text(values: Sequence[float]) -> str:
    """A learning curve in one line: bars and numbers. Of more than eight numbers only three are shown."""
    numbers = values if len(values) <= 8 else [values[0], values[len(values) // 2], values[-1]]
    separator = ", " if len(values) <= 8 else " ... "
    return f"{sparkline(values)}  {separator.join(f'{value:.0f}' for value in numbers)}"


def sparkline(values: Sequence[float]) -> str:
    """Numbers as a row of bars, scaled from the lowest to the highest. NaN and infinity are left out."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in finite)


def _page(client: Any, summary: Summary, trials: Sequence[Any], text: str) -> str:
    """One HTML file that needs no network: learning curves, Orion's regret plot and a table of costs."""
    import html

    import plotly.graph_objects as go

    figure = go.Figure()
    best = summary.best
    completed = [trial for trial in trials if trial.status == "completed" and trial.id != best.id]
    for trial in [*completed, best]:  # The best is drawn last, on top of the others.
        curve = read_curve(Path(trial.working_dir))
        if not curve:
            continue
        if trial is best:
            style: dict[str, Any] = {"name": f"best: {best.id[:8]}", "line": {"color": "#c2410c", "width": 3}}
        else:
            style = {
                "name": trial.id[:8], "line": {"color": "rgba(110,110,110,0.45)", "width": 1},
                "marker": {"size": 4}, "showlegend": False,
            }  # fmt: skip
        figure.add_scatter(
            x=[row["env_steps"] for row in curve], y=[row["return_mean"] for row in curve],
            mode="lines+markers", **style,
        )  # fmt: skip
    figure.update_layout(
        title="Learning curves: a line that ends early was stopped early",
        xaxis_title="environment steps", yaxis_title="mean evaluation return", template="simple_white",
    )  # fmt: skip
    regret = client.plot.regret()
    regret.update_layout(
        template="simple_white", yaxis_title="objective (the negated return; lower is better)"
    )
    plots = figure.to_html(full_html=False, include_plotlyjs=True)
    plots += regret.to_html(full_html=False, include_plotlyjs=False)
    title = html.escape(summary.title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<body style="font-family: sans-serif; max-width: 70em; margin: 2em auto">'
        f"<h1>{title}</h1><pre>{html.escape(text)}</pre>{plots}{_cost_table(trials)}</body></html>\n"
    )


def _cost_table(trials: Sequence[Any]) -> str:
    """The cost of each trial, as a table of the page."""
    import html

    names = ("trial", "status", "steps", "in evaluations", "repeated or not ended", "wall s", "CPU s")
    rows = "".join(
        f"<tr><td>{html.escape(trial.id[:8])}<td>{html.escape(trial.status)}<td>{cost.env_steps:,}"
        f"<td>{cost.eval_steps:,}<td>{cost.unkept_steps:,}<td>{cost.wall_seconds:.1f}<td>{cost.cpu_seconds:.1f}"
        for trial, cost in zip(trials, costs_of(trials), strict=True)
    )
    head = "".join(f"<th>{name}" for name in names)
    return f'<table class="cost" cellpadding="6"><tr>{head}{rows}</table>'

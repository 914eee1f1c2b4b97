"""What retraining found, as a table, as sentences and as a web page."""

from __future__ import annotations

from collections.abc import Sequence

from ppo_hpo.sweeps.retrain import Tested


def table(tested: Sequence[Tested]) -> list[str]:
    """A row for each configuration."""
    rows = [("configuration", "steps", "claimed", "test IQM", "95 % interval", "quartiles", "drop")]
    rows += [
        (
            item.label,
            f"{item.steps:,}",
            "" if item.claimed is None else f"{item.claimed:.1f}",
            f"{item.iqm:.1f}",
            _span(item.interval),
            _span(item.quartiles),
            "" if item.drop is None else f"{item.drop:.1f}",
        )
        for item in tested
    ]
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
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
    """A web page in one file, which needs no network.

    Each run is a dot, each claim a cross, and each IQM a diamond with its interval.

    Args:
        title: name and version of the experiment.
        tested: the configurations.
        text: what is printed.
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

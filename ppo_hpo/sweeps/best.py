"""The best trials of an experiment: again on fresh seeds, as a preset, as a policy.

The best of many noisy scores is too good: it won by its configuration and by its luck (the winner's curse).
What is left of it shows when it is trained again, from scratch, on seeds that tuning has not seen.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ppo_hpo.orion.experiment import (
    completed_trials,
    configuration_of,
    open_experiment,
    ranking_key,
    statistics_of,
)
from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError
from ppo_hpo.spec.space import fill, list_spaces, read_space

if TYPE_CHECKING:
    from ppo_hpo.sweeps.batch import Job, Result

TOP = 3


@dataclass(frozen=True)
class Candidate:
    """A configuration, and how good tuning found it.

    Attributes:
        label: what to call it in a table.
        config: as the trial was judged: its epochs are those it had.
        claimed: the score that tuning saw; None for what it is compared with.
        trial: Orion's id; None for what it is compared with.
        directory: of the trial; None for what it is compared with.
        forked: whether hyperparameters changed in mid-life, as with PBT.
    """

    label: str
    config: TrialConfig
    claimed: float | None = None
    trial: str | None = None
    directory: Path | None = None
    forked: bool = False

    @property
    def steps(self) -> int:
        """Environment steps of its training."""
        return self.config.task.epochs * self.config.task.steps_per_epoch


@dataclass(frozen=True)
class Tested:
    """A configuration on fresh seeds; intervals are at 95 %.

    Attributes:
        label: of the candidate.
        trial: Orion's id; None for what it is compared with.
        steps: environment steps of each run.
        claimed: the score that tuning saw; None for what it is compared with.
        scores: on each fresh seed: the mean return of the run's last evaluation.
        diverged: runs that diverged.
        iqm: interquartile mean of the scores.
        interval: of `iqm`.
        quartiles: of the scores.
        kept: the advantage over what it is compared with: the difference of the two `iqm`.
        kept_interval: of `kept`.
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
        """By how much the claimed score was too high."""
        return None if self.claimed is None else self.claimed - self.iqm


def best(
    name: str,
    config: str | None = None,
    *,
    top: int = TOP,
    test_seeds: int = 0,
    workers: int = 2,
    device: str = "auto",
    directory: str | None = None,
    against: str | None = None,
    export: str | None = None,
    policy: str | None = None,
    html: str | None = None,
    progress: TextIO | None = None,
) -> str:
    """The best trials of an experiment, to be read.

    Args:
        name: the experiment's name.
        config: Orion's configuration file of the hunt, for its storage.
        top: how many configurations.
        test_seeds: train each of them from scratch on so many fresh seeds; 0 does not.
        workers: processes that train.
        device: of all of them.
        directory: where the test trials go; None is ``best`` in the experiment's working directory.
        against: what is trained beside them: a preset's name, a file, ``default`` or ``none``. None takes the
            shipped preset of the environment, or the default where there is none.
        export: write the best trial's configuration to this file, as a preset.
        policy: write the best trial's policy to this file; ONNX if it ends in ``.onnx``.
        html: write a page with a picture of the test scores to this file.
        progress: where to tell how far the test trials are.

    Raises:
        UserError: there is no such experiment, nothing is completed yet, a trial's files are not there, a
            file cannot be written, or a test trial failed.
    """
    for value, low, what in ((top, 1, "top"), (test_seeds, 0, "test-seeds"), (workers, 1, "workers")):
        if value < low:
            raise UserError(f"`--{what} >= {low}` must hold, but got {value}.")
    if html is not None and not test_seeds:
        raise UserError("`--html` draws test scores. Add --test-seeds N.")
    client = open_experiment(name, config)
    title = f"{client.name}-v{client.version}"
    found = candidates(client.fetch_trials(), top, client.name)
    # Before the test, which may take hours: what cannot be written is heard of now.
    written = _exports(found[0], title, export, policy)
    if not test_seeds:
        return "\n".join([*_listing(found, title, name, config), *written])
    place = _place(client, directory)
    rival = baseline(found[0].config, against)
    everybody = [*found, *([] if rival is None else [rival])]
    tested = retrain(everybody, test_seeds, place, workers=workers, device=device, progress=progress)
    lines = [f"experiment  {title}: the best of tuning on {test_seeds} fresh seeds", "", *table(tested), ""]
    lines += [*conclusions(tested), *_beware(found), f"lie in      {place}"]
    about = {"experiment": title, "test_seeds": test_seeds, "tested": [asdict(item) for item in tested]}
    _write(place / "best.json", json.dumps(about, indent=1) + "\n")
    if html is not None:
        _write(Path(html), page(title, tested, "\n".join(lines)))
        written.append(f"picture     {html}")
    return "\n".join([*lines, *written])


def candidates(trials: Sequence[Any], top: int, name: str) -> list[Candidate]:
    """The best configurations: each by its trial of the lowest objective; among equals, the longest trained.

    Raises:
        UserError: none is completed, or a trial's configuration cannot be read.
    """
    completed = sorted(completed_trials(trials), key=ranking_key)
    if not completed:
        raise UserError(f"Nothing is completed in {name!r} yet.")
    found: dict[str, Any] = {}
    for trial in completed:
        found.setdefault(configuration_of(trial), trial)
    return [_candidate(trial, number) for number, trial in enumerate(list(found.values())[:top], 1)]


def _candidate(trial: Any, number: int) -> Candidate:
    place = Path(trial.working_dir)
    path = place / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: the files of trial {trial.id} are not on this machine, or were removed. "
            f"Run this where they are."
        )
    config, statistics = TrialConfig.from_mapping(yamlio.load(path)), statistics_of(trial)
    if statistics.get("stopped"):
        # Judged, and saved, at an epoch before the one that it was asked for.
        task = {"epochs": int(statistics["epochs"]), "max_epochs": config.max_epochs}
        config = config.replace(task=task)
    return Candidate(
        label=f"{number}. {trial.id[:8]}",
        config=config,
        claimed=-float(trial.objective.value),
        trial=str(trial.id),
        directory=place,
        forked=bool(statistics.get("forked")),
    )


# ------------------------------------------------------------------------------ test


def baseline(winner: TrialConfig, name: str | None = None) -> Candidate | None:
    """What anybody would have had without tuning, at the winner's number of steps.

    A preset keeps its hyperparameters. Its epochs become the winner's, rounded to whole rollouts of its own,
    and its schedules end at their end.

    Args:
        winner: the configuration that it is compared with.
        name: see `best`.

    Raises:
        UserError: there is no such preset, or it searches something.
    """
    if name == "none":
        return None
    if name is None:
        name = preset_of(winner) or "default"
    groups: dict[str, dict[str, Any]] = {}
    if name != "default":
        space = read_space(name)
        if any(space.priors.values()):
            raise UserError(f"{name} is a space and no preset: it searches hyperparameters. Name a preset.")
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
    """The name of the shipped preset of a trial's environment."""

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
    """The test trials of one configuration, each of one seed, in a directory named after its identity."""
    from ppo_hpo.spec.seeds import fresh_seeds  # which imports numpy
    from ppo_hpo.sweeps.batch import Job

    found = []
    for number, seed in enumerate(fresh_seeds(candidate.config, seeds), 1):
        config = candidate.config.replace(task={"seed": seed, "seeds": 1})
        found.append(Job(f"{candidate.label}, seed {number}", config, place / config.identity()[:32]))
    return found


def retrain(
    everybody: Sequence[Candidate],
    seeds: int,
    place: Path,
    *,
    workers: int = 2,
    device: str = "auto",
    progress: TextIO | None = None,
) -> list[Tested]:
    """Train every configuration on fresh seeds; what was trained before is taken as it is.

    Args:
        everybody: the configurations; one without a trial is what the others are compared with.
        seeds: how many.
        place: the directory in which those of the test trials lie.
        workers: processes.
        device: of all of them.
        progress: where to tell how far they are.

    Raises:
        UserError: see `ppo_hpo.sweeps.batch.run_all`.
    """
    from ppo_hpo.sweeps.batch import Progress, run_all

    jobs = [job for candidate in everybody for job in jobs_of(candidate, seeds, place)]
    show = Progress(progress, jobs)
    try:
        results = run_all(jobs, workers=workers, device=device, on_end=show.ended, on_look=show.look)
    finally:
        show.close()
    runs = [results[index * seeds : (index + 1) * seeds] for index in range(len(everybody))]
    rival = next((own for who, own in zip(everybody, runs, strict=True) if who.trial is None), None)
    return [summarise(who, own, rival) for who, own in zip(everybody, runs, strict=True)]


def summarise(candidate: Candidate, runs: Sequence[Result], rival: Sequence[Result] | None) -> Tested:
    """What the runs of one configuration come to, beside those of what it is compared with."""
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


def _place(client: Any, directory: str | None) -> Path:
    if directory is not None:
        if not directory:
            raise UserError("`--dir` must name a directory, but got ''. Write . for the current one.")
        return Path(directory).absolute()
    if not client.working_dir:
        raise UserError(f"The experiment {client.name!r} has no working directory. Say where with --dir DIR.")
    return Path(client.working_dir).absolute() / "best"


# ------------------------------------------------------------------------------ tell


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
    """What the numbers say, in sentences that they bear out."""
    winner = tested[0]
    assert winner.claimed is not None
    lines = [
        f"winner      claimed {winner.claimed:.1f}; {winner.iqm:.1f} is left on {len(winner.scores)} fresh "
        f"seeds, {_span(winner.interval)}"
    ]
    rival = next((item for item in tested if item.trial is None), None)
    if rival is not None and winner.kept is not None and winner.kept_interval is not None:
        low, high = winner.kept_interval
        sure = "" if low > 0 or high < 0 else "; the interval holds 0, so no difference is shown"
        lines.append(
            f"advantage   over {rival.label}: {winner.claimed - rival.iqm:+.1f} claimed, {winner.kept:+.1f} "
            f"left, {_span(winner.kept_interval)}{sure}"
        )
        if rival.steps != winner.steps:
            lines.append(f"            {rival.label} has {rival.steps:,} steps: whole rollouts of its own")
    ahead = max((item for item in tested if item.trial is not None), key=lambda item: item.iqm)
    if ahead.iqm > winner.iqm:
        lines.append(f"best now    {ahead.label} with {ahead.iqm:.1f}, again picked as the best of several")
    for item in tested:
        if item.diverged:
            lines.append(f"diverged    {item.label}: {item.diverged} of {len(item.scores)} runs")
    return lines


def _beware(found: Sequence[Candidate]) -> list[str]:
    forked = ", ".join(candidate.label for candidate in found if candidate.forked)
    if not forked:
        return []
    return [
        f"beware      hyperparameters of {forked} changed in mid-life, as with PBT; from scratch, with the "
        f"last ones throughout, it is another trial"
    ]


def _listing(found: Sequence[Candidate], title: str, name: str, config: str | None) -> list[str]:
    lines = [f"experiment  {title}"]
    for candidate in found:
        assert candidate.claimed is not None
        assert candidate.directory is not None
        task = candidate.config.task
        changed = _not_default(candidate.config)
        width = max(len(key) for key in changed)
        path = shlex.quote(str(candidate.directory / "config.yaml"))
        lines += [
            "",
            f"{candidate.label}  return {candidate.claimed:.1f} after {task.epochs} of "
            f"{candidate.config.max_epochs} epochs, {candidate.steps:,} steps",
            *(f"    {key:{width}}  {value}" for key, value in changed.items()),
            f"    on another seed: ppo-hpo run --config {path} --seed {task.seed + 1}",
        ]
    where = "" if config is None else f" -c {shlex.quote(config)}"
    again = f"ppo-hpo best {shlex.quote(name)}{where} --test-seeds 10"
    return [*lines, *_beware(found), "", f"what is left of it on fresh seeds: {again}"]


def _not_default(config: TrialConfig) -> dict[str, Any]:
    """Hyperparameters by dotted name, but for those that have their default."""
    default = TrialConfig().to_mapping()
    return {
        f"{group}.{key}": value
        for group, values in config.to_mapping().items()
        for key, value in values.items()
        if value != default[group][key] or (group, key) == ("env", "id")
    }


def _span(ends: tuple[float, float]) -> str:
    return f"{ends[0]:.1f} to {ends[1]:.1f}"


def page(title: str, tested: Sequence[Tested], text: str) -> str:
    """One HTML file that needs no network: each run a dot, the claim a cross, the IQM with its interval."""
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
        marker={"color": "#c2410c", "size": 12, "symbol": "x"}, name="claimed by tuning",
    )  # fmt: skip
    figure.update_layout(
        title="What is left on fresh seeds", xaxis_title="mean evaluation return", template="simple_white",
        yaxis={"autorange": "reversed", "categoryorder": "array", "categoryarray": labels},
    )  # fmt: skip
    name = html.escape(title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        f'<body style="font-family: sans-serif; max-width: 70em; margin: 2em auto">'
        f"<h1>{name}</h1><pre>{html.escape(text)}</pre>"
        f"{figure.to_html(full_html=False, include_plotlyjs=True)}</body></html>\n"
    )


# ---------------------------------------------------------------------------- export


def _exports(winner: Candidate, title: str, export: str | None, policy: str | None) -> list[str]:
    """Write what was asked for, and say so."""
    lines = []
    if export is not None:
        if Path(export).exists():
            raise UserError(f"{export} is there already. Choose another name, or remove it.")
        _write(Path(export), as_preset(winner, title))
        # What looks like no file would be taken for the name of a shipped preset.
        name = export if "/" in export or export.endswith((".yaml", ".yml")) else f"./{export}"
        lines.append(f"preset      {export}: ppo-hpo run --config {shlex.quote(name)}")
    if policy is not None:
        from ppo_hpo.ppo.policy import export_policy

        assert winner.directory is not None
        export_policy(winner.directory, policy, winner.config.task.epochs)
        lines.append(f"policy      {policy}: docs/how-to/best-trials.md says how to load it")
    return lines


def as_preset(candidate: Candidate, title: str) -> str:
    """A configuration as a space file in which nothing is searched."""
    config, task = candidate.config, candidate.config.task
    mapping = config.to_mapping()
    mapping["task"]["max_epochs"] = config.max_epochs
    # A comment ends with its line, whatever the experiment is called.
    title = title if title.isprintable() else ascii(title)
    lines = [
        f"# Preset: {config.env.id} in {candidate.steps:,} steps. Nothing is searched.",
        "#",
        f"# Found by the experiment {title}, trial {candidate.trial}, which claimed {candidate.claimed:.1f}.",
    ]
    if task.epochs < config.max_epochs:
        lines.append(
            f"# It was judged after {task.epochs} of {config.max_epochs} epochs; "
            f"--epochs {config.max_epochs} trains it to the end."
        )
    if candidate.forked:
        lines.append("# Its hyperparameters changed in mid-life, as with PBT: these are the last ones.")
    return "\n".join(lines) + "\n" + yamlio.dump(mapping)


def _write(path: Path, content: str) -> None:
    from ppo_hpo.state.files import write_atomically

    write_atomically(path, content.encode())

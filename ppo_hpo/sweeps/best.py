"""`ppo-hpo best`: lists the best trials of an experiment, exports them, or retrains them on fresh seeds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from ppo_hpo.orion.experiment import open_experiment
from ppo_hpo.spec.errors import UserError
from ppo_hpo.sweeps.candidates import Candidate, as_preset, candidates, changed_values


@dataclass(frozen=True)
class Retraining:
    """How to retrain the best trials from scratch.

    Attributes:
        seeds: how many fresh seeds.
        against: what to compare with; see `ppo_hpo.sweeps.retrain.baseline`.
        n_workers: how many runs are trained at a time. None means the number of usable cores.
        device: device of each run.
        directory: directory of the runs. None means ``best`` in the experiment's working directory.
        html: file for a web page with a plot of the scores. None writes none.
        progress: where to print progress. None prints none.
    """

    seeds: int
    against: str | None = None
    n_workers: int | None = None
    device: str = "auto"
    directory: str | None = None
    html: str | None = None
    progress: TextIO | None = None


def best(
    name: str,
    config: str | None = None,
    *,
    top: int = 3,
    retraining: Retraining | None = None,
    export: str | None = None,
    policy: str | None = None,
) -> str:
    """Describe the best trials of an experiment.

    Args:
        name: name of the experiment.
        config: Orion's configuration file; see `ppo_hpo.orion.experiment.open_experiment`.
        top: how many configurations.
        retraining: how to retrain them. None does not.
        export: file for the best trial's configuration.
        policy: file for the best trial's policy, as ONNX if it ends in ``.onnx``.

    Returns:
        The text that `ppo-hpo best` prints.

    Raises:
        UserError: there is no such experiment, no trial is completed, a trial's files are missing, a file
            cannot be written, or a run failed.
    """
    client = open_experiment(name, config)
    title = f"{client.name} (version {client.version})"
    found = candidates(client.fetch_trials(), top, client.name)
    # Retraining may take hours. A file that cannot be written is an error before that.
    written = _exports(found[0], title, export, policy)
    if retraining is None:
        return "\n".join([*_listing(found, title, name, config), *written])
    return "\n".join([*_retrained(client, found, title, retraining), *written])


def _retrained(client: Any, found: Sequence[Candidate], title: str, retraining: Retraining) -> list[str]:
    from ppo_hpo.orion.workers import usable_cores
    from ppo_hpo.sweeps.retrain import baseline, retrain
    from ppo_hpo.sweeps.retrain_text import conclusions, page, table

    place = _place(client, retraining.directory)
    rival = baseline(found[0].config, retraining.against)
    tested = retrain(
        [*found, *([] if rival is None else [rival])],
        retraining.seeds,
        place,
        n_workers=retraining.n_workers or usable_cores(),
        device=retraining.device,
        progress=retraining.progress,
    )
    lines = [f"experiment  {title}: the best trials on {retraining.seeds} fresh seeds", ""]
    lines += [*table(tested), "", *conclusions(tested), *_warnings(found), f"directory   {place}"]
    about = {
        "experiment": f"{client.name}-v{client.version}",
        "test_seeds": retraining.seeds,
        "tested": [asdict(item) for item in tested],
    }
    _write(place / "best.json", json.dumps(about, indent=1) + "\n")
    if retraining.html is not None:
        _write(Path(retraining.html), page(title, tested, "\n".join(lines)))
        lines.append(f"page        {retraining.html}")
    return lines


def _place(client: Any, directory: str | None) -> Path:
    if directory is not None:
        return Path(directory).absolute()
    if not client.working_dir:
        raise UserError(f"The experiment {client.name!r} has no working directory. Add --test-dir DIR.")
    return Path(client.working_dir).absolute() / "best"


def _warnings(found: Sequence[Candidate]) -> list[str]:
    forked = ", ".join(candidate.label for candidate in found if candidate.forked)
    if not forked:
        return []
    return [
        f"warning     hyperparameters of {forked} changed during training, as PBT does. Retrained with the "
        f"last ones throughout, it is another trial."
    ]


def _listing(found: Sequence[Candidate], title: str, name: str, config: str | None) -> list[str]:
    lines = [f"experiment  {title}"]
    for candidate in found:
        assert candidate.claimed is not None
        assert candidate.directory is not None
        task = candidate.config.task
        changed = changed_values(candidate.config)
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
    return [*lines, *_warnings(found), "", f"retrain on fresh seeds: {again}"]


def _exports(winner: Candidate, title: str, export: str | None, policy: str | None) -> list[str]:
    """Write the files that were asked for; return a line about each."""
    lines = []
    if export is not None:
        if Path(export).exists():
            raise UserError(f"{export} exists already. Choose another name, or remove it.")
        _write(Path(export), as_preset(winner, title))
        # Without a slash or a suffix, it would be taken for the name of a shipped preset.
        name = export if "/" in export or export.endswith((".yaml", ".yml")) else f"./{export}"
        lines.append(f"trial file  {export}: ppo-hpo run --config {shlex.quote(name)}")
    if policy is not None:
        from ppo_hpo.ppo.policy import export_policy

        assert winner.directory is not None
        export_policy(winner.directory, policy, winner.config.task.epochs)
        how = "" if policy.endswith(".onnx") else f": in Python, ppo_hpo.load_policy({json.dumps(policy)})"
        lines.append(f"policy      {policy}{how}")
    return lines


def _write(path: Path, content: str) -> None:
    from ppo_hpo.state.files import write_atomically

    write_atomically(path, content.encode())

"""`ppo-hpo best`: lists the best trials of an experiment, exports them, or retrains them on fresh seeds."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ppo_hpo.orion.experiment import open_experiment
from ppo_hpo.spec.errors import UserError
from ppo_hpo.state.files import write_atomically
from ppo_hpo.sweeps.candidates import Candidate, as_preset, candidates, changed_values
from ppo_hpo.sweeps.retrain import Retraining, baseline, conclusions, page, retrain, table


def best(
    name: str, config: str | None = None, *, top: int = 3, retraining: Retraining | None = None,
    export: str | None = None, policy: str | None = None,
) -> str:  # fmt: skip
    """The text that `ppo-hpo best` prints about the ``top`` best configurations.

    ``config`` is Orion's configuration file. ``export`` and ``policy`` are files for the best trial's
    configuration and policy.
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
    if retraining.directory is None and not client.working_dir:
        raise UserError(f"The experiment {client.name!r} has no working directory. Add --test-dir DIR.")
    place = Path(retraining.directory or Path(client.working_dir) / "best").absolute()
    rival = baseline(found[0].config, retraining.against)
    tested = retrain([*found, *([] if rival is None else [rival])], place, retraining)
    lines = [
        f"experiment  {title}: the best trials on {retraining.seeds} fresh seeds",
        f"            each evaluated on {retraining.episodes} fresh episodes",
        "",
    ]
    lines += [*table(tested), "", *conclusions(tested), *_warnings(found), f"directory   {place}"]
    about = {
        "experiment": f"{client.name}-v{client.version}", "test_seeds": retraining.seeds,
        "test_episodes": retraining.episodes, "tested": [asdict(item) for item in tested],
    }  # fmt: skip
    write_atomically(place / "best.json", (json.dumps(about, indent=1) + "\n").encode())
    if retraining.html is not None:
        write_atomically(Path(retraining.html), page(title, tested, "\n".join(lines)).encode())
        lines.append(f"page        {retraining.html}")
    return lines


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
        write_atomically(Path(export), as_preset(winner, title).encode())
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

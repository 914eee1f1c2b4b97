"""What `--stop-poor` saves, and whether it ever stops the best: the rule on the curves of `winners_curse.py`.

    python benchmarks/stop_poor.py --dir DIR     # after `python benchmarks/winners_curse.py --dir DIR`

Random search without fidelities, one worker, 32 configurations on each of ten seeds: the trials are gone
through in their order, each is stopped where the rule of `trial/median_stop` says so, by the trials before it
as far as those were trained. A stopped trial's curve is the beginning of its whole one (trials continue to
the bit), so nothing has to be trained again. Prints a table and writes `stop_poor.json` and `stop_poor.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import machine

from ppo_hpo.state.curve import read_curve
from ppo_hpo.trial.median_stop import median_to_reach

RESULTS = Path(__file__).resolve().parent / "results"


def stopped(curves: list[list[float]]) -> tuple[float, int, float]:
    """Go through one sweep.

    Args:
        curves: of each trial, in their order, the returns after epochs 1, 2, ...

    Returns:
        The share of the epochs that was not trained; how many trials stopped; what the best score lost.
    """
    before: list[list[float]] = []
    for curve in curves:
        ends = len(curve)
        for epoch in range(2, len(curve)):
            median = median_to_reach(epoch, before)
            if median is not None and max(curve[:epoch]) < median:
                ends = epoch
                break
        before.append(curve[:ends])
    whole, trained = sum(map(len, curves)), sum(map(len, before))
    number = sum(len(a) < len(b) for a, b in zip(before, curves, strict=True))
    return 1 - trained / whole, number, max(c[-1] for c in curves) - max(c[-1] for c in before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="of the runs of winners_curse.py")
    arguments = parser.parse_args()
    lines = [
        "| environment | epochs | trials stopped | epochs saved | least, most | best score lost |",
        "|---" * 6 + "|",
    ]
    stored: dict[str, list[tuple[float, int, float]]] = {}
    for place in sorted(path for path in arguments.dir.iterdir() if path.is_dir()):
        sweeps: dict[str, list[list[float]]] = {}
        for file in sorted(place.glob("*/*/curve.jsonl")):
            returns = [row["return_mean"] for row in read_curve(file.parent) if row["epoch"] > 0]
            sweeps.setdefault(file.parent.name, []).append(returns)
        found = stored[place.name] = [stopped(curves) for curves in sweeps.values()]
        saved = [share for share, _, _ in found]
        one, number = next(iter(sweeps.values())), statistics.fmean(number for _, number, _ in found)
        lines.append(
            f"| {place.name} | {len(one[0])} | {number:.1f} of {len(one)} "
            f"| {statistics.fmean(saved):.0%} | {min(saved):.0%} to {max(saved):.0%} "
            f"| in {sum(lost > 0 for _, _, lost in found)} of {len(found)} sweeps |"
        )
    page = "\n".join(lines)
    print(page)
    content = {"machine": machine.describe(), "commit": machine.commit(), "saved, stopped, lost": stored}
    (RESULTS / "stop_poor.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "stop_poor.md").write_text(page + "\n")


if __name__ == "__main__":
    main()

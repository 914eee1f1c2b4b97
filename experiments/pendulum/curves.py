"""Draw the learning curves of untuned and tuned PPO on fresh seeds, from the output of `hunt.py pendulum`.

python experiments/pendulum/curves.py docs/images/pendulum-untuned-tuned.png     # needs matplotlib
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.state.curve import read_curve

FOLDER = Path(__file__).resolve().parent
OUTPUT = FOLDER / "output"


def main() -> None:
    trials = {path.parent: config_of(path) for path in OUTPUT.glob("best/*/config.yaml")}
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=110, layout="constrained")
    for path, color, label in (
        (OUTPUT / "winner.yaml", "#1f4e8c", "tuned by Orion"),
        (FOLDER / "untuned.yaml", "#c2410c", "Stable-Baselines3's defaults"),
    ):
        wanted = config_of(path)
        curves = [read_curve(trial) for trial, config in trials.items() if config == wanted]
        steps = [row["env_steps"] for row in curves[0]]
        returns = [[row["return_mean"] for row in curve] for curve in curves]
        means = [sum(values) / len(values) for values in zip(*returns, strict=True)]
        for values in returns:
            axes.plot(steps, values, color=color, alpha=0.35, linewidth=1)
        axes.plot(steps, means, color=color, linewidth=2.5, label=f"{label}: {means[-1]:.0f}")
    axes.set_title(f"PPO on Pendulum-v1: {len(curves)} fresh seeds and their mean", loc="left")
    axes.set_xlabel("environment steps")
    axes.set_ylabel("mean evaluation return")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(sys.argv[1])


def config_of(path: Path) -> tuple[object, ...]:
    """What tells the two configurations apart; the seed does not."""
    config = TrialConfig.from_mapping(yamlio.load(path))
    return config.optimizer, config.lr_schedule, config.normalize, config.ppo


if __name__ == "__main__":
    main()

"""Compare PPO untuned with PPO tuned by `orion hunt`: equal environment steps, fresh seeds.

    python experiments/hunt.py pendulum                 # what `make demo` runs
    python experiments/hunt.py pendulum --output DIR

An experiment is a folder of three files: `orion.yaml` says how Orion searches, `space.yaml` what it searches,
and `untuned.yaml` what the winner is compared with. Rerun the command to resume.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from statistics import mean

from ppo_hpo.spec import yamlio
from ppo_hpo.spec.config import TrialConfig

BIN = Path(sys.executable).parent
#: What `ppo-hpo run` and `ppo-hpo best` print when a trial ends.
TRIAL_ENDED = re.compile(r"(?:done: |seed \d+ of \d+ +)return +(\S+)")
RETURNS_PER_LINE = 8
WIDTH = 100


class CommandFailed(Exception):
    """A command failed; the message says which one, and where its output is."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", help="a folder beside this file")
    parser.add_argument("--output", type=Path, help="directory for all results (default: FOLDER/output)")
    parser.add_argument("--seeds", type=int, default=5, help="fresh seeds to compare on (default: 5)")
    arguments = parser.parse_args()
    folder = (Path(__file__).parent / arguments.experiment).resolve()
    if not (folder / "orion.yaml").is_file():
        parser.error(f"{folder / 'orion.yaml'} does not exist")
    try:
        compare(folder, (arguments.output or folder / "output").resolve(), arguments.seeds)
    except CommandFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Rerun the command to resume.", file=sys.stderr)
        return 130
    return 0


def compare(folder: Path, output: Path, seeds: int) -> None:
    """Train PPO untuned, tune it, train both on fresh seeds, and print what came out."""
    name, started = folder.name, time.monotonic()
    if (output / "orion.yaml").exists():
        print(f"Resuming from {typed(output)}. Remove that directory to start over.")
    output.mkdir(parents=True, exist_ok=True)
    plan = yamlio.load(folder / "orion.yaml")
    database = {"type": "sqlitedb", "host": str(output / "orion.sqlite")}
    plan["storage"] = {"type": "legacy", "database": database}
    (output / "orion.yaml").write_text(yamlio.dump(plan))
    # Orion's own commands ignore the storage in the file of `-c`, but they all read these two variables.
    os.environ.update(ORION_DB_TYPE=database["type"], ORION_DB_ADDRESS=database["host"])
    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    log, trials, best = output / "log.txt", output / "trials", output / "best"

    trial = TrialConfig.from_mapping(yamlio.load(folder / "untuned.yaml"))
    steps = trial.task.epochs * trial.task.steps_per_epoch
    say(
        f"PPO on {trial.env.id}. Each trial trains for {steps:,} environment steps. A return is the mean over"
    )
    say(f"{trial.task.eval_episodes} evaluation episodes; higher is better.\n")
    envs, n_steps = trial.env.n_envs, trial.ppo.n_steps
    rollout = f"{envs * n_steps:,} steps: {n_steps} in each of {envs} environments"
    say(f"1. Train with the defaults of Stable-Baselines3 (rollouts of {rollout}). Return:")
    run(log, "ppo-hpo", "run", "--config", folder / "untuned.yaml", "--dir", output / "untuned",
        "--device", "cpu")  # fmt: skip
    say("2. Tune with `orion hunt`, two trials at a time. Returns of its trials:")
    run(log, "orion", "hunt", "-n", name, "-c", folder / "orion.yaml", "--working-dir", trials,
        "ppo-hpo", "run", "--config", folder / "space.yaml", "--device", "cpu")  # fmt: skip
    say(f"3. Retrain the best trial and those defaults on {seeds} fresh seeds; evaluate 100 fresh episodes:")
    winner = output / "winner.yaml"
    winner.unlink(missing_ok=True)
    run(log, "ppo-hpo", "best", name, "-c", output / "orion.yaml", "--top", "1", "--export", winner,
        "--test-seeds", str(seeds), "--against", folder / "untuned.yaml", "--test-dir", best,
        "--device", "cpu", show_returns=False)  # fmt: skip

    total = sum(statistic(path, "env_steps") for path in trials.glob("*/results.json"))
    seconds = time.monotonic() - started
    say(f"\nDone in {seconds:.0f} s in all. The search took {total:,.0f} environment steps.")
    say_comparison(folder, winner, best)
    command = typed(BIN / "ppo-hpo")
    say(f"\nNext:\n  {command} report {name} -c {typed(output / 'orion.yaml')}    # more about this search")
    say(f"  {command} run --config {typed(winner)}    # train the winner yourself")
    say(f"  {command} sweep CartPole-v1    # tune PPO on CartPole-v1, or name your environment")


def say(text: str) -> None:
    print(text, flush=True)


def run(log: Path, *command: str | Path, show_returns: bool = True) -> None:
    """Run a command. Its output goes to the log, and the return of each trial, or a dot, to the screen.

    Raises:
        CommandFailed: the command's exit code is not 0.
    """
    returns: list[float] = []
    started = time.monotonic()
    with (
        open(log, "a", encoding="utf-8") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", file=file, flush=True)
                if match := TRIAL_ENDED.search(line):
                    returns.append(float(match[1]))
                    print(f"{returns[-1]:7.0f}" if show_returns else " .", end="", flush=True)
                    if show_returns and len(returns) % RETURNS_PER_LINE == 0:
                        say(f"   after {time.monotonic() - started:.0f} s, best so far {max(returns):.0f}")
        except KeyboardInterrupt:
            process.wait()
            raise
    if len(returns) % RETURNS_PER_LINE or not show_returns:
        say("")
    if process.returncode:
        raise CommandFailed(
            f"`{command[0]} {command[1]}` failed with exit code {process.returncode}. Its output is in "
            f"{typed(log)}. Fix the cause and rerun the command to resume."
        )


def say_comparison(folder: Path, winner: Path, best: Path) -> None:
    """Print untuned and tuned, one below the other, and the hyperparameters in which they differ."""
    tuned, untuned = json.loads((best / "best.json").read_text())["tested"]
    say(f"{'':10}{'steps':>9}   mean return on {len(tuned['scores'])} fresh seeds (lowest to highest)")
    for label, tested in (("untuned", untuned), ("tuned", tuned)):
        scores = tested["scores"]
        span = f"({min(scores):.0f} to {max(scores):.0f})"
        say(f"{label:10}{tested['steps']:9,}   {mean(scores):5.0f}  {span}")
    say("The best return in step 2 was partly luck. Fresh seeds and episodes give the honest number.")
    new, old = (
        TrialConfig.from_mapping(yamlio.load(path)).to_mapping() for path in (winner, folder / "untuned.yaml")
    )
    changes = [
        f"{group}.{key} {short(old[group][key])} -> {short(value)}"
        for group in ("optimizer", "lr_schedule", "normalize", "model", "ppo")
        for key, value in new[group].items()
        if value != old[group][key]
    ]
    say("\n" + textwrap.fill(f"Tuning changed: {'; '.join(changes)}.", WIDTH, subsequent_indent="  "))


def statistic(results: Path, name: str) -> float:
    """Read a value that a trial reported to Orion."""
    return next(item["value"] for item in json.loads(results.read_text()) if item["name"] == name)


def short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def typed(path: Path) -> str:
    """A path as one types it in the current directory."""
    return str(path).removeprefix(f"{Path.cwd()}{os.sep}")


if __name__ == "__main__":
    sys.exit(main())

"""Run one of the experiments beside this file: real `orion hunt`, then what it found.

    python experiments/hunt.py cartpole-asha            # what `make demo` runs
    python experiments/hunt.py pendulum-tpe --output DIR

An experiment is a folder of three files: `orion.yaml` (what Orion does), `space.yaml` (what is searched) and
`untuned.yaml` (what to compare with). Running it again goes on with it: Orion's database and the trials'
checkpoints are in the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from ppo_hpo.inspect.report import curve_text
from ppo_hpo.state.curve import read_curve

HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
_DONE = re.compile(r"\[(\w+)\] done: return (\S+) \+- (\S+) after epoch (\d+)")
_FROM = re.compile(r"\[(\w+)\] (?:starts|resumes).*: epoch (\d+) -> (\d+)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", help="a folder beside this file")
    parser.add_argument("--output", type=Path, help="where everything goes (default: FOLDER/output)")
    arguments = parser.parse_args()
    folder = HERE / arguments.experiment
    if not (folder / "orion.yaml").is_file():
        parser.error(f"{folder} has no orion.yaml")
    output = (arguments.output or folder / "output").resolve()
    output.mkdir(parents=True, exist_ok=True)

    os.environ["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    # Orion's commands ignore the storage in a file given with -c; these two they all read.
    os.environ["ORION_DB_TYPE"] = "pickleddb"
    os.environ["ORION_DB_ADDRESS"] = str(output / "orion.pkl")

    started = time.monotonic()
    print(f"1. PPO with nobody's tuning, for comparison ({arguments.experiment}/untuned.yaml)", flush=True)
    untuned = output / "untuned"
    subprocess.run(
        [
            "ppo-hpo",
            "run",
            "--config",
            folder / "untuned.yaml",
            "--dir",
            _short(str(untuned)),
            "--device",
            "cpu",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    hunt = [
        "orion", "hunt", "-n", arguments.experiment, "-c", str(folder / "orion.yaml"),
        "--working-dir", str(output / "trials"),
        "ppo-hpo", "run", "--config", str(folder / "space.yaml"), "--device", "cpu",
    ]  # fmt: skip
    print(f"\n2. {_short(shlex.join(hunt), '$PWD/')}\n", flush=True)
    code = _follow(hunt, output / "hunt.log")
    if code:
        print(f"orion hunt ended with code {code}; {output / 'hunt.log'} says why. Run this again to go on.")
        return code

    page = output / "report.html"
    print(f"\n3. What was found, after {time.monotonic() - started:.0f} s in all\n", flush=True)
    text = subprocess.run(
        ["ppo-hpo", "report", arguments.experiment, "--html", page],
        check=True, stdout=subprocess.PIPE, text=True,
    ).stdout  # fmt: skip
    print(_short(text.rstrip()))
    print(f"untuned     {_untuned(untuned)}")
    print(_short(f"all of it   {output}"))
    _say_next(arguments.experiment, text)
    return 0


def _follow(command: list[str], log: Path) -> int:
    """Run the hunt; a line for each trial that ends, everything else into the log."""
    begun: dict[str, str] = {}
    best, count, started = float("-inf"), 0, time.monotonic()
    with (
        open(log, "a", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if match := _FROM.search(line):
                    begun[match[1]] = f"epoch {match[2]} -> {match[3]}"
                elif match := _DONE.search(line):
                    count += 1
                    best = max(best, float(match[2]))
                    print(
                        f"   {time.monotonic() - started:4.0f} s  trial {count:3}  {match[1]}  "
                        f"{begun.get(match[1], ''):12}  return {float(match[2]):8.1f}  best {best:8.1f}",
                        flush=True,
                    )
        except KeyboardInterrupt:
            print("\nstopping: the trials under way go on from their last epoch when you run this again")
            process.wait()
            return 130
        return process.wait()


def _untuned(directory: Path) -> str:
    results = json.loads((directory / "results.json").read_text())
    values = {item["name"]: item["value"] for item in results}
    returns = [row["return_mean"] for row in read_curve(directory)]
    return (
        f"return {values['return_mean']:.1f} +- {values['return_std']:.1f} after {values['env_steps']:,.0f} "
        f"steps, at Stable-Baselines3's defaults\n            return by epoch {curve_text(returns)}"
    )


def _short(text: str, here: str = "") -> str:
    """Paths as they can be typed from where we are."""
    return text.replace(f"{Path.cwd()}/", here)


def _say_next(name: str, text: str) -> None:
    best = _short(text.partition("lies in")[2].split("\n")[0].strip())
    bin_path = shlex.quote(str(BIN))
    address = shlex.quote(os.environ["ORION_DB_ADDRESS"])
    print("\nNext:")
    for command, what in (
        (
            _short(
                f"export PATH={bin_path}:$PATH ORION_DB_TYPE=pickleddb ORION_DB_ADDRESS={address}", "$PWD/"
            ),
            "",
        ),
        (f"ppo-hpo run --config {shlex.quote(best)}/config.yaml --seed 1", "the winner on another seed"),
        (f"orion status -n {name} --all", "every trial"),
        ("ppo-hpo space copy classic-control my-space.yaml", "tune your own environment: the README goes on"),
    ):
        print(f"  {command}" + (f"\n      # {what}" if what else ""))


if __name__ == "__main__":
    sys.exit(main())

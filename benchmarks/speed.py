"""How fast is training beside its peers, and beside what the environments and the products allow?

    python benchmarks/speed.py                                   # every preset, 5 rounds each, as committed
    python benchmarks/speed.py --preset pendulum acrobot         # renews these two rows of the results
    python benchmarks/speed.py --preset cartpole-4 --rounds 2    # a quick look; writes nothing

Ours and the peers (Stable-Baselines3, SBX, CleanRL) run in turn, A B C A B C ..., each in a process of its
own on one core with one thread, with the same hyperparameters on the same environment and no evaluation. Two
rollouts with their updates come before the clock starts, so that nobody's compilation is counted. Each waits
until a core is idle, half a minute at most (`--wait`), and one that got less than 95 % of its core is taken
again, twice at most; `share_of_core` in the results says what each got. Ratios are medians over the rounds of
the ratio within a round; the rest are medians over the rounds.

Two floors are measured in the same rounds: stepping the environments with actions drawn before, in the same
vector environment as ours, and the products of the updates and of acting alone. "Floor" in the table
is the share reached, (environment floor + product floor) / our time.

The peers have virtual environments of their own in `.peers/`, made when first needed from the pins in
`peers/`. Ours runs where this is started: LunarLander-v3 needs `.[box2d]` there, HalfCheetah-v5 `.[mujoco]`,
the columns of EnvPool `.[envpool]`, Pong `.[atari]`. What cannot run is left out and named with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine
import peers
import quiet
from presets import PRESETS, Preset

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ROUNDS = 5
# A process that got less than this share of its core was disturbed.
UNDISTURBED = 0.95
TRIES = 3
CORES = quiet.allowed_cores()
PEERS = ("sb3", "sbx", "cleanrl")
OURS = ("ours", "ours_envpool", "ours_native", "ours_autograd")
FLOORS = ("environment", "environment_envpool", "environment_native", "products", "torch")
LABELS = {
    "sb3": "Stable-Baselines3",
    "sbx": "SBX",
    "cleanrl": "CleanRL",
    "ours": "ours",
    "ours_envpool": "ours, EnvPool",
    "ours_native": "ours, gymnasium's vector environment",
    "ours_autograd": "ours by autograd",
    "environment": "environments alone",
    "environment_envpool": "environments alone, EnvPool",
    "environment_native": "environments alone, gymnasium's vector environment",
}
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "PYTHONWARNINGS": "ignore",
}
Row = dict[str, Any]


class LeftOut(Exception):
    """A measurement cannot be had here; the message says why."""


def interpreters() -> tuple[dict[str, Path], dict[str, str]]:
    """The peers' interpreters, and why there is none where there is none."""
    found, missing = {}, {}
    for name in PEERS:
        try:
            found[name] = peers.python_of(name)
        except peers.PeerError as error:
            missing[name] = f"does not install: {error}"
    return found, missing


def measure(what: str, preset: Preset, pythons: dict[str, Path], patience: float) -> dict[str, Any]:
    """The measurement that something else on the machine disturbed least, of at most `TRIES`.

    Raises:
        LeftOut: as `measure_once`.
    """
    best: dict[str, Any] = {}
    for _ in range(TRIES if patience else 1):
        quiet.take_core(CORES, patience)
        found = measure_once(what, preset, pythons)
        found["share_of_core"] = found["cpu_seconds"] / found["seconds"]
        if not best or found["share_of_core"] > best["share_of_core"]:
            best = found
        if what == "torch" or found["share_of_core"] >= UNDISTURBED:
            break
    return best


def measure_once(what: str, preset: Preset, pythons: dict[str, Path]) -> dict[str, Any]:
    """Run one measurement in a fresh process.

    Raises:
        LeftOut: the process failed; the message is the last line that it wrote.
    """
    task = json.dumps(preset.mapping())
    if what in PEERS:
        command = [str(pythons[what]), str(HERE / "peers" / "train.py"), what, task]
    else:
        command = [sys.executable, str(HERE / "measures.py"), what, task]
    with tempfile.TemporaryDirectory() as folder:  # CleanRL and MuJoCo write logs where they are run
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=ENVIRONMENT, cwd=folder
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LeftOut(lines[-1].removeprefix("ppo_hpo.spec.errors.UserError: "))
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(
    name: str, rounds: int, pythons: dict[str, Path], missing: dict[str, str], patience: float
) -> Row:
    """Measure everything on one preset, in turn."""
    preset = PRESETS[name]
    left_out = dict(missing)
    seconds: dict[str, list[float]] = {}
    peak: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    versions: dict[str, str] = {}
    for index in range(rounds):
        for what in (*OURS, *PEERS, *FLOORS):
            if what in left_out or (what.endswith("_native") and not preset.native):
                continue
            try:
                found = measure(what, preset, pythons, patience)
            except LeftOut as reason:
                left_out[what] = str(reason)
                seconds.pop(what, None)
                if what == "ours":  # there is nothing to compare with
                    return {"preset": preset.words(), "left_out": {what: str(reason)}}
                continue
            seconds.setdefault(what, []).append(found["seconds"])
            peak.setdefault(what, []).append(found["peak_mib"])
            shares.setdefault(what, []).append(round(found["share_of_core"], 3))
            if "version" in found:
                versions[what] = found["version"]
        done = [what for what in (*OURS, *PEERS) if what in seconds]
        rates = [f"{what} {preset.steps / seconds[what][-1]:,.0f}" for what in done]
        print(f"  {name} {index + 1}/{rounds}, steps/s: {', '.join(rates)}", flush=True)
    return {
        "preset": preset.words(),
        "timed_steps": preset.steps,
        "rounds": rounds,
        "figures": figures(preset.steps, seconds),
        "peak_mib": {what: statistics.median(values) for what, values in peak.items()},
        "seconds": seconds,
        "share_of_core": shares,
        "versions": versions,
        "left_out": left_out,
    }


def figures(steps: int, seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Medians: steps per second of everything, and of ours the ratios and the share of the floor."""
    rates = {what: statistics.median(steps / s for s in values) for what, values in seconds.items()}
    rates.pop("torch", None)
    others = [what for what in PEERS if what != "sb3" and what in rates]
    fastest = max(others, key=rates.__getitem__, default=None)
    found: dict[str, dict[str, float]] = {"steps_per_second": rates}
    found |= {"to_sb3": {}, "to_fastest_other": {}, "floor": {}}

    def ratio(what: str, other: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[what], seconds[other], strict=True))

    for what in OURS:
        if what not in seconds:
            continue
        if "sb3" in seconds:
            found["to_sb3"][what] = ratio(what, "sb3")
        if fastest is not None:
            found["to_fastest_other"][what] = ratio(what, fastest)
        floor = what.replace("ours", "environment").removesuffix("_autograd")
        if floor in seconds and "products" in seconds:
            both = zip(seconds[what], seconds[floor], seconds["products"], strict=True)
            found["floor"][what] = statistics.median((a + b) / own for own, a, b in both)
    return found


# ------------------------------------------------------------------------------------ the page


def table(rows: dict[str, Row]) -> str:
    """The page's tables: speed, other ways of ours, floors and memory; then what is left out."""
    speed = [
        "| steps per second | Stable-Baselines3 | SBX | CleanRL | **ours** | to SB3 | to the fastest other "
        "| floor | **ours, EnvPool** | to SB3 | to the fastest other | floor |",
        "|---|" + "---|" * 11,
    ]
    ways = ["| | ours by | steps/s | to SB3 | to the fastest other | floor |", "|---|" + "---|" * 5]
    floors = [
        "| | environments alone, steps/s | with EnvPool | products alone, steps/s "
        "| peak MiB: importing torch | ours | ours, EnvPool | Stable-Baselines3 | SBX | CleanRL |",
        "|---|" + "---|" * 9,
    ]
    notes = []
    for name, row in rows.items():
        for what, why in row["left_out"].items():
            notes.append(f"- {name}: {LABELS.get(what, what)} is left out: {why}")
        if "figures" not in row:
            continue
        rate, peak = row["figures"]["steps_per_second"], row["peak_mib"]
        peer_rates = [cell(rate.get(what)) for what in PEERS]
        cells = [row["preset"], *peer_rates, *ratios(row, "ours"), *ratios(row, "ours_envpool")]
        speed.append("| " + " | ".join(cells) + " |")
        for what, way in (("ours_autograd", "autograd"), ("ours_native", "gymnasium's vector environment")):
            if what in rate:
                ways.append("| " + " | ".join([row["preset"], way, *ratios(row, what)]) + " |")
        alone = [cell(rate.get(what)) for what in ("environment", "environment_envpool", "products")]
        peaks = [cell(peak.get(what)) for what in ("torch", "ours", "ours_envpool", *PEERS)]
        floors.append("| " + " | ".join([row["preset"], *alone, *peaks]) + " |")
    return "\n".join([*speed, "", *ways, "", *floors, "", *notes])


def ratios(row: Row, what: str) -> list[str]:
    """One of ours in four cells."""
    found = row["figures"]
    return [
        cell(found["steps_per_second"].get(what)),
        cell(found["to_sb3"].get(what), "{:.1f}x"),
        cell(found["to_fastest_other"].get(what), "{:.1f}x"),
        cell(found["floor"].get(what), "{:.0%}"),
    ]


def cell(value: float | None, form: str = "{:,.0f}") -> str:
    return "-" if value is None else form.format(value)


def page(rows: dict[str, Row]) -> str:
    """The markdown page."""
    made: dict[str, list[str]] = {}
    for name, row in rows.items():
        versions = ", ".join(f"{LABELS[what]} {version}" for what, version in row.get("versions", {}).items())
        rounds = f", {row['rounds']} rounds" if "rounds" in row else ""
        text = f"{row['date']}, commit {row['commit']}{rounds}: {machine.sentence(row['machine'])}"
        made.setdefault(text + (f"; {versions}" if versions else ""), []).append(name)
    when = "\n".join(f"- {', '.join(names)}: {text}." for text, names in made.items())
    return f"""# Speed: steps per second beside the peers

Written by `python benchmarks/speed.py`; its first lines say what is measured and how. One thread on one core
each, taking turns; medians. "Floor" is the share reached of what the environments and the matrix products
alone would take.

{table(rows)}

Measured:

{when}
"""


def write(out: Path, rows: dict[str, Row]) -> None:
    """Renew these rows of the results; the others stay as they are."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "speed.json"
    stored = json.loads(path.read_text()).get("rows", {}) if path.exists() else {}
    merged = stored | rows
    merged = {name: merged[name] for name in PRESETS if name in merged}
    path.write_text(json.dumps({"rows": merged}, indent=1, allow_nan=False) + "\n")
    (out / "speed.md").write_text(page(merged))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, nargs="+", default=list(PRESETS), metavar="NAME",
                        help=f"rows to measure (default: all of {', '.join(PRESETS)})")  # fmt: skip
    parser.add_argument("--rounds", "--pairs", type=int, default=ROUNDS, help="(default: %(default)s)")
    parser.add_argument("--wait", type=float, default=30.0, help="seconds to wait for an idle core before "
                        "each measurement; 0: take the machine as it is (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="where the files go (default: benchmarks/results for at "
                        f"least {ROUNDS} rounds, else nowhere)")  # fmt: skip
    arguments = parser.parse_args()
    out = arguments.out or (RESULTS if arguments.rounds >= ROUNDS else None)
    pythons, missing = interpreters()
    date = datetime.now(UTC).date().isoformat()
    about = {"date": date, "commit": machine.commit(), "machine": machine.describe()}
    rows: dict[str, Row] = {}
    for name in arguments.preset:
        rows[name] = about | compare(name, arguments.rounds, pythons, missing, arguments.wait)
        if out is not None:
            write(out, {name: rows[name]})
    print("\n" + table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which of Orion's algorithms finds good hyperparameters for PPO soonest, at equal environment steps?

    python experiments/which-algorithm/run.py --workers 2               # all that is missing of 60 runs
    python experiments/which-algorithm/run.py --env Pendulum-v1 --algorithm asha --repetition 1
    python experiments/which-algorithm/run.py --budget 60000            # a quick look; the results stay
    python experiments/which-algorithm/run.py --redraw                  # table and pictures from the results

A run is one algorithm on one environment with one seed, which is the algorithm's and that of all its trials.
It asks Orion for trials one after the other until the budget of environment steps is spent: those of training
and of every evaluation, a promoted trial's only from where it goes on. A trial that ends beyond the budget
does not count. The incumbent is the trial with the best score of those that ended before; at the end its
saved policy plays fresh episodes.

Each run is a process of its own with one thread and one worker, so its result follows from its seed, to the
CPU seconds and the machine's arithmetic. It is stored in `results.json` when it ends; a run that is there is
not done again, and one that was stopped in the middle begins anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "benchmarks"))

import machine  # noqa: E402

from ppo_hpo.spec import yamlio  # noqa: E402
from ppo_hpo.spec.space import MARK, read_space  # noqa: E402

Run = dict[str, Any]
History = Sequence[Mapping[str, float]]

ALGORITHMS = ("random", "tpe", "asha", "hyperband", "evolutiones", "pbt")
REPETITIONS = 5
PARTS = {"a quarter": 0.25, "half": 0.5, "all": 1.0}
# Seeds of no trial's evaluation: those are drawn from the trial's own seed.
JUDGING_SEED, JUDGING_EPISODES = 2**31, 50
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
COLORS = ("#000000", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#D55E00")
BEGIN, END = "<!-- results -->", "<!-- end -->"

# PBT changes hyperparameters in mid-life: what cannot change then is fixed, as in `classic-control-pbt`,
# and with it what that space does not search either.
PBT_FIXED: dict[str, dict[str, Any]] = {
    "model": {"width": 64, "depth": 2, "activation": "tanh"},
    "optimizer": {"eps": 1e-5},
    "lr_schedule": {"name": "constant"},
    "normalize": {"norm_obs": True, "norm_reward": True},
    "ppo": {"clip_range_vf": "none", "target_kl": "none", "normalize_advantage": True},
}


@dataclass(frozen=True)
class Setup:
    """One environment.

    Attributes:
        space: the shipped space that is searched.
        fixed: what is fixed otherwise in it.
        epochs: the fidelity, the same for all algorithms.
        budget: environment steps of a run.
        options: of the algorithms whose defaults ask for more than the budget.
        picture: file name.
    """

    space: str
    fixed: Mapping[str, Mapping[str, Any]]
    epochs: str
    budget: int
    options: Mapping[str, Mapping[str, Any]]
    picture: str


SETUPS = {
    # Episodes of 200 steps: 8,192 steps are five for each of 8 environments, as every shipped space has it.
    "Pendulum-v1": Setup(
        space="classic-control",
        fixed={"task": {"steps_per_epoch": 8192}},
        epochs="fidelity(1, 16, base=4)",
        budget=1_500_000,
        options={"evolutiones": {"nums_population": 6}, "pbt": {"population_size": 9, "generations": 4}},
        picture="pendulum.png",
    ),
    # Episodes of up to 1,000 steps: with 4 environments instead of 8 an epoch may have half the steps.
    "LunarLander-v3": Setup(
        space="default",
        fixed={"env": {"n_envs": 4}, "task": {"steps_per_epoch": 20480}},
        epochs="fidelity(1, 8, base=2)",
        budget=1_000_000,
        options={"evolutiones": {"nums_population": 4}, "pbt": {"population_size": 5, "generations": 3}},
        picture="lunarlander.png",
    ),
}


# ------------------------------------------------------------------------------ a run


def cut(history: History, budget: float) -> Mapping[str, float] | None:
    """The incumbent when so many steps were spent; None where no trial had ended by then.

    Args:
        history: a row for each new incumbent, in their order: ``steps`` spent by its trial's end, ``score``.
        budget: a trial that ends exactly there counts.
    """
    found = None
    for row in history:
        if row["steps"] <= budget:
            found = row
    return found


def algorithm_of(name: str, setup: Setup, repetition: int) -> dict[str, Any]:
    """What Orion is told."""
    # TPE draws its first points at random, by default more of them than there are trials in a budget.
    own = {"asha": {"num_brackets": 1}, "tpe": {"n_initial_points": 4}}.get(name, {})
    return {name: {"seed": repetition, **own, **setup.options.get(name, {})}}


def document_of(env: str, setup: Setup, algorithm: str, repetition: int) -> dict[str, dict[str, Any]]:
    """The space of one run, as a file."""
    space = read_space(setup.space)
    high = int(setup.epochs.removeprefix("fidelity(").split(",")[1])
    document: dict[str, dict[str, Any]] = {group: dict(values) for group, values in space.fixed.items()}
    for group, priors in space.priors.items():
        document.setdefault(group, {}).update({key: MARK + prior for key, prior in priors.items()})
    changes: list[Mapping[str, Mapping[str, Any]]] = [
        setup.fixed,
        {"env": {"id": env}, "task": {"epochs": MARK + setup.epochs, "max_epochs": high, "seed": repetition}},
        *([PBT_FIXED] if algorithm == "pbt" else []),
    ]
    for change in changes:
        for group, values in change.items():
            document.setdefault(group, {}).update(values)
    return document


def play(env: str, algorithm: str, repetition: int, budget: int, place: Path) -> Run:
    """Tune until the budget is spent, and judge the incumbent."""
    warnings.simplefilter("ignore")  # pkg_resources announces its end
    from orion.client import build_experiment
    from orion.core.utils.exceptions import CompletedExperiment, WaitingForTrials

    from ppo_hpo import UserError, get_space, objective
    from ppo_hpo.orion.objective import prepare_trial

    setup = SETUPS[env]
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    path = place / "space.yaml"
    path.write_text(yamlio.dump(document_of(env, setup, algorithm, repetition)))
    started, cpu = time.monotonic(), time.process_time()
    client = build_experiment(
        f"{env}-{algorithm}-{repetition}",
        space=get_space(str(path)),
        algorithm=algorithm_of(algorithm, setup, repetition),
        storage={"type": "legacy", "database": {"type": "pickleddb", "host": str(place / "orion.pkl")}},
        working_dir=str(place / "trials"),
        max_trials=10**6,
    )
    function = objective(str(path), device="cpu", console=False)
    spent = trials = broken = 0
    training = 0.0
    history: list[dict[str, Any]] = []
    ended = "the budget is spent"
    while spent < budget:
        try:
            trial = client.suggest()
        except (CompletedExperiment, WaitingForTrials) as error:
            ended = f"no trial is left: {type(error).__name__}"
            break
        prepare_trial(client, trial)
        before = time.process_time()
        try:
            found = function.run(trial, trial.params)
        except UserError as error:
            print(f"a trial is broken: {error}", file=sys.stderr)
            client.release(trial, status="broken")
            broken += 1
            continue
        finally:
            training += time.process_time() - before
        values = {str(row["name"]): float(row["value"]) for row in found}
        spent += int(values["env_steps_here"] + values["eval_steps_here"])
        client.observe(trial, found)
        if spent > budget:
            break
        trials += 1
        score, epochs = -values["objective"], values["epochs"]
        best = history[-1] if history else None
        # Of equals the one that was trained longer.
        if best is None or (score, epochs) > (best["score"], best["epochs"]):
            history.append({"steps": spent, "score": score, "epochs": epochs, "directory": trial.working_dir})
    orion = time.process_time() - cpu - training
    judged = judge(Path(history[-1]["directory"])) if history else None
    rows = [{key: row[key] for key in ("steps", "score", "epochs")} for row in history]
    return {
        "env": env, "algorithm": algorithm, "repetition": repetition, "budget": budget, "trials": trials,
        "broken": broken, "spent": spent, "ended": ended, "orion_cpu_seconds": round(orion, 2),
        "training_cpu_seconds": round(training, 2), "wall_seconds": round(time.monotonic() - started, 1),
        "judged": judged, "history": rows,
    }  # fmt: skip


def judge(directory: Path) -> float:
    """Mean return of a trial's saved policy in fresh episodes, the same for all runs."""
    from ppo_hpo import PPO, TrialConfig
    from ppo_hpo.envs.make import probe
    from ppo_hpo.ppo.evaluate import Evaluator

    config = TrialConfig.from_mapping(yamlio.load(directory / "config.yaml"))
    agent = PPO.from_config(config, "cpu", storage=str(directory), uid=directory.name).agent
    seeds = [JUDGING_SEED + episode for episode in range(JUDGING_EPISODES)]
    evaluator = Evaluator(config.env, probe(config.env), seeds, 10**6)
    try:
        return statistics.fmean(evaluator(agent.learner, agent.normalizer, None).returns)
    finally:
        evaluator.close()


# ---------------------------------------------------------------------------- all runs


def key_of(run: Run) -> tuple[str, str, int]:
    return run["env"], run["algorithm"], run["repetition"]


def run_missing(wanted: Sequence[tuple[str, str, int, int]], workers: int, output: Path, keep: Any) -> bool:
    """Run what is missing, so many at a time, each in a process of its own.

    Args:
        wanted: environment, algorithm, repetition, budget.
        workers: processes.
        output: of the runs under way.
        keep: told of each run that ended.

    Returns:
        Whether all went well. The others go on when one fails.
    """
    waiting, under_way, well, done = list(wanted), {}, True, 0
    started = time.monotonic()
    try:
        while waiting or under_way:
            while waiting and len(under_way) < workers:
                env, algorithm, repetition, budget = job = waiting.pop(0)
                place = output / f"{env}-{algorithm}-{repetition}"
                command = [sys.executable, str(Path(__file__).resolve()), "--one", env, algorithm]
                command += [str(repetition), str(budget), str(place)]
                log = output / f"{place.name}.log"
                with log.open("wb") as file:
                    process = subprocess.Popen(
                        command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **ONE_THREAD}
                    )
                under_way[process] = (job, place, log)
            time.sleep(0.2)
            for process in [one for one in under_way if one.poll() is not None]:
                job, place, log = under_way.pop(process)
                result, done = place / "run.json", done + 1
                if process.returncode or not result.is_file():
                    well = False
                    print(f"{place.name} failed:\n{log.read_text(errors='replace')[-2000:]}", flush=True)
                    continue
                run = json.loads(result.read_text())
                keep(run)
                shutil.rmtree(place)
                log.unlink()
                best = run["history"][-1]["score"] if run["history"] else float("nan")
                print(
                    f"{time.monotonic() - started:6.0f} s  {done:3} of {len(wanted)}  {place.name:30} "
                    f"{run['trials']:4} trials  best {best:8.1f}  judged {run['judged'] or float('nan'):8.1f}"
                    f"  {run['wall_seconds']:.0f} s, Orion {run['orion_cpu_seconds']:.0f} s of CPU"
                    + ("" if run["ended"].startswith("the budget") else f"  ({run['ended']})"),
                    flush=True,
                )
    finally:
        for process in under_way:
            process.kill()
            process.wait()
    return well


# ----------------------------------------------------------------------------- results


def scores(runs: Sequence[Run], steps: float) -> list[float]:
    """The incumbents' scores when so many steps were spent, of the runs that had one."""
    return [row["score"] for run in runs if (row := cut(run["history"], steps)) is not None]


def _median_and_range(values: Sequence[float], of: int) -> str:
    if not values:
        return "-"
    missing = "" if len(values) == of else f", {of - len(values)} of {of} had none"
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}{missing})"


def table(runs: Sequence[Run]) -> str:
    """A line for each environment and algorithm."""
    lines = [
        "| environment | algorithm | "
        + " | ".join(f"after {name} of the steps" for name in PARTS)
        + " | in 50 fresh episodes | trials | Orion's CPU seconds |",
        "|---" * (len(PARTS) + 5) + "|",
    ]
    for env in SETUPS:
        for algorithm in ALGORITHMS:
            own = [run for run in runs if (run["env"], run["algorithm"]) == (env, algorithm)]
            if not own:
                continue
            cells = [
                _median_and_range([s for run in own for s in scores([run], part * run["budget"])], len(own))
                for part in PARTS.values()
            ]
            judged = [run["judged"] for run in own if run["judged"] is not None]
            cells.append(_median_and_range(judged, len(own)))
            cells.append(f"{statistics.median(run['trials'] for run in own):.0f}")
            cells.append(f"{statistics.median(run['orion_cpu_seconds'] for run in own):.1f}")
            lines.append(f"| {env} | {algorithm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(env: str, runs: Sequence[Run], path: Path) -> None:
    """The best score so far against the steps, and how the last incumbents did on fresh seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    own = [run for run in runs if run["env"] == env]
    budget = max(run["budget"] for run in own)
    grid = np.linspace(0, budget, 401)
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9.6, 4.2), width_ratios=(2.2, 1), layout="constrained", sharey=True
    )
    names = [name for name in ALGORITHMS if any(run["algorithm"] == name for run in own)]
    for place, name in enumerate(names):
        color = COLORS[ALGORITHMS.index(name)]
        mine = [run for run in own if run["algorithm"] == name]
        # A line begins where every repetition has a first trial behind it.
        each = [found if len(found := scores(mine, steps)) == len(mine) else None for steps in grid]
        low, middle, high = (
            np.array([np.nan if values is None else float(what(values)) for values in each])
            for what in (np.min, np.median, np.max)
        )
        left.plot(grid, middle, color=color, linewidth=1.8, label=name, drawstyle="steps-post")
        left.fill_between(grid, low, high, color=color, alpha=0.08, linewidth=0, step="post")
        judged = [run["judged"] for run in mine if run["judged"] is not None]
        right.scatter([place] * len(judged), judged, color=color, s=18, alpha=0.6, linewidths=0)
        if judged:
            middle_one = statistics.median(judged)
            right.plot([place - 0.25, place + 0.25], [middle_one] * 2, color=color, linewidth=2.5)
    left.set_title(f"{env}: best score so far, median and range of {_repetitions(own)} runs", fontsize=9)
    left.set_xlabel("environment steps, with evaluation", fontsize=8)
    left.set_ylabel("return", fontsize=8)
    left.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    left.legend(fontsize=8, frameon=False, loc="lower right")
    right.set_title(f"the last incumbents, {JUDGING_EPISODES} fresh episodes", fontsize=9)
    right.set_xticks(range(len(names)), names, rotation=35, ha="right")
    for axis in (left, right):
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _repetitions(runs: Sequence[Run]) -> int:
    return len({run["repetition"] for run in runs})


def write(out: Path, about: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """All files of the results; the README's part of them where it lies beside."""
    ordered = sorted(
        runs, key=lambda run: (run["env"], ALGORITHMS.index(run["algorithm"]), run["repetition"])
    )
    keep_numbers(out / "results.json", about, ordered)
    text = table(ordered)
    (out / "results.md").write_text(text + "\n")
    images = []
    for env, setup in SETUPS.items():
        if any(run["env"] == env for run in ordered):
            try:
                draw(env, ordered, out / setup.picture)
            except ImportError:
                print("no pictures: matplotlib is not installed")
                break
            images.append(f"![{env}: best score so far of each algorithm]({setup.picture})")
    readme = out / "README.md"
    if readme.is_file():
        before, _, rest = readme.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        cpu = sum(run["training_cpu_seconds"] + run["orion_cpu_seconds"] for run in ordered)
        whole = len(SETUPS) * len(ALGORITHMS) * REPETITIONS
        when = (
            f"{len(ordered)} of {whole} runs, {cpu / 60:.0f} minutes of CPU; {about.get('date', '')}, commit "
            f"{about.get('commit', '')}, {machine.sentence(about['machine'])}."
        )
        parts = [BEGIN, when, text, *images, END]
        readme.write_text(before + "\n\n".join(parts) + after)


def keep_numbers(path: Path, about: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """In one piece: a run that is half written would be lost with all others."""
    from ppo_hpo.state.files import write_atomically

    content = {"about": dict(about), "runs": list(runs)}
    write_atomically(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        env, algorithm, repetition, budget, place = sys.argv[2:]
        found = play(env, algorithm, int(repetition), int(budget), Path(place))
        (Path(place) / "run.json").write_text(json.dumps(found, allow_nan=False))
        sys.stdout.flush()
        os._exit(0)  # a heartbeat of Orion's must not keep it alive
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", nargs="+", choices=list(SETUPS), default=list(SETUPS), metavar="ID")
    parser.add_argument("--algorithm", nargs="+", choices=ALGORITHMS, default=ALGORITHMS, metavar="NAME")
    parser.add_argument("--repetition", type=int, nargs="+", default=list(range(1, REPETITIONS + 1)))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--budget", type=int, help="environment steps of a run, in the place of the "
                        "environments' own; the results go below --dir, not here")  # fmt: skip
    parser.add_argument("--dir", type=Path, default=HERE / "output", help="of the runs under way")
    parser.add_argument("--redraw", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if arguments.workers < 1 or min(arguments.repetition) < 1:
        parser.error("--workers and --repetition must be at least 1")
    if arguments.budget is not None and arguments.budget < 1:
        parser.error("--budget must be at least 1")
    output = arguments.dir.resolve()
    out = HERE if arguments.budget is None else output / f"budget-{arguments.budget}"
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    stored = json.loads(path.read_text()) if path.is_file() else {"about": {}, "runs": []}
    about, runs = stored["about"], stored["runs"]
    there = {key_of(run) for run in runs}
    wanted = [
        (env, algorithm, repetition, arguments.budget or SETUPS[env].budget)
        for repetition in arguments.repetition
        for env in arguments.env
        for algorithm in arguments.algorithm
        if (env, algorithm, repetition) not in there
    ]
    well = True
    if wanted and not arguments.redraw:
        about = {
            "date": time.strftime("%Y-%m-%d"), "commit": machine.commit(), "machine": machine.describe()
        }  # fmt: skip

        def keep(run: Run) -> None:
            runs.append(run)
            keep_numbers(path, about, runs)

        output.mkdir(parents=True, exist_ok=True)
        print(f"{len(wanted)} runs to do, {len(there)} are there", flush=True)
        well = run_missing(wanted, arguments.workers, output, keep)
    if runs:
        write(out, about, runs)
        print(f"\n{table(runs)}\n\nwritten to {out}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())

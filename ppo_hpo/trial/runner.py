"""The trial runner: where a trial's state lies, and what happens around `fit`.

Where the state comes from, the one rule for every algorithm, stands in `ppo_hpo.trial.restore`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.spec import results, seeds, yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import CheckpointError, LostLock, MachineError, UserError
from ppo_hpo.state import lock, worklog
from ppo_hpo.state.checkpoint import Storage
from ppo_hpo.state.claim import Claim
from ppo_hpo.state.files import explain_write_errors, remove_temporary_files, write_atomically
from ppo_hpo.state.remote_store import Store, open_store
from ppo_hpo.trial import failure, gpu_slots, median_stop
from ppo_hpo.trial.options import OrionContext, RunOptions
from ppo_hpo.trial.restore import TrialStorage

if TYPE_CHECKING:
    from ppo_hpo.envs.make import EnvInfo
    from ppo_hpo.ppo.task import PPO

# What is appended to, locked or emptied: in a directory of somebody else's a link would lead to other files.
_WRITTEN_IN_PLACE = ("log.txt", "timing.jsonl", worklog.FILE, "lock", "writer")
_FILES = (
    *_WRITTEN_IN_PLACE[:-1], "failure.json", "curve.jsonl", "results.json", "config.yaml", median_stop.RECORD,
)  # fmt: skip
_Write = Callable[[Path, bytes], None]
_DEFAULTS, _BY_HAND = RunOptions(), OrionContext()
# How many whole episodes of each environment an epoch should hold. docs/explanation/exact-resuming.md has the
# figures.
_EPISODES_PER_EPOCH = 5


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        objective: to be minimised.
        statistics: name to number; the README explains each.
        directory: where the trial's files lie.
    """

    objective: float
    statistics: Mapping[str, float]
    directory: Path

    @property
    def entries(self) -> list[dict[str, Any]]:
        """In the form of Orion's result file."""
        return results.entries(self.objective, self.statistics)


def check(config: TrialConfig, directory: Path, device: str) -> EnvInfo:
    """Everything that can be checked before torch is imported.

    Raises:
        UserError: the environment cannot be made or is not supported, the directory cannot be
            written or has a trial of another number of seeds, or the device's name is none.
    """
    from ppo_hpo.envs.make import check_hyperparameters_fit, probe

    gpu_slots.device_name(device)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The directory {directory} cannot be made: {error.strerror}.") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise MachineError(f"The directory {directory} cannot be written. Choose another one.")
    for name in (*_WRITTEN_IN_PLACE, *filter(None, seeds.split_by_seed(config))):
        if (directory / name).is_symlink():
            raise UserError(f"{directory / name} is a link, which would be written through. Remove it.")
    for name, is_one in {**dict.fromkeys(_FILES, Path.is_file), "writer": Path.is_dir}.items():
        # A pipe would wait for somebody at its other end.
        if (directory / name).exists() and not is_one(directory / name):
            kind = "directory" if name == "writer" else "file"
            raise UserError(f"{directory / name} is no {kind}, as it has to be. Remove it.")
    one = config.task.seeds == 1
    if Storage(directory / "seed-1" if one else directory).paths():
        raise CheckpointError(
            f"{directory} has the checkpoints of a trial of {'several seeds' if one else 'one seed'}, but "
            f"`task.seeds` is {config.task.seeds}. Use another directory."
        )
    info = probe(config.env)
    check_hyperparameters_fit(config, info)
    return info


def default_directory(config: TrialConfig) -> Path:
    """Where a trial goes that nobody gave a place: the same trial always to the same one."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", config.env.id)
    return Path("ppo-hpo-runs") / f"{name}-{config.identity()[:12]}"


def run(
    config: TrialConfig,
    directory: Path,
    options: RunOptions = _DEFAULTS,
    orion: OrionContext = _BY_HAND,
    *,
    console: bool = True,
    tick: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run one trial to its last epoch. It resumes from whatever is there.

    Args:
        config: the trial.
        directory: directory of the trial's files. It is made if it is missing.
        options: what is asked of the trial.
        orion: which trial of which experiment it is.
        console: whether to log to standard error, beside the trial's own ``log.txt``.
        tick: called before each environment step. What it raises stops the trial there.

    Raises:
        UserError: the input is bad, a file cannot be written, or the store cannot be reached.
    """
    store = open_store(options.checkpoint_store)
    if options.stop_poor:
        median_stop.refuse_what_does_not_fit(seeds=config.task.seeds, store=store)
        if orion.siblings is None:
            raise UserError(
                "`--stop-poor` compares a trial with the others of its experiment, but this one has none: it "
                "is run without Orion, or in a directory of its own. Leave it out."
            )
    info = check(config, directory, options.device)
    # A small network on vectors is trained faster by the CPU (`ppo_hpo.ppo.numpy_engine`).
    device = "cpu" if options.device == "auto" and not info.images else options.device
    if store is not None:
        store.names()  # before torch is imported, as everything that may be wrong
    trial = _Trial(config, directory, info, device, options, orion, store, console, tick)
    takeover = options.takeover
    lost: LostLock | None = None
    while True:
        try:
            with lock.hold(directory, takeover=takeover, lost=lost) as claim:
                return trial.run(claim, lost)
        except LostLock as error:
            # Not an end of the process: Orion would stop the hunt, or call broken a trial that lives.
            lost, takeover = error, False
            logging.getLogger("ppo_hpo").warning("%s; waiting for what it leaves", error)


@dataclass(frozen=True)
class _Trial:
    """What `run` was asked to do; its arguments."""

    config: TrialConfig
    directory: Path
    info: EnvInfo
    #: What ``auto`` stands for is decided here.
    device: str
    options: RunOptions
    orion: OrionContext
    store: Store | None
    console: bool
    tick: Callable[[], None]
    #: What this process did for each seed, also before it lost its lock.
    works: dict[str, failure.Work] = field(default_factory=dict)
    #: Which process it is, in the ledger; one that trains many trials is another one for each.
    process: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}")

    def run(self, claim: Claim, lost: LostLock | None) -> Outcome:
        """`run` by the one writer.

        Args:
            claim: says that it is this process.
            lost: how this process ceased to be the writer before, if it did.
        """
        config, directory = self.config, self.directory
        with _logging_to(directory, self.orion.trial_id, self.console) as log:
            if lost is not None:
                log.warning("%s; goes on from what is there", lost)
            remove_temporary_files(directory)
            _warn_of_short_epochs(config, self.info, log)
            before = failure.read_record(directory)
            known = None if before is None else before.place
            parts = seeds.split_by_seed(config)
            write = failure.patiently(claim.write, self.options.retries, log)
            try:
                with self._device(claim, log) as device:
                    done = [
                        self._train(part, own, device, claim, write, known, log)
                        for part, own in parts.items()
                    ]
            except Exception as error:
                # Under Orion it is written down with what Orion is told; and what belongs to another trial
                # stays as it is.
                if self.orion.trial_id is None and not isinstance(error, CheckpointError):
                    failure.note(directory, error)
                raise
            outcome = done[0][0]
            if len(parts) > 1:
                each = [outcome.statistics for outcome, _ in done]
                outcome = Outcome(
                    *results.combine([outcome.objective for outcome, _ in done], each, config.task.aggregate),
                    directory,
                )
                _write_curve(directory, results.combine_curves([curve for _, curve in done]), write)
            # Under the lock still: a second worker that waits for it tidies the directory up when it has it.
            failure.forget(directory)
            claim.write(directory / "results.json", results.to_bytes(outcome.entries))
            if self.orion.results_path is not None:
                write_atomically(self.orion.results_path, results.to_bytes(outcome.entries))
            log.info(
                "done: return %.1f +- %.1f after epoch %d; %s",
                -outcome.objective,
                outcome.statistics["return_std"],
                outcome.statistics["epochs"],
                directory,
            )
            return outcome

    def _device(self, claim: Claim, log: logging.Logger) -> contextlib.AbstractContextManager[str]:
        """What torch is told, while the trial is trained."""

        def count() -> int:
            from ppo_hpo.ppo.device import count_gpus

            return count_gpus()

        def tick() -> None:
            claim.raise_if_lost()
            self.tick()

        return gpu_slots.taken(self.device, self.options.trials_per_device, count=count, log=log, tick=tick)

    def _train(
        self,
        part: str,
        config: TrialConfig,
        device: str,
        claim: Claim,
        write: _Write,
        known: str | None,
        log: logging.Logger,
    ) -> tuple[Outcome, Sequence[results.Row]]:
        """Train one seed to the trial's epochs.

        Args:
            part: see `seeds.split_by_seed`.
            config: of the seed.
            device: where.
            claim: of the trial.
            write: a file of the trial.
            known: where an earlier process failed, if one did.
            log: of the trial.

        Returns:
            What became of it, and its learning curve.
        """
        work = self.works.setdefault(part, failure.Work(part=part))
        started, cpu = time.perf_counter(), _cpu_seconds()
        wall_before, cpu_before = work.wall_seconds, work.cpu_seconds

        def look_at_the_clock() -> None:
            work.wall_seconds = wall_before + time.perf_counter() - started
            work.cpu_seconds = cpu_before + _cpu_seconds() - cpu

        def enter_into_ledger(state: worklog.State, epoch: int) -> None:
            look_at_the_clock()
            line = worklog.Line(
                self.orion.trial_id or "", self.process, part, state, work.began or 0, epoch,
                config.task.steps_per_epoch, work.steps, work.eval_steps, work.wall_seconds, work.cpu_seconds,
            )  # fmt: skip
            # It is a count: where it cannot be written for the moment, the trial goes on.
            with contextlib.suppress(OSError, UserError):
                worklog.append(self.directory, line)

        def tick() -> None:
            claim.raise_if_lost()
            self.tick()
            work.count(config.env.n_envs)

        if part:
            log.info("%s of %d: task.seed %d", part, self.config.task.seeds, config.task.seed)
        attempt = functools.partial(
            self._attempt, part, config, device, write, tick, enter_into_ledger, work, log
        )
        try:
            task, start = failure.persist(attempt, work, self.options.retries, known, log)
        except LostLock:
            # It writes nothing here any more, and all of it when it comes again.
            look_at_the_clock()
            raise
        except BaseException:
            if work.attempted:
                enter_into_ledger("failed", work.epoch)
            raise
        enter_into_ledger("done", task.epoch)
        stop = median_stop.read(self.directory / part, config)
        if stop is not None:
            log.info(
                "stopped after epoch %d of %d: its best return, %.1f, is below %.1f, the median of %d other "
                "trials (%s)",
                stop.epoch, stop.epochs, stop.best, stop.median, stop.siblings, median_stop.RECORD,
            )  # fmt: skip
        outcome = _outcome(task, config, stop, self.directory / part, start, work)
        if part:
            write(outcome.directory / "results.json", results.to_bytes(outcome.entries))
        return outcome, task.metrics.curve

    def _attempt(
        self,
        part: str,
        config: TrialConfig,
        device: str,
        write: _Write,
        tick: Callable[[], None],
        enter_into_ledger: Callable[[worklog.State, int], None],
        work: failure.Work,
        log: logging.Logger,
    ) -> tuple[PPO, int | None]:
        """Go on from the last checkpoint of one seed to the trial's epochs.

        Returns:
            The task, and the epoch that it went on from; None where it began.
        """
        directory = self.directory / part
        storage = TrialStorage(
            config,
            self.directory,
            part,
            uid=self.orion.trial_id,
            parent=self.orion.parent,
            siblings=self.orion.siblings,
            store=self.store,
            write=write,
            log=log,
        )

        # This imports torch: everything that could be wrong was looked at before.
        from ppo_hpo.ppo.task import PPO

        task = PPO.from_config(config, device, storage=storage, logger=log, uid=self.orion.trial_id)
        task.before_step = tick
        if not task.lineage:
            storage.register()
        start = task.epoch if task.resumed() else None
        if not work.attempted:
            work.attempted, work.began = True, start
        work.enter(task.epoch)
        aim = config.task.epochs
        if (stop := median_stop.read(directory, config)) is not None:
            aim = stop.epoch  # whatever this process was asked for: it is what became of the trial
        elif self.options.stop_poor and not task.lineage:
            task.should_stop = self._judge(directory, config, write)
        _announce(task, aim, start, self.orion.experiment, log)
        with explain_write_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        # Of the trial, and where that has several seeds, of this one.
        for place, whole in {self.directory: self.config, directory: config}.items():
            write(place / "config.yaml", yamlio.dump(_written(whole)).encode())
        _write_curve(directory, task.metrics.curve, write)
        enter_into_ledger("began", task.epoch)
        untrained = not task.metrics.curve

        def start_epoch(task: PPO, epoch: int) -> None:
            nonlocal untrained
            work.enter(epoch)
            if untrained:
                work.eval_steps += task.metrics.curve[0]["eval_steps"]
                untrained = False

        def end_epoch(task: PPO, epoch: int, row: results.Row) -> None:
            work.eval_steps += row["eval_steps"]
            self._keep_records(part, task, write)
            enter_into_ledger("epoch", task.epoch)

        task.events.subscribe("start_epoch", start_epoch)
        task.events.subscribe("end_epoch", end_epoch)
        try:
            task.fit(aim)
        except BaseException:
            # What is broken may fail once more as it is closed: that would only hide how it began.
            with contextlib.suppress(Exception):
                task.finish()
            raise
        task.finish()
        storage.finish()
        _write_curve(directory, task.metrics.curve, write)
        return task, start

    def _judge(
        self, directory: Path, config: TrialConfig, write: _Write
    ) -> Callable[[Sequence[results.Row]], bool]:
        """What says after each epoch whether the trial is poor, and writes it down if it is."""
        assert self.orion.siblings is not None
        siblings = median_stop.Siblings(self.orion.siblings, config)

        def judge(curve: Sequence[results.Row]) -> bool:
            stop = median_stop.decide(config, curve, siblings)
            if stop is not None:
                write(directory / median_stop.RECORD, median_stop.to_bytes(stop))
            return stop is not None

        return judge

    def _keep_records(self, part: str, task: PPO, write: _Write) -> None:
        _write_curve(self.directory / part, task.metrics.curve, write)
        seconds = task.metrics.seconds[task.epoch]
        row = {
            **({"part": part} if part else {}),
            "epoch": task.epoch,
            "seconds": round(seconds, 4),
            "steps_per_second": round(task.config.task.steps_per_epoch / seconds, 1),
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": str(task.device),
        }
        # One for the trial, whatever seeds it has: it shows how far the trial is.
        path = self.directory / "timing.jsonl"
        with explain_write_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _outcome(
    task: Any,
    config: TrialConfig,
    stop: median_stop.Stop | None,
    directory: Path,
    start: int | None,
    work: failure.Work,
) -> Outcome:
    epochs = config.task.epochs if stop is None else stop.epoch
    # Of a poor trial the return that it stopped at, which is at most its best, and that is below the median:
    # it cannot win a rung by having stopped at a lucky moment.
    report = task.report(epochs)
    objective = report.pop("objective")
    seconds_here = sum(task.metrics.seconds.values())
    trained_here = (task.epoch - (start or 0)) * config.task.steps_per_epoch
    per_epoch = config.task.steps_per_epoch
    env_steps = min(task.epoch, epochs) * per_epoch + (task.env_steps - task.epoch * per_epoch)
    statistics = {
        **report,
        "stopped": float(stop is not None),
        "env_steps": env_steps,
        "env_steps_not_trained": config.task.epochs * per_epoch - env_steps,
        "env_steps_here": work.steps,
        "eval_steps": sum(row["eval_steps"] for row in task.metrics.curve if row["epoch"] <= epochs),
        "eval_steps_here": work.eval_steps,
        "wall_seconds": work.wall_seconds,
        "cpu_seconds": work.cpu_seconds,
        "steps_per_second": trained_here / seconds_here if seconds_here else 0.0,
        "continued": float(work.began is not None),
        "continued_from_epoch": float(work.began or 0),
        "retries": float(work.retries),
        "forked": float(bool(task.lineage)),
    }
    return Outcome(objective, statistics, directory)


def _cpu_seconds() -> float:
    """Of this process and the children it has seen end; where trials run in threads, of this thread."""
    if threading.current_thread() is not threading.main_thread():
        return time.thread_time()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _announce(task: Any, epochs: int, start: int | None, experiment: str | None, log: logging.Logger) -> None:
    config: TrialConfig = task.config
    of = f" of {experiment}" if experiment else ""
    threads = f"{config.task.threads} thread{'s' if config.task.threads > 1 else ''}"
    where = f"on {task.device}, {threads}, gradients by {task.agent.learner.engine}"
    if start is None or start < epochs:
        where += f", environments by {task.vectorization}"
    if start is None:
        log.info("starts%s: epoch 0 -> %d, %s", of, epochs, where)
    elif start < epochs:
        log.info("continues%s: epoch %d -> %d, %s", of, start, epochs, where)
    else:
        log.info("has done epoch %d%s already: nothing to train", epochs, of)
    log.debug("%s", task.summary())


def _warn_of_short_epochs(config: TrialConfig, info: EnvInfo, log: logging.Logger) -> None:
    """Law 2's price: resetting environments at each epoch hurts where epochs are short."""
    limit = info.time_limit
    if limit is None:
        log.warning(
            "%s has no time limit: evaluation episodes are cut after %d steps; "
            "set env.max_episode_steps to choose",
            info.id, config.task.steps_per_epoch,
        )  # fmt: skip
        return
    n_envs, steps = config.env.n_envs, config.task.steps_per_epoch
    needed = _EPISODES_PER_EPOCH * n_envs * limit
    if steps < needed:
        log.warning(
            "task.steps_per_epoch is %d, but %d x env.n_envs x time limit = %d x %d x %d = %d is advised: "
            "environments are reset at each epoch, and episodes that are often cut teach less",
            steps, _EPISODES_PER_EPOCH, _EPISODES_PER_EPOCH, n_envs, limit, needed,
        )  # fmt: skip


# ---------------------------------------------------------------------------- files


def _written(config: TrialConfig) -> Mapping[str, Any]:
    """What `config.yaml` says: everything, but of seeds only where there are several."""
    mapping = config.to_mapping()
    if config.task.seeds == 1:
        del mapping["task"]["seeds"], mapping["task"]["aggregate"]
    return mapping


def _write_curve(directory: Path, curve: Sequence[results.Row], write: _Write) -> None:
    """The learning curve, one JSON line for each epoch; the checkpoint has it too, and heals it."""
    lines = "".join(json.dumps(row) + "\n" for row in curve)
    write(directory / "curve.jsonl", lines.encode())


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """A full disk shall stop the trial with one sentence, from `write_atomically`, and no traceback."""


@contextlib.contextmanager
def _logging_to(directory: Path, uid: str | None, console: bool) -> Iterator[logging.Logger]:
    log = logging.Logger(f"ppo_hpo.{uid or directory.name}", logging.INFO)
    try:
        file = _LogFile(directory / "log.txt", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory / 'log.txt'} cannot be written: {error.strerror}.") from None
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    if console:
        stream = logging.StreamHandler()
        prefix = f"[{uid[:8]}] " if uid else ""
        stream.setFormatter(logging.Formatter(prefix.replace("%", "%%") + "%(message)s"))
        log.addHandler(stream)
    try:
        yield log
    finally:
        # Closing writes what an earlier failure left over, and fails again.
        with contextlib.suppress(OSError):
            file.close()

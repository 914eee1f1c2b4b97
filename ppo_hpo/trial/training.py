"""Training one seed of a trial, which writes every epoch down, and what became of it: its `Outcome`."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_hpo.spec import results
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import LostLock
from ppo_hpo.spec.results import Row
from ppo_hpo.state import worklog
from ppo_hpo.state.files import explain_write_errors
from ppo_hpo.state.remote_store import Store
from ppo_hpo.trial import fresh_test, median_stop, trial_files
from ppo_hpo.trial.options import OrionContext, RunOptions
from ppo_hpo.trial.restore import TrialStorage
from ppo_hpo.trial.retries import Work, with_retries

if TYPE_CHECKING:
    from ppo_hpo.ppo.task import PPO


@dataclass(frozen=True)
class Trial:
    """A trial, and what is asked of it."""

    config: TrialConfig
    directory: Path
    options: RunOptions
    orion: OrionContext
    store: Store | None
    # Name of this process in the work log. The time makes it another one for each trial.
    process: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}")


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    objective: float  # value to be minimised
    statistics: Mapping[str, float]  # numbers by name, as docs/reference/trial-files.md explains them
    directory: Path  # directory of the trial's files

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The outcome in the form of Orion's result file."""
        return results.entries(self.objective, self.statistics)

    def to_bytes(self) -> bytes:
        """The content of ``results.json``, which is that of Orion's result file too."""
        return results.to_bytes(self.entries)


@dataclass(frozen=True)
class SeedTraining:
    """Trains one seed of a trial. This process must be the trial's only writer."""

    trial: Trial
    config: TrialConfig  # of this seed alone
    work: Work  # what this process has done for the seed so far; it names the seed's folder
    device: str
    write: trial_files.Write
    tick: Callable[[], None]  # called before each environment step
    log: logging.Logger

    @property
    def directory(self) -> Path:
        """Directory of the seed's files. For a trial of one seed it is the trial's."""
        return self.trial.directory / self.work.part

    def run(self, earlier_failure: str | None) -> tuple[Outcome, Sequence[Row]]:
        """Train to the trial's last epoch; return the outcome and the learning curve.

        ``earlier_failure`` is where an earlier process failed (`retries.place_of`), if one did.
        """
        config, work, log = self.config, self.work, self.log
        if work.part:
            log.info("%s of %d: task.seed %d", work.part, self.trial.config.task.seeds, config.task.seed)
        work.start_clock()
        try:
            retries = self.trial.options.retries
            task, resumed_from = with_retries(self._attempt, work, retries, earlier_failure, log)
        except LostLock:
            # This process may not write here any more. It writes all of it if it gets the lock again.
            work.read_clock()
            raise
        except BaseException:
            if work.attempted:
                self.log_work("failed", work.epoch)
            raise
        self.log_work("done", task.epoch)
        stop = median_stop.read(self.directory, config)
        if stop is not None:
            log.info(
                "stopped after epoch %d of %d: its best return, %.1f, is below %.1f, the median of %d other "
                "trials (%s)",
                stop.epoch, stop.epochs, stop.best, stop.median, stop.siblings, median_stop.RECORD,
            )  # fmt: skip
        outcome = _outcome_of(task, stop, self.directory, resumed_from, work)
        if work.part:
            self.write(self.directory / trial_files.RESULTS, outcome.to_bytes())
        return outcome, task.metrics.curve

    def _attempt(self) -> tuple[PPO, int | None]:
        """Resume from the last checkpoint, if there is one, and train; return the task and that epoch."""
        trial, directory = self.trial, self.directory
        storage = TrialStorage(
            self.config, trial.directory, self.work.part, trial.orion,
            store=trial.store, write=self.write, log=self.log,
        )  # fmt: skip
        # This imports torch. Everything that could be wrong was checked before.
        from ppo_hpo.ppo.task import PPO

        uid = trial.orion.trial_id
        task = PPO.from_config(self.config, self.device, storage=storage, logger=self.log, uid=uid)
        task.before_step = self._tick
        if not task.lineage:
            storage.register()
        resumed_from = task.epoch if task.resumed() else None
        if not self.work.attempted:
            self.work.attempted, self.work.resumed_from = True, resumed_from
        self.work.start_epoch(task.epoch)
        last_epoch = self.config.task.epochs
        if (stop := median_stop.read(directory, self.config)) is not None:
            last_epoch = stop.epoch  # as an earlier process decided, whatever is asked of this one
        elif trial.options.stop_poor and not task.lineage:
            assert trial.orion.siblings is not None
            siblings = median_stop.Siblings(trial.orion.siblings, self.config)
            task.should_stop = partial(self._is_poor, siblings)
        _log_start(task, last_epoch, resumed_from, trial.orion.experiment, self.log)
        self._write_first_files(task)
        # Rows of the learning curve that an earlier attempt wrote are not counted again.
        self.work.curve_rows = len(task.metrics.curve)
        task.events.subscribe("start_epoch", self._start_epoch)
        task.events.subscribe("end_epoch", self._end_epoch)
        try:
            task.fit(last_epoch)
        except BaseException:
            # A broken task may fail again as it is closed. That would hide the first failure.
            with contextlib.suppress(Exception):
                task.finish()
            raise
        task.finish()
        self._test(task)
        storage.finish()
        trial_files.write_curve(directory, task.metrics.curve, self.write)
        return task, resumed_from

    def _test(self, task: PPO) -> None:
        """Test the policy on fresh episodes, if that was asked for and is not done yet."""
        episodes = self.trial.options.fresh_episodes
        if episodes and fresh_test.read(self.directory, self.config, episodes) is None:
            test = fresh_test.take(task, episodes)
            self.work.eval_steps += test.steps
            self.write(self.directory / fresh_test.FILE, fresh_test.to_bytes(test, self.config))

    def _tick(self) -> None:
        self.tick()
        self.work.add_steps(self.config.env.n_envs)

    def _start_epoch(self, task: PPO, epoch: int) -> None:
        self.work.start_epoch(epoch)
        self._count_evaluations(task)  # that of the untrained policy

    def _end_epoch(self, task: PPO, epoch: int, row: Row) -> None:
        self._count_evaluations(task)
        trial_files.write_curve(self.directory, task.metrics.curve, self.write)
        trial_files.append_timing(self.trial.directory, self.work.part, task, self.log)
        self.log_work("epoch", task.epoch)

    def _count_evaluations(self, task: PPO) -> None:
        new = task.metrics.curve[self.work.curve_rows :]
        self.work.eval_steps += sum(row["eval_steps"] for row in new)
        self.work.curve_rows += len(new)

    def _write_first_files(self, task: PPO) -> None:
        with explain_write_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        # The trial has a configuration, and so has each of several seeds.
        configs = {self.trial.directory: self.trial.config, self.directory: self.config}
        for directory, config in configs.items():
            self.write(directory / trial_files.CONFIG, trial_files.config_bytes(config))
        trial_files.write_curve(self.directory, task.metrics.curve, self.write)
        self.log_work("began", task.epoch)

    def _is_poor(self, siblings: median_stop.Siblings, curve: Sequence[Row]) -> bool:
        """Decide after an epoch whether the trial is poor, and record it if it is."""
        stop = median_stop.decide(self.config, curve, siblings)
        if stop is not None:
            self.write(self.directory / median_stop.RECORD, median_stop.to_bytes(stop))
        return stop is not None

    def log_work(self, state: worklog.State, epoch: int) -> None:
        """Append a line to the work log."""
        work = self.work
        work.read_clock()
        line = worklog.Line(
            self.trial.orion.trial_id or "", self.trial.process, work.part, state, work.resumed_from or 0,
            epoch, self.config.task.steps_per_epoch, work.steps, work.eval_steps, work.wall_seconds,
            work.cpu_seconds,
        )  # fmt: skip
        worklog.append(self.trial.directory, line, self.log)


def _log_start(
    task: PPO, last_epoch: int, resumed_from: int | None, experiment: str | None, log: logging.Logger
) -> None:
    threads = task.config.task.threads
    if resumed_from is not None and resumed_from >= last_epoch:
        of = f" of {experiment}" if experiment else ""
        log.info("has done epoch %d%s already: nothing to train", last_epoch, of)
    else:
        log.info(
            "%strains%s from epoch %d to %d on %s (%d thread%s, %s gradients, %s environments)",
            "" if resumed_from is None else "resumes, and ", f" for {experiment}" if experiment else "",
            resumed_from or 0, last_epoch, task.device, threads, "s" if threads > 1 else "",
            task.agent.learner.engine, task.vectorization,
        )  # fmt: skip
    log.debug("%s", task.summary())


def _outcome_of(
    task: PPO, stop: median_stop.Stop | None, directory: Path, resumed_from: int | None, work: Work
) -> Outcome:
    """The outcome of one seed, whose last attempt resumed from an epoch, or from nothing (None)."""
    config = task.config.task
    epochs = config.epochs if stop is None else stop.epoch
    # The objective of a poor trial is the return at which it stopped. That is at most its best return, which
    # is below the median. So a trial cannot win a rung because it stopped at a lucky moment.
    report = task.report(epochs)
    objective = report.pop("objective")
    per_epoch = config.steps_per_epoch
    seconds_here = sum(task.metrics.seconds.values())
    trained_here = (task.epoch - (resumed_from or 0)) * per_epoch
    diverged_steps = task.env_steps - task.epoch * per_epoch
    env_steps = min(task.epoch, epochs) * per_epoch + diverged_steps
    statistics = {
        **report,
        "stopped": float(stop is not None),
        "env_steps": env_steps,
        "env_steps_not_trained": config.epochs * per_epoch - env_steps,
        "env_steps_here": work.steps,
        "eval_steps": sum(row["eval_steps"] for row in task.metrics.curve if row["epoch"] <= epochs),
        "eval_steps_here": work.eval_steps,
        "wall_seconds": work.wall_seconds,
        "cpu_seconds": work.cpu_seconds,
        "steps_per_second": trained_here / seconds_here if seconds_here else 0.0,
        "continued": float(work.resumed_from is not None),
        "continued_from_epoch": float(work.resumed_from or 0),
        "retries": float(work.retries),
        "forked": float(bool(task.lineage)),
    }
    return Outcome(objective, statistics, directory)


def combined(outcomes: Sequence[Outcome], aggregate: str, directory: Path) -> Outcome:
    """The outcome of a trial of several seeds, whose objective is ``task.aggregate`` of theirs."""
    objectives = [outcome.objective for outcome in outcomes]
    statistics = [outcome.statistics for outcome in outcomes]
    return Outcome(*results.combine(objectives, statistics, aggregate), directory)

"""The loop over the epochs of a task, for `PPO.fit` and for a caller's own loop of `PPO.ppo`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ppo_hpo.ppo.rollout import Episodes, Rollout
from ppo_hpo.ppo.task_envs import Environments
from ppo_hpo.ppo.train import Diverged, Rates, Updates, train_epoch

if TYPE_CHECKING:
    from ppo_hpo.ppo.task import PPO


class Loop:
    """Trains, evaluates and saves epochs, and leads the task's `epoch`, `metrics` and `diverged` on."""

    def __init__(
        self, task: PPO, environments: Environments, save: Callable[[], None], log: logging.Logger
    ) -> None:
        self._task, self._environments, self._save, self._log = task, environments, save, log
        self.diverged_steps = 0  # steps of the epoch in which the task diverged
        self._updates: Updates | None = None  # of the epoch under way
        self._started = 0.0

    def forget(self) -> None:
        """Forget the epoch under way, because another state was loaded."""
        self.diverged_steps, self._updates = 0, None

    @property
    def rates(self) -> Rates:
        """The rates of the next update."""
        task = self._task
        return (self._updates or Updates(task.agent, task.config, task.epoch)).rates

    def emit(self, event: str, **details: Any) -> None:
        """Call the observers of an event. Whatever they do to the network, it can act and learn on."""
        self._task.events.emit(event, self._task, **details)
        self._task.agent.learner.attach()

    def evaluate_untrained(self) -> None:
        """Begin the learning curve, if there is none."""
        self._environments.open()
        if not self._task.metrics.curve:
            self._task.metrics.curve.append(self._environments.evaluate_untrained(self._task.agent))
            self._save()

    def run_epoch(self) -> bool:
        """Train, evaluate and save one epoch; return whether it is the last one of `fit`."""
        updates, envs = self._start_epoch(), self._environments.open()
        try:
            episodes = train_epoch(updates, envs, self._task.info, self._on_rollout, self._task.before_step)
            return self._end_epoch(updates, episodes)
        except Diverged as reason:
            self._diverge(reason)
            return True

    def update(self, rollout: Rollout, next_obs: NDArray[Any]) -> dict[str, float]:
        """Do the next update of an epoch on a rollout of the caller's, and return its statistics."""
        self.evaluate_untrained()
        updates = self._updates or self._start_epoch()
        try:
            updates.update(rollout, next_obs)
            self._on_rollout(len(updates.rows) - 1, rollout)
            if updates.complete:
                self._end_epoch(updates, Episodes(0))
        except Diverged as reason:
            self._diverge(reason)
        return updates.rows[-1]

    def _start_epoch(self) -> Updates:
        task = self._task
        self.emit("start_epoch", epoch=task.epoch)
        self._updates, self._started = Updates(task.agent, task.config, task.epoch), time.perf_counter()
        return self._updates

    def _on_rollout(self, index: int, rollout: Rollout) -> None:
        self.emit("end_rollout", epoch=self._task.epoch, index=index, rollout=rollout)

    def _end_epoch(self, updates: Updates, episodes: Episodes) -> bool:
        task = self._task
        row = self._environments.evaluate(updates, episodes)
        seconds, self._updates = time.perf_counter() - self._started, None
        task.epoch += 1
        task.metrics.curve.append(row)
        task.metrics.seconds[task.epoch] = seconds
        stop = task.should_stop(task.metrics.curve)
        self._save()
        self._log.info(
            "epoch %d/%d  %s steps  return %.1f +- %.1f  %s steps/s",
            task.epoch, task.config.max_epochs, f"{row['env_steps']:,}",
            row["return_mean"], row["return_std"], f"{task.config.task.steps_per_epoch / seconds:,.0f}",
        )  # fmt: skip
        self.emit("end_epoch", epoch=task.epoch, row=task.metrics.latest)
        return stop

    def _diverge(self, reason: Diverged) -> None:
        self._task.diverged, self.diverged_steps, self._updates = True, reason.env_steps, None
        self._log.warning("diverged in %s. The trial stops and scores as its worst evaluation.", reason)
        self.emit("diverged", reason=str(reason))

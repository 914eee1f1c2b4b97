"""The environments of a task: those it trains in, and those that evaluate it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ppo_hpo.envs.make import EnvInfo
from ppo_hpo.envs.repeat import first_difference
from ppo_hpo.envs.step import VectorEnv
from ppo_hpo.envs.vector import vectorize
from ppo_hpo.ppo.agent import Agent
from ppo_hpo.ppo.evaluate import Evaluation, Evaluator
from ppo_hpo.ppo.rollout import Episodes
from ppo_hpo.ppo.train import Updates, diverging
from ppo_hpo.spec import randomness, results
from ppo_hpo.spec.config import TrialConfig


class Environments:
    """Training and evaluation environments, made by `open`."""

    def __init__(self, config: TrialConfig, info: EnvInfo, log: logging.Logger) -> None:
        self._config, self._info, self._log = config, info, log
        self._training: VectorEnv | None = None
        self._evaluator: Evaluator | None = None

    def open(self) -> VectorEnv:
        """Make what is not there, and return the training environments."""
        config = self._config
        if config.env.one_at_a_time and self._evaluator is not None:
            self.close()
        try:
            if self._training is None:
                self._training = vectorize(config.env, self._info, config.task.threads)
            if not config.env.one_at_a_time:
                self._open_evaluator()
        except BaseException:
            self.close()
            raise
        return self._training

    def _open_evaluator(self) -> Evaluator:
        config = self._config
        if config.env.one_at_a_time and self._training is not None:
            self.close()
        if self._evaluator is None:
            seeds = randomness.evaluation_seeds(config.task.eval_episodes)
            at_once = 1 if config.env.one_at_a_time else None
            self._evaluator = Evaluator(config.env, self._info, seeds, self._longest_episode, at_once)
        return self._evaluator

    @property
    def _longest_episode(self) -> int:
        return self._info.time_limit or self._config.task.steps_per_epoch

    def evaluate(self, updates: Updates, episodes: Episodes) -> dict[str, Any]:
        """Evaluate an agent after all updates of an epoch, and return the epoch's row of the curve."""
        agent, epoch = updates.agent, updates.epoch + 1
        with diverging(agent, f"the evaluation of epoch {epoch}", self._config.task.steps_per_epoch):
            evaluation = self._evaluation(agent, epoch)
        return self._row(epoch, evaluation, updates.summary(episodes))

    def evaluate_untrained(self, agent: Agent) -> dict[str, Any]:
        """Evaluate an agent before its first epoch, and return the first row of the curve."""
        self._warn_if_not_repeating()
        evaluation = self._evaluation(agent, 0)
        return self._row(0, evaluation, {})

    def _evaluation(self, agent: Agent, epoch: int) -> Evaluation:
        task = self._config.task
        rng = None if task.eval_deterministic else randomness.make_rng(task.seed, "eval", epoch)
        return self._open_evaluator()(agent.learner, agent.normalizer, rng)

    def _warn_if_not_repeating(self) -> None:
        n_envs = self._config.env.n_envs
        if difference := first_difference(self.open(), self._info, n_envs):
            self._log.warning(
                "`env.id: %s` does not repeat itself: after two resets with the same seed and the same "
                "actions, %s differed. So a trial that resumes may give other results. Draw all random "
                "numbers from self.np_random, and reset all state in `reset`.",
                self._info.id, difference,
            )  # fmt: skip

    def evaluate_fresh(self, agent: Agent, episodes: int) -> Evaluation:
        """Evaluate an agent on fresh episodes (`randomness.fresh_episode_seeds`).

        At most ``task.eval_episodes`` of them run at a time, so this needs no more environments than tuning.
        """
        task, alone = self._config.task, self._config.env.one_at_a_time
        if alone:
            self.close()
        seeds = randomness.fresh_episode_seeds(task.seed, episodes)
        evaluator = Evaluator(
            self._config.env, self._info, seeds, self._longest_episode,
            at_once=1 if alone else task.eval_episodes,
        )  # fmt: skip
        try:
            rng = None if task.eval_deterministic else randomness.make_rng(task.seed, "judge", 1)
            return evaluator(agent.learner, agent.normalizer, rng)
        finally:
            self._close([evaluator])

    def _row(self, epoch: int, evaluation: Evaluation, summary: Mapping[str, Any]) -> dict[str, Any]:
        row = {
            "epoch": epoch,
            "env_steps": epoch * self._config.task.steps_per_epoch,
            **results.evaluation_columns(evaluation.returns, evaluation.lengths),
            **summary,
        }
        # Through JSON, so that a row that was never in a file equals one that was.
        return dict(json.loads(json.dumps(row, allow_nan=False)))

    def close(self) -> None:
        """Close all environments. `open` makes them again."""
        parts = [part for part in (self._training, self._evaluator) if part is not None]
        self._training = self._evaluator = None
        self._close(parts)

    def _close(self, parts: Sequence[VectorEnv | Evaluator]) -> None:
        """Close environments. A failure is only logged: everything that they gave before is complete."""
        for part in parts:
            try:
                part.close()
            except (Exception, SystemExit) as error:
                self._log.warning(
                    "`env.id: %s` raised %r as it was closed. This changes no result.",
                    self._info.id, error, exc_info=error,
                )  # fmt: skip

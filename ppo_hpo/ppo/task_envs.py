"""The environments of a task: those it trains in, and those that evaluate it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ppo_hpo.envs.make import EnvInfo
from ppo_hpo.envs.step import VectorEnv
from ppo_hpo.envs.vector import vectorize
from ppo_hpo.ppo.agent import Agent
from ppo_hpo.ppo.evaluate import Evaluation, Evaluator
from ppo_hpo.ppo.rollout import Episodes
from ppo_hpo.ppo.train import Diverged, Updates
from ppo_hpo.spec import randomness, results
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError


class Environments:
    """Training and evaluation environments, made by `open`."""

    def __init__(self, config: TrialConfig, info: EnvInfo) -> None:
        self._config, self._info = config, info
        self._training: VectorEnv | None = None
        self._evaluator: Evaluator | None = None

    def open(self) -> VectorEnv:
        """Make what is not there, and return the training environments."""
        config = self._config
        if self._training is None:
            self._training = vectorize(config.env, self._info, config.task.threads)
        if self._evaluator is None:
            seeds = randomness.evaluation_seeds(config.task.eval_episodes)
            self._evaluator = Evaluator(config.env, self._info, seeds, self._longest_episode)
        return self._training

    @property
    def _longest_episode(self) -> int:
        return self._info.time_limit or self._config.task.steps_per_epoch

    def evaluate(self, updates: Updates, episodes: Episodes) -> dict[str, Any]:
        """Evaluate an agent after all updates of an epoch, and return the epoch's row of the curve."""
        evaluation = self._evaluation(updates.agent, updates.epoch + 1)
        if not evaluation.finite:
            raise Diverged("the evaluation: a return is not finite", self._config.task.steps_per_epoch)
        return self._row(updates.epoch + 1, evaluation, updates.summary(episodes))

    def evaluate_untrained(self, agent: Agent) -> dict[str, Any]:
        """Evaluate an agent before its first epoch, and return the first row of the curve."""
        evaluation = self._evaluation(agent, 0)
        if not evaluation.finite:
            raise UserError(
                f"`env.id: {self._config.env.id}` gives returns that are not finite even before training: "
                f"{evaluation.returns}. Fix the rewards of the environment."
            )
        return self._row(0, evaluation, {})

    def _evaluation(self, agent: Agent, epoch: int) -> Evaluation:
        self.open()
        assert self._evaluator is not None
        task = self._config.task
        rng = None if task.eval_deterministic else randomness.make_rng(task.seed, "eval", epoch)
        return self._evaluator(agent.learner, agent.normalizer, rng)

    def evaluate_fresh(self, agent: Agent, episodes: int) -> Evaluation:
        """Evaluate an agent on fresh episodes (`randomness.fresh_episode_seeds`).

        At most ``task.eval_episodes`` of them run at a time, so this needs no more environments than tuning.
        """
        task = self._config.task
        seeds = randomness.fresh_episode_seeds(task.seed, episodes)
        evaluator = Evaluator(
            self._config.env, self._info, seeds, self._longest_episode, at_once=task.eval_episodes
        )
        try:
            rng = None if task.eval_deterministic else randomness.make_rng(task.seed, "judge", 1)
            return evaluator(agent.learner, agent.normalizer, rng)
        finally:
            evaluator.close()

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
        for part in (self._training, self._evaluator):
            if part is not None:
                part.close()
        self._training = self._evaluator = None

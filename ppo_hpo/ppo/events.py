"""Events that observers subscribe to, and the metrics that a task gathers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ppo_hpo.spec.errors import UserError

Observer = Callable[..., None]


class Events:
    """Named moments in the life of a task. Observers are called in the order they subscribed.

    | event | when | details |
    |---|---|---|
    | `resumed` | a checkpoint was taken over | `epoch` |
    | `start_fit` | `fit` begins | `epochs`, `context` |
    | `start_epoch` | an epoch begins | `epoch` (those done before it) |
    | `end_rollout` | a rollout was learned from | `epoch`, `index`, `rollout` |
    | `end_epoch` | an epoch was evaluated and saved | `epoch` (done, with this one), `row` |
    | `diverged` | a loss or a parameter is not finite | `reason` |
    | `end_fit` | `fit` ends | `epochs`, `context` |
    """

    NAMES = (
        "resumed", "start_fit", "start_epoch", "end_rollout", "end_epoch", "diverged", "end_fit",
    )  # fmt: skip

    def __init__(self) -> None:
        self._observers: dict[str, list[Observer]] = {name: [] for name in self.NAMES}

    def subscribe(self, event: str, observer: Observer) -> Observer:
        """Call ``observer(task, **details)`` at each ``event``; return it, to unsubscribe it later.

        Raises:
            UserError: there is no such event.
        """
        if event not in self._observers:
            raise UserError(f"An event must be one of {', '.join(self.NAMES)}, but got {event!r}.")
        self._observers[event].append(observer)
        return observer

    def unsubscribe(self, event: str, observer: Observer) -> None:
        """Take back one subscription."""
        self._observers[event].remove(observer)

    def emit(self, event: str, task: Any, **details: Any) -> None:
        """Tell the observers."""
        for observer in list(self._observers[event]):
            observer(task, **details)


class Metrics:
    """The learning curve of a task: one row for each epoch, the untrained policy's first.

    Rows hold only what follows from hyperparameters and seed, so that a continued trial has the very
    same ones; what the clock says is in `seconds`.

    Attributes:
        curve: rows, JSON-ready, in the order of their `epoch`.
        seconds: wall seconds of each epoch that this process trained, by epoch.
    """

    def __init__(self) -> None:
        self.curve: list[dict[str, Any]] = []
        self.seconds: dict[int, float] = {}

    @property
    def latest(self) -> dict[str, Any]:
        """The newest row; empty before the first evaluation."""
        return dict(self.curve[-1]) if self.curve else {}

    def at(self, epoch: int) -> dict[str, Any]:
        """The row of one epoch; empty where it has not been reached."""
        return next((dict(row) for row in self.curve if row["epoch"] == epoch), {})

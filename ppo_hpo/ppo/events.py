"""Events that observers subscribe to, and the learning curve of a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ppo_hpo.spec import results
from ppo_hpo.spec.errors import UserError

Observer = Callable[..., None]


class Events:
    """Named moments in the life of a task. Observers are called in the order in which they subscribed.

    | event | when | details |
    |---|---|---|
    | `resumed` | a checkpoint was loaded | `epoch` |
    | `start_fit` | `fit` begins | `epochs`, `context` |
    | `start_epoch` | an epoch begins | `epoch` (number of epochs done before it) |
    | `end_rollout` | the update on a rollout is done | `epoch`, `index`, `rollout` |
    | `end_epoch` | an epoch was evaluated and saved | `epoch` (number of epochs done, with it), `row` |
    | `diverged` | a loss, a parameter or a return is not finite | `reason` |
    | `end_fit` | `fit` ends | `epochs`, `context` |
    """

    NAMES = ("resumed", "start_fit", "start_epoch", "end_rollout", "end_epoch", "diverged", "end_fit")

    def __init__(self) -> None:
        self._observers: dict[str, list[Observer]] = {name: [] for name in self.NAMES}

    def subscribe(self, event: str, observer: Observer) -> Observer:
        """Call ``observer(task, **details)`` at each ``event``, and return it, to unsubscribe it later.

        Raises:
            UserError: there is no such event.
        """
        if event not in self._observers:
            raise UserError(f"An event must be one of {', '.join(self.NAMES)}, but got {event!r}.")
        self._observers[event].append(observer)
        return observer

    def unsubscribe(self, event: str, observer: Observer) -> None:
        """Cancel one subscription."""
        self._observers[event].remove(observer)

    def emit(self, event: str, task: Any, **details: Any) -> None:
        """Call the observers of an event."""
        for observer in list(self._observers[event]):
            observer(task, **details)


class Metrics:
    """The learning curve of a task: one row for each epoch, that of the untrained policy first.

    Rows hold only what follows from hyperparameters and seed, so that a resumed trial has the very same ones.
    What depends on the clock is in `seconds`.

    Attributes:
        curve: rows that JSON can hold, in the order of their `epoch`.
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
        """The row of one epoch; empty where the epoch has not been reached."""
        return next((dict(row) for row in self.curve if row["epoch"] == epoch), {})

    def report(self, epochs: int, *, diverged: bool) -> dict[str, float]:
        """The objective after so many epochs, and its statistics; see `PPO.report`."""
        if not self.curve:
            raise RuntimeError("There is nothing to report yet: call fit(...) first.")
        return {
            "objective": results.objective(self.curve, epochs, diverged=diverged),
            **results.statistics(self.curve, epochs, diverged=diverged),
        }

"""The guard that stops a failed task from being used again."""

from __future__ import annotations

from typing import Any

from ppo_hpo.spec.errors import BadResume


class BadResumeGuard:
    """Sets a task's ``bad_state`` when the guarded block fails, and refuses to run a block of a bad task.

    After a failure a task may be anywhere between two states. A new task with the same hyperparameters and
    storage resumes from the last checkpoint instead.
    """

    def __init__(self, task: Any) -> None:
        self._task = task

    def __enter__(self) -> None:
        if self._task.bad_state:
            raise BadResume(
                "This task failed before and may be in a bad state. Make a new one with the same "
                "hyperparameters and storage. It resumes from the last checkpoint."
            )

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is not None:
            self._task.bad_state = True

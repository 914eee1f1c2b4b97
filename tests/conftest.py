"""What all tests share."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest
import torch

from ppo_hpo.trial import process

# The networks are small: more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def signals_are_handled_as_before() -> Iterator[None]:
    """A command that a test runs in this process handles signals, which later tests must not notice."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        if handler is not None:  # of a library in C
            signal.signal(number, handler)
    process._handled.clear()


@pytest.fixture(autouse=True)
def no_heart_beats_on() -> Iterator[None]:
    """A test that failed leaves trials reserved, whose threads would keep pytest from ending."""
    yield
    for thread in threading.enumerate():
        if type(thread).__name__ == "TrialPacemaker":
            thread.stop()  # type: ignore[attr-defined]

"""What all tests share."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

# The networks are small: more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_heart_beats_on() -> Iterator[None]:
    """A test that failed leaves trials reserved, whose threads would keep pytest from ending."""
    yield
    for thread in threading.enumerate():
        if type(thread).__name__ == "TrialPacemaker":
            thread.stop()  # type: ignore[attr-defined]

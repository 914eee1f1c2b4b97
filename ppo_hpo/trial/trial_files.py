"""The files in a trial's directory: their names, the log, the learning curve and the configuration."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from ppo_hpo.spec import results, yamlio
from ppo_hpo.spec.config import TrialConfig
from ppo_hpo.spec.errors import UserError
from ppo_hpo.state import worklog
from ppo_hpo.state.files import append_line
from ppo_hpo.trial import failure, fresh_test, median_stop

if TYPE_CHECKING:
    from ppo_hpo.ppo.task import PPO

# Writes a file whole, or not at all.
Write = Callable[[Path, bytes], None]
LOG, TIMING, CURVE, RESULTS, CONFIG = "log.txt", "timing.jsonl", "curve.jsonl", "results.json", "config.yaml"
WRITTEN_IN_PLACE = (LOG, TIMING, worklog.FILE, "lock")  # appended to, locked or emptied
WRITER = "writer"  # directory in which the lock names the trial's writer
REPLACED = (
    failure.RECORD, failure.TRACEBACK, CURVE, RESULTS, CONFIG, median_stop.RECORD, fresh_test.FILE,
)  # fmt: skip


def default_directory(config: TrialConfig) -> Path:
    """The directory for a trial that was given none. The same trial always gets the same one."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", config.env.id)
    return Path("ppo-hpo-runs") / f"{name}-{config.identity()[:12]}"


def config_bytes(config: TrialConfig) -> bytes:
    """The content of ``config.yaml``. It mentions seeds only if there are several."""
    mapping = config.to_mapping()
    if config.task.seeds == 1:
        del mapping["task"]["seeds"], mapping["task"]["aggregate"]
    return yamlio.dump(mapping).encode()


def write_curve(directory: Path, curve: Sequence[results.Row], write: Write) -> None:
    """Write the learning curve, one JSON line for each epoch. It can be restored from the checkpoint."""
    write(directory / CURVE, "".join(json.dumps(row) + "\n" for row in curve).encode())


def append_timing(directory: Path, part: str, task: PPO, log: logging.Logger) -> None:
    """Append the time that the last epoch of one seed took, and where. All seeds share one file."""
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
    append_line(directory / TIMING, json.dumps(row), log)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Do nothing: a full disk stops the trial with one sentence, when the next file is written."""


@contextlib.contextmanager
def logging_to(directory: Path, trial_id: str | None, console: bool) -> Iterator[logging.Logger]:
    """A logger that writes to the trial's ``log.txt``, and to standard error if ``console`` is true."""
    log = logging.Logger(f"ppo_hpo.{trial_id or directory.name}", logging.INFO)
    try:
        file = _LogFile(directory / LOG, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory / LOG} cannot be written: {error.strerror}.") from None
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(file)
    crashes = not faulthandler.is_enabled()
    if crashes:  # A crash in C then leaves its traceback in the log.
        faulthandler.enable(cast(TextIO, file.stream))
    if console:
        stream = logging.StreamHandler()
        prefix = f"[{trial_id[:8]}] " if trial_id else ""
        stream.setFormatter(logging.Formatter(prefix.replace("%", "%%") + "%(message)s"))
        log.addHandler(stream)
    try:
        yield log
    finally:
        if crashes:
            faulthandler.disable()
        # Closing writes what an earlier failure left unwritten, and fails again.
        with contextlib.suppress(OSError):
            file.close()

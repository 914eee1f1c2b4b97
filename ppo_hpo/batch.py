"""Many trials in one go, on a few worker processes; what was done before is not done again.

Each trial is an ordinary one, in a directory of its own: killed with all of its workers, it goes on from its
last checkpoint when the same list is asked for again, and one that has its result is only read.

A worker is a new interpreter (``python -m ppo_hpo.batch``), never a fork, which would inherit torch's
threads. It reads one trial at a time from its standard input, as a line of JSON, and answers with a line of
JSON. It ends when its input does, and when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ppo_hpo import failure, gpus, yamlio
from ppo_hpo.checkpoint import read_bytes
from ppo_hpo.config import TrialConfig
from ppo_hpo.errors import CheckpointError, Interrupted, UserError
from ppo_hpo.trial import run

# Numerical libraries read these when they are first imported.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# Far above what results and ten thousand epochs take.
_MOST_RESULTS, _MOST_CURVE = 1 << 20, 16 << 20
# A worker that was killed, as for lack of memory, is replaced so often for one trial.
_DEATHS = 2
# Seconds that a worker has to end its trial when it is asked to.
_GRACE = 10.0
# Empties the line that a terminal is in.
_ERASE = "\r\x1b[K"


@dataclass(frozen=True)
class Job:
    """One trial of the list.

    Attributes:
        label: what to call it.
        config: the trial.
        directory: of its state.
    """

    label: str
    config: TrialConfig
    directory: Path


@dataclass(frozen=True)
class Result:
    """What a trial came to.

    Attributes:
        score: the negative objective: the mean return of its last evaluation, or of its worst if it diverged.
        statistics: as in its result file.
        read: whether it was there already.
    """

    score: float
    statistics: Mapping[str, float]
    read: bool = False


#: Told of a trial that ended, and how many of how many have.
Listener = Callable[[Job, Result, int, int], None]


def run_all(
    jobs: Sequence[Job],
    *,
    workers: int = 2,
    device: str = "auto",
    on_end: Listener = lambda job, result, ended, of: None,
    on_look: Callable[[Sequence[Job]], None] = lambda under_way: None,
) -> list[Result]:
    """Run trials, as many at a time as there are workers.

    Args:
        jobs: the trials; those that name the same directory have to be the same, and are run once.
        workers: processes.
        device: of all of them.
        on_end: see `Listener`.
        on_look: told about once a second which trials are under way.

    Returns:
        The results, in the order of the jobs.

    Raises:
        UserError: a trial failed, or its worker died again and again. The others stop at once; the same call
            goes on with all of them.
    """
    if workers < 1:
        raise UserError(f"`workers >= 1` must hold, but got {workers}.")
    unique = {job.directory: job for job in jobs}
    results: dict[Path, Result] = {}
    for job in unique.values():
        found = result_of(job)
        if found is not None:
            results[job.directory] = found
            on_end(job, found, len(results), len(unique))
    waiting = [job for job in unique.values() if job.directory not in results]
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(_crew(waiting, min(workers, len(waiting)), device))
        while len(results) < len(unique):
            try:
                job, answer = crew.answers.get(timeout=1.0)
            except queue.Empty:
                on_look(list(crew.under_way.values()))
                continue
            if isinstance(answer, str):
                raise UserError(
                    f"The trial in {job.directory} failed: {answer.rstrip('.')}. What is finished is kept; "
                    f"the same command goes on."
                )
            results[job.directory] = answer
            on_end(job, answer, len(results), len(unique))
            on_look(list(crew.under_way.values()))
    return [results[job.directory] for job in jobs]


def result_of(job: Job) -> Result | None:
    """The result of a trial that is done; None where it is not, or has another trial's directory."""
    try:
        config = TrialConfig.from_mapping(yamlio.load(job.directory / "config.yaml"))
        content = json.loads(read_bytes(job.directory / "results.json", _MOST_RESULTS))
        values = {str(entry["name"]): float(entry["value"]) for entry in content}
        done = values["epochs"] == job.config.task.epochs or values["diverged"]
    except (UserError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if config.identity() != job.config.identity() or not done:
        return None
    return Result(-values.pop("objective"), values, read=True)


def epochs_of(job: Job) -> int:
    """Epochs that a trial under way has behind it."""
    try:
        curve = read_bytes(job.directory / "curve.jsonl", _MOST_CURVE)
    except CheckpointError:
        return 0
    return max(0, min(curve.count(b"\n") - 1, job.config.task.epochs))


class Progress:
    """A line for each trial that ends; on a terminal, one more that says where the others are."""

    def __init__(self, out: TextIO | None, jobs: Sequence[Job]) -> None:
        """Tell ``out``, unless it is None, of these trials; `ended` and `look` are for `run_all`."""
        self._out = out
        self._lively = out is not None and out.isatty()
        self._began = time.monotonic()
        self._epochs = {job.directory: job.config.task.epochs for job in jobs}
        self._ended: set[Path] = set()
        self._read = self._epochs_read = 0

    def ended(self, job: Job, result: Result, number: int, of: int) -> None:
        """Take in a trial that ended."""
        self._ended.add(job.directory)
        if result.read:
            self._read += 1
            self._epochs_read += self._epochs[job.directory]
            return
        self._tell_read()
        how = "  diverged" if result.statistics["diverged"] else ""
        self._line(
            f"{time.monotonic() - self._began:7.0f} s  {number:4} of {of}  {job.label:28}  "
            f"return {result.score:8.1f}{how}"
        )

    def look(self, under_way: Sequence[Job]) -> None:
        """Say where the trials are that are under way."""
        self._tell_read()
        if self._out is None or not self._lively:
            return
        now = [(job.label, epochs_of(job), job.config.task.epochs) for job in under_way]
        done = sum(self._epochs[place] for place in self._ended) + sum(epoch for _, epoch, _ in now)
        new, left = done - self._epochs_read, sum(self._epochs.values()) - done
        minutes = (time.monotonic() - self._began) / 60 / new * left if new > 0 else None
        text = "; ".join(f"{label}: epoch {epoch} of {of}" for label, epoch, of in now)[:150]
        rest = "" if minutes is None else f"; about {max(1, round(minutes))} min left"
        self._out.write(f"{_ERASE}{text}{rest}")
        self._out.flush()

    def close(self) -> None:
        """Leave the terminal's line empty."""
        self._tell_read()
        if self._out is not None and self._lively:
            self._out.write(_ERASE)
            self._out.flush()

    def _tell_read(self) -> None:
        if self._read:
            self._line(f"{self._read} of {len(self._epochs)} trials were done before")
            self._read = 0

    def _line(self, text: str) -> None:
        if self._out is not None:
            self._out.write((_ERASE if self._lively else "") + text + "\n")
            self._out.flush()


# ------------------------------------------------------------------------- the leader


class _Crew:
    """Threads, each with a worker process that it feeds.

    Attributes:
        answers: of each trial that ended, its result or, in words, why it failed.
        under_way: the trials that workers have at the moment.
    """

    def __init__(self, jobs: Sequence[Job], workers: int, device: str) -> None:
        self.answers: queue.Queue[tuple[Job, Result | str]] = queue.Queue()
        self.under_way: dict[int, Job] = {}
        self._device = device
        self._jobs: queue.Queue[Job] = queue.Queue()
        for job in jobs:
            self._jobs.put(job)
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[str]] = []
        self._stopping = False
        self._threads = [threading.Thread(target=self._serve, args=(n,), daemon=True) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    def _serve(self, number: int) -> None:
        process: subprocess.Popen[str] | None = None
        deaths = 0
        job: Job | None = None
        while not self._stopping:
            if job is None:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
                deaths = 0
            self.under_way[number] = job
            try:
                if process is None:
                    process = self._start(job.config.task.threads)
                answer = self._ask(process, job)
            except OSError as error:
                answer, process = None, None
                reason = f"its worker process cannot be started: {error.strerror}"
                deaths = _DEATHS
            else:
                reason = ""
            if answer is None:
                if process is not None:
                    reason = f"its worker process ended with code {process.wait()}"
                process, deaths = None, deaths + 1
                if self._stopping:
                    break
                if deaths <= _DEATHS:
                    continue
                answer = reason
            del self.under_way[number]
            self.answers.put((job, answer))
            job = None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()

    def _start(self, threads: int) -> subprocess.Popen[str]:
        with self._lock:
            if self._stopping:
                raise OSError(0, "stopped", None)
            environ = {**os.environ, **{name: str(threads) for name in _THREADS}}
            # What Orion says of a trial of its own is not said of these.
            environ = {name: value for name, value in environ.items() if not name.startswith("ORION_TRIAL")}
            process = subprocess.Popen(
                [sys.executable, "-m", "ppo_hpo.batch", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environ,
                text=True,
            )
            self._processes.append(process)
            return process

    def _ask(self, process: subprocess.Popen[str], job: Job) -> Result | str | None:
        """A worker's answer; None where it died over it."""
        task = {
            "config": job.config.to_mapping(),
            "directory": str(job.directory.absolute()),
            "device": self._device,
        }
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            return None
        if "failed" in answer:
            return str(answer["failed"])
        return Result(-answer["objective"], answer["statistics"])

    def stop(self) -> None:
        """End every worker, with its trial if it has one."""
        with self._lock:
            self._stopping = True
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        ends = time.monotonic() + _GRACE
        for process in self._processes:
            try:
                process.wait(max(0.1, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


@contextlib.contextmanager
def _crew(jobs: Sequence[Job], workers: int, device: str) -> Iterator[_Crew]:
    crew = _Crew(jobs, workers, device)
    try:
        yield crew
    finally:
        crew.stop()


# ------------------------------------------------------------------------ the worker


def serve(leader: int) -> None:
    """Run the trials of standard input, until it ends or the process ``leader`` does."""
    gpus.own_process()
    # Answers are flushed each, and what an environment prints must not come between them.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def stop(signum: int, frame: object) -> None:
        raise Interrupted(signum)

    def tick() -> None:
        if os.getppid() != leader:
            raise Interrupted(signal.SIGTERM)

    # Ctrl-C reaches the whole group: the leader decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    try:
        for line in sys.stdin:
            answers.write(json.dumps(_answer(json.loads(line), tick)) + "\n")
            answers.flush()
        # The leader sends SIGTERM to whoever is still there: too late to be an interruption.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except (Interrupted, BrokenPipeError):
        os._exit(128 + signal.SIGTERM)
    # Taking torch down takes nearly half a second of CPU, and the kernel frees all of it anyway.
    answers.close()
    os._exit(0)


def _answer(task: Mapping[str, Any], tick: Callable[[], None]) -> dict[str, Any]:
    try:
        outcome = run(
            TrialConfig.from_mapping(task["config"]),
            Path(task["directory"]),
            device=task["device"],
            console=False,
            tick=tick,
            retries=failure.RETRIES,
        )
    except UserError as error:
        return {"failed": str(error)}
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return {"failed": failure.one_line(error)}
    return {"objective": outcome.objective, "statistics": dict(outcome.statistics)}


if __name__ == "__main__":
    serve(int(sys.argv[1]))

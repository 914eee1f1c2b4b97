"""The process that runs a trial: its thread limit, its signals and its exit code.

This module imports nothing heavy. The command line, Orion's workers and the preloaded process share it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from ppo_hpo.spec.errors import DeterministicFailure, EnvironmentFault, Interrupted, UserError, hide_secrets
from ppo_hpo.spec.printing import print_anything

# Numerical libraries read these variables when they are first imported.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# Packages that a trial imports. Nobody means to replace one by a file in the current directory.
_NEEDED = ("gymnasium", "numpy", "torch", "yaml", "safetensors", "orion", "ale_py", "envpool")
_received: list[int] = []  # the signal that asked this process to stop, once one has
_handled: list[int] = []  # the signals that raise `Interrupted` here


def set_thread_variables(threads: int) -> None:
    """Limit the threads of numerical libraries that are imported later."""
    for variable in THREAD_VARIABLES:
        os.environ[variable] = str(threads)


def find_modules_here() -> None:
    """Let environments be modules in the current directory, also where no `python -m` adds it.

    They go before installed packages, but behind Python's own modules, which other libraries import.
    """
    for name in _NEEDED:
        if os.path.isfile(f"{name}.py"):
            raise UserError(
                f"The current directory has a file {name}.py, which hides the package {name} from Python. "
                f"Rename the file."
            )
    if "" not in sys.path:
        installed = (index for index, path in enumerate(sys.path) if path.endswith("-packages"))
        sys.path.insert(next(installed, 0), "")


def raise_on_signals() -> None:
    """Make SIGTERM and SIGINT raise `Interrupted` at once. Files are written in one piece or not at all."""

    def stop(signum: int, frame: FrameType | None) -> None:
        # Only the first signal raises. A second one must not disturb the clean-up after the first.
        if not _received:
            _received.append(signum)
            raise Interrupted(signum)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
        _handled.append(number)


def may_be_interrupted_by_keyboard() -> bool:
    """Whether Ctrl-C may raise KeyboardInterrupt here. If not, whatever raises one is no keyboard."""
    return not _handled


def raise_if_stopped() -> None:
    """Raise `Interrupted` again, because an ``except:`` of the environment's may have swallowed the first."""
    if _received:
        raise Interrupted(_received[0])


def interrupt_code(signum: int) -> int:
    """The exit code for an interruption: Orion's, or the one that shells report for the signal."""
    code = os.environ.get("ORION_INTERRUPT_CODE", "")
    return int(code) if code.isdigit() else 128 + signum


def exit_code(
    command: Callable[[], int], stops_the_hunt: Callable[[UserError], bool] = lambda error: False
) -> int:
    """Run a command, and turn what it raises into one line on standard error and an exit code.

    The code is the command's own; 2 for a user's error or one of Orion's; 141 after a broken pipe; see
    `interrupt_code` for a signal. ``stops_the_hunt`` says for a user's error whether `orion hunt` should
    stop, because other trials would fail in the same way.
    """
    print_anything()
    try:
        code = int(command())
        sys.stdout.flush()
        return code
    except UserError as error:
        return _report_signal(_received[0]) if _received else _report_error(error, stops_the_hunt(error))
    except BrokenPipeError:
        # The reader of a pipe closed it, as `head` does. Python would complain about it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except BaseException as error:
        # An exception that is raised while a class is created, as during imports, becomes a RuntimeError. So
        # the signal counts, not the type of the exception.
        if isinstance(error, Interrupted) or _received:
            return _report_signal(error.signum if isinstance(error, Interrupted) else _received[0])
        if not type(error).__module__.startswith("orion."):
            raise
        # For example, a database was locked for longer than Orion waits.
        text = hide_secrets(" ".join(f"{type(error).__name__}: {error}".split()))
        print(f"ppo-hpo: error: Orion failed: {text}", file=sys.stderr)
        return 2


def _report_signal(signum: int) -> int:
    code = interrupt_code(signum)
    print(
        f"ppo-hpo: stopped by {signal.Signals(signum).name}. Everything saved is whole. Rerun the command to "
        f"resume (exit code {code}).",
        file=sys.stderr,
    )
    return code


def _report_error(error: UserError, stops_the_hunt: bool) -> int:
    if isinstance(error, DeterministicFailure | EnvironmentFault) and error.__cause__ is not None:
        sys.excepthook(type(error.__cause__), error.__cause__, error.__cause__.__traceback__)
    if not stops_the_hunt:
        print(f"ppo-hpo: error: {error}", file=sys.stderr)
        return 2
    code = interrupt_code(signal.SIGINT)
    print(
        f"ppo-hpo: error: {error} The hunt stops here (exit code {code}), because other trials would fail "
        f"too. Fix the cause and rerun the command: it resumes the hunt, with this trial.",
        file=sys.stderr,
    )
    return code


def leave(code: int) -> NoReturn:
    """End this process as Python does, but without unloading every module.

    Unloading costs 0.4 s of CPU time once torch is imported, and the kernel frees the memory anyway.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    # Files that are still open get what was written to them.
    for thing in gc.get_objects():
        if type(thing) in (io.BufferedWriter, io.BufferedRandom, io.TextIOWrapper):
            with contextlib.suppress(OSError, ValueError):
                thing.flush()
    os._exit(code)

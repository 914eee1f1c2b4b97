"""What goes wrong by the user's hand, and what merely stops a trial."""

from __future__ import annotations

import re

_LONGEST = 2000


class UserError(ValueError):
    """Input that breaks a rule: the message says the rule, the value and what to do.

    The command line prints it as one line and exits with code 2. Parts of it may come from somebody
    else's file: control characters are shown as escapes, and the middle of what is overlong is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} [...] {message[-_LONGEST // 2 :]}"
        if not message.isprintable():
            message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(message)


class MachineError(UserError):
    """Something that this machine lacks: no trial would get any further here, whatever its values."""


class DeterministicFailure(UserError):
    """An error that came twice at the very same step: a trial repeats itself, so it would come each time."""


class OutOfMemory(UserError):
    """There was not enough memory, on the machine or on its GPU."""


class CheckpointError(UserError):
    """A checkpoint that is torn, foreign, of other hyperparameters or not finite."""


class TornCheckpoint(CheckpointError):
    """A checkpoint that is not what was written: it will never be of use, to nobody."""


class BadResume(RuntimeError):
    """A task that failed was asked to go on; a new one has to be made from its checkpoint."""


class Interrupted(BaseException):
    """A signal asked the trial to stop.

    Not an ``Exception``, so that no ``except Exception`` on the way out can swallow it.

    Attributes:
        signum: the number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


class LostLock(BaseException):
    """Another process has the trial now: this one must not write its files any more.

    Not an ``Exception``, for the same reason.

    Attributes:
        number: that this process had as the trial's writer.
        reason: how it came to that.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"writer {number} lost the trial: {reason}")
        self.number = number
        self.reason = reason


def hide_passwords(text: str) -> str:
    """Replace the user name and password of every URL in ``text`` by ``***``, for messages."""
    return re.sub(r"(?<=://)[^/\s']+@", "***@", text)

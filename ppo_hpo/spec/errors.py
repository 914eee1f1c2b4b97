"""The exceptions of this package."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

_LONGEST = 2000


class UserError(ValueError):
    """Input that breaks a rule. The message names the rule, the value and what to do.

    The command line prints the message as one line and exits with code 2. Parts of a message may come from
    somebody else's file. So control characters are escaped, and the middle of an overlong message is left
    out. Secrets in it are hidden.
    """

    def __init__(self, message: object) -> None:
        # gymnasium makes an error of its worker's anew, from that error.
        message = hide_secrets(str(message))
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} [...] {message[-_LONGEST // 2 :]}"
        if not message.isprintable():
            message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(message)


class MachineError(UserError):
    """This machine lacks something that every trial needs, such as a package, a device or a store."""


class EnvironmentFault(UserError):
    """The environment breaks a rule of gymnasium's, so that no hyperparameters can help."""


class NotFinite(EnvironmentFault):
    """An observation, a reward or an action is NaN or infinite.

    Once a policy has learned, its own actions may be the reason.
    """


class DeterministicFailure(UserError):
    """A trial failed twice at the same step, or after every retry, so that another one would not help.

    Its cause is the error itself.
    """


class ExitOfEnvironment(RuntimeError):
    """Code of the user's tried to end the process, as ``sys.exit(0)`` does."""


class OutOfMemory(UserError):
    """The machine or its GPU did not have enough memory."""


class CheckpointError(UserError):
    """A file of a trial cannot be read or used.

    Such a checkpoint is torn, holds numbers that are not finite, or belongs to other hyperparameters.
    """


class TornCheckpoint(CheckpointError):
    """A checkpoint differs from what was written. It can never be used again."""


class BadResume(RuntimeError):
    """A task was asked to resume after it failed. Make a new task from its checkpoint instead."""


class Interrupted(BaseException):
    """A signal asked the trial to stop. ``except Exception`` does not catch it on the way out."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}")
        self.signum = signum


class LostLock(BaseException):
    """Another process writes the trial now, so this one, whose claim has ``number``, must write no more.

    It is not an ``Exception``, for the same reason as `Interrupted`.
    """

    def __init__(self, number: int, reason: str, *, asked: bool = False) -> None:
        super().__init__(f"writer {number} lost the trial: {reason}")
        self.number, self.reason = number, reason
        self.asked = asked  # whether the other process asked first, as one that sees this one alive does


@contextlib.contextmanager
def named_as(names: Mapping[str, str]) -> Iterator[None]:
    """Replace names between backticks in the message of a `UserError` by those that the user typed."""
    try:
        yield
    except UserError as error:
        if not names:
            raise
        pattern = re.compile(rf"(?<![\w.-])(?:{'|'.join(map(re.escape, names))})(?![\w.-])")
        quoted = re.sub(
            r"`[^`]*`", lambda part: pattern.sub(lambda name: names[name[0]], part[0]), str(error)
        )
        error.args = (quoted,)
        raise


_SECRETS = (
    # A password may have a slash or an @ in it, which a URL should have escaped.
    (re.compile(r"(://)[^\s'\"]*@"), r"\1***@"),
    # Everything that is asked of a server: tokens, signatures, passwords.
    (re.compile(r"(://[^\s'\"?]*\?|\?(?=[\w.-]+=))[^\s'\"]+"), r"\1***"),
    # Settings as YAML, Python and shells write them.
    (
        re.compile(
            r"(?i)((?:password|passwd|pwd|secret|token|credential|api_?key|access_?key)[a-z_]*['\"]?\s*[:=]\s*)"
            r"(?:'[^']*'|\"[^\"]*\"|[^\s'\",;&}\])]+)"
        ),
        r"\1***",
    ),
)


def hide_secrets(text: str) -> str:
    """Replace by ``***`` what nobody but the user should read: passwords, tokens and queries of URLs.

    This is for everything that is printed or logged. A file with such a text is readable by its owner only.
    """
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text

"""``ppo-hpo``, which is also ``python -m ppo_hpo``.

Orion counts a trial as broken that dies by SIGTERM or SIGINT. So a trial catches them before it imports
anything else: only while Python itself starts nothing can be done.
"""

import _signal  # type: ignore[import-not-found]  # `signal` imports a dozen modules
import os
import sys


def _leave(signum: int, frame: object) -> None:
    """End with the code that Orion takes for an interruption: nothing was begun that could be tidied up."""
    code = os.environ.get("ORION_INTERRUPT_CODE", "")
    os.write(2, b"ppo-hpo: stopped before the trial began\n")
    os._exit(int(code) if code.isdigit() else 128 + signum)


def main() -> int:
    """Run the command; return its exit code."""
    if sys.argv[1:2] == ["run"]:
        for number in (_signal.SIGTERM, _signal.SIGINT):
            _signal.signal(number, _leave)
    from ppo_hpo.cli.main import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())

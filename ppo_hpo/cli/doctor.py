"""``ppo-hpo doctor``, which looks for problems with the installation and with a database."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ppo_hpo.cli import common

if TYPE_CHECKING:
    from ppo_hpo.cli.common import Commands


def add_commands(commands: Commands) -> None:
    """Add ``doctor``."""
    doctor = commands.add_parser(
        "doctor",
        help="check the installation and a database, and say what to fix",
        description="Print versions, devices and extras, and check a database for broken trials, stuck "
        "trials and locks that a killed worker left. Each problem is one sentence that says how to fix it. "
        "The exit code is 1 if there is a problem.",
    )
    common.add_orion_config(
        doctor, "Without it, ppo-hpo tries ORION_DB_TYPE and ORION_DB_ADDRESS, then Orion's default."
    )
    doctor.add_argument("--json", action="store_true", help="print JSON, for other programs")
    doctor.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from ppo_hpo.inspect.doctor import examine, to_json

    report = examine(arguments.orion_config, progress=sys.stderr)
    print(to_json(report) if arguments.json else report)
    return 1 if report.findings else 0

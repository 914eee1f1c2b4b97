"""``ppo-hpo doctor``: checks the installation and a database, and says what to fix.

The checks are independent of each other. A check that fails becomes a finding, and the others still run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import TextIO

from ppo_hpo.inspect import doctor_database, doctor_installation
from ppo_hpo.inspect.doctor_report import Report
from ppo_hpo.spec.errors import UserError, hide_passwords


def examine(config: str | None = None, progress: TextIO | None = None) -> Report:
    """Run all checks.

    Args:
        config: Orion's configuration file, which says where the database is. None uses ``ORION_DB_TYPE`` and
            ``ORION_DB_ADDRESS``, or Orion's default.
        progress: where to print the name of a check that takes more than a second; None prints nothing.
    """
    report = Report()
    for name, check in doctor_installation.CHECKS.items():
        _run(name, check, report, progress)
    _run("database", lambda report: doctor_database.check(report, config), report, progress)
    return report


def _run(name: str, check: Callable[[Report], None], report: Report, progress: TextIO | None) -> None:
    timer = threading.Timer(1.0, print, [f"ppo-hpo: checking the {name} ..."], {"file": progress})
    timer.daemon = True
    if progress is not None:
        timer.start()
    try:
        check(report)
    except UserError as error:
        report.add_finding(str(error))
    except (Exception, SystemExit) as error:
        text = hide_passwords(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        report.add_finding(f"The {name} could not be checked ({text}).")
    finally:
        timer.cancel()


def to_json(report: Report) -> str:
    """The report as JSON, for other programs."""
    return json.dumps(asdict(report), indent=1)

"""Hold a trial's lock, on a file system without flock, until standard input ends.

    python -m tests.state.waiting_writer DIRECTORY

Prints the number of the claim once it has it, and at the end whether it lost it. What it waits for is logged
to standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ppo_hpo.spec.errors import LostLock
from ppo_hpo.state import claim as claims
from ppo_hpo.state import lock
from tests.state.without_flock import without_flock

without_flock()
claims._HEARTBEAT = 0.02
with lock.hold(Path(sys.argv[1])) as claim:
    print(claim.number, flush=True)
    sys.stdin.read()
    try:
        claim.check_still_held()
    except LostLock as error:
        print(error, flush=True)
    else:
        print("kept it", flush=True)

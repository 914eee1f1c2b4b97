"""``python -m ppo_hpo`` is ``ppo-hpo``."""

import sys

from ppo_hpo.cli import main

if __name__ == "__main__":
    sys.exit(main())

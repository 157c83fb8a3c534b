"""`python -m launcher`."""

import sys

from launcher.start import run_command

if __name__ == "__main__":
    sys.exit(run_command())

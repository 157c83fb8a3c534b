"""`python -m launcher`."""

import sys

from launcher.start import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m launcher`, and the installed command: what must happen before the imports, which take a second."""

import os
import signal
import sys

from launcher.runtime.ending import last_words
from launcher.runtime.parent import end_with_parent
from launcher.runtime.signals import importing, own_process, release_process
from launcher.runtime.streams import prepare_standard_streams
from launcher.runtime.wakeup import watch_signals


def start() -> int:
    """Run the command line; returns the exit code."""
    end_with_parent(signal.SIGKILL)  # until there is something to save, which api.train knows
    prepare_standard_streams()  # the watcher's pipe must not get the number of a closed one
    own_process()
    watch_signals()
    with last_words(_print_end):
        with importing():
            from launcher.cli import main
        code = main()
    release_process(code)
    return code


def _print_end(code: int, reason: str) -> None:
    rank = f"rank {os.environ.get('RANK')}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    os.write(2, f"error: {rank}{reason} (exit code {code})\n".encode())


if __name__ == "__main__":
    sys.exit(start())

"""A task that tests run in a child process; it ends in one of the ways there are."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from launcher.errors import DataError
from launcher.train.request import Request


def task(ending: str, request: Request) -> Iterator[Any]:
    """Yields its process id, whether torch is imported and its request; then ends."""
    yield os.getpid(), "torch" in sys.modules, request
    match ending:
        case "error":
            raise DataError("rows must be there; none is.\nGive some.", step=7)
        case "crash":
            raise ZeroDivisionError("planted")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "wait":
            time.sleep(600)

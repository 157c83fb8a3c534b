"""What tests run in a child process: a task that tells, and tasks that end in every way there is."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from launcher.errors import DataError
from launcher.train.request import Request


def tells(asked: Request) -> Iterator[Any]:
    yield "a phase"
    yield os.getpid(), "torch" in sys.modules, asked


def refuses(asked: Request) -> Iterator[Any]:
    yield "a phase"
    raise DataError("rows must be there; none is.\nGive some.", step=7)


def crashes(asked: Request) -> Iterator[Any]:
    yield "a phase"
    raise ZeroDivisionError("planted")


def is_killed(asked: Request) -> Iterator[Any]:
    yield "a phase"
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(asked: Request) -> Iterator[Any]:
    yield "a phase"
    os._exit(3)


def waits(asked: Request) -> Iterator[Any]:
    yield os.getpid()
    time.sleep(600)

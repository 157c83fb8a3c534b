"""The signals that end a run, and that no code in between may swallow.

Python raises KeyboardInterrupt wherever the main thread happens to be. If that is a callback whose errors are dropped,
the exception is lost: 1 of 50 interrupted runs went on training. So a signal is raised at once and also remembered, and
the training loop asks at every step.
"""

import signal
from types import FrameType
from typing import NoReturn

_received: list[type[BaseException]] = []


class Terminated(BaseException):
    """SIGTERM was received."""


def listen() -> None:
    """From now on SIGTERM raises Terminated and SIGINT KeyboardInterrupt; a SIGINT that is ignored stays ignored."""
    _received.clear()
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)


def raise_if_stopped() -> None:
    """Raise the last signal's exception again, in case it was swallowed."""
    if _received:
        raise _received[-1]


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    if signum == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the ending
    _received.append(Terminated if signum == signal.SIGTERM else KeyboardInterrupt)
    raise _received[-1]

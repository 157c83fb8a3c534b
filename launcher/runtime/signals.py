"""The signals that end a run, and that no code on the way may swallow.

Python raises KeyboardInterrupt wherever the main thread happens to be. Where that is a callback whose errors are
dropped, nobody hears of it: 1 of 50 interrupted runs went on training, what dropped it is not known. So a signal is
raised at once and remembered, and the training loop asks at every step.
"""

import signal
from types import FrameType
from typing import NoReturn

_arrived: list[type[BaseException]] = []


class Terminated(BaseException):
    """SIGTERM arrived."""


def listen() -> None:
    """From here on SIGTERM raises Terminated and SIGINT KeyboardInterrupt; an ignored SIGINT stays so."""
    _arrived.clear()
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)


def raise_if_stopped() -> None:
    """Raise what has arrived and did not come through."""
    if _arrived:
        raise _arrived[-1]


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    if signum == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the ending
    _arrived.append(Terminated if signum == signal.SIGTERM else KeyboardInterrupt)
    raise _arrived[-1]

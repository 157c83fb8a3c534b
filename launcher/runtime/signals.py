"""The signals that end a run, and that no code in between may swallow.

Python raises KeyboardInterrupt wherever the main thread happens to be. If that is a callback whose errors are dropped,
the exception is lost: 1 of 50 interrupted runs went on training. So a signal is raised at once and also remembered, and
the training loop asks at every step. The command line and api.run listen; mode=parity and bench do not ask.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def listening() -> Iterator[None]:
    """`listen` inside, the handlers of before afterwards. Does nothing in a thread other than the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    listen()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _received.clear()


def raise_if_stopped() -> None:
    """Raise the last signal's exception again, in case it was swallowed."""
    if _received:
        raise _received[-1]


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    if signum == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the ending
    _received.append(Terminated if signum == signal.SIGTERM else KeyboardInterrupt)
    raise _received[-1]

"""The signals that end a run, and that no code in between may swallow.

Python raises KeyboardInterrupt wherever the main thread happens to be. If that is a callback whose errors are dropped,
the exception is lost: 1 of 50 interrupted runs went on training. So a signal is raised at once and also remembered.
While the training loop defers it, the first signal is only remembered: the loop asks at every step, saves and ends.
The command line and api.run listen; mode=parity and bench do not ask.
"""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

_received: list[type[BaseException]] = []
_deferring: list[bool] = []  # one entry in each `deferring`


class Terminated(BaseException):
    """SIGTERM was received."""


VOTES: dict[type[BaseException], int] = {KeyboardInterrupt: 1, Terminated: 2**16}  # sums of many ranks stay apart


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


@contextmanager
def deferring() -> Iterator[None]:
    """Inside, the first signal is remembered and not raised. A second SIGINT is raised; a second SIGTERM is ignored."""
    _deferring.append(True)
    try:
        yield
    finally:
        _deferring.pop()


def stop_vote() -> float:
    """What this rank adds to the votes of a step: 0 unless it received a signal. All ranks see the sum, and stop at
    the same step."""
    return float(VOTES[_received[0]]) if _received else 0.0


def voted_stop(votes: Iterable[float]) -> type[BaseException] | None:
    """The exception that ends all ranks after these steps; SIGTERM's where ranks differ. None without a vote."""
    most = max(votes, default=0.0)
    return None if not most else Terminated if most >= VOTES[Terminated] else KeyboardInterrupt


def _stop(signum: int, frame: FrameType | None) -> None:
    if signum == signal.SIGTERM:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the ending
    kind = Terminated if signum == signal.SIGTERM else KeyboardInterrupt
    _received.append(kind)
    # accelerate, interrupted by the same Ctrl-C, ends at once, and with it comes SIGTERM: not the user's second signal.
    again = len(_received) > 1 and kind is KeyboardInterrupt
    if again or not _deferring:
        raise kind

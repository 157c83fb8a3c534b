"""The signals that end a run, and that no code in between may swallow.

Python raises a signal's exception wherever the main thread happens to be. If that is a callback whose errors are
dropped, the exception is lost: 1 of 50 interrupted runs went on training. So a signal is also remembered.

    in the training loop   the first signal is remembered: the loop asks at every step, saves and ends
    during imports         the process ends at once: half-imported modules swallow exceptions or raise others
    elsewhere              it is raised
    a second one           SIGINT ends at once; any other changes nothing

The command line owns its process (`own_process`); api.run only borrows it: there, a signal during imports is raised
after them, and a second SIGINT is raised. mode=parity and bench have no loop that asks.
"""

import atexit
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from launcher.runtime.ending import end_process
from launcher.runtime.ranks import gather

NOTHING_SAVED = "nothing was saved since the last checkpoint"


class Terminated(BaseException):
    """SIGTERM was received."""


class HungUp(Terminated):
    """SIGHUP was received: the terminal was closed."""


class Preempted(Terminated):
    """SIGUSR1 was received: SLURM says that the job's time is nearly up."""


STOPS: dict[int, tuple[type[BaseException], str]] = {  # where ranks differ, the first of these ends them all
    signal.SIGTERM: (Terminated, "terminated"),
    signal.SIGINT: (KeyboardInterrupt, "interrupted"),
    signal.SIGHUP: (HungUp, "hung up"),
    signal.SIGUSR1: (Preempted, "preempted"),
}

_received: list[int] = []
_deferring: list[bool] = []  # one entry in each `deferring`
_importing: list[bool] = []  # one entry in each `importing`
_owned: list[bool] = []  # not empty: the process is the command line's


def listen() -> None:
    """From now on the signals of STOPS end the run; those received before are forgotten. An ignored SIGINT or SIGHUP
    stays ignored, as for a background job or under nohup."""
    forget_signals()
    _set_handlers()


def forget_signals() -> None:
    _received.clear()


def _set_handlers() -> None:
    for number in STOPS:
        if number not in (signal.SIGINT, signal.SIGHUP) or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)


@contextmanager
def listening() -> Iterator[None]:
    """`listen` inside, the handlers of before afterwards. Does nothing in a thread other than the main one."""
    with handling():
        forget_signals()
        try:
            yield
        finally:
            forget_signals()


@contextmanager
def handling() -> Iterator[None]:
    """`listening` for a part of a run: what was received is remembered until the next part."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in STOPS}
    _set_handlers()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # one that was not set from Python cannot be put back
                signal.signal(number, handler)


def ask_to_stop() -> bool:
    """Inside `deferring` the same as a SIGINT: the training loop saves, and raises KeyboardInterrupt. Elsewhere nothing
    is asked for; returns which of the two."""
    if _deferring:
        _received.append(signal.SIGINT)
    return bool(_deferring)


def own_process() -> None:
    """From now on signals may end the process at once. Not in a process that was forked from this one."""
    _owned.append(True)
    atexit.register(_ignore_signals)  # the first one that is registered is called last
    os.register_at_fork(after_in_child=_disown)
    listen()


def release_process(code: int) -> None:
    """All is done and the process ends with `code`: from now on a signal only ends it sooner."""
    for number in STOPS:
        signal.signal(number, lambda *_: os._exit(code))


@contextmanager
def deferring() -> Iterator[None]:
    """Inside, the first signal is only remembered."""
    _deferring.append(True)
    try:
        yield
    finally:
        _deferring.pop()


def is_deferring() -> bool:
    return bool(_deferring)


@contextmanager
def importing() -> Iterator[None]:
    """Around imports, in which nothing can be lost: a signal ends an owned process at once, another one after them."""
    _importing.append(True)
    try:
        yield
    finally:
        _importing.pop()
    if stop := received_stop():
        raise stop


def received_stop() -> type[BaseException] | None:
    """What ends the run because of a signal that this process has received."""
    return STOPS[_received[0]][0] if _received else None


def stop_vote() -> float:
    """What this rank adds to the votes of a step: 1 if it received a signal. All ranks see the sum, and stop at the
    same step."""
    return float(bool(_received))


def voted_stop(votes: Iterable[float]) -> type[BaseException] | None:
    """The exception that ends all ranks after these steps; None without a vote. Every rank must have the same votes."""
    if not any(votes):
        return None
    stops = gather(received_stop())
    return next(stop for stop, _ in STOPS.values() if stop in stops)


def stop_code_and_reason(stop: type[BaseException], saved: str = "") -> tuple[int, str]:
    """The exit code of a process that a signal ends, and the reason for status.json. `saved`: what was saved before."""
    number, word = next((number, word) for number, (kind, word) in STOPS.items() if kind is stop)
    return 128 + number, f"{word}; {saved or NOTHING_SAVED}"


def _stop(signum: int, frame: FrameType | None) -> None:
    # accelerate, interrupted by the same Ctrl-C, ends at once, and with it comes SIGTERM: not the user's second signal.
    again, stop = bool(_received), STOPS[signum][0]
    _received.append(signum)
    if (_deferring and not again) or (again and signum != signal.SIGINT):
        return
    if _owned and (again or _importing):
        end_process(*stop_code_and_reason(STOPS[_received[0]][0]))
    if again or not _importing:
        raise stop


def _ignore_signals() -> None:
    """For the last moments of the interpreter, which gives signals their default actions back: the process would end by
    one of them in place of its code."""
    if _owned:
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)


def _disown() -> None:
    """In a forked child: it must not speak for the run."""
    _owned.clear()
    for number in STOPS:
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)  # its signals are not the parent's

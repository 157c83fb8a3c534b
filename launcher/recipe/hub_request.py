"""Requests to the hub that end in time, whatever answers: nothing, or a byte a second."""

from collections.abc import Callable
from queue import Empty, Queue
from threading import Thread
from typing import TypeVar

T = TypeVar("T")

HUB_TIMEOUT_S = 5.0  # for one small request to the hub, to see whether it answers


def answered(ask: Callable[[], T], *, timeout_s: float = HUB_TIMEOUT_S) -> T:
    """What `ask` returns. Raises what it raises, and TimeoutError when it takes longer.

    In a thread: the client's own timeout starts again for each address of the hub and with each byte that comes, and
    does not cover the name lookup.
    """
    answers: Queue[tuple[T | None, Exception | None]] = Queue()

    def work() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    Thread(target=work, daemon=True).start()
    try:
        answer, error = answers.get(timeout=timeout_s)
    except Empty:
        raise TimeoutError(f"no answer within {timeout_s:.0f} s") from None
    if error:
        raise error
    return answer  # type: ignore[return-value]

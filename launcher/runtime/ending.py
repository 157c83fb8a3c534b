"""Ends the process at once, from any thread. Stdlib only."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

WORDS_S = 1.0  # for each of the last words: a console or a file system may hang

Words = Callable[[int, str], object]

_last_words: list[Words] = []
_ending = threading.RLock()  # never released: of several threads the first one ends the process
_begun: list[bool] = []


@contextmanager
def last_words(say: Words) -> Iterator[None]:
    """Inside, `end_process` calls `say(code, reason)` before it ends the process, the innermost first."""
    _last_words.append(say)
    try:
        yield
    finally:
        _last_words.remove(say)


def end_process(code: int, reason: str) -> NoReturn:
    """Say the last words and exit with `code`, without waiting for other threads and without clean-up by Python."""
    _ending.acquire()
    words = [] if _begun else [*reversed(_last_words)]  # a signal may come while they are said
    _begun.append(True)
    for say in words:
        thread = threading.Thread(target=_try, args=(say, code, reason), daemon=True)
        with suppress(RuntimeError):  # no thread can be started while the interpreter ends
            thread.start()
            thread.join(WORDS_S)
    os._exit(code)


def _try(say: Words, code: int, reason: str) -> None:
    with suppress(Exception):
        say(code, reason)

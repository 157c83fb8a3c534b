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
_begun, _said = threading.Lock(), threading.Lock()  # taken for good as the words begin; free once all are said
_said.acquire()


@contextmanager
def last_words(say: Words) -> Iterator[None]:
    """Inside, `end_process` calls `say(code, reason)` before it ends the process, the innermost first."""
    _last_words.append(say)
    try:
        yield
    finally:
        _last_words.remove(say)


def end_process(code: int, reason: str) -> NoReturn:
    """Say the last words and exit with `code`, without waiting for other threads and without clean-up by Python.

    The handler of a further signal may call this again at any moment of it: the words are said once, to their end.
    """
    _ending.acquire()
    words = [*reversed(_last_words)]
    with suppress(RuntimeError):  # no thread can be started while the interpreter ends
        threading.Thread(target=_say, args=(words, code, reason), daemon=True).start()
        _said.acquire(timeout=WORDS_S * (len(words) + 1))
    os._exit(code)


def _say(words: list[Words], code: int, reason: str) -> None:
    if not _begun.acquire(blocking=False):  # another thread says them
        return
    for say in words:
        thread = threading.Thread(target=_try, args=(say, code, reason), daemon=True)
        with suppress(RuntimeError):
            thread.start()
            thread.join(WORDS_S)
    _said.release()


def _try(say: Words, code: int, reason: str) -> None:
    with suppress(Exception):
        say(code, reason)

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
_speaker: list[threading.Thread] = []


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

    The handler of a further signal may call this again meanwhile: the words come to their end all the same.
    """
    _ending.acquire()
    words = [*reversed(_last_words)]
    with suppress(RuntimeError):  # no thread can be started while the interpreter ends
        if not _speaker:
            _speaker.append(threading.Thread(target=_say, args=(words, code, reason), daemon=True))
            _speaker[0].start()
        _speaker[0].join(WORDS_S * (len(words) + 1))
    os._exit(code)


def _say(words: list[Words], code: int, reason: str) -> None:
    for say in words:
        thread = threading.Thread(target=_try, args=(say, code, reason), daemon=True)
        with suppress(RuntimeError):
            thread.start()
            thread.join(WORDS_S)


def _try(say: Words, code: int, reason: str) -> None:
    with suppress(Exception):
        say(code, reason)

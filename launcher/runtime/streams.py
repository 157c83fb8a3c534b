"""Standard output and error: what libraries, warnings and tracebacks print is masked too, and outlives its reader."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from launcher.credentials import masked


class LastingStream:
    """A text stream that masks credentials and outlives its reader: once it cannot be written to (a closed pipe, a full
    disk), it takes all and keeps nothing. A run must not end with the terminal that watches it."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.lost = False

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(masked(text)))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, write: Callable[[], Any]) -> None:
        if self.lost:
            return
        try:
            write()
        except (OSError, ValueError):  # ValueError: it was closed
            self.lost = True
            with suppress(OSError, ValueError):  # else the interpreter's own last flush would fail
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


def lasting(stream: Any) -> Any:
    """The stream as a LastingStream, unless it is one."""
    return stream if isinstance(stream, LastingStream) else LastingStream(stream)


def prepare_standard_streams() -> None:
    """Open what was closed of standard input, output and error, as by `>&-`: else the next file that is opened gets its
    number, and what libraries print would go into that file. Make output and error lasting."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115  # as long as the process lives
        setattr(sys, name, lasting(stream))

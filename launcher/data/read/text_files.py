"""Text files as raw rows: .jsonl has one JSON object per line, .txt one text per line. Blank lines are skipped.

Lines are read as bytes and decoded one by one, so that a fault can name the line and the byte offset.
"""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from launcher.data.read.rows import SKIP, RawRow, RowFault, shown
from launcher.errors import DataError

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Steps from escape to escape, so that neither "\\ud83d" (an escaped backslash) nor a complete pair matches.
_LONE_SURROGATE = re.compile(
    rb"(?:[^\\]++|\\[^u]|\\u(?![dD][89a-fA-F])....|\\u[dD][89abAB]..\\u[dD][c-fC-F]..)*+(\\u[dD][89a-fA-F])", re.DOTALL
)


class Passage(NamedTuple):
    """Bytes of a text file, a line or all of it, with their place: a fault in them is named by line and byte offset."""

    raw: bytes
    name: str  # of the file, in messages
    line: int  # number of its first line
    offset: int  # of its first byte in the file
    remedy: str = SKIP

    def where(self, at: int = 0) -> str:
        content = self.raw.rstrip()  # what is missing at its end is missing on its last line
        return f"{self.name}:{self.line + content[:at].count(10)}"

    def decoded(self) -> str:
        """The text. Raises RowFault where a byte is zero or not UTF-8."""
        try:
            text = self.raw.decode()
            if "\0" not in text:
                return text
            problem, at = "a zero byte (UTF-16 or UTF-32?)", self.raw.index(0)
        except UnicodeDecodeError as error:
            problem, at = f"byte 0x{self.raw[error.start]:02x} (Latin-1 or UTF-16?)", error.start
        raise not_unicode(problem, self.offset + at, where=self.where(at), remedy=self.remedy)

    def parsed(self, rule: str) -> Any:
        """The JSON value. Raises RowFault where the bytes are not UTF-8 or not JSON."""
        text, at = self.decoded(), 0
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            at = len(text[: error.pos].encode())
            excerpt = shown(text[error.pos : error.pos + 40])
            found = f"{error.msg} at byte offset {self.offset + at} of the file: {excerpt}"
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested too deeply
            found = f"{error}"
        raise RowFault("broken_json", where=self.where(at), rule=rule, found=found, remedy=self.remedy)


def not_unicode(problem: str, offset: int, *, where: str, remedy: str = SKIP) -> RowFault:
    rule = "a source is UTF-8 text; iconv -t UTF-8 converts others."
    return RowFault(
        "encoding", where=where, rule=rule, found=f"{problem} at byte offset {offset} of the file", remedy=remedy
    )


def lone_surrogate(raw: bytes) -> int:
    """Byte offset of the first escaped half of a surrogate pair without its other half, in valid JSON; -1: none."""
    match = _SURROGATE.search(raw) and _LONE_SURROGATE.match(raw)  # the first is faster and mostly finds nothing
    return match.start(1) if match else -1


LONE_SURROGATE = "the escape of a lone surrogate, which no text can hold,"


@contextmanager
def opened(path: Path, name: str) -> Iterator[BufferedReader]:
    """The file, opened after a UTF-8 byte-order mark. Raises DataError when it cannot be opened or read."""
    try:
        with path.open("rb") as stream:
            if stream.read(len(BOM_UTF8)) != BOM_UTF8:
                stream.seek(0)
            yield stream
    except OSError as error:
        raise DataError(
            f"{name}: a source must be readable.\nFound: {error.strerror}.\nCorrect its permissions, or name another."
        ) from error


def lines(path: Path, name: str) -> Iterator[Passage]:
    """All lines of the file, blank ones included."""
    with opened(path, name) as stream:
        offset = stream.tell()
        for number, raw in enumerate(stream, start=1):
            yield Passage(raw, name, number, offset)
            offset += len(raw)


def read_jsonl(path: Path, name: str) -> Iterator[RawRow | RowFault]:
    return _rows_of_lines(path, name, _object)


def read_text(path: Path, name: str) -> Iterator[RawRow | RowFault]:
    """Each line becomes the column "text"."""
    return _rows_of_lines(path, name, lambda line: {"text": line.decoded().rstrip("\r\n")})


def _rows_of_lines(path: Path, name: str, parse: Callable[[Passage], dict[str, Any]]) -> Iterator[RawRow | RowFault]:
    for line in lines(path, name):
        if line.raw.isspace():
            continue
        try:
            yield RawRow(line.where(), parse(line))
        except RowFault as fault:
            yield fault


def _object(line: Passage) -> dict[str, Any]:
    rule = "every line is one JSON object."
    fields = line.parsed(rule)
    if not isinstance(fields, dict):
        raise RowFault("wrong_type", where=line.where(), rule=rule, found=shown(fields))
    if (at := lone_surrogate(line.raw)) >= 0:
        raise not_unicode(LONE_SURROGATE, line.offset + at, where=line.where())
    return fields

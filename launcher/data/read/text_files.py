"""Text files as raw rows: .jsonl has one JSON object per line, .txt one text per line. Blank lines are skipped.

Lines are read as bytes and decoded one by one, so that a fault can name the line and the byte offset. Of a line beyond
the size of a row only the beginning is held. A packed file (.gz, .zst) is unpacked, with offsets in its content.
"""

import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from launcher.data.read.packed import begins_otherwise, is_compressed, unpacked
from launcher.data.read.rows import SKIP, RawRow, RowFault, shown_value, too_large
from launcher.errors import DataError

SKIPPED_BYTES = 2**20  # read at a time of what is left of a line that is too long

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
    max_bytes: int  # longer than this, it is only a beginning and refused
    remedy: str = SKIP

    def where(self, at: int = 0) -> str:
        content = self.raw.rstrip()  # what is missing at its end is missing on its last line
        return f"{self.name}:{self.line + content[:at].count(10)}"

    def decoded(self) -> str:
        """The text. Raises RowFault where it is too long, or a byte is zero or not UTF-8."""
        if len(self.raw) > self.max_bytes:
            raise too_large(self.where(), f"a line of more, from byte offset {self.offset} of the file", self.max_bytes)
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
            excerpt = shown_value(text[error.pos : error.pos + 40])
            found = f"{error.msg.removesuffix(' at')} at byte offset {self.offset + at} of the file: {excerpt}"
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
        with unpacked(path) if is_compressed(path) else path.open("rb") as stream:
            if stream.peek(len(BOM_UTF8)).startswith(BOM_UTF8):
                stream.read(len(BOM_UTF8))
            yield stream
    except (OSError, EOFError, zlib.error) as error:  # the last two, and some of the first: a damaged packed file
        raise DataError(
            f"{name}: a source must be readable.\nFound: {getattr(error, 'strerror', None) or error}.\n{_remedy(path)}"
        ) from error


def _remedy(path: Path) -> str:
    if begins_otherwise(path):
        return (
            f"It does not begin as a {path.suffix} file does. If it is not compressed, rename it without "
            f"{path.suffix}; if it is, write it anew."
        )
    return "Correct its permissions or write it anew, or name another."


def lines(path: Path, name: str, max_bytes: int) -> Iterator[Passage]:
    """All lines of the file, blank ones included; of one longer than `max_bytes` so many bytes and one more."""
    with opened(path, name) as stream:
        offset = stream.tell()
        for number in count(1):
            raw = piece = stream.readline(max_bytes + 1)
            if not raw:
                return
            yield Passage(raw, name, number, offset, max_bytes)
            offset += len(raw)
            while len(raw) > max_bytes and piece and not piece.endswith(b"\n"):
                piece = stream.readline(SKIPPED_BYTES)
                offset += len(piece)


def read_jsonl(path: Path, name: str, max_bytes: int) -> Iterator[RawRow | RowFault]:
    return _rows_of_lines(lines(path, name, max_bytes), _object)


def read_text(path: Path, name: str, max_bytes: int) -> Iterator[RawRow | RowFault]:
    """Each line becomes the column "text"."""
    return _rows_of_lines(lines(path, name, max_bytes), lambda line: {"text": line.decoded().rstrip("\r\n")})


def _rows_of_lines(
    passages: Iterator[Passage], parse: Callable[[Passage], dict[str, Any]]
) -> Iterator[RawRow | RowFault]:
    for line in passages:
        if line.raw.isspace() and len(line.raw) <= line.max_bytes:
            continue
        try:
            yield RawRow(line.where(), parse(line))
        except RowFault as fault:
            yield fault


def _object(line: Passage) -> dict[str, Any]:
    rule = "every line is one JSON object."
    fields = line.parsed(rule)
    if not isinstance(fields, dict):
        raise RowFault("wrong_type", where=line.where(), rule=rule, found=shown_value(fields))
    if (at := lone_surrogate(line.raw)) >= 0:
        raise not_unicode(LONE_SURROGATE, line.offset + at, where=line.where())
    return fields

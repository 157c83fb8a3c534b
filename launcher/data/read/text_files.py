"""Text files read by the line, as bytes: a fault names file:line and, where bytes are the matter, their offset.

.jsonl holds one JSON object to a line, .txt one text to a line; a blank line is no row in either.
"""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from launcher.data.read.rows import RowFault, shown
from launcher.errors import DataError


@dataclass(frozen=True)
class Record:
    """One row as its source gives it: columns and values, or the fault that kept it from being read."""

    where: str  # as errors name it: "file:line", or "file row 7"
    fields: dict[str, Any] | RowFault


class Line(NamedTuple):
    raw: bytes  # its end included
    where: str  # "file:line"
    offset: int  # of its first byte in the file


@contextmanager
def opened(path: Path, name: str) -> Iterator[BinaryIO]:
    """The file for reading, past a UTF-8 byte-order mark. Raises DataError when the system refuses to open or read."""
    try:
        with path.open("rb") as stream:
            if stream.read(len(BOM_UTF8)) != BOM_UTF8:
                stream.seek(0)
            yield stream
    except OSError as error:
        raise DataError(
            f"{name}: a source must be readable.\nFound: {error.strerror}.\nCorrect its permissions, or name another."
        ) from error


def lines(path: Path, name: str) -> Iterator[Line]:
    """Every line of the file, blank ones too. `name` is what errors call the file."""
    with opened(path, name) as stream:
        offset = stream.tell()
        for number, raw in enumerate(stream, start=1):
            yield Line(raw, f"{name}:{number}", offset)
            offset += len(raw)


def jsonl_records(path: Path, name: str) -> Iterator[Record]:
    """The objects of a .jsonl file."""
    for line in lines(path, name):
        if line.raw.isspace():
            continue
        try:
            fields: dict[str, Any] | RowFault = _parsed(line)
        except RowFault as fault:
            fields = fault
        yield Record(line.where, fields)


def text_records(path: Path, name: str) -> Iterator[Record]:
    """The lines of a .txt file, each the column "text"."""
    for line in lines(path, name):
        if line.raw.isspace():
            continue
        try:
            fields: dict[str, Any] | RowFault = {"text": decoded(line).rstrip("\r\n")}
        except RowFault as fault:
            fields = fault
        yield Record(line.where, fields)


def decoded(line: Line) -> str:
    """Raises RowFault with the byte offset of what is not UTF-8."""
    try:
        text = line.raw.decode()
    except UnicodeDecodeError as error:
        raise not_unicode(not_utf8(line.raw[error.start]), line.where, line.offset + error.start) from None
    if (at := line.raw.find(b"\0")) >= 0:
        raise not_unicode(ZERO_BYTE, line.where, line.offset + at)
    return text


ZERO_BYTE = "a zero byte (UTF-16 or UTF-32?)"


def not_utf8(byte: int) -> str:
    return f"byte 0x{byte:02x} (Latin-1 or UTF-16?)"


def not_unicode(what: str, where: str, offset: int) -> RowFault:
    found = f"{what} at byte offset {offset} of the file"
    return RowFault(
        "encoding", where=where, rule="a source is UTF-8 text; iconv -t UTF-8 converts others.", found=found
    )


LONE_SURROGATE = "the escape of a lone surrogate, which no text can hold,"


def lone_surrogate(raw: bytes) -> int:
    """Where JSON escapes half of a surrogate pair without its other half; -1 where it does not."""
    if b"\\u" not in raw or not _SURROGATE.search(raw):
        return -1
    return next((escape.start() for escape in _ESCAPE.finditer(raw) if escape[1]), -1)


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)", re.DOTALL)


def _parsed(line: Line) -> dict[str, Any]:
    text = decoded(line)
    if (at := lone_surrogate(line.raw)) >= 0:
        raise not_unicode(LONE_SURROGATE, line.where, line.offset + at)
    rule = "every line is one JSON object."
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        at = line.offset + len(text[: error.pos].encode())
        found = f"{error.msg} at byte offset {at} of the file: {shown(text[error.pos : error.pos + 40])}"
        raise RowFault("broken_json", where=line.where, rule=rule, found=found) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of nested brackets
        raise RowFault("broken_json", where=line.where, rule=rule, found=f"{error}") from None
    if not isinstance(fields, dict):
        raise RowFault("wrong_type", where=line.where, rule=rule, found=shown(fields))
    return fields

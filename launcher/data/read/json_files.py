"""A .json file: one list of objects, or an object that holds one such list under a key; read piece by piece.

Own, because whole-file readers hold the file in memory, and infer types over all rows: one odd row hides behind them, a
column of "2020-01-01" becomes timestamps, a lone surrogate vanishes. Elements are parsed one by one from a window:

    file      [ {…}, {…}, {…}, {…}, … ]
    window           ^start  ^at  ^end         start  byte offset of text[0] in the file; at  what is read next

A file of this name that holds one object to a line is read as .jsonl.
"""

import json
from codecs import getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from launcher.data.read.rows import RowFault, shown
from launcher.data.read.text_files import (
    LONE_SURROGATE,
    ZERO_BYTE,
    Record,
    jsonl_records,
    lone_surrogate,
    not_unicode,
    not_utf8,
    opened,
)
from launcher.errors import DataError

PIECE = 1 << 20  # bytes read at a time, or more where an element is larger
BLANK = " \t\n\r"
CUT = 16  # characters: an error so near to the window's end may be one of the cut, within a literal or an escape


def json_records(path: Path, name: str) -> Iterator[Record]:
    """The objects of a .json file.

    Raises DataError with line and byte offset where the file is not JSON or not UTF-8: what follows cannot be read, so
    that no row can be skipped there; and when it holds no list of objects, or several.
    """
    with opened(path, name) as stream:
        window = _Window(stream, name)
        first = window.peek()
        if first == "{" and window.is_followed_by_an_object():
            yield from jsonl_records(path, name)
            return
        if first == "[":
            for number, value in enumerate(window.elements(), start=1):
                yield window.record(value, number)
        elif first:
            yield from _records_under_a_key(window, name)
        if window.peek():
            raise window.broken("Extra data")


def _records_under_a_key(window: "_Window", name: str) -> Iterator[Record]:
    found: list[str] = []
    for key in window.members():
        if window.peek() != "[":
            window.value()
            continue
        for number, value in enumerate(window.elements(), start=1):
            if number == 1 and isinstance(value, dict):
                found.append(key)
                if len(found) > 1:
                    raise _refused(name, f"lists of objects under {shown(found[0])} and {shown(key)}")
            if key in found[-1:]:
                yield window.record(value, number)
    if not found:
        raise _refused(name, "an object without one")


def _refused(name: str, found: str) -> DataError:
    return DataError(
        f"{name}: a .json file is one list of objects, or an object that holds one such list.\nFound: {found}.\n"
        "Keep one list, or write one object to a line and name the file .jsonl."
    )


class _Window:
    """The part of the file that is decoded and not yet read, and a reader of JSON on it."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.stream, self.name = stream, name
        self.text, self.began, self.at = "", 0, 0
        self.start, self.line = stream.tell(), 1  # of text[0]: byte offset and line number
        self._decode = getincrementaldecoder("utf-8")().decode
        self._scan = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in BLANK:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._refill():
                return ""

    def elements(self) -> Iterator[Any]:
        """The elements of the list that begins here."""
        self._take("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.peek() == "]":
                self.at += 1
                return
            self._take(",")

    def record(self, value: Any, number: int) -> Record:
        """`value`, read just now, as row `number`."""
        where = f"{self.name} row {number}"
        if not isinstance(value, dict):
            rule = "every element of the list is one JSON object."
            return Record(where, RowFault("wrong_type", where=where, rule=rule, found=shown(value)))
        if self.text.find("\\u", self.began, self.at) >= 0:
            at = lone_surrogate(self.text[self.began : self.at].encode())
            if at >= 0:
                return Record(where, not_unicode(LONE_SURROGATE, where, self._offset(self.began) + at))
        return Record(where, value)

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here; whoever iterates reads each value before the next key."""
        self._take("{")
        while self.peek() != "}":
            key = self.value()
            if not isinstance(key, str):
                raise self.broken("Expecting a key in double quotes")
            self._take(":")
            self.peek()
            yield key
            if self.peek() != "}":
                self._take(",")
        self.at += 1

    def value(self) -> Any:
        """The value that begins here; it stays in the window, from `began` to `at`."""
        value, end = self._parse()
        self.began, self.at = self.at, end
        return value

    def is_followed_by_an_object(self) -> bool:
        """Whether the object that begins here ends within the window, and another begins after it."""
        try:
            end = self._scan(self.text, self.at)[1]
        except (ValueError, RecursionError):
            return False
        return self.text[end:].lstrip(BLANK).startswith("{")

    def broken(self, what: str, at: int | None = None) -> DataError:
        at = self.at if at is None else at
        line = self.line + self.text.count("\n", 0, at)
        return DataError(
            f"{self.name}:{line}: a .json file is one JSON document.\n"
            f"Found: {what} at byte offset {self._offset(at)} of the file: {shown(self.text[at : at + 40])}\n"
            "Correct it there. What follows cannot be read, so data.bad_rows=skip does not help."
        )

    def _parse(self) -> tuple[Any, int]:
        """The value that begins at `at`, and its end in `text`."""
        while True:
            self.peek()
            try:
                value, end = self._scan(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos + CUT > len(self.text) or error.msg.startswith("Unterminated string")
                if cut and self._refill():
                    continue
                raise self.broken(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested thousands deep
                raise self.broken(f"{error}") from None
            if end == len(self.text) and self._refill():  # a number may go on
                continue
            return value, end

    def _take(self, expected: str) -> None:
        if self.peek() != expected:
            raise self.broken(f"Expecting {expected!r}")
        self.at += 1

    def _offset(self, at: int) -> int:
        return self.start + len(self.text[:at].encode())

    def _refill(self) -> bool:
        """Another piece of the file behind the window, what is before `at` let go; False at the end of the file."""
        before = self.stream.tell()
        piece = self.stream.read(max(PIECE, len(self.text) - self.at))
        try:
            more = self._decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            at = before + len(piece) - len(error.object) + error.start
            raise self._not_unicode(not_utf8(error.object[error.start]), at) from None
        if (zero := piece.find(b"\0")) >= 0:
            raise self._not_unicode(ZERO_BYTE, before + zero)
        if piece:
            self.start, self.line = self._offset(self.at), self.line + self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :] + more, 0
        return bool(piece)

    def _not_unicode(self, what: str, offset: int) -> DataError:
        return DataError(
            f"{self.name}: a source is UTF-8 text.\nFound: {what} at byte offset {offset} of the file.\n"
            "Convert the file to UTF-8. What follows cannot be read, so data.bad_rows=skip does not help."
        )

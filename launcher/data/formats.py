"""Sources become rows: a .jsonl file gives conversations or texts, by line; what cannot be used is named or counted.

Lines are read as bytes, so that a fault names file:line and, where bytes are the matter, the byte offset in the file.
A blank line is no row. Faults of a row follow data.bad_rows; empty rows are dropped and counted in either case.
"""

import json
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import DataError
from launcher.recipe.schema import Source

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    role: str  # one of ROLES
    content: str


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    where: str  # "file:line"


@dataclass(frozen=True)
class Text:
    text: str
    where: str  # "file:line"


Row = Conversation | Text


class RowFault(DataError):
    """One row that cannot be used. `reason` names the count `rows_dropped_<reason>` when data.bad_rows=skip."""

    def __init__(self, reason: str, *, where: str, rule: str, found: str) -> None:
        remedy = "Fix the row, or set data.bad_rows=skip to drop such rows and count them."
        super().__init__(f"{where}: {rule}\nFound: {found}\n{remedy}")
        self.reason = reason


def read_source(source: Source, *, bad_rows: str, counts: Counter[str]) -> list[Row]:
    """The usable rows of one source, in file order. Adds `rows_read` and `rows_dropped_<reason>` to `counts`.

    Raises DataError: the path is not a readable .jsonl file, a row is faulty with bad_rows "raise", or no row is left.
    """
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    layout: str = source.format
    for line in _lines(_checked(source.path)):
        counts["rows_read"] += 1
        try:
            record = _parse(line)
            if layout == "auto":
                layout = _detect(record, line.where)
            row = _READERS[layout](record, line.where)
        except RowFault as fault:
            if bad_rows == "raise":
                raise
            dropped[f"rows_dropped_{fault.reason}"] += 1
            continue
        if row:
            rows.append(row)
        else:
            dropped["rows_dropped_empty"] += 1
    counts.update(dropped)
    if not rows:
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "the file holds no rows"
        raise DataError(
            f"{source.path}: 0 usable rows; a source needs at least one.\nFound: {why}.\n"
            'Give rows like {"messages": [{"role": "user", "content": "…"}, …]} or {"text": "…"}, one to a line.'
        )
    return rows


@dataclass(frozen=True)
class _Line:
    raw: bytes
    where: str  # "file:line"
    offset: int  # of its first byte in the file


def _checked(path: str) -> Path:
    file = Path(path)
    if file.is_dir():
        found = "a folder"
    elif not file.exists():
        found = f"no such file; looked for {file.absolute()}"
    elif file.suffix.lower() != ".jsonl":
        found = f"a {file.suffix or 'nameless'} file"
    else:
        return file
    raise DataError(
        f"{path}: a source is an existing .jsonl file, one JSON object to a line.\nFound: {found}.\n"
        "Correct the path in data.sources or data.validation, or convert the data to .jsonl."
    )


def _lines(file: Path) -> Iterator[_Line]:
    offset = 0
    try:
        with file.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                # A UTF-8 byte-order mark is harmless.
                mark = len(BOM_UTF8) if number == 1 and raw.startswith(BOM_UTF8) else 0
                if raw[mark:].strip():
                    yield _Line(raw[mark:], f"{file}:{number}", offset + mark)
                offset += len(raw)
    except OSError as error:
        raise DataError(
            f"{file}: a source must be readable.\nFound: {error.strerror}.\nCorrect its permissions, or name another."
        ) from error


def _parse(line: _Line) -> dict[str, Any]:
    text = _decode(line)
    rule = "every line is one JSON object."
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        at = line.offset + len(text[: error.pos].encode())
        found = f"{error.msg} at byte offset {at} of the file: {_shown(text[error.pos : error.pos + 40])}"
        raise RowFault("broken_json", where=line.where, rule=rule, found=found) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of nested brackets
        raise RowFault("broken_json", where=line.where, rule=rule, found=f"{error}") from None
    if not isinstance(record, dict):
        raise RowFault("wrong_type", where=line.where, rule=rule, found=_shown(record))
    return record


def _decode(line: _Line) -> str:
    rule = "a source is UTF-8 text."
    try:
        text = line.raw.decode()
        at, what = line.raw.find(b"\0"), "a zero byte (UTF-16 or UTF-32?)"
    except UnicodeDecodeError as error:
        at, what = error.start, f"byte 0x{line.raw[error.start]:02x} (Latin-1 or UTF-16?)"
    if at < 0:
        at, what = _lone_surrogate(line.raw), "the escape of a lone surrogate, which no text can hold,"
    if at >= 0:
        found = f"{what} at byte offset {line.offset + at} of the file"
        raise RowFault("encoding", where=line.where, rule=rule, found=found)
    return text


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)", re.DOTALL)


def _lone_surrogate(raw: bytes) -> int:
    """Where half of a surrogate pair is escaped without its other half; -1 where none is."""
    if not _SURROGATE.search(raw):
        return -1
    return next((escape.start() for escape in _ESCAPE.finditer(raw) if escape[1]), -1)


def _detect(record: dict[str, Any], where: str) -> str:
    """The layout of a source by the columns of its first row."""
    layouts = [name for name in _READERS if name in record]
    if len(layouts) == 1:
        return layouts[0]
    columns = f"the columns {', '.join(sorted(record)) or '(none)'}"
    if layouts:
        raise DataError(
            f"{where}: a source has one format.\nFound: {_shown(columns)}.\n"
            f"Say which of them holds the data with format: {' or format: '.join(layouts)} beside the source's path."
        )
    raise RowFault("wrong_type", where=where, rule='a row has a column "messages" or "text".', found=_shown(columns))


def _read_messages(record: dict[str, Any], where: str) -> Conversation | None:
    messages = record.get("messages")
    if not isinstance(messages, list):
        rule = '"messages" is a list of {"role", "content"} objects.'
        raise RowFault("wrong_type", where=where, rule=rule, found=_shown(messages))
    return Conversation(tuple(_read_message(m, where) for m in messages), where) if messages else None


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        rule = 'a message is a {"role", "content"} object.'
        raise RowFault("wrong_type", where=where, rule=rule, found=_shown(message))
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowFault("unknown_role", where=where, rule=f"a role is one of {', '.join(ROLES)}.", found=_shown(role))
    if not isinstance(content, str):
        rule = f'the "content" of a message is a string (here of role {role}).'
        raise RowFault("wrong_type", where=where, rule=rule, found=_shown(content))
    return Message(role, content)


def _read_text(record: dict[str, Any], where: str) -> Text | None:
    text = record.get("text")
    if not isinstance(text, str):
        raise RowFault("wrong_type", where=where, rule='"text" is a string.', found=_shown(text))
    return Text(text, where) if text.strip() else None


_READERS: dict[str, Callable[[dict[str, Any], str], Row | None]] = {"messages": _read_messages, "text": _read_text}


def _shown(value: Any) -> str:
    """A value of the file as JSON for a message: short, on one line, in ASCII (a terminal must not obey it)."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    shown = json.dumps(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."

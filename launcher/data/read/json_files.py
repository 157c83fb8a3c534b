"""A .json file as raw rows: one list of objects, or an object that holds one such list under a key.

The file is parsed as a whole, so a fault in its syntax or encoding ends the run even with data.bad_rows=skip.
A file of this name with one object per line is read as .jsonl.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launcher.data.read.packed import is_compressed
from launcher.data.read.rows import RawRow, RowFault, shown_value
from launcher.data.read.text_files import LONE_SURROGATE, Passage, lone_surrogate, not_unicode, opened, read_jsonl
from launcher.errors import DataError

MAX_FILE_BYTES = 2**30  # parsed, a file takes several times its size in memory
JSON_REMEDY = "Correct the file there. It is read as a whole, so data.bad_rows=skip does not help."
_OBJECT_LINES = re.compile(rb"\s*\{.*\}[ \t\r]*\n\s*\{")  # no single JSON value begins like this


def read_json(path: Path, name: str, max_bytes: int) -> Iterator[RawRow | RowFault]:
    """Raises DataError when the file is not UTF-8, not JSON, too large, or has no list of objects or several."""
    with opened(path, name) as stream:
        offset, size = stream.tell(), path.stat().st_size
        unpacked_at_most = MAX_FILE_BYTES + 1 if is_compressed(path) else -1
        raw = stream.read(unpacked_at_most) if size <= MAX_FILE_BYTES else b""
        if (size := max(size, len(raw))) > MAX_FILE_BYTES:
            raise DataError(
                f"{name}: a .json file has at most {MAX_FILE_BYTES:,} bytes, as it is read as a whole.\n"
                f"Found: {size:,} bytes.\nWrite one object to a line and name the file .jsonl: that has no limit."
            )
    if _OBJECT_LINES.match(raw):
        yield from read_jsonl(path, name, max_bytes)
    elif raw and not raw.isspace():
        yield from _rows(Passage(raw, name, 1, offset, MAX_FILE_BYTES, JSON_REMEDY))


def _rows(file: Passage) -> Iterator[RawRow | RowFault]:
    values = _list_of_objects(file.parsed("a .json file is one JSON document."), file.name)
    surrogate_at = lone_surrogate(file.raw)
    for number, value in enumerate(values, start=1):
        where = f"{file.name} row {number}"
        if not isinstance(value, dict):
            rule = "every element of the list is one JSON object."
            yield RowFault("wrong_type", where=where, rule=rule, found=shown_value(value))
        elif surrogate_at >= 0 and lone_surrogate(json.dumps(value).encode()) >= 0:
            yield not_unicode(f"{LONE_SURROGATE} first", file.offset + surrogate_at, where=where)
        else:
            yield RawRow(where, value)


def _list_of_objects(document: Any, name: str) -> list[Any]:
    if isinstance(document, list):
        return document
    found = shown_value(document)
    if isinstance(document, dict):
        lists = {key: value for key, value in document.items() if isinstance(value, list)}
        keys = [key for key, value in lists.items() if value and isinstance(value[0], dict)]
        if len(keys) == 1:
            return lists[keys[0]]
        found = f"lists of objects under {' and '.join(map(shown_value, keys))}" if keys else "an object without one"
    raise DataError(
        f"{name}: a .json file is one list of objects, or an object that holds one such list.\nFound: {found}.\n"
        "Keep one list, or write one object to a line and name the file .jsonl."
    )

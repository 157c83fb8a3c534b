"""Reads data files the way a recipe does."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Feed, Row, RowFault
from launcher.data.read.sources import OpenedSource, open_source
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection, Source


def written(path: Path, rows: Iterable[Any]) -> Path:
    """The path of a file with these rows (objects as JSON, bytes as they are), a line each."""
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def sections(path: Path | str, keys: dict[str, Any]) -> tuple[Source, DataSection]:
    """A source and a data section, each with those of the keys that it has."""
    of_source = {key: value for key, value in keys.items() if key in Source.model_fields}
    of_data = {key: value for key, value in keys.items() if key not in Source.model_fields}
    return Source.model_validate({"path": str(path), **of_source}), DataSection.model_validate(
        {"validation": 0, **of_data}
    )


def opened(path: Path | str, *, validates: bool = False, **keys: Any) -> OpenedSource:
    source, data = sections(path, keys)
    return open_source(source, data=data, validates=validates)


def feeds(path: Path | str, **keys: Any) -> list[Feed]:
    return opened(path, **keys).feeds


def fields(path: Path | str | Feed, **keys: Any) -> list[Any]:
    """Columns and values of each raw row of a file or feed; the fault of a row that cannot be read."""
    [feed] = [path] if isinstance(path, Feed) else feeds(path, **keys)
    return [raw if isinstance(raw, RowFault) else raw.fields for raw in feed.raw_rows()]


def read(path: Path | str, **keys: Any) -> tuple[list[Row], Counter[str]]:
    """The usable rows of a file or folder, and what was counted. `keys`: of the source and of the data section."""
    counts: Counter[str] = Counter()
    _, data = sections(path, keys)
    return list(read_rows(feeds(path, **keys), data=data, counts=counts)), counts


def refusal(path: Path | str, **keys: Any) -> str:
    """The message of the DataError that a source with these keys, and a data section with these, ends with."""
    with pytest.raises(DataError) as caught:
        read(path, **keys)
    message = str(caught.value)
    assert caught.value.code == 3 and len(message.splitlines()) <= 5
    return message

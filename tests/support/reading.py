"""Reads data files the way a recipe does."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Feed, Row, RowFault
from launcher.data.read.sources import open_source
from launcher.errors import DataError
from launcher.recipe.data_section import Source


def feeds(path: Path | str, *, streaming: bool = False, **keys: Any) -> list[Feed]:
    return open_source(Source.model_validate({"path": str(path), **keys}), streaming=streaming)


def fields(path: Path | str | Feed) -> list[Any]:
    """Columns and values of each raw row of a file or feed; the fault of a row that cannot be read."""
    [feed] = [path] if isinstance(path, Feed) else feeds(path)
    return [raw if isinstance(raw, RowFault) else raw.fields for raw in feed.raw_rows()]


def read(path: Path | str, *, format: str = "auto", bad_rows: str = "raise") -> tuple[list[Row], Counter[str]]:
    """The usable rows of a file, and what was counted."""
    counts: Counter[str] = Counter()
    [feed] = feeds(path, format=format)
    return list(read_rows(feed, bad_rows=bad_rows, counts=counts)), counts


def refusal(path: Path | str, *, bad_rows: str = "raise", **keys: Any) -> str:
    """The message of the DataError that a source ends with."""
    with pytest.raises(DataError) as caught:
        for feed in feeds(path, **keys):
            list(read_rows(feed, bad_rows=bad_rows, counts=Counter()))
    message = str(caught.value)
    assert caught.value.code == 3 and len(message.splitlines()) <= 5
    return message

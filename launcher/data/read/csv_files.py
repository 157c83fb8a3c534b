"""A .csv file with commas and a header as raw rows; every cell stays text.

Readers of whole tables are not used: they guess types ("007" becomes 7, "NA" becomes null), and shift or fill the cells
of rows that have too many or too few.
"""

import csv
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from launcher.data.read.rows import RawRow, RowFault, shown_value, too_large
from launcher.data.read.tables import distinct
from launcher.data.read.text_files import lines
from launcher.errors import DataError

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # that files named .csv have instead of commas
CSV_REMEDY = (
    "Close its quotes, cut it into several, or raise data.max_row_mib. "
    "Nothing tells where the next row begins, so data.bad_rows=skip does not help."
)


def read_csv(path: Path, name: str, max_bytes: int) -> Iterator[RawRow | RowFault]:
    """Raises DataError when the header cannot be read, or a row is longer than `max_bytes`."""
    csv.field_size_limit(max_bytes)
    text_lines = _TextLines(path, name, max_bytes)
    table = csv.reader(text_lines, strict=True)
    columns = _header(table, name, text_lines)
    for number in count(1):
        where = f"{name} row {number}"
        text_lines.begin_row()
        faults, cells = text_lines.faults, list[str]()
        try:
            cells = next(filter(None, table), [])  # past blank lines
            if not cells:
                return
            if len(cells) != len(columns):
                rule = f"a row has as many cells as the header, {len(columns)}."
                faults.append(_fault(where, rule, f"{len(cells)} cells, on line {table.line_num}"))
        except csv.Error as error:
            faults.append(_fault(where, "cells are divided by commas, or quoted.", f"{error}, line {table.line_num}"))
        yield faults[0] if faults else RawRow(where, dict(zip(columns, cells, strict=True)))


class _TextLines(Iterator[str]):
    """The lines of the file. One that is not UTF-8 adds to the `faults` of its row, and does not end it.

    Raises RowFault for a row that is longer than `max_bytes`: it may have a quote that is never closed, so that nothing
    tells where the next row begins.
    """

    def __init__(self, path: Path, name: str, max_bytes: int) -> None:
        self._lines, self._max_bytes = lines(path, name, max_bytes), max_bytes
        self.begin_row()

    def begin_row(self) -> None:
        self.faults: list[RowFault] = []
        self._row_bytes = self._first = 0

    def __next__(self) -> str:
        line = next(self._lines)
        self._first = self._first if self._row_bytes else line.line
        self._row_bytes += len(line.raw)
        if self._row_bytes > self._max_bytes:
            raise too_large(f"{line.name}:{self._first}", "a row of more", self._max_bytes, CSV_REMEDY)
        try:
            return line.decoded()
        except RowFault as fault:
            self.faults.append(fault)
            return line.raw.decode(errors="replace")


def _header(table: Iterator[list[str]], name: str, text_lines: _TextLines) -> list[str]:
    try:
        columns = next(filter(None, table), [])
    except csv.Error as error:
        raise _fault(name, "the first line of a .csv file is its header.", f"{error}") from None
    if text_lines.faults:
        raise text_lines.faults[0]
    separator = next((mark for mark in SEPARATORS if mark in columns[0]), None) if len(columns) == 1 else None
    if separator:
        raise DataError(
            f"{name}: the cells of a .csv file are divided by commas.\n"
            f"Found: one column, {shown_value(columns[0])}, divided by {SEPARATORS[separator]}.\n"
            "Save the table with commas, or write its rows into a .jsonl file."
        )
    return distinct(columns, name)


def _fault(where: str, rule: str, found: str) -> RowFault:
    return RowFault("broken_csv", where=where, rule=rule, found=found)

"""A .csv file with commas and a header as raw rows; every cell stays text.

Readers of whole tables are not used: they guess types ("007" becomes 7, "NA" becomes null), and shift or fill the cells
of rows that have too many or too few.
"""

import csv
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from launcher.data.read.rows import RawRow, RowFault, shown
from launcher.data.read.tables import distinct
from launcher.data.read.text_files import lines
from launcher.errors import DataError

SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # that files named .csv have instead of commas
MAX_CELL_CHARACTERS = 2**27  # so that a quote that is never closed does not read the whole file into memory


def read_csv(path: Path, name: str) -> Iterator[RawRow | RowFault]:
    """Raises DataError when the header cannot be read."""
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    faults: list[RowFault] = []  # of the row that is being read
    table = csv.reader(_text_lines(path, name, faults), strict=True)
    columns = _header(table, name, faults)
    for number in count(1):
        where = f"{name} row {number}"
        cells: list[str] = []
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
        faults.clear()


def _text_lines(path: Path, name: str, faults: list[RowFault]) -> Iterator[str]:
    """The lines of the file. One that is not UTF-8 adds to `faults`."""
    for line in lines(path, name):
        try:
            yield line.decoded()
        except RowFault as fault:
            faults.append(fault)
            yield line.raw.decode(errors="replace")


def _header(table: Iterator[list[str]], name: str, faults: list[RowFault]) -> list[str]:
    try:
        columns = next(filter(None, table), [])
    except csv.Error as error:
        raise _fault(name, "the first line of a .csv file is its header.", f"{error}") from None
    if faults:
        raise faults[0]
    separator = next((mark for mark in SEPARATORS if mark in columns[0]), None) if len(columns) == 1 else None
    if separator:
        raise DataError(
            f"{name}: the cells of a .csv file are divided by commas.\n"
            f"Found: one column, {shown(columns[0])}, divided by {SEPARATORS[separator]}.\n"
            "Save the table with commas, or write its rows into a .jsonl file."
        )
    return distinct(columns, name)


def _fault(where: str, rule: str, found: str) -> RowFault:
    return RowFault("broken_csv", where=where, rule=rule, found=found)

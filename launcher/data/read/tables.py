"""Tables as records: .csv by the line, .parquet by the batch, both from the file itself and never as a whole.

A .csv is read here, and every cell stays the text it is: the readers of whole tables guess types ("007" becomes 7, "NA"
nothing), shift the columns of rows that have one cell too many and fill those that have one too few. A .parquet is not
left to `datasets`, whose copy of it anyone may read, and which takes a file for unchanged by its path and time.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.data.read.rows import RowFault, shown
from launcher.data.read.text_files import Record, decoded, lines, opened
from launcher.errors import DataError

if TYPE_CHECKING:
    import pyarrow

BATCH = 1000  # rows of a table in memory at a time
PAGES = 1 << 20  # bytes read ahead in each column of a .parquet; else the chunks of a row group are read as a whole
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # of files that are called .csv all the same
LONGEST_CELL = 1 << 27  # characters: a quote that is never closed must not read the whole file into memory


def csv_records(path: Path, name: str) -> Iterator[Record]:
    """The rows of a .csv file with commas and a header. Raises DataError when the header cannot be read."""
    csv.field_size_limit(LONGEST_CELL)
    faults: list[RowFault] = []
    reader = csv.reader(_texts(path, name, faults), strict=True)
    columns = _header(reader, name, faults)
    number = 0
    while True:
        where = f"{name} row {number + 1}"
        try:
            cells = next(reader)
            if not cells:  # a blank line
                continue
            if len(cells) != len(columns):
                rule = f"a row has as many cells as the header, {len(columns)}."
                faults.append(_fault(where, rule, f"{len(cells)} cells, on line {reader.line_num}"))
        except StopIteration:
            return
        except csv.Error as error:
            faults.append(_fault(where, "cells are divided by commas, or quoted.", f"{error}, line {reader.line_num}"))
        number += 1
        yield Record(where, faults[0] if faults else dict(zip(columns, cells, strict=True)))
        faults.clear()


def _texts(path: Path, name: str, faults: list[RowFault]) -> Iterator[str]:
    """The lines of the file; one that is not Unicode leaves a fault to the row that it belongs to."""
    for line in lines(path, name):
        try:
            yield decoded(line)
        except RowFault as fault:
            faults.append(fault)
            yield line.raw.decode(errors="replace")


def _header(reader: Iterator[list[str]], name: str, faults: list[RowFault]) -> list[str]:
    try:
        columns: list[str] = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise _fault(name, "the first line of a .csv file is its header.", f"{error}") from None
    if faults:  # without a header no row can be read, so that none can be skipped
        raise faults[0]
    if len(columns) == 1 and (separator := next((mark for mark in SEPARATORS if mark in columns[0]), None)):
        raise DataError(
            f"{name}: the cells of a .csv file are divided by commas.\n"
            f"Found: one column, {shown(columns[0])}, divided by {SEPARATORS[separator]}.\n"
            "Save the table with commas, or write its rows into a .jsonl file."
        )
    return _distinct(columns, name)


def _distinct(columns: list[str], name: str) -> list[str]:
    if len(set(columns)) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise DataError(f"{name}: a column has a name of its own.\nFound: {shown(twice)} twice.\nRename one of them.")
    return columns


def _fault(where: str, rule: str, found: str) -> RowFault:
    return RowFault("broken_csv", where=where, rule=rule, found=found)


def parquet_records(path: Path, name: str) -> Iterator[Record]:
    """The rows of a .parquet file, their cells as plain Python values. Raises DataError when it cannot be read (on)."""
    number = 0
    for batch in _batches(path, name):
        columns = _distinct(batch.schema.names, name)
        values = [_cells(array) for array in batch.columns]
        for index in range(batch.num_rows):
            number += 1
            where = f"{name} row {number}"
            fields = {column: cells[index] for column, cells in zip(columns, values, strict=True)}
            faulty = [(column, cell) for column, cell in fields.items() if isinstance(cell, _NoValue)]
            yield Record(where, _cell_fault(where, *faulty[0]) if faulty else fields)


def _batches(path: Path, name: str) -> "Iterator[pyarrow.RecordBatch]":
    from pyarrow.parquet import ParquetFile  # a third of a second, for those who have such files

    number = 0
    with opened(path, name) as stream:
        if not stream.read(1):
            return
        try:
            file = ParquetFile(stream, buffer_size=PAGES, pre_buffer=False)
            for group in range(file.num_row_groups):  # each alone: Arrow cannot join what nested dictionaries hold
                for batch in file.iter_batches(batch_size=BATCH, row_groups=[group]):
                    yield batch
                    number += batch.num_rows
        except Exception as error:  # Arrow's kinds, and whatever else a damaged file leads it to
            raise unreadable(name, error, after=number, remedy="Write the file anew") from error


class _NoValue:
    """Stands for a cell that Python cannot hold: a date beyond the year 9999, text that is not UTF-8."""

    def __init__(self, kind: str, error: Exception) -> None:
        self.kind, self.error = kind, error


def _cells(array: "pyarrow.Array") -> list[Any]:
    try:
        return list(array.to_pylist())
    except Exception:  # OverflowError, UnicodeDecodeError, Arrow's own and more, by the type; one cell spoils them all
        return [_cell(scalar) for scalar in array]


def _cell(scalar: "pyarrow.Scalar") -> Any:
    try:
        return scalar.as_py()
    except Exception as error:
        return _NoValue(str(scalar.type), error)


def _cell_fault(where: str, column: str, cell: _NoValue) -> RowFault:
    rule = f"the column {shown(column)} holds values that can be read."
    reason = "encoding" if isinstance(cell.error, UnicodeDecodeError) else "wrong_type"
    return RowFault(reason, where=where, rule=rule, found=f"a value of type {_line(cell.kind)}: {_line(cell.error)}")


def unreadable(name: str, error: BaseException, *, after: int, remedy: str) -> DataError:
    """The last cause of the failure, in its own words and on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    place = f" after row {after}" if after else ""
    return DataError(
        f"{name}: a source must be readable as a table.\n"
        f"Found{place}: {_line(error) or type(error).__name__}\n{remedy}, or write its rows into a .jsonl file."
    )


def _line(text: object) -> str:
    return " ".join(str(text).split())[:300]

"""A .parquet file as raw rows, read from the file itself in batches.

`datasets` is not used: it copies the rows into a cache that others may read, and takes a file of the same path and time
for unchanged.
"""

from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.data.read.rows import RawRow, RowFault, shown_value, too_large
from launcher.data.read.tables import BATCH_ROWS, distinct, one_line, unreadable
from launcher.data.read.text_files import opened

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

READ_AHEAD_BYTES = 2**20  # per column; without a limit, the columns of a row group are read whole
BATCH_BYTES = 2**26  # of a batch, if rows are as large as the average of their row group

# The largest row group that is read row by row, if its size tells that it has a row that is too large. That takes three
# times as much memory: its pages as stored, the pages unpacked, the cells.
LARGEST_GROUP_BYTES = 2**29

MAX_ROWS_PER_BYTE = 100  # of the file: real rows differ; more are one value repeated, or a damaged count


def read_parquet(path: Path, name: str, max_bytes: int) -> Iterator[RawRow | RowFault]:
    """Cells become plain Python values. Raises DataError where the file cannot be read.

    A row of more than `max_bytes` is a fault, found before its cells become Python values. If the sizes of its row
    group show that there is one, and the group is too large to be read, all rows of the group are faults: the first
    stands for the large one, the others are "beside_too_large".
    """
    return rows_of_batches(_batches(path, name, max_bytes), name, max_bytes)


def rows_of_batches(
    batches: "Iterable[pyarrow.RecordBatch | RowFault]", name: str, max_bytes: int
) -> Iterator[RawRow | RowFault]:
    """The rows of a table that comes in batches; a fault among them stands for a row. Raises DataError where two
    columns have one name."""
    number = 0
    for batch in batches:
        if isinstance(batch, RowFault):
            yield batch
            number += 1
            continue
        distinct(batch.schema.names, name)
        fits = batch.nbytes <= max_bytes
        for part in [batch] if fits else (batch.slice(index, 1) for index in range(batch.num_rows)):
            if part.nbytes > max_bytes:
                yield too_large(f"{name} row {number + 1}", f"{part.nbytes:,} bytes", max_bytes)
            else:
                yield from _rows(part, name, number)
            number += part.num_rows


def _batches(path: Path, name: str, max_bytes: int) -> "Iterator[pyarrow.RecordBatch | RowFault]":
    from pyarrow import parquet  # a third of a second, only for those who have such files

    number = 0
    with opened(path, name) as stream:
        if not stream.read(1):
            return
        try:
            file = parquet.ParquetFile(
                stream, buffer_size=READ_AHEAD_BYTES, pre_buffer=False, page_checksum_verification=True
            )
            check_number_of_rows(_stated_rows(file), path.stat().st_size)
            for index in range(file.num_row_groups):  # one by one: Arrow cannot join nested dictionaries across groups
                group = file.metadata.row_group(index)
                # Of the whole group: pyarrow ends the process where the sizes of a single column are damaged.
                rows, size = group.num_rows, group.total_byte_size
                has_too_large = size > max_bytes * rows
                if has_too_large and size > LARGEST_GROUP_BYTES:
                    yield from _group_faults(f"{name} row {number + 1}", number, rows, size, max_bytes)
                    number += rows
                    continue
                batch_rows = min(BATCH_ROWS, max(1, BATCH_BYTES * rows // max(1, size)))
                batch_rows = 1 if has_too_large else batch_rows
                for batch in file.iter_batches(batch_size=batch_rows, row_groups=[index]):
                    yield batch
                    number += batch.num_rows
        except Exception as error:  # Arrow's kinds, and any other that a damaged file causes
            raise unreadable(name, error, after=number, remedy="Write the file anew") from error


def _stated_rows(file: "ParquetFile") -> int:
    metadata = file.metadata
    return max(metadata.num_rows, sum(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)))


def check_number_of_rows(rows: int, size: int) -> None:
    """Raise ValueError for more rows than a file of this size can hold: reading them would take hours, and memory."""
    if rows > MAX_ROWS_PER_BYTE * size:
        raise ValueError(f"{rows:,} rows in {size:,} bytes: all alike, or their number is damaged")


def _group_faults(where: str, before: int, rows: int, size: int, max_bytes: int) -> Iterator[RowFault]:
    """Of a row group that is not read: at least one row is too large, which one is not known."""
    remedy = (
        "Write the file with fewer rows in a row group, raise data.max_row_mib, or set data.bad_rows=skip to drop and "
        "count all rows of this one: one as too_large, the others as beside_too_large."
    )
    found = f"{size:,} bytes in the rows {before + 1} to {before + rows}"
    fault = too_large(where, found, max_bytes, remedy)
    yield fault
    rule = f"a row group with a row that is too large is read up to {LARGEST_GROUP_BYTES:,} bytes."
    beside = RowFault("beside_too_large", where=where, rule=rule, found=found, remedy=remedy)
    yield from repeat(beside, rows - 1)


def _rows(batch: "pyarrow.RecordBatch", name: str, before: int) -> Iterator[RawRow | RowFault]:
    """The rows of a batch that comes after `before` others."""
    try:
        rows: list[dict[str, Any]] | list[None] = batch.to_pylist()
    except Exception:  # OverflowError, UnicodeDecodeError, Arrow's own: one cell that Python cannot hold
        rows = [None] * batch.num_rows
    for index, fields in enumerate(rows):
        where = f"{name} row {before + index + 1}"
        yield RawRow(where, fields, null_filled=True) if fields is not None else _cell_by_cell(batch, index, where)


def _cell_by_cell(batch: "pyarrow.RecordBatch", index: int, where: str) -> RawRow | RowFault:
    """One row; a fault if Python cannot hold a cell, such as a date after the year 9999 or text that is not UTF-8."""
    fields = {}
    for column, array in zip(batch.schema.names, batch.columns, strict=True):
        try:
            fields[column] = array[index].as_py()
        except Exception as error:
            reason = "encoding" if isinstance(error, UnicodeDecodeError) else "wrong_type"
            rule = f"the column {shown_value(column)} holds values that can be read."
            found = f"a value of type {one_line(array.type)}: {one_line(error)}"
            return RowFault(reason, where=where, rule=rule, found=found)
    return RawRow(where, fields, null_filled=True)

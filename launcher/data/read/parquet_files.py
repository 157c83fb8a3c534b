"""A .parquet file as raw rows, read from the file itself in batches.

`datasets` is not used: it copies the rows into a cache that others may read, and takes a file of the same path and time
for unchanged.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.data.read.rows import RawRow, RowFault, shown
from launcher.data.read.tables import BATCH_ROWS, distinct, one_line, unreadable
from launcher.data.read.text_files import opened

if TYPE_CHECKING:
    import pyarrow

READ_AHEAD_BYTES = 2**20  # per column; without a limit, the columns of a row group are read whole


def read_parquet(path: Path, name: str) -> Iterator[RawRow | RowFault]:
    """Cells become plain Python values. Raises DataError where the file cannot be read."""
    number = 0
    for batch in _batches(path, name):
        distinct(batch.schema.names, name)
        try:
            rows: list[dict[str, Any]] | list[None] = batch.to_pylist()
        except Exception:  # OverflowError, UnicodeDecodeError, Arrow's own: one cell that Python cannot hold
            rows = [None] * batch.num_rows
        for index, fields in enumerate(rows):
            number += 1
            where = f"{name} row {number}"
            yield RawRow(where, fields) if fields is not None else _cell_by_cell(batch, index, where)


def _batches(path: Path, name: str) -> "Iterator[pyarrow.RecordBatch]":
    from pyarrow.parquet import ParquetFile  # a third of a second, only for those who have such files

    number = 0
    with opened(path, name) as stream:
        if not stream.read(1):
            return
        try:
            file = ParquetFile(stream, buffer_size=READ_AHEAD_BYTES, pre_buffer=False)
            for group in range(file.num_row_groups):  # one by one: Arrow cannot join nested dictionaries across groups
                for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=[group]):
                    yield batch
                    number += batch.num_rows
        except Exception as error:  # Arrow's kinds, and any other that a damaged file causes
            raise unreadable(name, error, after=number, remedy="Write the file anew") from error


def _cell_by_cell(batch: "pyarrow.RecordBatch", index: int, where: str) -> RawRow | RowFault:
    """One row; a fault if Python cannot hold a cell, such as a date after the year 9999 or text that is not UTF-8."""
    fields = {}
    for column, array in zip(batch.schema.names, batch.columns, strict=True):
        try:
            fields[column] = array[index].as_py()
        except Exception as error:
            reason = "encoding" if isinstance(error, UnicodeDecodeError) else "wrong_type"
            rule = f"the column {shown(column)} holds values that can be read."
            found = f"a value of type {one_line(array.type)}: {one_line(error)}"
            return RowFault(reason, where=where, rule=rule, found=found)
    return RawRow(where, fields)

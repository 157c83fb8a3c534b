"""An .arrow file as raw rows: of a folder that `datasets` saved (save_to_disk), or any other in Arrow's IPC format.

`datasets` is not used: it maps the file into memory, so that a change of it meanwhile ends the process.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.data.read.packed import most_unpacked, too_much_unpacked
from launcher.data.read.parquet_files import check_number_of_rows, rows_of_batches
from launcher.data.read.rows import RawRow, RowFault
from launcher.data.read.tables import BATCH_ROWS, one_line, unreadable
from launcher.data.read.text_files import opened
from launcher.errors import DataError

if TYPE_CHECKING:
    import pyarrow

STATE_FILE = "state.json"  # which datasets writes beside the .arrow files of a dataset
FILE_MAGIC, END_OF_STREAM = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"


def read_arrow(path: Path, name: str, max_bytes: int) -> Iterator[RawRow | RowFault]:
    """Cells become plain Python values. Raises DataError where the file cannot be read, is cut short, or holds
    more rows or bytes than a file of its size can."""
    return rows_of_batches(_batches(path, name), name, max_bytes)


def not_saved(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Of the files, relative to the folder, the .arrow files that the saved dataset beside them does not have: caches.

    Raises DataError where the state of a dataset names a file that is missing, or is none.
    """
    by_parent: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        by_parent[path.parent].append(path)
    left_out = []
    for parent, paths in by_parent.items():
        arrow = [path for path in paths if path.suffix == ".arrow"]
        if arrow and parent / STATE_FILE in paths:
            saved = _saved(folder / parent / STATE_FILE)
            left_out += [path for path in arrow if path.name not in saved]
    return left_out


def _saved(state: Path) -> set[str]:
    """The names of the files that the dataset of this state has."""
    try:
        names = {str(file["filename"]) for file in json.loads(state.read_bytes())["_data_files"]}
        missing = sorted(name for name in names if not (state.parent / name).is_file())
        found = f"no {missing[0]}" if missing else ""
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        names, found = set(), f"{type(error).__name__} in it: {one_line(error)}"
    if found:
        raise DataError(
            f"{state}: a dataset saved by `datasets` has the .arrow files that its {STATE_FILE} names.\n"
            f"Found: {found}.\nSave or copy it anew, or name its .arrow files one by one in data.sources."
        )
    return names


def _batches(path: Path, name: str) -> "Iterator[pyarrow.RecordBatch]":
    import pyarrow  # a third of a second, only for those who have such files

    number = unpacked = 0
    with opened(path, name) as stream:
        try:
            start = stream.peek(len(FILE_MAGIC))
            if not start:
                return
            if start.startswith(FILE_MAGIC):
                file = pyarrow.ipc.open_file(stream)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            else:
                _check_end(stream.fileno())
                batches = iter(pyarrow.ipc.open_stream(stream))
            size = os.fstat(stream.fileno()).st_size
            for batch in batches:
                check_number_of_rows(number + batch.num_rows, size)
                batch.validate(full=True)  # else damaged offsets end the process
                unpacked += _own_bytes(batch)
                if max(unpacked, batch.nbytes) > most_unpacked(size):
                    raise ValueError(too_much_unpacked(most_unpacked(size)))
                for first in range(0, batch.num_rows, BATCH_ROWS):
                    yield batch.slice(first, BATCH_ROWS)
                number += batch.num_rows
        except Exception as error:  # Arrow's kinds, and any other that a damaged file causes
            raise unreadable(name, error, after=number, remedy="Write the file anew") from error


def _own_bytes(batch: "pyarrow.RecordBatch") -> int:
    """Bytes of a batch without its columns of dictionaries, which it may share with others."""
    return sum(column.nbytes for column in batch.columns if "dictionary<" not in str(column.type))


def _check_end(file: int) -> None:
    """Raise ValueError where the stream lacks its end: Arrow takes one that is cut between batches for whole."""
    size = os.fstat(file).st_size
    if os.pread(file, len(END_OF_STREAM), max(0, size - len(END_OF_STREAM))) != END_OF_STREAM:
        raise ValueError("no end of the stream: the file is cut short, or no Arrow file")

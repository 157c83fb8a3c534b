"""Tables as records: .csv by the line, .parquet and whatever else `datasets` has built from its Arrow cache.

A .csv is read here, and every cell stays the text it is: the readers of whole tables guess types ("007" becomes 7, "NA"
nothing), shift the columns of rows that have one cell too many and fill those that have one too few.
"""

import csv
import glob
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from launcher.data.lines import Record, decoded, lines, opened
from launcher.data.rows import RowFault, shown
from launcher.errors import DataError

BATCH = 1000  # rows of a table in memory at a time
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
    if len(set(columns)) < len(columns):
        twice = next(column for column in columns if columns.count(column) > 1)
        raise DataError(f"{name}: a column has a name of its own.\nFound: {shown(twice)} twice.\nRename one of them.")
    return columns


def _fault(where: str, rule: str, found: str) -> RowFault:
    return RowFault("broken_csv", where=where, rule=rule, found=found)


def parquet_records(path: Path, name: str, *, streaming: bool) -> Iterator[Record]:
    """The rows of a .parquet file; streaming: from the file itself, without a copy in the cache of `datasets`."""

    def build(datasets: ModuleType) -> Any:
        # Escaped: `datasets` takes the path for a pattern.
        file = glob.escape(str(path.absolute()))
        return datasets.load_dataset_builder("parquet", data_files=file, batch_size=BATCH)

    with opened(path, name) as stream:
        if not stream.read(1):
            return iter(())
    return built_records(build, name, split="train", streaming=streaming)


Build = Callable[[ModuleType], Any]  # `datasets` -> a DatasetBuilder


def built_records(build: Build, name: str, *, split: str, streaming: bool) -> Iterator[Record]:
    """The rows of a split as `datasets` gives them. Raises DataError with its reason when it cannot."""
    number = 0
    for batch in _batches(build, name, split=split, streaming=streaming):
        columns = list(batch)
        for values in zip(*batch.values(), strict=True):
            number += 1
            yield Record(f"{name} row {number}", dict(zip(columns, values, strict=True)))


def _batches(build: Build, name: str, *, split: str, streaming: bool) -> Iterator[dict[str, list[Any]]]:
    number = 0
    try:
        builder = build(quiet_datasets())
        if streaming:
            dataset = builder.as_streaming_dataset(split)
        else:
            builder.download_and_prepare()
            if split in builder.info.splits and not builder.info.splits[split].num_examples:
                return  # it refuses to give a dataset without rows
            dataset = builder.as_dataset(split)
        for batch in dataset.iter(batch_size=BATCH):
            yield batch
            number += len(next(iter(batch.values())))
    except Exception as error:  # its own kinds, and those of Arrow, of the hub and of the network behind it
        raise _unreadable(name, error, after=number) from error


def quiet_datasets() -> ModuleType:
    """`datasets`, imported when a table is read and not before: it takes over a second.

    Without bars and log lines (`_unreadable` says what it would log), and without the request by which it counts every
    load, that of a local file too: https://github.com/huggingface/datasets/blob/5.2.0/src/datasets/load.py#L189.
    """
    import datasets
    import huggingface_hub

    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets


def _unreadable(name: str, error: BaseException, *, after: int) -> DataError:
    """The last cause of the failure, in its own words and on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = " ".join(str(error).split()) or type(error).__name__
    place = f" after row {after}" if after else ""
    return DataError(
        f"{name}: a source must be readable as a table.\nFound{place}: {reason[:300]}\n"
        "Correct the source or its config, split and revision, or write its rows into a .jsonl file."
    )

"""A row beyond data.max_row_mib is a fault with its place, and is not read as a whole."""

import gzip
import json
import tracemalloc
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.read import parquet_files
from launcher.data.read.rows import RowFault
from tests.support.reading import feeds, read, refusal

LIMIT: dict[str, Any] = {"max_row_mib": 0.01}
LARGE = 2**24  # bytes
GOOD = {"text": "a river"}


def large_file(path, suffix):
    """A good row, a large one, a good one."""
    good, large = json.dumps(GOOD), json.dumps({"text": "x" * LARGE})
    content = {
        "jsonl": f"{good}\n{large}\n{good}\n",
        "jsonl.gz": f"{good}\n{large}\n{good}\n",
        "txt": f"a river\n{'x' * LARGE}\na river\n",
        "blank.txt": f"a river\n{' ' * LARGE}x\na river\n",
        "csv": f"text\na river\n{'x' * LARGE}\na river\n",
        "quoted.csv": f'text\na river\n"{"x" * LARGE}"\na river\n',
        "json": f"[{good}, {large}, {good}]",
    }[suffix].encode()
    path = path / f"rows.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    return path


@pytest.mark.parametrize(
    ("suffix", "place"),
    [
        ("jsonl", ":2"),
        ("jsonl.gz", ":2"),
        ("txt", ":2"),
        ("blank.txt", ":2"),
        ("csv", ":3"),
        ("quoted.csv", ":3"),
        ("json", " row 2"),
    ],
)
def test_a_large_row_is_named_or_skipped_and_its_neighbours_are_read(tmp_path, suffix, place):
    path = large_file(tmp_path, suffix)
    message = refusal(path, **LIMIT)
    assert message.startswith(f"{path}{place}: a row has at most data.max_row_mib=0.01 MiB (10,486 bytes)")
    assert "raise data.max_row_mib" in message
    assert len(read(path, max_row_mib=17)[0]) == 3
    if suffix.endswith("csv"):  # nothing tells where the next row begins
        assert "data.bad_rows=skip does not help" in refusal(path, bad_rows="skip", **LIMIT)
    else:
        rows, counts = read(path, bad_rows="skip", **LIMIT)
        assert len(rows) == 2 and counts == {"rows_read": 3, "rows_dropped_too_large": 1}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "txt", "csv", "quoted.csv"])
def test_of_a_large_line_only_the_beginning_is_held(tmp_path, suffix):
    [feed] = feeds(large_file(tmp_path, suffix), streaming=True, **LIMIT)
    tracemalloc.start()
    try:
        with suppress(RowFault):  # in a table it is the last
            assert len(list(feed.raw_rows())) == 3
        assert tracemalloc.get_traced_memory()[1] < LARGE / 4
    finally:
        tracemalloc.stop()


def test_what_follows_an_unclosed_quote_in_a_table_never_becomes_rows(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text\n"a\n' + "more\n" * 3000 + "a river\n")
    assert f"{path}:2: a row has at most" in refusal(path, bad_rows="skip", **LIMIT)


def written(path, cells, *, notes=None, **options):
    columns = {"note": notes or [""] * len(cells), "text": cells}
    pq.write_table(pa.table(columns), path, compression="none", **options)
    return path


@pytest.mark.parametrize("used", [True, False])
def test_a_large_parquet_cell_is_named_and_its_neighbours_are_read(tmp_path, used):
    large, small = ["a", "b" * 40_000, *"cdefg"], list("abcdefg")
    path = written(tmp_path / "rows.parquet", large if used else small, notes=small if used else large)
    assert refusal(path, **LIMIT).startswith(f"{path} row 2: a row has at most data.max_row_mib=0.01 MiB")
    rows, counts = read(path, bad_rows="skip", **LIMIT)
    assert [row.where for row in rows] == [f"{path} row {n}" for n in (1, 3, 4, 5, 6, 7)]
    assert (counts["rows_read"], counts["rows_dropped_too_large"]) == (7, 1)
    assert len(read(path)[0]) == 7


def test_rows_beside_a_parquet_cell_that_the_sizes_of_its_row_group_give_away_are_read(tmp_path):
    path = written(tmp_path / "rows.parquet", [*["a"] * 10, "b" * 2**20, *["c"] * 10], use_dictionary=False)
    assert refusal(path, **LIMIT).startswith(f"{path} row 11: a row has at most data.max_row_mib=0.01 MiB")
    rows, counts = read(path, bad_rows="skip", **LIMIT)
    assert len(rows) == 20 and (counts["rows_read"], counts["rows_dropped_too_large"]) == (21, 1)


def test_a_parquet_row_group_that_is_too_large_to_be_read_for_its_small_rows_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_files, "LARGEST_GROUP_BYTES", 30_000)
    path = written(tmp_path / "rows.parquet", ["a", "b", "c" * 40_000, "d"], row_group_size=2, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    raw, start = bytearray(path.read_bytes()), column.data_page_offset
    raw[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(raw)
    assert "a source must be readable" in refusal(path), "it cannot be read"
    assert f"{path} row 3: " in refusal(path, **LIMIT) and "bytes in the rows 3 to 4" in refusal(path, **LIMIT)
    rows, counts = read(path, bad_rows="skip", **LIMIT)
    dropped = {"rows_dropped_too_large": 1, "rows_dropped_beside_too_large": 1}
    assert len(rows) == 2 and counts.items() >= {"rows_read": 4, **dropped}.items()
    assert "one as too_large, the others as beside_too_large" in refusal(path, **LIMIT)


def test_rows_of_a_parquet_file_are_read_in_batches_of_bounded_size(tmp_path):
    path = written(tmp_path / "rows.parquet", [f"{n}" * 2**19 for n in range(10, 99)] * 2, write_batch_size=1)
    [feed], before, peak = feeds(path, streaming=True), pa.total_allocated_bytes(), 0
    for _ in feed.raw_rows():
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 0 < peak < 120 * 2**20, "178 MiB in one row group"

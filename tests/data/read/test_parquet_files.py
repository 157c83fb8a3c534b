import datetime
import decimal
import stat
import tracemalloc
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.read.rows import RowFault
from launcher.errors import DataError
from tests.support.reading import feeds, fields, refusal


@pytest.fixture
def path(tmp_path):
    return tmp_path / "[odd] *name?.parquet"


def test_rows_are_given_in_order_and_copied_nowhere(path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path.parent / "cache")
    rows: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(2500)]
    rows[0]["messages"][0]["name"] = "x"
    pq.write_table(pa.Table.from_pylist(rows), path)
    path.chmod(0o600)
    raw_rows = list(feeds(path)[0].raw_rows())
    assert [raw.where for raw in raw_rows[::1000]] == [f"{path} row {number}" for number in (1, 1001, 2001)]
    assert len(raw_rows) == 2500
    assert fields(path)[-1] == {"messages": [{"role": "user", "content": "2499", "name": None}]}
    assert list(path.parent.iterdir()) == [path] and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_table_without_rows_has_none_and_a_broken_file_is_refused(path, capfd):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert fields(path) == []
    pq.write_table(pa.table({"text": [f"{i}" for i in range(500)]}), path)
    whole, no_table = path.read_bytes(), b'{"text": "a river"}\n' * 9
    for raw in (whole[: len(whole) // 2], b"PAR1", whole[:100] + b"\xff" * 400 + whole[500:], no_table):
        path.write_bytes(raw)
        message = refusal(path, bad_rows="skip")
        assert message.startswith(f"{path}: a source must be readable") and len(message.splitlines()) == 3
        assert "config" not in message, "a local file has none"
    assert capfd.readouterr() == ("", "")


def test_a_file_that_breaks_off_says_after_which_row(path):
    table = pa.table({"text": [f"{i} river" * 9 for i in range(5000)]})
    pq.write_table(table, path, row_group_size=1000, compression="none", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    raw = bytearray(path.read_bytes())
    raw[start : start + 40] = b"\xff" * 40
    path.write_bytes(raw)
    raw_rows = feeds(path)[0].raw_rows()
    assert len(list(islice(raw_rows, 2000))) == 2000
    with pytest.raises(DataError, match="Found after row 2000: "):
        next(raw_rows)


def test_a_row_group_is_not_read_as_a_whole(path):
    table = pa.table({"text": [f"{i}" * 400 for i in range(10_000, 30_000)]})
    pq.write_table(table, path, compression="none", use_dictionary=False)
    assert path.stat().st_size > 40_000_000 and pq.ParquetFile(path).num_row_groups == 1
    del table
    before, peak = pa.total_allocated_bytes(), 0
    tracemalloc.start()  # the bytes lie in Python's memory or in Arrow's, depending on how they are read
    try:
        for _ in islice(feeds(path, streaming=True)[0].raw_rows(), 0, None, 100):
            peak = max(peak, pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert 0 < peak < 20_000_000


def test_cells_are_plain_values_and_one_that_python_cannot_hold_is_a_fault_of_its_row(path):
    offsets, data = pa.array([0, 1, 3, 4], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfec")
    plain: dict[str, Any] = {
        "date": datetime.date(2020, 1, 2),
        "stamp": datetime.datetime(2020, 1, 2, 3),
        "decimal": decimal.Decimal("1.50"),
        "bytes": b"\xff",
        "list": [1, None],
        "object": {"a": 1.5},
    }
    table = {
        "text": pa.Array.from_buffers(pa.string(), 3, [None, offsets, data]),
        "far": pa.array([0, 0, 2**49], pa.timestamp("s")),
        **{column: pa.array([value] * 3) for column, value in plain.items()},
    }
    pq.write_table(pa.table(table), path)
    first, no_text, no_date = fields(path)
    assert first == {"text": "a", "far": datetime.datetime(1970, 1, 1), **plain}
    assert isinstance(no_text, RowFault) and no_text.reason == "encoding"
    assert str(no_text).startswith(f'{path} row 2: the column "text" ')
    assert isinstance(no_date, RowFault) and no_date.reason == "wrong_type"
    assert '"far"' in str(no_date) and "a value of type timestamp[ms]: " in str(no_date)


def test_two_columns_of_one_name_are_refused(path):
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    assert '"text" twice' in refusal(path, bad_rows="skip")

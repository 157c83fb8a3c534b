import datetime
import decimal
import os
import stat
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data.read import tables
from launcher.data.read.formats import read_rows
from launcher.data.read.rows import RowFault
from launcher.data.read.sources import open_source
from launcher.data.read.tables import csv_records, parquet_records
from launcher.data.read.text_files import Record
from launcher.errors import DataError
from launcher.recipe.data_section import Source

HEADER = b"prompt,completion\n"


def read_csv(path: Path, raw: bytes | str) -> list[Record]:
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return list(csv_records(path, "rows.csv"))


def good(records: list[Record]) -> list[tuple[str, ...]]:
    return [tuple(r.fields.values()) for r in records if not isinstance(r.fields, RowFault)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.csv"


def write_parquet(path: Path, rows: list[dict[str, Any]] | pa.Table) -> Path:
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path)
    return path


def test_cells_stay_the_strings_they_are(path: Path) -> None:
    cells = [("007", "NA"), ("1.0", "null"), ("", "None"), ("2020-01-01", "true"), ("a\nb", 'say "c", d'), ("é", " ")]
    lines = ['"' + '","'.join(cell.replace('"', '""') for cell in row) + '"\n' for row in cells]
    records = read_csv(path, HEADER.decode() + "".join(lines))
    assert good(records) == cells
    assert [record.where for record in records] == [f"rows.csv row {n}" for n in range(1, 7)]
    assert good(read_csv(path, "\ufeffprompt,completion\r\n1,NA\r\n\r\n2,b")) == [("1", "NA"), ("2", "b")]


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ("1,2,3", "3 cells, on line 3"),
        ("1", "1 cells, on line 3"),
        ('"1"x,2', "line 3"),
    ],
)
def test_a_row_of_another_shape_is_a_fault_and_its_neighbours_are_not(path: Path, bad: str, found: str) -> None:
    records = read_csv(path, f"a,b\n1,2\n{bad}\n3,4\n")
    assert good(records) == [("1", "2"), ("3", "4")]
    fault = records[1].fields
    assert isinstance(fault, RowFault) and fault.reason == "broken_csv"
    assert str(fault).startswith("rows.csv row 2: ") and found in str(fault)


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_a_header_divided_by_another_separator_names_it_and_what_to_do(path: Path, mark: str, name: str) -> None:
    with pytest.raises(DataError, match=rf"commas\.\nFound: one column, .*, divided by {name}\.\nSave the table with"):
        read_csv(path, f"prompt{mark}completion\na, b{mark}c\n")
    assert good(read_csv(path, f'"a{mark}b",c\n1,2\n')) == [("1", "2")]
    assert good(read_csv(path, f"text\na{mark}b\n")) == [(f"a{mark}b",)]


def test_a_chat_in_a_cell_is_refused_with_the_formats_that_hold_one(path: Path) -> None:
    path.write_text('messages\n"[{""role"": ""user"", ""content"": ""Hi""}]"\n')
    [feed] = open_source(Source(path=str(path)), streaming=False)
    with pytest.raises(RowFault, match=r"row 1: .*\nFound: a list written as text, .*\nSave the data as \.jsonl or"):
        list(read_rows(feed, bad_rows="raise", counts=Counter()))


def test_a_quote_that_is_never_closed_is_a_fault_and_cannot_fill_the_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [record] = read_csv(path, 'a,b\n"1,2\n3,4\n')
    assert isinstance(record.fields, RowFault)
    monkeypatch.setattr(tables, "LONGEST_CELL", 100)
    records = read_csv(path, 'a,b\n"1,2\n' + "3,4\n" * 1000)
    assert isinstance(records[0].fields, RowFault) and "field larger" in str(records[0].fields)


@pytest.mark.parametrize(("encoding", "at"), [("latin-1", 3), ("utf-16", 0), ("utf-16-le", 6), ("utf-32", 0)])
def test_a_header_in_another_encoding_is_named_by_its_byte(path: Path, encoding: str, at: int) -> None:
    with pytest.raises(DataError, match=f"UTF-8(.|\n)*byte offset {at} "):
        read_csv(path, "café,b\n1,2\n".encode(encoding))


def test_a_row_in_another_encoding_is_named_by_its_byte_and_can_be_skipped(path: Path) -> None:
    raw = HEADER + b"a,b\ncaf\xe9,b\nc,d\n"
    records = read_csv(path, raw)
    assert good(records) == [("a", "b"), ("c", "d")]
    fault = records[1].fields
    assert isinstance(fault, RowFault) and fault.reason == "encoding"
    assert f"byte 0xe9 (Latin-1 or UTF-16?) at byte offset {raw.index(0xE9)} " in str(fault)


def test_a_csv_file_without_rows_has_none_and_two_columns_have_two_names(path: Path) -> None:
    assert read_csv(path, b"") == read_csv(path, HEADER) == []
    with pytest.raises(DataError, match='"a" twice'):
        read_csv(path, "a,b,a\n1,2,3\n")
    with pytest.raises(DataError, match="header"):
        read_csv(path, '"a,b\n1,2\n')


def test_a_parquet_file_gives_its_rows_in_order(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(2500)]
    rows[0]["messages"][0]["name"] = "x"
    path = write_parquet(tmp_path / "[odd] *name?.parquet", rows)
    records = list(parquet_records(path, "it"))
    assert [record.where for record in records[::1000]] == ["it row 1", "it row 1001", "it row 2001"]
    assert records[-1].fields == {"messages": [{"role": "user", "content": "2499", "name": None}]}
    assert len(records) == 2500 and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_parquet_file_without_rows_has_none_and_a_broken_one_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_parquet(tmp_path / "rows.parquet", pa.table({"text": pa.array([], pa.string())}))
    assert list(parquet_records(path, "it")) == []
    whole = write_parquet(path, [{"text": f"{i}"} for i in range(500)]).read_bytes()
    foreign = b'{"text": "a river"}\n' * 9
    for raw in (whole[: len(whole) // 2], b"PAR1", whole[:100] + b"\xff" * 400 + whole[500:], foreign):
        path.write_bytes(raw)
        with pytest.raises(DataError) as caught:
            list(parquet_records(path, "it"))
        message = str(caught.value)
        assert message.startswith("it: a source must be readable") and len(message.splitlines()) == 3
        assert "config" not in message, "a local file has none"
    path.write_bytes(b"")
    assert list(parquet_records(path, "it")) == []
    assert capfd.readouterr() == ("", "")


def test_a_parquet_file_that_breaks_off_says_after_which_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": [f"{i} river" * 9 for i in range(5000)]})
    pq.write_table(table, path, row_group_size=1000, compression="none", use_dictionary=False)
    group = pq.ParquetFile(path).metadata.row_group(2).column(0)
    raw = bytearray(path.read_bytes())
    raw[group.data_page_offset : group.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(raw)
    records = parquet_records(path, "it")
    assert [next(records).where for _ in range(2000)][-1] == "it row 2000"
    with pytest.raises(DataError, match="Found after row 2000: "):
        next(records)


def test_a_changed_parquet_file_is_read_anew_whatever_its_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    for text in ("one", "two"):
        write_parquet(path, [{"text": text}])
        os.utime(path, ns=(10**18, 10**18))
        assert [r.fields for r in parquet_records(path, "it")] == [{"text": text}]


def test_the_rows_of_a_private_parquet_file_are_copied_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = write_parquet(tmp_path / "rows.parquet", [{"text": "a secret"}])
    path.chmod(0o600)
    assert len(list(parquet_records(path, "it"))) == 1
    assert list(tmp_path.rglob("*")) == [path] and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_row_group_is_not_read_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": [f"{i}" * 400 for i in range(10_000, 30_000)]})  # 40 MB in one group
    pq.write_table(table, path, compression="none", use_dictionary=False)
    assert path.stat().st_size > 40_000_000 and pq.ParquetFile(path).num_row_groups == 1
    del table
    before, most = pa.total_allocated_bytes(), 0
    tracemalloc.start()  # what is read lies in Python's memory or in Arrow's, by the way it is asked for
    try:
        for record in islice(parquet_records(path, "it"), 0, None, 100):
            assert record.where
            most = max(most, pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
    assert 0 < most < 20_000_000


def test_cells_are_plain_values_and_one_that_python_cannot_hold_is_a_fault_of_its_row(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"), pa.py_buffer(b"a\xff\xfec")]
    )
    plain: dict[str, Any] = {
        "date": datetime.date(2020, 1, 2),
        "stamp": datetime.datetime(2020, 1, 2, 3),
        "decimal": decimal.Decimal("1.50"),
        "bytes": b"\xff",
        "list": [1, None],
        "object": {"a": 1.5},
    }
    columns = {column: pa.array([value] * 3) for column, value in plain.items()}
    far = pa.array([0, 0, 2**49], pa.timestamp("s"))
    path = write_parquet(tmp_path / "rows.parquet", pa.table({"text": text, "far": far, **columns}))
    first, second, third = parquet_records(path, "it")
    assert first.fields == {"text": "a", "far": datetime.datetime(1970, 1, 1), **plain}
    assert isinstance(second.fields, RowFault) and second.fields.reason == "encoding"
    assert str(second.fields).startswith('it row 2: the column "text" ')
    assert isinstance(third.fields, RowFault) and third.fields.reason == "wrong_type"
    assert '"far"' in str(third.fields) and "a value of type timestamp[ms]: " in str(third.fields)


def test_two_columns_of_a_parquet_file_have_two_names(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(DataError, match='"text" twice'):
        list(parquet_records(write_parquet(tmp_path / "rows.parquet", table), "it"))

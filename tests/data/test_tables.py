import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launcher.data import tables
from launcher.data.lines import Record
from launcher.data.rows import RowFault
from launcher.data.tables import csv_records, parquet_records
from launcher.errors import DataError

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


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_gives_its_rows_in_order(tmp_path: Path, streaming: bool) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(2500)]
    rows[0]["messages"][0]["name"] = "x"
    path = write_parquet(tmp_path / "[odd] *name?.parquet", rows)
    records = list(parquet_records(path, "it", streaming=streaming))
    assert [record.where for record in records[::1000]] == ["it row 1", "it row 1001", "it row 2001"]
    assert records[-1].fields == {"messages": [{"role": "user", "content": "2499", "name": None}]}
    assert len(records) == 2500 and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_parquet_file_without_rows_has_none_and_a_broken_one_is_refused(
    tmp_path: Path, streaming: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets

    datasets.logging.set_verbosity_warning()
    datasets.enable_progress_bars()
    path = write_parquet(tmp_path / "rows.parquet", pa.table({"text": pa.array([], pa.string())}))
    assert list(parquet_records(path, "it", streaming=streaming)) == []
    whole = write_parquet(path, [{"text": f"{i}"} for i in range(500)]).read_bytes()
    for raw in (whole[: len(whole) // 2], b"PAR1", whole[:100] + b"\xff" * 400 + whole[500:]):
        path.write_bytes(raw)
        with pytest.raises(DataError) as caught:
            list(parquet_records(path, "it", streaming=streaming))
        message = str(caught.value)
        assert message.startswith("it: a source must be readable") and len(message.splitlines()) <= 5
    path.write_bytes(b"")
    assert list(parquet_records(path, "it", streaming=streaming)) == []
    assert capfd.readouterr() == ("", "")
    assert datasets.logging.get_verbosity() == logging.CRITICAL  # its handler writes to a stream of its own


def test_a_changed_parquet_file_is_read_anew(tmp_path: Path) -> None:
    for text in ("one", "two"):
        path = write_parquet(tmp_path / "rows.parquet", [{"text": text}])
        assert [r.fields for r in parquet_records(path, "it", streaming=False)] == [{"text": text}]


def test_reading_a_local_table_asks_nothing_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[str] = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.load, "get_session", lambda: asked.append("session"))
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    path = write_parquet(tmp_path / "rows.parquet", [{"text": "a"}])
    datasets.load_dataset_builder("parquet", data_files=str(path))
    assert asked, "without the setting, datasets counts the load of a local file"
    asked.clear()
    assert len(list(parquet_records(path, "it", streaming=False))) == 1
    assert asked == []

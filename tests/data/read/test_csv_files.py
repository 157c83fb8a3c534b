from pathlib import Path
from typing import Any

import pytest

from launcher.data.read.rows import RowFault
from tests.support.reading import feeds, fields, refusal

HEADER = b"prompt,completion\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.csv"


def records(path: Path, raw: bytes | str) -> list[Any]:
    """The cells of each row, or its fault."""
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return [row if isinstance(row, RowFault) else tuple(row.values()) for row in fields(path)]


def test_cells_stay_the_text_they_are(path):
    cells = [
        ("007", "NA"),
        ("1.0", "null"),
        ("", "None"),
        ("2020-01-01", "true"),
        ("a\nb", 'say "c", d'),
        ("é\r\v\u2028", " "),
    ]
    lines = ['"' + '","'.join(cell.replace('"', '""') for cell in row) + '"\n' for row in cells]
    assert records(path, HEADER.decode() + "".join(lines)) == cells
    assert [raw.where for raw in feeds(path)[0].raw_rows()] == [f"{path} row {n}" for n in range(1, 7)]


def test_windows_line_ends_blank_lines_and_a_byte_order_mark_are_no_rows(path):
    assert records(path, "\ufeff\r\nprompt,completion\r\n1,NA\r\n\r\n2,b") == [("1", "NA"), ("2", "b")]
    assert list(fields(path)[0]) == ["prompt", "completion"]


@pytest.mark.parametrize(
    ("bad", "found"), [("1,2,3", "3 cells, on line 3"), ("1", "1 cells, on line 3"), ('"1"x,2', "line 3")]
)
def test_a_row_with_too_many_or_too_few_cells_is_a_fault_and_its_neighbours_are_not(path, bad, found):
    first, fault, last = records(path, f"a,b\n1,2\n{bad}\n3,4\n")
    assert (first, last) == (("1", "2"), ("3", "4"))
    assert isinstance(fault, RowFault) and fault.reason == "broken_csv"
    assert str(fault).startswith(f"{path} row 2: ") and found in str(fault)


@pytest.mark.parametrize(("mark", "name"), [(";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_a_header_with_another_separator_is_refused_with_its_name(path, mark, name):
    path.write_text(f"prompt{mark}completion\na, b{mark}c\n")
    message = refusal(path)
    assert "commas." in message and "one column, " in message and f"divided by {name}.\nSave the table" in message
    assert records(path, f'"a{mark}b",c\n1,2\n') == [("1", "2")]
    assert records(path, f"text\na{mark}b\n") == [(f"a{mark}b",)]


def test_a_quote_that_is_never_closed_is_a_fault(path):
    [fault] = records(path, 'a,b\n"1,2\n3,4\n')
    assert isinstance(fault, RowFault)


@pytest.mark.parametrize(("encoding", "at"), [("latin-1", 3), ("utf-16", 0), ("utf-16-le", 6), ("utf-32", 0)])
def test_a_header_in_another_encoding_is_named_by_its_byte(path, encoding, at):
    path.write_bytes("café,b\n1,2\n".encode(encoding))
    message = refusal(path, bad_rows="skip")
    assert "UTF-8" in message and f"byte offset {at} " in message


def test_a_row_in_another_encoding_is_named_by_its_byte_and_can_be_skipped(path):
    raw = HEADER + b"a,b\ncaf\xe9,b\nc,d\n"
    first, fault, last = records(path, raw)
    assert (first, last) == (("a", "b"), ("c", "d"))
    assert isinstance(fault, RowFault) and fault.reason == "encoding"
    assert f"byte 0xe9 (Latin-1 or UTF-16?) at byte offset {raw.index(0xE9)} " in str(fault)


@pytest.mark.parametrize(("raw", "found"), [("a,b,a\n1,2,3\n", '"a" twice'), ('"a,b\n1,2\n', "header")])
def test_a_header_that_names_no_columns_or_one_twice_is_refused(path, raw, found):
    path.write_text(raw)
    assert found in refusal(path, bad_rows="skip")


def test_a_header_alone_has_no_rows(path):
    assert records(path, HEADER) == []

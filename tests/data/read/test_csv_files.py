import json
from pathlib import Path
from typing import Any

import pytest

from launcher.data.read import csv_files
from launcher.data.read.rows import RowFault
from launcher.errors import RecipeError
from tests.support.reading import feeds, fields, opened, refusal, written

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


@pytest.mark.parametrize("mark", [";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_header_tells_what_divides_the_cells_and_a_note_says_so(path, mark, end):
    text = f'\ufeffprompt{mark}completion{end}"a, b\n{mark}c"{mark}d{end}{end}e,{mark}f{end}'
    assert records(path, text) == [(f"a, b\n{mark}c", "d"), ("e,", "f")]
    assert list(fields(path)[0]) == ["prompt", "completion"]
    assert opened(path).notes == [f"{path}: read with {json.dumps(mark)} between columns, by the header"]
    assert records(path, f'"a{mark}b",c\n1,2\n') == [("1", "2")]
    assert opened(path).notes == []
    assert records(path, f"text\na{mark}b\n") == [(f"a{mark}b",)]


def test_a_tsv_file_has_tabs_whatever_else_its_header_holds(tmp_path):
    path = tmp_path / "rows.TSV"
    assert records(path, "question, or title\tanswer\na\tb\n") == [("a", "b")]
    assert opened(path).notes == []
    assert records(path, "question;answer\na;b\n") == [("a", "b")]
    assert "by the header" in opened(path).notes[0]
    assert records(path, "text\na, b\n") == [("a, b",)]


def test_a_quoted_header_may_hold_line_ends_and_the_marks(path):
    assert records(path, '"a\nb;c","d"\n1,2\n') == [("1", "2")]
    assert list(fields(path)[0]) == ["a\nb;c", "d"]
    assert records(path, '"a\n,b";"d"\n1;2\n') == [("1", "2")]


def test_a_header_that_several_marks_divide_is_refused_until_one_is_named(path):
    path.write_text("prompt (a,b);completion\n1;2\n")
    message = refusal(path)
    assert "divided by commas and by semicolons" in message and 'delimiter: ","' in message
    assert fields(path, delimiter=";") == [{"prompt (a,b)": "1", "completion": "2"}]
    assert opened(path).notes == [] == opened(path, delimiter=";").notes


def test_a_delimiter_that_is_named_divides_whatever_the_header_looks_like(path):
    path.write_text("prompt:completion;x\na:b\n")
    assert fields(path, delimiter=":") == [{"prompt": "a", "completion;x": "b"}]
    assert fields(path, delimiter=",")[0] == {"prompt:completion;x": "a:b"}
    undivided = 'if semicolons divide it, set delimiter: ";" beside the path'
    assert undivided in refusal(path, delimiter=",") and undivided in refusal(path, delimiter=",", format="text")
    assert "divided by ':', or quoted" in refusal(written(path, [b"a:b", b'"1"2:3']), delimiter=":")


def test_a_delimiter_where_there_is_no_table_of_text_is_refused(tmp_path, path):
    with pytest.raises(RecipeError, match="delimiter of a source is for .csv and .tsv files"):
        opened(written(tmp_path / "rows.jsonl", [{"text": "a"}]), delimiter=";")
    for odd in ("", ";;", '"', "\n"):
        with pytest.raises(ValueError, match="delimiter"):
            opened(path, delimiter=odd)


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


@pytest.mark.parametrize("line", ["why is it so,since", "x" * 9000])
def test_a_header_with_a_quote_that_is_never_closed_is_refused_soon(path, line, monkeypatch):
    divided = []
    parsed_line = csv_files._parsed_line
    monkeypatch.setattr(csv_files, "_parsed_line", lambda *args: divided.append(args) or parsed_line(*args))
    message = refusal(written(path, [b'"question,answer', *[line.encode()] * 400]), bad_rows="skip")
    assert 'Found: "\\"question,answer", divided by ' in message and "Close the quote in the header" in message
    assert len(divided) <= 2 * 4 * csv_files.MAX_HEADER_LINES
    assert sum(map(len, divided[-1][0])) < csv_files.MAX_HEADER_BYTES + len(line) + 2


def test_a_header_with_a_quote_that_only_one_mark_leaves_open_is_not_read_over_its_rows(path):
    path.write_text('height;"feet,width\n1,2\n3,4\n')
    assert 'delimiter: ","' in refusal(path)
    assert fields(path, delimiter=",")[0] == {'height;"feet': "1", "width": "2"}


def test_a_header_alone_has_no_rows(path):
    assert records(path, HEADER) == []

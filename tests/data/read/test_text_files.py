import json

from launcher.data.read.rows import RowFault
from tests.support.reading import fields, read


def test_rows_are_named_by_file_and_line_and_blank_lines_are_no_rows(write):
    path = write([{"text": "one"}, b"", b"  \r", {"text": "four"}])
    rows, counts = read(path)
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:4"] and counts == {"rows_read": 2}


def test_windows_line_ends_a_byte_order_mark_and_unicode_separators_are_no_faults(write):
    row = {"text": "one\u2028two\x85three"}
    line = json.dumps(row, ensure_ascii=False).encode() + b"\r"
    assert fields(write([b"\xef\xbb\xbf" + line, line])) == [row, row]


def test_complete_pairs_and_escaped_backslashes_are_no_lone_surrogates(write):
    path = write([b'{"text": "\\ud83d\\ude00"}', b'{"text": "\\\\ud83d"}'])
    assert fields(path) == [{"text": "😀"}, {"text": "\\ud83d"}]


def test_each_line_of_a_txt_file_is_a_row_as_it_stands(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_bytes(b"\xef\xbb\xbf  one\\ud83d \r\n \ncaf\xe9\nt\0wo\nthree")
    first, latin, zero, last = fields(path)
    assert (first, last) == ({"text": "  one\\ud83d "}, {"text": "three"})
    for fault, line, at in ((latin, 3, 22), (zero, 4, 25)):
        assert isinstance(fault, RowFault) and fault.reason == "encoding"
        assert f"rows.txt:{line}: " in str(fault) and f"byte offset {at} " in str(fault)

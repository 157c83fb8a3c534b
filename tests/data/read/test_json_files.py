import json
from pathlib import Path

import pytest

from launcher.data.read import json_files
from launcher.data.read.rows import RowFault
from tests.support.reading import fields, refusal

ROWS = [{"text": "one", "n": [1, {"a": None}]}, {"text": 'é "漢" \\ 😀'}, {"date": "2020-01-01", "text": "007"}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.json"


def written(path: Path, raw: bytes | str) -> Path:
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return path


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_list_and_a_list_under_a_key_give_the_same_rows(path, indent, ascii_only):
    text = json.dumps(ROWS, indent=indent, ensure_ascii=ascii_only)
    assert fields(written(path, text)) == ROWS
    document = f'\ufeff{{"version": 12, "of": ["a", 1], "data": {text}, "more": {{"x": []}}}}\n'
    assert fields(written(path, document)) == ROWS


@pytest.mark.parametrize("raw", ["", " \n", " [ ] "])
def test_a_file_without_rows_has_none(path, raw):
    assert fields(written(path, raw)) == []


def test_a_string_with_a_line_end_is_named_with_its_place(path):
    message = refusal(written(path, '[{"text": "a\n"}]'))
    assert "Invalid control character at byte offset 12 of the file" in message


def test_a_file_cut_anywhere_is_refused(path):
    raw = json.dumps({"data": ROWS, "n": -1.5e3}, ensure_ascii=False).encode()
    for end in range(1, len(raw)):
        assert "byte offset" in refusal(written(path, raw[:end]), bad_rows="skip")
    assert fields(written(path, raw)) == ROWS


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_syntax_error_is_named_by_line_and_byte_offset(path, mark):
    rows = json.dumps([{"text": "é" * 50}] * 6, indent=0, ensure_ascii=False).encode().rstrip(b"\n]")
    raw = mark + rows + b',\n{"text": "a" oops}]'
    message, lines = refusal(written(path, raw), bad_rows="skip"), raw.count(b"\n") + 1
    assert message.startswith(f"{path}:{lines}: ")
    assert raw[int(message.split("byte offset ")[1].split()[0]) :].startswith(b"oops")
    assert "data.bad_rows=skip does not help" in message


@pytest.mark.parametrize(
    ("raw", "at"),
    [
        ('[{"text": "café"}]'.encode("latin-1"), 14),
        (b"\xef\xbb\xbf" + '[{"text": "café"}]'.encode("latin-1"), 17),
        ('[{"text": "é漢"}'.encode()[:-3] + b'"}]', 13),
        ('[{"text": "a"}]'.encode("utf-16"), 0),
        ('[{"text": "a"}]'.encode("utf-16-le"), 1),
        (b'[{"text": "\xe6\xbc', 11),
    ],
)
def test_what_is_not_utf8_is_named_by_its_byte(path, raw, at):
    message = refusal(written(path, raw), bad_rows="skip")
    assert "UTF-8" in message and f"byte offset {at} " in message


def test_a_faulty_element_does_not_hide_the_others(path):
    raw = '["é", {"text": "a\\ud83d"}, {"text": "\\ud83d\\ude00 \\\\ud83d"}, [], {"text": 5}]'
    no_object, surrogate, pair, no_object_either, last = fields(written(path, raw))
    for fault, number, reason in (
        (no_object, 1, "wrong_type"),
        (surrogate, 2, "encoding"),
        (no_object_either, 4, "wrong_type"),
    ):
        assert (
            isinstance(fault, RowFault) and fault.reason == reason and str(fault).startswith(f"{path} row {number}: ")
        )
    assert raw.encode()[int(str(surrogate).split("byte offset ")[1].split()[0]) :].startswith(b"\\ud83d")
    assert (pair, last) == ({"text": "😀 \\ud83d"}, {"text": 5})


def test_one_object_a_line_is_read_as_jsonl(path):
    assert fields(written(path, "\n".join(json.dumps(row) for row in ROWS))) == ROWS
    first, fault = fields(written(path, '\n{"text": "a"} \r\n\n{"text": oops}'))
    assert first == {"text": "a"} and isinstance(fault, RowFault) and str(fault).startswith(f"{path}:4: ")


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ('{"text": "a"}', "an object without one"),
        ("{}", "an object without one"),
        ('{"a": [{}], "b": [1], "c": [{}]}', 'lists of objects under "a" and "c"'),
        ("7", "Found: 7."),
        ("[{}] []", "Extra data"),
        ("[{} {}]", "Expecting ','"),
        ("[" * 100_000, "recursion"),
        ("[" + "9" * 5000 + "]", "4300 digits"),
    ],
)
def test_what_is_no_list_of_rows_is_refused(path, raw, found):
    assert found in refusal(written(path, raw), bad_rows="skip")


def test_a_file_too_large_for_memory_is_refused_unread_and_jsonl_recommended(path):
    written(path, json.dumps(ROWS))
    with path.open("r+b") as stream:
        stream.truncate(json_files.MAX_FILE_BYTES + 1)  # sparse: takes no disk
    message = refusal(path, streaming=True)
    assert "1,073,741,824" in message and "1,073,741,825" in message and ".jsonl" in message

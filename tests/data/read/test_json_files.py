import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from launcher.data.read import json_files as elements
from launcher.data.read.json_files import json_records
from launcher.data.read.rows import RowFault
from launcher.errors import DataError

NEWLINE = b"\n"
ROWS = [{"text": "one", "n": [1, {"a": None}]}, {"text": 'é "漢" \\ 😀'}, {"date": "2020-01-01", "text": "007"}]


def read(path: Path, raw: bytes | str) -> list[dict[str, Any] | RowFault]:
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    records = list(json_records(path, "rows.json"))
    return [record.fields for record in records]


def refusal(path: Path, raw: bytes | str) -> str:
    with pytest.raises(DataError) as caught:
        read(path, raw)
    assert len(str(caught.value).splitlines()) <= 5
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.json"


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_the_same_in_pieces_of_any_size(
    path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, indent: int | None
) -> None:
    monkeypatch.setattr(elements, "PIECE", piece)
    for ascii_only in (False, True):
        text = json.dumps(ROWS, indent=indent, ensure_ascii=ascii_only)
        assert read(path, text) == ROWS
        assert read(path, f'{{"version": 12, "of": ["a", 1], "data": {text}, "more": {{"x": []}}}}\n') == ROWS
    assert read(path, b"\xef\xbb\xbf [ ] ") == read(path, "") == []


def test_cut_anywhere_a_file_is_refused_and_never_half_read_in_silence(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = json.dumps({"data": ROWS, "n": -1.5e3}, ensure_ascii=False).encode()
    for piece in (5, 1 << 20):
        monkeypatch.setattr(elements, "PIECE", piece)
        for end in range(1, len(raw)):
            assert "byte offset" in refusal(path, raw[:end])
    assert read(path, raw) == ROWS


def test_a_syntax_error_is_named_by_line_and_byte_offset(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps([{"text": "é" * 50}] * 6, indent=0, ensure_ascii=False).encode().rstrip(b"\n]")
    raw += b',\n{"text": "a" oops}]'
    for piece in (16, 1 << 20):
        monkeypatch.setattr(elements, "PIECE", piece)
        message = refusal(path, raw)
        assert message.startswith(f"rows.json:{raw.count(NEWLINE) + 1}: ")
        assert raw[int(message.split("byte offset ")[1].split()[0]) :].startswith(b"oops")
        assert "data.bad_rows=skip does not help" in message


@pytest.mark.parametrize(
    ("raw", "at"),
    [
        ('[{"text": "café"}]'.encode("latin-1"), 14),
        ('[{"text": "é漢"}'.encode()[:-3] + b'"}]', 13),
        ('[{"text": "a"}]'.encode("utf-16"), 0),
        ('[{"text": "a"}]'.encode("utf-16-le"), 1),
        (b'[{"text": "\xe6\xbc', 11),
    ],
)
def test_what_is_not_utf8_is_named_by_its_byte(
    path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, at: int
) -> None:
    for piece in (1, 4, 1 << 20):
        monkeypatch.setattr(elements, "PIECE", piece)
        message = refusal(path, raw)
        assert "UTF-8" in message and f"byte offset {at} " in message


def test_an_element_that_is_no_row_does_not_hide_the_others(path: Path) -> None:
    raw = '["é", {"text": "a\\ud83d"}, {"text": "\\ud83d\\ude00"}, [], {"text": 5}]'
    first, second, *others, last = read(path, raw)
    assert isinstance(first, RowFault) and first.reason == "wrong_type" and str(first).startswith("rows.json row 1: ")
    assert isinstance(second, RowFault) and second.reason == "encoding"
    assert raw.encode()[int(str(second).split("byte offset ")[1].split()[0]) :].startswith(b"\\ud83d")
    assert [type(fields) for fields in others] == [dict, RowFault] and last == {"text": 5}


def test_one_object_to_a_line_is_read_by_the_line_whatever_the_name(path: Path) -> None:
    assert read(path, "".join(json.dumps(row) + "\n" for row in ROWS)) == ROWS
    [first, second] = read(path, '{"text": "a"}\n{"text": oops}')
    assert first == {"text": "a"} and isinstance(second, RowFault) and str(second).startswith("rows.json:2: ")


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ('{"text": "a"}', "an object without one"),
        ("{}", "an object without one"),
        ('{"a": [{}], "b": [1], "c": [{}]}', 'lists of objects under "a" and "c"'),
        ("7", "Expecting '{'"),
        ("[{}] []", "Extra data"),
        ("[{} {}]", "Expecting ','"),
        ("[{},]", "Expecting value"),
        ('{"a" [{}]}', "Expecting ':'"),
        ("{7: [{}]}", "Expecting a key"),
        ("[" * 100_000, "byte offset"),
        ("[" + "9" * 5000 + "]", "byte offset"),
    ],
)
def test_what_is_no_list_of_rows_is_refused(path: Path, raw: str, found: str) -> None:
    assert found in refusal(path, raw)


def test_a_long_file_is_never_held_as_a_whole(path: Path) -> None:
    rng = random.Random(0)
    row = json.dumps({"text": rng.randbytes(500).hex()})
    path.write_text("[" + ",\n".join([row] * 20_000) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_records(path, "rows.json")) == 20_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 20e6 and peak < 8e6

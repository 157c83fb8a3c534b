import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.data.formats import Conversation, Message, Row, RowFault, Text, read_source
from launcher.errors import DataError
from launcher.recipe.schema import Source

Write = Callable[..., str]
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def read(path: str, *, layout: str = "auto", bad_rows: str = "raise") -> tuple[list[Row], Counter[str]]:
    counts: Counter[str] = Counter()
    return read_source(
        Source.model_validate({"path": path, "format": layout}), bad_rows=bad_rows, counts=counts
    ), counts


def refusal(path: str, *, layout: str = "auto", bad_rows: str = "raise") -> str:
    with pytest.raises(DataError) as caught:
        read(path, layout=layout, bad_rows=bad_rows)
    message = str(caught.value)
    assert caught.value.code == 3
    assert len(message.splitlines()) <= 5
    return message


def test_chats_and_texts_are_told_apart_by_the_first_row(write: Write) -> None:
    chats, counts = read(write([CHAT, CHAT]))
    texts, _ = read(write([{"text": "a river"}], name="texts.jsonl"))
    assert chats[0] == Conversation((Message("user", "Hi"), Message("assistant", "Hello.")), chats[0].where)
    assert isinstance(texts[0], Text) and texts[0].text == "a river"
    assert counts == {"rows_read": 2}


def test_a_row_remembers_its_file_and_line_and_blank_lines_are_no_rows(write: Write) -> None:
    path = write([{"text": "one"}, b"", b"  \r", {"text": "four"}])
    rows, counts = read(path)
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:4"]
    assert counts["rows_read"] == 2


def test_line_ends_of_windows_and_a_utf8_mark_are_read(write: Write) -> None:
    rows, _ = read(write([b"\xef\xbb\xbf" + json.dumps(CHAT).encode() + b"\r", json.dumps(CHAT).encode() + b"\r"]))
    assert len(rows) == 2


def test_a_separator_inside_a_string_does_not_end_the_line(write: Write) -> None:
    [row], _ = read(write([{"text": "one\u2028two\x85three"}]))
    assert isinstance(row, Text) and row.text == "one\u2028two\x85three"


def test_broken_json_is_named_by_file_line_and_byte_offset(write: Write) -> None:
    good = json.dumps({"text": "é" * 10}, ensure_ascii=False).encode()
    path = write([good] * 6 + [b'{"text": "\xc3\xa9" oops}'])
    message = refusal(path)
    assert message.startswith(f"{path}:7: ")
    offset = int(message.split("byte offset ")[1].split()[0])
    assert Path(path).read_bytes()[offset:].startswith(b"oops")
    assert "data.bad_rows=skip" in message


@pytest.mark.parametrize(
    ("row", "reason", "expected"),
    [
        (b"{broken", "broken_json", "one JSON object"),
        (b"[" * 100_000, "broken_json", "one JSON object"),
        (b'{"text": ' + b"9" * 5000 + b"}", "broken_json", "one JSON object"),
        ([1, 2], "wrong_type", "a list"),
        ({"messages": None}, "wrong_type", "null"),
        ({"messages": "Hi"}, "wrong_type", '"Hi"'),
        ({"messages": ["Hi"]}, "wrong_type", '"Hi"'),
        ({"messages": [{"role": "user"}]}, "wrong_type", "null"),
        ({"messages": [{"role": "user", "content": 7}]}, "wrong_type", "7"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "wrong_type", "a list"),
        ({"text": "no messages here"}, "wrong_type", "null"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "unknown_role", "system, user, assistant"),
        ({"messages": [{"content": "Hi"}]}, "unknown_role", "null"),
        ({"messages": [{"role": ["user"], "content": "Hi"}]}, "unknown_role", "a list"),
        (b'{"messages": [{"role": "user", "content": "caf\xe9"}]}', "encoding", "byte 0xe9"),
        (b'{"messages": [{"role": "user", "content": "\\ud83d!"}]}', "encoding", "lone surrogate"),
    ],
)
def test_a_faulty_row_stops_with_its_place_or_is_skipped_and_counted(
    write: Write, row: Any, reason: str, expected: str
) -> None:
    path = write([CHAT, row, CHAT])
    message = refusal(path)
    assert message.startswith(f"{path}:2: ")
    assert expected in message
    rows, counts = read(path, bad_rows="skip")
    assert len(rows) == 2
    assert counts == {"rows_read": 3, f"rows_dropped_{reason}": 1}


@pytest.mark.parametrize(
    ("raw", "at"),
    [
        (b'{"text": "caf\xe9"}', 13),
        (b'{"text": "\xed\xa0\xbd"}', 10),
        (b'{"text": "a\\ud83d"}', 11),
        (b'{"text": "\\ud83d\\ude00 \\\\ud83d \\ude00"}', 31),
        (b'{"other": "\\udc00", "text": "a"}', 11),
        (b'{"text": "a\x00"}', 11),
    ],
)
def test_what_is_not_unicode_is_named_by_its_byte_in_the_file(write: Write, raw: bytes, at: int) -> None:
    before = {"text": "漢字"}
    path = write([before, raw])
    first_line = len(json.dumps(before, ensure_ascii=False).encode()) + 1
    message = refusal(path)
    assert "UTF-8" in message and f"byte offset {first_line + at} " in message


def test_escaped_pairs_and_escaped_backslashes_are_no_lone_surrogates(write: Write) -> None:
    rows, _ = read(write([b'{"text": "\\ud83d\\ude00"}', b'{"text": "\\\\ud83d"}']))
    assert [row.text for row in rows if isinstance(row, Text)] == ["😀", "\\ud83d"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_a_file_in_another_encoding_is_refused_with_a_byte_offset(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "café"}\n{"text": "thé"}\n'.encode(encoding))
    message = refusal(str(path))
    assert "UTF-8" in message and "byte offset" in message
    assert "0 usable rows" in refusal(str(path), bad_rows="skip")


def test_empty_rows_are_dropped_and_counted_under_either_policy(write: Write) -> None:
    rows, counts = read(write([{"text": "  \n"}, {"text": ""}, {"text": "a"}], name="t.jsonl"), layout="text")
    assert (len(rows), counts["rows_dropped_empty"]) == (1, 2)
    _, counts = read(write([{"messages": []}, CHAT]))
    assert counts["rows_dropped_empty"] == 1


def test_a_file_without_a_usable_row_says_so(write: Write) -> None:
    assert "0 usable rows" in refusal(write([]))
    assert "0 usable rows" in refusal(write([b"", b" "]))
    message = refusal(write([b"{", b"{", {"text": ""}]), bad_rows="skip")
    assert "0 usable rows" in message and "2 rows_dropped_broken_json, 1 rows_dropped_empty" in message


def test_a_path_that_is_no_jsonl_file_is_refused_with_what_is_supported(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    for name, found in (("none.jsonl", "no such file"), ("rows.parquet", ".parquet"), (".", "a folder")):
        message = refusal(str(tmp_path / name))
        assert found in message and ".jsonl" in message and "data.sources" in message


def test_columns_that_say_nothing_or_too_much_are_refused(write: Write) -> None:
    assert "the columns prompt" in refusal(write([{"prompt": "a"}]))
    both = write([{"text": "a", **CHAT}])
    assert "format: messages" in refusal(both) and "format: messages" in refusal(both, bad_rows="skip")
    [row], _ = read(both, layout="text")
    assert isinstance(row, Text)


def test_a_skipped_first_row_leaves_the_format_to_the_next(write: Write) -> None:
    rows, counts = read(write([b"{", {"columns": 0}, {"text": "a"}]), bad_rows="skip")
    assert (len(rows), counts["rows_dropped_broken_json"], counts["rows_dropped_wrong_type"]) == (1, 1, 1)


def test_an_error_shows_a_value_short_and_as_ascii(write: Write) -> None:
    message = refusal(write([{"messages": [{"role": "\x1b[31m" + "é" * 500, "content": "a"}]}]))
    assert "\x1b" not in message and len(message) < 500
    assert "\\u001b" in message


def test_no_mutation_of_a_row_brings_a_traceback_and_every_row_is_counted(write: Write) -> None:
    rng = random.Random(0)
    good = json.dumps(CHAT).encode()
    rows: list[Any] = [CHAT]
    for _ in range(3000):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        rows.append(bytes(raw).replace(b"\n", b" "))
    kept, counts = read(write(rows), bad_rows="skip", layout="messages")
    assert counts["rows_read"] == 3001
    assert len(kept) + sum(n for key, n in counts.items() if "dropped" in key) == 3001
    assert len(kept) > 1 and len(counts) > 3


def test_a_fault_is_a_data_error_that_carries_its_reason() -> None:
    fault = RowFault("encoding", where="f:1", rule="rule.", found="found")
    assert isinstance(fault, DataError) and fault.reason == "encoding" and fault.code == 3

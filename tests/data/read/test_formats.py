import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Conversation, Message, Row, RowFault, Text
from launcher.data.read.sources import open_source
from launcher.errors import DataError
from launcher.recipe.data_section import Source

Write = Callable[..., str]
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


def read(path: str, *, layout: str = "auto", bad_rows: str = "raise") -> tuple[list[Row], Counter[str]]:
    counts: Counter[str] = Counter()
    [feed] = open_source(Source.model_validate({"path": path, "format": layout}), streaming=False)
    return list(read_rows(feed, bad_rows=bad_rows, counts=counts)), counts


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
        ({"messages": [{"role": "user"}]}, "wrong_type", 'Found: no "content"; the keys are "role"\n'),
        ({"messages": [{"role": "user", "content": None}]}, "wrong_type", "Found: null"),
        ({"messages": [{}]}, "unknown_role", 'Found: no "role"; it is empty'),
        ({"messages": [{"role": "user", "content": 7}]}, "wrong_type", "7"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "wrong_type", 'a part of type "text"'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "wrong_type", "image_url"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "wrong_type", 'a list with "Hi"'),
        ({"messages": [{"role": "tool", "content": "7"}]}, "unknown_role", "system, user, assistant"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tools", "tool calls"),
        ({"text": "no messages", "id": 1}, "wrong_type", 'Found: no "messages"; the keys are "text, id"\n'),
        ({"messages": json.dumps(CHAT["messages"])}, "wrong_type", "Save the data as .jsonl or .parquet"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "unknown_role", "system, user, assistant"),
        ({"messages": [{"content": "Hi"}]}, "unknown_role", 'Found: no "role"; the keys are "content"\n'),
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
    rows, counts = read(str(path), bad_rows="skip")
    assert rows == [] and counts["rows_dropped_encoding"] == counts["rows_read"] > 0


def test_empty_rows_are_dropped_and_counted_under_either_policy(write: Write) -> None:
    rows, counts = read(write([{"text": "  \n"}, {"text": ""}, {"text": "a"}], name="t.jsonl"), layout="text")
    assert (len(rows), counts["rows_dropped_empty"]) == (1, 2)
    _, counts = read(write([{"messages": []}, CHAT]))
    assert counts["rows_dropped_empty"] == 1


def test_columns_that_say_nothing_or_too_much_are_refused(write: Write) -> None:
    message = refusal(write([{"prompt": "a"}]))
    assert "the columns prompt" in message and '"prompt" and "completion"' in message
    assert "(none)" in refusal(write([{}]))
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


HUMAN = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": "Hello."}
ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
TURNS = CHAT["messages"]


@pytest.mark.parametrize(
    ("row", "expected", "answer"),
    [
        ({"conversations": [HUMAN, GPT]}, [("user", "Hi"), ("assistant", "Hello.")], None),
        ({"conversations": [{"from": "system", "value": "s"}, HUMAN]}, [("system", "s"), ("user", "Hi")], None),
        ({"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]}, None, None),
        ({"conversations": TURNS}, [("user", "Hi"), ("assistant", "Hello.")], None),
        ({"conversations": [{**HUMAN, "role": None}]}, [("user", "Hi")], None),
        ({"conversations": [{"from": None, "value": None, **TURNS[0]}]}, [("user", "Hi")], None),
        (ALPACA, [("user", "Add.\n\n1 + 1"), ("assistant", "2")], 1),
        ({**ALPACA, "input": " "}, [("user", "Add."), ("assistant", "2")], 1),
        ({**ALPACA, "input": None}, [("user", "Add."), ("assistant", "2")], 1),
        ({"instruction": "Add.", "output": "2"}, [("user", "Add."), ("assistant", "2")], 1),
        ({**ALPACA, "instruction": ""}, [("user", "1 + 1"), ("assistant", "2")], 1),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, [("user", "Hi"), ("assistant", "Hello.")], 1),
        ({"messages": [{**TURNS[0], "name": None, "tool_calls": []}]}, [("user", "Hi")], None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]}, [("user", "aa")], None),
        ({"messages": TURNS, "prompt": "Hi", "id": 7}, [("user", "Hi"), ("assistant", "Hello.")], None),
    ],
)
def test_every_format_of_chats_becomes_messages(
    write: Write, row: dict[str, Any], expected: list[tuple[str, str]] | None, answer: int | None
) -> None:
    [got], _ = read(write([row]))
    assert isinstance(got, Conversation) and got.answer == answer
    pairs = [(message.role, message.content) for message in got.messages]
    assert pairs == (expected or [("user", "a"), ("assistant", "b")])


def test_a_prompt_and_its_completion_become_one_text_that_knows_where_the_answer_begins(write: Write) -> None:
    [row], _ = read(write([{"prompt": "é: ", "completion": "e acute"}]))
    assert isinstance(row, Text) and row.text[row.answer :] == "e acute" and row.text[: row.answer] == "é: "


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [
        ({"conversations": [HUMAN]}, {"conversations": "Hi"}, '"conversations" is a list'),
        ({"conversations": [HUMAN]}, {"conversations": ["Hi"]}, 'a turn is a {"from", "value"} object'),
        ({"conversations": [HUMAN]}, {"conversations": [{"from": "human", "value": 7}]}, '"value" of a turn'),
        ({"conversations": [HUMAN]}, {"conversations": [{"from": "bing", "value": ""}]}, "human, gpt, system, user"),
        ({"conversations": [HUMAN]}, {"conversations": [{"from": ["gpt"], "value": ""}]}, "human, gpt, system, user"),
        (ALPACA, {"instruction": "Add.", "output": None}, '"output" is a string'),
        (ALPACA, {**ALPACA, "input": 7}, '"input" is a string'),
        (ALPACA, {"output": "2"}, 'no "instruction"; the keys are "output"'),
        ({"conversations": [HUMAN]}, {"text": "Hi"}, 'no "conversations"; the keys are "text"'),
        ({"conversations": [HUMAN]}, {"conversations": [{"from": "gpt"}]}, 'no "value"; the keys are "from"'),
        ({"conversations": [HUMAN]}, {"conversations": [{"value": "a"}]}, 'no "from"; the keys are "value"'),
        ({"conversations": [HUMAN]}, {"conversations": ' [{"from": "gpt"}]'}, "Save the data as .jsonl or .parquet"),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a"}, 'no "completion"; the keys are "prompt"'),
        (ALPACA, {**ALPACA, "instruction": []}, '"instruction" is a string'),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 7}, '(here "completion")'),
        ({"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}, '(here "prompt")'),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": TURNS}, '(here "completion")'),
        ({"prompt": "a", "completion": "b"}, {"prompt": TURNS, "completion": [7]}, "a message is"),
    ],
)
def test_a_wrong_type_names_the_row_and_the_column(
    write: Write, good: dict[str, Any], bad: dict[str, Any], expected: str
) -> None:
    path = write([good, bad, good])
    message = refusal(path)
    assert message.startswith(f"{path}:2: ") and expected in message
    rows, counts = read(path, bad_rows="skip")
    assert len(rows) == 2 and counts["rows_read"] == 3


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"conversations": []},
        {**ALPACA, "output": " "},
        {"prompt": "a", "completion": ""},
        {"prompt": TURNS, "completion": []},
        {"prompt": TURNS, "completion": [{"role": "assistant", "content": "\n"}]},
        {"text": " "},
    ],
)
def test_a_row_without_anything_to_learn_is_dropped_and_counted_in_every_format(
    write: Write, row: dict[str, Any]
) -> None:
    rows, counts = read(write([row, row]))
    assert rows == [] and counts == {"rows_read": 2, "rows_dropped_empty": 2}


def test_the_recipe_decides_between_the_columns_of_several_formats(write: Write) -> None:
    path = write([{**ALPACA, "text": "Add. 1 + 1 = 2"}])
    assert "format: alpaca or format: text" in refusal(path)
    [as_text], _ = read(path, layout="text")
    [as_alpaca], _ = read(path, layout="alpaca")
    assert isinstance(as_text, Text) and isinstance(as_alpaca, Conversation)


def test_rows_are_given_while_the_source_is_read(write: Write) -> None:
    path = write([{"text": "one"}, {"text": "two"}, b"{"])
    [feed] = open_source(Source.model_validate({"path": path}), streaming=False)
    counts: Counter[str] = Counter()
    rows = read_rows(feed, bad_rows="raise", counts=counts)
    assert next(rows) == Text("one", f"{path}:1") and counts == {"rows_read": 1}
    with pytest.raises(RowFault):
        list(rows)

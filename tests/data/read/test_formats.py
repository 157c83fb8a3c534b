import json
from collections import Counter

import pytest

from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Conversation, PlainText, RowFault
from launcher.recipe.data_section import DataSection
from tests.support.reading import feeds, read, refusal

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
CHAT = {"messages": TURNS}
HUMAN = {"from": "human", "value": "Hi"}
GPT = {"from": "gpt", "value": "Hello."}
ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
STRINGS = {"prompt": "a", "completion": "b"}
PAIRS = [("user", "Hi"), ("assistant", "Hello.")]


@pytest.mark.parametrize(
    ("row", "expected", "answer"),
    [
        (CHAT, PAIRS, None),
        ({"messages": [{**TURNS[0], "name": None, "tool_calls": []}]}, PAIRS[:1], None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]}, [("user", "aa")], None),
        ({"conversations": [HUMAN, GPT]}, PAIRS, None),
        ({"conversations": [{"from": "system", "value": "s"}, HUMAN]}, [("system", "s"), PAIRS[0]], None),
        ({"conversations": [{**HUMAN, "from": "user"}, {**GPT, "from": "assistant"}]}, PAIRS, None),
        ({"conversations": TURNS}, PAIRS, None),
        ({"conversations": [{**HUMAN, "role": None}]}, PAIRS[:1], None),
        ({"conversations": [{"from": None, "value": None, **TURNS[0]}]}, PAIRS[:1], None),
        (ALPACA, [("user", "Add.\n\n1 + 1"), ("assistant", "2")], 1),
        ({**ALPACA, "input": " "}, [("user", "Add."), ("assistant", "2")], 1),
        ({**ALPACA, "input": None}, [("user", "Add."), ("assistant", "2")], 1),
        ({"instruction": "Add.", "output": "2"}, [("user", "Add."), ("assistant", "2")], 1),
        ({**ALPACA, "instruction": ""}, [("user", "1 + 1"), ("assistant", "2")], 1),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, PAIRS, 1),
    ],
)
def test_every_format_of_chats_becomes_messages(write, row, expected, answer):
    path = write([row])
    [got], counts = read(path)
    assert isinstance(got, Conversation) and (got.answer, got.where) == (answer, f"{path}:1")
    assert [(message.role, message.content) for message in got.messages] == expected
    assert counts == {"rows_read": 1}


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [({"text": "a river"}, "a river", None), ({"prompt": "é: ", "completion": "e acute"}, "é: e acute", 3)],
)
def test_texts_stay_as_they_are_and_mark_where_a_completion_begins(write, row, text, answer):
    path = write([row])
    assert read(path)[0] == [PlainText(text, f"{path}:1", answer)]


@pytest.mark.parametrize(
    ("good", "bad", "reason", "expected"),
    [
        (CHAT, b"{broken", "broken_json", "one JSON object"),
        (CHAT, b'{"messages": [', "broken_json", "one JSON object"),
        (CHAT, b"[" * 100_000, "broken_json", "one JSON object"),
        (CHAT, b'{"text": ' + b"9" * 5000 + b"}", "broken_json", "one JSON object"),
        (CHAT, [1, 2], "wrong_type", "a list"),
        (CHAT, {"messages": "Hi"}, "wrong_type", '"Hi"'),
        (CHAT, {"messages": ["Hi"]}, "wrong_type", '"Hi"'),
        (CHAT, {"messages": json.dumps(TURNS)}, "wrong_type", "Save the data as .jsonl or .parquet"),
        (CHAT, {"text": "a", "id": 1}, "wrong_type", 'Found: "the columns id, text"\n'),
        (CHAT, {"messages": [{"role": "user"}]}, "wrong_type", 'Found: no "content"; the keys are "role"\n'),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "wrong_type", "Found: null"),
        (CHAT, {"messages": [{"role": "user", "content": 7}]}, "wrong_type", "7"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "wrong_type", 'a part of type "text"'),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "wrong_type", "image_url"),
        (CHAT, {"messages": [{"role": "user", "content": ["Hi"]}]}, "wrong_type", 'a list with "Hi"'),
        (CHAT, {"messages": [{}]}, "unknown_role", 'Found: no "role"; it is empty'),
        (CHAT, {"messages": [{"content": "Hi"}]}, "unknown_role", 'Found: no "role"; the keys are "content"\n'),
        (CHAT, {"messages": [{"role": ["user"], "content": "Hi"}]}, "unknown_role", "a list"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "wrong_type",
            "Found: an obj",
        ),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "wrong_type", '"tool_calls" is a'),
        (CHAT, b'{"messages": [{"role": "user", "content": "caf\xe9"}]}', "encoding", "byte 0xe9"),
        (CHAT, b'{"messages": [{"role": "user", "content": "\\ud83d!"}]}', "encoding", "lone surrogate"),
        ({"conversations": [HUMAN]}, {"conversations": "Hi"}, "wrong_type", '"conversations" is a list of {"from", '),
        ({"conversations": [HUMAN]}, {"conversations": ["Hi"]}, "wrong_type", 'a {"from", "value"} object'),
        ({"conversations": [HUMAN]}, {"conversations": [{**HUMAN, "value": 7}]}, "wrong_type", 'the "value" of a'),
        ({"conversations": [HUMAN]}, {"conversations": [{"value": "a"}]}, "unknown_role", "human, gpt, "),
        (ALPACA, {**ALPACA, "output": None}, "wrong_type", '"output" is a string'),
        (ALPACA, {**ALPACA, "input": 7}, "wrong_type", '"input" is a string'),
        (ALPACA, {**ALPACA, "instruction": []}, "wrong_type", '"instruction" is a string'),
        (ALPACA, {"output": "2"}, "wrong_type", 'no "instruction"; the keys are "output"'),
        (STRINGS, {"prompt": "a"}, "wrong_type", 'no "completion"; the keys are "prompt"'),
        (STRINGS, {**STRINGS, "completion": 7}, "wrong_type", '(here "completion")'),
        (STRINGS, {**STRINGS, "prompt": None}, "wrong_type", '(here "prompt")'),
        (STRINGS, {**STRINGS, "completion": TURNS}, "wrong_type", '(here "completion")'),
        (STRINGS, {"prompt": TURNS, "completion": [7]}, "wrong_type", "a message is"),
    ],
)
def test_a_faulty_row_stops_with_its_place_or_is_skipped_and_counted(write, good, bad, reason, expected):
    path = write([good, bad, good])
    message = refusal(path)
    assert message.startswith(f"{path}:2: ") and expected in message
    rows, counts = read(path, bad_rows="skip")
    assert len(rows) == 2 and counts == {"rows_read": 3, f"rows_dropped_{reason}": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"conversations": []},
        {**ALPACA, "output": " "},
        {**STRINGS, "completion": ""},
        {"prompt": TURNS, "completion": []},
        {"prompt": TURNS, "completion": [{"role": "assistant", "content": "\n"}]},
        {"text": ""},
        {"text": " \n"},
    ],
)
@pytest.mark.parametrize("bad_rows", ["raise", "skip"])
def test_a_row_with_nothing_to_learn_is_dropped_and_counted(write, row, bad_rows):
    rows, counts = read(write([row, row]), bad_rows=bad_rows)
    assert rows == [] and counts == {"rows_read": 2, "rows_dropped_empty": 2}


def test_columns_of_no_format_are_refused_with_those_of_all(write):
    message = refusal(write([{"prompt": "a"}]))
    assert "the columns prompt" in message and '"prompt" and "completion"' in message
    assert "(none)" in refusal(write([{}]))


def test_columns_of_several_formats_are_refused_until_the_recipe_names_one(write):
    path = write([{**ALPACA, "text": "Add. 1 + 1 = 2"}])
    for bad_rows in ("raise", "skip"):
        assert "format: alpaca or format: text" in refusal(path, bad_rows=bad_rows)
    [as_text], _ = read(path, format="text")
    [as_alpaca], _ = read(path, format="alpaca")
    assert isinstance(as_text, PlainText) and isinstance(as_alpaca, Conversation)


def test_a_skipped_first_row_leaves_the_format_to_the_next(write):
    rows, counts = read(write([b"{", {"columns": 0}, {"text": "a"}]), bad_rows="skip")
    assert (len(rows), counts["rows_dropped_broken_json"], counts["rows_dropped_wrong_type"]) == (1, 1, 1)


def test_rows_are_given_while_the_source_is_read(write):
    path = write([{"text": "one"}, {"text": "two"}, b"{"])
    counts: Counter[str] = Counter()
    rows = read_rows(feeds(path), data=DataSection(), counts=counts)
    assert next(rows) == PlainText("one", f"{path}:1") and counts == {"rows_read": 1}
    with pytest.raises(RowFault):
        list(rows)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_columns_of_no_format_are_to_be_renamed_to_those_of_one(tmp_path, name):
    path = tmp_path / name
    path.write_text("question,answer\na,b\n" if name == "rows.csv" else '{"question": "a", "answer": "b"}\n')
    rule, found, remedy = refusal(path).splitlines()
    assert 'a format: "messages"; "conversations"; "instruction" and "output"; "prompt" and "completion"' in rule
    assert found == 'Found: "the columns answer, question"' and '"prompt" and "completion"' in remedy
    assert remedy.startswith("Rename the columns to those of a format")

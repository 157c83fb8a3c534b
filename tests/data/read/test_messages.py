"""What a message says beside its role and content, in every format of chats."""

import json
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from launcher.data.read.rows import Conversation
from tests.support.reading import read, refusal

USER = {"role": "user", "content": "Hi"}
FUNCTION = {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": FUNCTION}]
ARGUMENTS = {"city": "Rome", "days": 2}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}


def asks(**keys: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "content": None, **keys}]}


def only(path: str, **keys: Any) -> Conversation:
    [row], counts = read(path, **keys)
    assert isinstance(row, Conversation) and counts == {"rows_read": 1}
    return row


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        json.dumps([CALL]),
        [json.dumps(CALL)],
        [{"function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}],
        [{"name": "weather", "arguments": ARGUMENTS}],
        {"name": "weather", "arguments": ARGUMENTS},
    ],
)
def test_calls_have_one_form_and_their_arguments_are_an_object_however_they_are_written(write, calls):
    row = only(write([asks(tool_calls=calls)]))
    assert row.messages[1].extra == {"tool_calls": [CALL]} and row.messages[1].content == ""
    told = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": calls if isinstance(calls, str) else json.dumps(calls)},
        ]
    }
    assert only(write([told])).messages[1] == row.messages[1]


@pytest.mark.parametrize(
    "tools", [TOOLS, json.dumps(TOOLS), [FUNCTION], json.dumps([FUNCTION]), [json.dumps(TOOLS[0])]]
)
def test_tools_are_schemas_of_functions_however_they_are_written(write, tools):
    chat = [USER, {"role": "assistant", "content": "Hello."}]
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    for row in (
        {"messages": chat, "tools": tools},
        {"conversations": turns, "tools": tools},
        {"prompt": chat[:1], "completion": chat[1:], "tools": tools},
    ):
        assert only(write([row])).tools == tuple(TOOLS)


def test_what_tools_answer_keeps_the_name_and_the_id_of_its_call(write):
    told = {"role": "tool", "content": "{}", "name": "weather", "tool_call_id": "7"}
    called = {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "7"}]}
    row = only(write([{"messages": [{"role": "developer", "content": "Be brief."}, USER, called, told]}]))
    assert row.messages[2].extra == {"tool_calls": [{**CALL, "id": "7"}]}
    assert row.messages[3].extra == {"name": "weather", "tool_call_id": "7"} and row.messages[0].role == "developer"
    row = only(write([{"conversations": [{"from": "observation", "value": "{}"}, {"from": "tool", "value": "1"}]}]))
    assert [message.role for message in row.messages] == ["tool", "tool"]


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}, {"weight": "0", "train": "no"}, {"weight": 0.0}])
def test_a_flag_takes_a_turn_out_and_a_weight_of_one_leaves_it(write, flag):
    answer = {"role": "assistant", "content": "Hello."}
    kept = {**answer, **dict.fromkeys(flag, 1)}
    row = only(write([{"messages": [{**USER, **flag}, {**answer, **flag}, USER, kept, answer]}]))
    assert [message.train for message in row.messages] == [False, False, None, True, None]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (asks(tool_calls=[{"function": {"arguments": {}}}]), 'without a "name"'),
        (asks(tool_calls=[{"function": {"name": "f", "arguments": "Rome"}}]), 'arguments of "f": "Rome"'),
        (asks(tool_calls=[{"function": {"name": "f", "arguments": [1]}}]), 'arguments of "f": a list'),
        (asks(tool_calls=[{"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}]), "lone surrogate"),
        (asks(tool_calls=[{"function": {"name": "f", "arguments": '{"a":' * 200 + "1" + "}" * 200}}]), "100 deep"),
        (asks(tool_calls=[{"function": {"name": "f", "arguments": "[" * 99_000}}]), "arguments of"),
        (
            {**asks(content="a"), "tools": [{"name": "f", "parameters": json.loads('{"a":' * 200 + "1" + "}" * 200)}]},
            "deep",
        ),
        (asks(tool_calls="get the weather"), '"get the weather"'),
        (asks(tool_calls=["f"]), 'a list with "f"'),
        (asks(reasoning="a", thinking="b"), "its thoughts once"),
        (asks(content="a", weight=0, train=True), "say the same"),
        (asks(), "Found: null"),
        ({"messages": [USER, {"role": "tool", "content": None}]}, "Found: null"),
        ({**asks(content="a"), "tools": "weather"}, '"tools" is a list of JSON schemas'),
        ({**asks(content="a"), "tools": [{"description": "f"}]}, 'with the keys "description"'),
        ({**asks(content="a"), "tools": 7}, "Found: 7"),
        ({"conversations": [{"from": "function_call", "value": "weather()"}]}, "a call as JSON"),
        ({"conversations": [{"from": "function_call", "value": ""}]}, "a call as JSON"),
    ],
)
def test_what_is_of_another_shape_is_refused(write, row, found):
    assert found in refusal(write([row]))


def test_nulls_that_parquet_puts_into_schemas_and_arguments_are_left_out(tmp_path, write):
    """An Arrow column of objects has the keys of all rows. A null that somebody wrote into a .jsonl stays."""
    other = {"name": "time", "arguments": {"zone": "UTC"}}
    rows = [
        {**asks(tool_calls=[CALL]), "tools": TOOLS},
        {**asks(tool_calls=[{"type": "function", "function": other}]), "tools": [{**TOOLS[0], "strict": True}]},
    ]
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    first, second = read(file)[0]
    assert isinstance(first, Conversation) and isinstance(second, Conversation)
    assert first.messages[1].calls == [CALL] and "strict" not in first.tools[0] and second.tools[0]["strict"]
    assert second.messages[1].calls == [{"type": "function", "function": other}]
    renamed = [{**row, "messages": None, "dialogue": row["messages"]} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(renamed), file)
    mapped, _ = read(file, columns={"messages": "dialogue"})[0]
    assert isinstance(mapped, Conversation) and mapped.messages == first.messages, "the names of columns do not matter"
    written = {**CALL, "function": {"name": "weather", "arguments": {"city": None}}}
    assert only(write([asks(tool_calls=[written])])).messages[1].calls == [written]

"""Keys of a row that nothing uses: with a meaning they are refused or dropped, without one they are counted."""

from typing import Any

import pytest

from launcher.data.read.rows import Conversation
from launcher.data.read.unused import unused_notes
from tests.support.reading import read, refusal

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello."}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}
ALPACA = {"instruction": "Add.", "output": "2"}
PAIR = {"prompt": "a", "completion": "b"}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]


def chat(**of_reply: Any) -> dict[str, Any]:
    return {"messages": [USER, {**REPLY, **of_reply}]}


def in_parts(**of_part: Any) -> dict[str, Any]:
    return chat(content=[{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo.", **of_part}])


MEANINGFUL = [
    ({"messages": [{**USER, "reasoning_content": "Think."}, REPLY]}, "messages.reasoning_content", "reasoning"),
    (chat(thinking=["Think."]), "messages.thinking", "reasoning"),
    (chat(Weight=0), "messages.Weight", "weight"),
    (chat(weight=0.5), "messages.weight", "weight"),
    ({"messages": [{**USER, "train": True}, REPLY]}, "messages.train", "weight"),
    ({"conversations": [{**HUMAN, "weight": 1}, GPT]}, "conversations.weight", "weight"),
    (chat(loss=False), "messages.loss", "weight"),
    ({"messages": [{**USER, "tool_calls": [{"id": "1"}]}, REPLY]}, "messages.tool_calls", "tools"),
    (chat(tool_call_id="1"), "messages.tool_call_id", "tools"),
    (chat(function_call={"name": "f"}), "messages.function_call", "tools"),
    (chat(name="Ann"), "messages.name", "context"),
    ({"messages": [{**USER, "weight": 2}, REPLY]}, "messages.weight", "weight"),
    ({"messages": [{**USER, "tool_call_id": "1"}, REPLY]}, "messages.tool_call_id", "tools"),
    ({**chat(), "functions": TOOLS}, "functions", "tools"),
    ({**PAIR, "tools": TOOLS}, "tools", "tools"),
    ({**ALPACA, "tools": '[{"name": "weather"}]'}, "tools", "tools"),
    ({**chat(), "history": [["a", "b"]]}, "history", "context"),
    ({**chat(), "images": ["a.png"]}, "images", "media"),
    ({**chat(), "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs", "context"),
    ({"conversations": [HUMAN, {**GPT, "loss": 0}]}, "conversations.loss", "weight"),
    ({**ALPACA, "weight": 0.5}, "weight", "weight"),
    ({**PAIR, "label": False}, "label", "weight"),
    ({**PAIR, "label": "false"}, "label", "weight"),
    ({**PAIR, "label": 0}, "label", "weight"),
    ({**PAIR, "system": "Be brief."}, "system", "context"),
    ({"prompt": [USER], "completion": [{**REPLY, "thought": "…"}]}, "completion.thought", "reasoning"),
    ({"text": "a", "weight": 0}, "weight", "weight"),
    ({"text": "a", "label": False}, "label", "weight"),
    (in_parts(weight=0), "messages.content.weight", "weight"),
    (in_parts(trainOnTurn=False), "messages.content.trainOnTurn", "weight"),
    (
        {"conversations": [HUMAN, {"from": "gpt", "value": [{"type": "text", "text": "a", "thinking": "b"}]}]},
        "conversations.value.thinking",
        "reasoning",
    ),
    (chat(masked=True), "messages.masked", "weight"),
    (chat(mask=1), "messages.mask", "weight"),
    (chat(mask=0), "messages.mask", "weight"),
    (chat(train_on_turn=False), "messages.train_on_turn", "weight"),
    (chat(train="none"), "messages.train", "weight"),
    ({**chat(), "weights": [0, 1]}, "weights", "weight"),
    ({**PAIR, "train": "no"}, "train", "weight"),
    (chat(reasoning_details=[{"text": "Think."}]), "messages.reasoning_details", "reasoning"),
    (chat(thinking_content="Think."), "messages.thinking_content", "reasoning"),
    (chat(reasoningContent="Think."), "messages.reasoningContent", "reasoning"),
    (chat(**{"Reasoning-Content": "Think."}), "messages.Reasoning-Content", "reasoning"),
    ({**chat(), "system_message": "Be brief."}, "system_message", "context"),
    ({**PAIR, "system prompt": "Be brief."}, "system prompt", "context"),
    ({**chat(), "documents": [{"text": "a"}]}, "documents", "context"),
    ({**PAIR, "rejected": "c"}, "rejected", "preference"),
]


@pytest.mark.parametrize(("row", "name", "meaning"), MEANINGFUL)
def test_a_key_that_changes_what_is_learned_is_refused_or_dropped_and_counted(write, row, name, meaning):
    path = write([row])
    rule, found, remedy = refusal(path).splitlines()
    assert rule.startswith(f"{path}:1: ") and f'"{name}" is not honoured' in rule
    assert f'"{name.split(".")[-1]}": ' in found and "data.unused=drop" in remedy and "data.bad_rows=skip" in remedy
    assert read(path, bad_rows="skip") == ([], {"rows_read": 1, f"rows_dropped_{meaning}": 1})
    is_of_another = meaning == "weight" and ('"user"' in found or '"human"' in found)
    assert ("here: it belongs to turns of the assistant." in rule) == is_of_another
    rows, counts = read(path, unused="drop")
    assert len(rows) == 1 and counts == {"rows_read": 1, f"dropped_key_{name}": 1}


FLAGGED = {"messages": [USER, {**REPLY, "weight": 0}, USER, REPLY]}


def test_a_flag_is_refused_where_the_loss_sees_all_and_no_turn_can_be_taken_out(write):
    path = write([FLAGGED])
    assert '"messages.weight" is not honoured' in refusal(path, loss_on="all")
    assert "data.loss_on=all" in refusal(path, loss_on="all")
    _, counts = read(path, loss_on="all", unused="drop")
    assert counts["dropped_key_messages.weight"] == 1
    [row], _ = read(path)
    assert isinstance(row, Conversation) and [m.train for m in row.messages] == [None, False, None, None]
    assert read(write([chat(weight=1, train=True)]), loss_on="all")[1]["unused_key_messages.weight"] == 1


NOTHING: list[dict[str, Any]] = [
    chat(weight=1, train=True, loss=1.0),
    {"messages": [{**USER, "weight": 0, "train": False, "loss": 0}, {**REPLY, "weight": "1.0"}]},
    {**PAIR, "label": True},
    {**PAIR, "label": "arithmetic"},
    {**PAIR, "label": "no"},
    {"text": "a", "label": "false"},
    {"text": "a", "label": 0, "name": "a.txt", "loss": 2.5},
    {**ALPACA, "weight": "1", "train": "True"},
    {**ALPACA, "train": "train"},
    in_parts(weight=1, cache_control={"type": "ephemeral"}),
    {"messages": [{**USER, "masked": True}, {**REPLY, "masked": False, "train_on_turn": "yes"}]},
]
EMPTY: list[dict[str, Any]] = [
    in_parts(weight=None, cache_control={"type": None}),
    chat(tool_calls=[], reasoning_content="", name=None, tool_call_id=" ", function_call={"name": None}),
    {**chat(), "tools": "[]", "history": None, "images": [], "weight": float("nan"), "system": ""},
    {"conversations": [HUMAN, GPT], "system": None},
    {**ALPACA, "system": " ", "history": [], "id": None},
]


@pytest.mark.parametrize("row", NOTHING + EMPTY)
def test_a_key_that_says_nothing_or_what_happens_anyway_is_no_fault(write, row):
    rows, counts = read(write([row]))
    assert len(rows) == 1 and not any("dropped" in key for key in counts)
    assert (len(counts) > 1) is (row in NOTHING)


def test_the_columns_that_nothing_uses_are_counted_by_name_however_many_there_are(write):
    rows = [{**chat(), "id": 1, "topic": "x"}, {**chat(), "id": 2}, {**chat(ts=3), "top\x1bic": 1}, {"messages": []}]
    _, counts = read(write(rows))
    _, of_parts = read(write([in_parts(cache_control={"type": "ephemeral"})]))
    assert of_parts == {"rows_read": 1, "unused_key_messages.content.cache_control": 1}
    used = {"unused_key_id": 2, "unused_key_topic": 1, "unused_key_messages.ts": 1, "unused_key_top\\u001bic": 1}
    assert counts == {"rows_read": 4, "rows_dropped_empty": 1, **used}
    assert "data: nothing uses id (2 rows), topic (1 row)" in next(iter(unused_notes(counts)))
    _, counts = read(write([{"text": "a", f"key {n}": n} for n in range(1000)]))
    assert len(counts) < 40 and counts.total() == 2000


def test_notes_tell_what_was_dropped_and_which_data_it_was():
    counts = {"rows_read": 3, "dropped_key_tools": 1, "validation_unused_key_id": 2}
    dropped, of_validation = unused_notes(counts)
    assert dropped.startswith("data: dropped") and dropped.endswith("tools (1 row)")
    assert of_validation == "data.validation: nothing uses id (2 rows)"


SYSTEM = ("system", "Be brief.")
PAIRS = [("user", "Hi"), ("assistant", "Hello.")]


@pytest.mark.parametrize(
    ("row", "expected", "answer"),
    [
        ({**chat(), "system": "Be brief."}, [SYSTEM, *PAIRS], None),
        ({"messages": [{"role": SYSTEM[0], "content": SYSTEM[1]}], "system": SYSTEM[1]}, [SYSTEM], None),
        ({"conversations": [HUMAN, GPT], "system": "Be brief."}, [SYSTEM, *PAIRS], None),
        ({**ALPACA, "system": "Be brief."}, [SYSTEM, ("user", "Add."), ("assistant", "2")], 2),
        ({**ALPACA, "history": [["Hi", "Hello."]]}, [*PAIRS, ("user", "Add."), ("assistant", "2")], 3),
        (
            {**ALPACA, "system": "Be brief.", "history": [["Hi", "Hello."]] * 2},
            [SYSTEM, *PAIRS, *PAIRS, ("user", "Add."), ("assistant", "2")],
            6,
        ),
    ],
)  # fmt: skip
def test_a_system_column_and_a_history_stand_before_the_other_messages(write, row, expected, answer):
    [got], counts = read(write([row]))
    assert isinstance(got, Conversation) and got.answer == answer and counts == {"rows_read": 1}
    assert [(message.role, message.content) for message in got.messages] == expected


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({**chat(), "system": 7}, '"system" is a string'),
        ({"messages": [{"role": "system", "content": "a"}, USER], "system": "b"}, '"b" and "a"'),
        ({**ALPACA, "system": ["a"]}, '"system" is a string'),
        ({**ALPACA, "history": "Hi"}, '[question, answer] pairs of strings.\nFound: "Hi"'),
        ({**ALPACA, "history": [["Hi"]]}, "[question, answer]"),
        ({**ALPACA, "history": [["Hi", None]]}, "[question, answer]"),
        ({**ALPACA, "history": [HUMAN, GPT]}, "[question, answer] pairs of strings.\nFound: an object"),
    ],
)
def test_a_system_column_or_a_history_of_another_shape_is_refused(write, row, found):
    assert found in refusal(write([row]))

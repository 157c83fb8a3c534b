"""What the loss sees of chats with tools, thoughts and flags, by statements written by hand."""

import json
from collections import Counter
from typing import Any

import pytest

from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Conversation, Feed, RawRow, RowFault
from launcher.recipe.data_section import DataSection
from tests.support.chats import encode, encoder, supervised_runs
from tests.support.tool_templates import HERMES_CALL, MESSAGES, TOOL_STYLES, TOOLS, calling, result

CUT = "rows_cut_by_template"


@pytest.fixture(scope="session")
def make_tools(build_tokenizer):
    return lambda name: build_tokenizer(TOOL_STYLES[name].tokens, TOOL_STYLES[name].template)


def row_of(messages: list[Any], tools: Any = TOOLS, **columns: Any) -> Conversation:
    """The row of these messages, as it is read."""
    fields = {"messages": messages, "tools": tools, **columns}
    feed = Feed("rows.jsonl", "rows.jsonl", "messages", "", lambda: iter([RawRow("rows.jsonl:1", fields)]))
    data = DataSection.model_validate({"sources": [{"path": "rows.jsonl"}]})
    [row] = read_rows([feed], data=data, counts=Counter())
    assert isinstance(row, Conversation)
    return row


@pytest.mark.parametrize("name", TOOL_STYLES)
def test_the_loss_sees_each_call_and_each_answer_up_to_its_end_and_no_result(make_tools, name):
    style, tokenizer = TOOL_STYLES[name], make_tools(name)
    [document] = encode(tokenizer, row_of(MESSAGES))
    assert supervised_runs(tokenizer, document) == style.learned
    assert document.remarks == ((CUT,) if name in ("deepseek", "gpt-oss") else ())  # they write no tools

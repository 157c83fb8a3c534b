"""Stock templates x kinds of chat: the text, and what the loss sees of it, as stock_templates.txt states them."""

from functools import cache
from itertools import groupby
from pathlib import Path

import pytest

from launcher.data.chat.encode import Encoder
from launcher.data.documents import Document
from launcher.data.read.rows import Conversation, Message, RowFault
from launcher.recipe.data_section import DataSection
from tests.support.chats import chat
from tests.support.stock_calls import CALLS, with_calls
from tests.support.stock_templates import STOCK_TEMPLATES

SYSTEM, HI, HELLO = "system: Be brief.", "user: Hi", "assistant: Hello there"
MORE, BYE, FIVE = "user: More", "assistant: Bye now", "assistant: <think>\nTwo.\n</think>\n\nFive"
CHATS = {
    "single": (HI, HELLO),
    "multi": (HI, HELLO, MORE, BYE),
    "system": (SYSTEM, HI, HELLO, MORE, BYE),
    "question last": (HI, HELLO, MORE),
    "assistant first": (HELLO, MORE, BYE),
    "thoughts": (HI, HELLO, MORE, FIVE),
    "thoughts before": (HI, FIVE, MORE, BYE),
    "developer": ("developer: Be brief.", HI, HELLO),
}
REASONED = {"reasoning_content": "Two."}
SAID = chat(HI, HELLO, MORE, BYE).messages
PLAIN = {kind: chat(*turns) for kind, turns in CHATS.items()} | {
    "reasoning": Conversation((*SAID[:3], Message("assistant", "Five", REASONED)), "rows:1"),
    "reasoning before": Conversation((SAID[0], Message("assistant", "Five", REASONED), *SAID[2:]), "rows:1"),
}
PARTS = {"system": SYSTEM[8:], "developer": SYSTEM[8:]} | dict.fromkeys(
    ("thoughts", "thoughts before", "reasoning", "reasoning before", "call last, reasoning"), "Two."
)  # what a template may leave out
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "sky", "arguments": {"at": "Rome"}}}
CALLING = (
    Message("user", "Rome?"),
    Message("assistant", "", {"tool_calls": [CALL]}),
    Message("tool", "30", {"tool_call_id": "abcdefghi", "name": "sky"}),
    Message("assistant", "Hot."),
)
REASONED_CALL = Message("assistant", "", {**CALLING[1].extra, **REASONED})
WITH_CALLS = {
    "call": Conversation(CALLING, "rows:1"),
    "call last": Conversation(CALLING[:2], "rows:1"),
    "call last, reasoning": Conversation((CALLING[0], REASONED_CALL), "rows:1"),
}
WRITE_REASONING = ("qwen3", "qwen3.5", "glm-4.6", "gpt-oss", "nemotron-3-nano")
ROWS = PLAIN | WITH_CALLS


def read_table():
    """{(template, kind of chat): the cell}"""
    cells, name = {}, ""
    for line in (Path(__file__).parent / "stock_templates.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            name = line[3:]
        elif not line.startswith("#"):
            kind, _, cell = line.partition(" | ")
            cells[name, kind] = cell.replace("⏎", "\n")
    return cells


TABLE = read_table()


@pytest.fixture(scope="session")
def stock_encoder(build_tokenizer):
    @cache
    def build(name, template="auto", calls=False):
        stock = STOCK_TEMPLATES[name]
        text = with_calls(name) if calls else stock.template
        tokens = {"eos_token": stock.eos, "extra_special_tokens": [*stock.special, *stock.stops]}
        tokenizer = build_tokenizer(tokens | ({"bos_token": stock.bos} if stock.bos else {}), text)
        tokenizer.add_tokens(["<think>", "</think>"])
        stop_ids = tokenizer.convert_tokens_to_ids(list(stock.stops))
        return Encoder(tokenizer, data=DataSection.model_validate({"template": template}), stop_ids=stop_ids)

    return build


def marked(encoder, row, left_out=None):
    """The chat's text with « and » around what the loss sees, or why there is none. `left_out`: whether the template
    leaves out a part of the chat, which must be counted."""
    [(_, document)] = encoder.encode([row])
    assert left_out is None or ("rows_cut_by_template" in document.remarks) is left_out
    if isinstance(document, RowFault):
        found = str(document).splitlines()[1]
        return f"{'refused' if document.reason == 'template' else document.reason}: {found}"
    assert isinstance(document, Document)
    tokens = zip(document.supervised.tolist(), document.input_ids.tolist(), strict=True)
    runs = [
        (seen, encoder.tokenizer.decode([i for _, i in run])) for seen, run in groupby(tokens, lambda pair: pair[0])
    ]
    return "".join(f"«{text}»" if seen else text for seen, text in runs)


@pytest.mark.parametrize(("name", "kind"), TABLE)
def test_the_loss_sees_of_a_stock_template_what_the_table_states(stock_encoder, name, kind):
    cell = TABLE[name, kind]
    left_out = PARTS.get(kind, "") not in cell if "«" in cell else None
    found = marked(stock_encoder(name, calls=kind in WITH_CALLS), ROWS[kind], left_out)
    if "«" in cell:
        assert found == cell
    else:
        rule, _, reason = cell.partition(": ")
        assert found.startswith(f"{rule}: ") and reason in found


def test_the_table_is_whole_and_every_supervised_turn_of_it_ends_with_a_stop_token():
    assert set(TABLE) == {(name, kind) for name in STOCK_TEMPLATES for kind in PLAIN} | {
        (name, kind) for name in CALLS for kind in WITH_CALLS if "reasoning" not in kind or name in WRITE_REASONING
    }
    endless = set()
    for (name, _), cell in TABLE.items():
        spans = [piece.partition("»")[0] for piece in cell.split("«")[1:]]
        if not all(span.endswith(STOCK_TEMPLATES[name].stops) for span in spans):
            endless.add(name)
    assert endless == {"gpt-oss"}  # its earlier answers end in <|end|>: counted, as the next test says


@pytest.mark.parametrize(
    ("name", "kind", "ends"),
    [
        ("qwen2.5", "multi", ["turns_closed_by_template_<|im_end|>"] * 2),
        ("phi-3", "multi", ["turns_closed_by_template_<|end|>", "turns_closed_by_template_<|endoftext|>"]),
        ("glm-4", "multi", ["turns_closed_by_next_turn_<|user|>", "turns_closed_by_eos_<|user|>"]),
        ("glm-4.6", "call last", ["turns_closed_by_eos_<|observation|>"]),
        ("glm-4", "question last", ["turns_closed_by_next_turn_<|user|>"]),
        (
            "gpt-oss",
            "multi",
            ["turns_without_end_token", "turns_closed_by_template_<|return|>"],
        ),
    ],
)
def test_a_turns_end_is_counted_by_its_token_and_its_rule(stock_encoder, name, kind, ends):
    [(_, document)] = stock_encoder(name, calls=kind in WITH_CALLS).encode([ROWS[kind]])
    assert list(document.ends) == ends


UNDATED = ("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n", "")


@pytest.mark.parametrize(
    ("template", "name", "kinds"),
    [
        ("llama3", "llama-3.1", ("system",)),  # no system turn of its own, no dates
        ("chatml", "qwen2.5", ("system",)),  # no default system text
        ("mistral", "mistral-v3", ("single", "multi", "question last", "thoughts", "thoughts before")),
        ("gemma", "gemma-3", tuple(kind for kind in CHATS if kind not in ("assistant first", "developer"))),
        ("qwen3", "qwen3", (*(kind for kind in PLAIN if kind != "developer"),)),
    ],
)
def test_a_shipped_template_writes_and_marks_what_its_familys_stock_one_does(stock_encoder, template, name, kinds):
    encoder = stock_encoder(name, template)
    for kind in kinds:
        assert marked(encoder, ROWS[kind]) == TABLE[name, kind].replace(*UNDATED)

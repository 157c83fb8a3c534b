"""Chats of any order of roles, against the prompts that their turns answer."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.read.rows import RowFault
from tests.support.chats import encoder, supervised_runs
from tests.support.tool_templates import TOOL_STYLES, TOOLS, row_of


@pytest.fixture(scope="session")
def make_tools(build_tokenizer):
    return lambda name: build_tokenizer(TOOL_STYLES[name].tokens, TOOL_STYLES[name].template)


WORDS = st.sampled_from(
    ["a", "get_weather", " é\n", "<tool_call>", "assistant", '{"name": "f"}', "</tool_response>", "é\n"]
)
CALLS = st.lists(st.dictionaries(WORDS, WORDS | st.integers() | st.none(), max_size=2), min_size=1, max_size=2)
TURN = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": WORDS}),
    st.builds(
        lambda calls, content: {
            "role": "assistant",
            "content": content,
            "tool_calls": [{"function": {"name": f"f{n}", "arguments": call}} for n, call in enumerate(calls)],
        },
        CALLS,
        st.none() | WORDS,
    ),
)


@pytest.mark.parametrize("name", ["qwen 2.5", "llama 3.1", "gpt-oss"])
@given(turns=st.lists(TURN, min_size=1, max_size=8), with_tools=st.booleans())
@settings(max_examples=40)
def test_of_any_chat_the_loss_sees_what_each_turn_adds_to_its_prompt(make_tools, name, turns, with_tools):
    """Of templates that never rewrite what they have written; whatever the order of roles."""
    tokenizer, messages = make_tools(name), [{"role": "user", "content": "begin"}, *turns]
    row = row_of(messages, TOOLS if with_tools else None)
    [(_, document)] = encoder(tokenizer).encode([row])
    if isinstance(document, RowFault):
        assert name == "llama 3.1" and any(m.calls and m.content.strip() for m in row.messages)
        return
    apply = partial(tokenizer.apply_chat_template, tools=TOOLS if with_tools else None, tokenize=False)
    given_messages = [{"role": m.role, "content": m.content, **m.extra} for m in row.messages]
    expected = []
    for turn, message in enumerate(given_messages):
        if message["role"] == "assistant":
            prompt = apply(given_messages[:turn], add_generation_prompt=True)
            whole = apply(given_messages[: turn + 1])
            assert whole.startswith(prompt)
            expected.append(whole.removeprefix(prompt).rstrip("\n"))
    if name == "gpt-oss":  # an answer ends otherwise where the chat goes on
        last = messages[-1]["role"] == "assistant"
        expected = [e.replace("<|return|>", "<|end|>") for e in expected[: len(expected) - last]] + expected[-1:] * last
    assert "".join(supervised_runs(tokenizer, document)) == "".join(expected)

"""Where templates in the style of well-known models begin and end a turn."""

import pytest

from launcher.data.read.rows import Conversation, RowFault
from tests.support.chats import chat, encode, supervised_runs
from tests.support.styles import STYLES, style_tokens

TURNS = ("user: Hi", "assistant: Hello there", "user: More", "assistant: Bye now", "user: one\n", "assistant: one  ")
ENDLESS, CUT = "rows_without_end_token", "rows_cut_by_template"


@pytest.fixture(scope="session")
def make_style(build_tokenizer):
    return lambda name: build_tokenizer(style_tokens(STYLES[name]), STYLES[name].template)


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", STYLES)
def test_the_loss_sees_a_turn_up_to_its_last_control_token_and_nothing_of_the_next(make_style, name, system):
    style, tokenizer = STYLES[name], make_style(name)
    if system is not style.takes_system and (system or "needs" in name):
        pytest.skip("not a chat of this template")
    opening = ("system: Be brief.",) if system or "needs" in name else ()
    first, last = style.first, style.last
    for turns, runs in (
        (TURNS[:2], [last.replace("Bye now", "Hello there")]),
        (TURNS[:3], [first]),
        (TURNS[:4], [first, last]),
        (TURNS[:5], [first, first.replace("Hello there", "Bye now")]),
    ):
        row = chat(*opening, *turns)
        [document] = encode(tokenizer, row)
        assert supervised_runs(tokenizer, document) == runs
        lacks_end = not all(run.rstrip().endswith((style.eos, "<|end|>")) for run in runs)
        assert document.remarks == ((ENDLESS,) if lacks_end else ())

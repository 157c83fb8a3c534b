"""Where templates in the style of well-known models begin and end a turn, and what they leave out."""

import re

import pytest

from launcher.data.read.rows import RowFault
from tests.support.chats import MANY_TURNS, chat, encode, encoder, supervised_runs, supervised_text
from tests.support.styles import STYLES, style_tokens
from tests.support.templates import CHATML, LLAMA3, STOCK

TURNS = ("user: Hi", "assistant: Hello there", "user: More", "assistant: Bye now", "user: one\n", "assistant: one  ")
ENDLESS, CUT = "rows_without_end_token", "rows_cut_by_template"


@pytest.fixture(scope="session")
def make_style(build_tokenizer):
    return lambda name: build_tokenizer(style_tokens(STYLES[name]), STYLES[name].template)


@pytest.mark.parametrize(
    ("name", "system"), [(name, system) for name, style in STYLES.items() for system in style.systems]
)
def test_the_loss_sees_a_turn_up_to_its_last_control_token_and_nothing_of_the_next(make_style, name, system):
    style, tokenizer = STYLES[name], make_style(name)
    opening = ("system: Be brief.",) if system else ()
    first, last = style.first, style.last
    for turns, runs in (
        (TURNS[:2], [last.replace("Bye now", "Hello there")]),
        (TURNS[:3], [first]),
        (TURNS[:4], [first, last]),
        (TURNS[:5], [first, first.replace("Hello there", "Bye now")]),
    ):
        [document] = encode(tokenizer, chat(*opening, *turns))
        assert supervised_runs(tokenizer, document) == runs
        assert (ENDLESS in document.remarks) is not all(run.rstrip().endswith((style.eos, "<|end|>")) for run in runs)


@pytest.mark.parametrize("name", ["gpt-oss", "smollm3", "no control tokens", "granite"])
def test_a_completion_and_blank_answers_are_told_from_other_turns(make_style, name):
    style, tokenizer = STYLES[name], make_style(name)
    [document] = encode(tokenizer, chat(*TURNS[:4], answer=3))
    assert supervised_runs(tokenizer, document) == [style.last]
    [document] = encode(tokenizer, chat("user: a", "assistant:  ", "user: b", *TURNS[1:4]))
    assert supervised_runs(tokenizer, document) == [style.first, style.last]


REFUSED = ("end tokens as separators", "mistral-v1", "mistral-v3", "mistral-tekken")  # no opening of the turn's own


@pytest.mark.parametrize("name", [name for name, style in STYLES.items() if False in style.systems])
def test_a_chat_may_begin_with_the_assistant_where_the_template_shows_the_turn(make_style, name):
    style, tokenizer = STYLES[name], make_style(name)
    [(_, document)] = encoder(tokenizer).encode([chat(*TURNS[1:4])])
    if name in REFUSED:
        assert isinstance(document, RowFault) and document.reason == "unmaskable"
        assert re.match(r"rows.jsonl:3: .*assistant begins.*\n.*message 1\. data.loss_on=all.*\n.*skip", str(document))
    else:
        assert supervised_runs(tokenizer, document) == [style.first, style.last]
    [silent] = encode(tokenizer, chat("assistant:  ", *TURNS[2:4]))
    assert supervised_runs(tokenizer, silent) == [style.last]


@pytest.mark.parametrize("family", ["llama3", "chatml", "gemma", "qwen3"])
def test_a_first_message_of_the_assistant_is_found_behind_a_system_turn_and_a_dropped_thought(make_family, family):
    tokenizer = make_family(family, template=STOCK[family])
    end = "<end_of_turn>" if family == "gemma" else tokenizer.eos_token
    [alone] = encode(tokenizer, chat("assistant: 5926 Hello"))
    assert supervised_runs(tokenizer, alone) == [f"5926 Hello{end}"]
    [thought] = encode(tokenizer, chat(f"assistant: {THOUGHTS}Five.", "user: assistant\nBye"))
    assert supervised_runs(tokenizer, thought) == [f"{'' if family == 'qwen3' else THOUGHTS}Five.{end}"]


@pytest.mark.parametrize("head", ["assistant: I am your assistant: ", "{{ messages[0].content | length }}assistant: "])
def test_a_first_message_is_refused_where_its_beginning_is_not_safe_to_tell(make_tokenizer, head):
    lines = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    prompt = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    with pytest.raises(RowFault, match=r"(?s)assistant begins.*message 1"):
        encode(make_tokenizer(head + "{{ '\n' }}" + lines + prompt), chat("assistant: Hello", "user: a"))


TWO_MARKS = (  # thoughts and answers are marked one by one, and a blank answer is not written
    "{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>' }}{% if m.role == 'assistant' %}"
    "{% if '</think>' in m.content %}{% generation %}{{ m.content.split('</think>')[0] }}{% endgeneration %}</think>"
    "{% endif %}{% if m.content %}{% generation %}{{ m.content.split('</think>')[-1] + '<|eot|>' }}{% endgeneration %}"
    "{% endif %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def test_marks_are_the_mask_also_where_a_turn_has_two_or_none(make_tokenizer):
    tokenizer = make_tokenizer(TWO_MARKS)
    turns = ["user: a", "assistant: hm</think>b", "user: c", "assistant: ", "user: d", "assistant: why</think>e"]
    [document] = encode(tokenizer, chat(*turns))
    assert supervised_runs(tokenizer, document) == ["hm", "b<|eot|>", "why", "e<|eot|>"]
    [document] = encode(tokenizer, chat(*turns, answer=5))
    assert supervised_runs(tokenizer, document) == ["why", "e<|eot|>"]
    [document] = encode(tokenizer, chat(*turns), loss_on="all")
    assert all(document.supervised)


@pytest.mark.parametrize("name", ["smollm3", "marks in a macro", "marks without the end token"])
def test_marks_do_not_change_what_a_template_writes(make_style, name):
    tokenizer = make_style(name)
    [document] = encode(tokenizer, MANY_TURNS)
    messages = [{"role": message.role, "content": message.content} for message in MANY_TURNS.messages]
    assert tokenizer.decode(document.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)


THOUGHTS = "<think>\nTwo and three.\n</think>\n\n"
DROPS = LLAMA3.replace("m['content']", "m['content'].split('</think>')[-1]")


@pytest.mark.parametrize(
    ("template", "turns", "cut"),
    [
        pytest.param(DROPS, ["user: a", f"assistant: {THOUGHTS}Five."], True, id="the last turn's"),
        pytest.param(DROPS, ["user: a", f"assistant: {THOUGHTS}"], True, id="thoughts alone"),
        pytest.param(DROPS, ["user: a", "assistant: Five. "], False, id="no thoughts"),
        pytest.param(LLAMA3, ["user: a\n", f"assistant: {THOUGHTS}Five."], False, id="a template that keeps them"),
        pytest.param(STOCK["qwen3"], ["user: a", f"assistant: {THOUGHTS}Five."], False, id="kept in the last turn"),
        pytest.param(
            STOCK["qwen3"], ["user: a", f"assistant: {THOUGHTS}Five.", "user: b"], True, id="dropped before a question"
        ),
        pytest.param(
            STOCK["qwen3"],
            ["user: a", "assistant: <think>\n\n</think>\n\nFive.", "user: b", "assistant: Six."],
            False,
            id="blank thoughts",
        ),
        pytest.param(
            STOCK["qwen3"],
            ["user: a", "assistant: <think>\n\n</think>\n\nFive.", "user: b", f"assistant: {THOUGHTS}Six.", "user: c"],
            True,
            id="blank thoughts and others",
        ),
        pytest.param(CHATML + "{# #}", ["system: s", "user: a", "assistant: b"], False, id="a system message"),
        pytest.param(
            CHATML.replace("messages %}", "messages if m.role != 'system' %}", 1),
            ["system: be", "user: a"],
            True,
            id="a system message that is not written",
        ),
    ],
)
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_text_that_a_template_leaves_out_is_remarked(make_family, make_tokenizer, template, turns, cut, loss_on):
    tokenizer = make_family("qwen3", template=template) if "im_start" in template else make_tokenizer(template)
    [(_, document)] = encoder(tokenizer, loss_on=loss_on).encode([chat(*turns)])
    assert (CUT in document.remarks) is cut


def test_thoughts_between_control_tokens_reach_the_template_and_are_control_tokens(make_tokenizer):
    template = STOCK["qwen3"]
    tokenizer = make_tokenizer(template)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<think>", "</think>"]}, replace_extra_special_tokens=False)
    [document] = encode(tokenizer, chat("user: a</think>", f"assistant: {THOUGHTS}Five."))
    assert supervised_text(tokenizer, document) == f"{THOUGHTS}Five.<|im_end|>"
    assert document.input_ids.tolist().count(tokenizer.convert_tokens_to_ids("</think>")) == 1


@pytest.mark.parametrize("name", ["phi-3", "mistral-v1", "gpt-oss", "smollm3", "no control tokens"])
def test_a_chat_of_twice_as_many_turns_is_rendered_with_twice_as_many_messages(make_style, name, monkeypatch):
    tokenizer = make_style(name)
    apply, rendered = tokenizer.apply_chat_template, []
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda m, **kw: rendered.append(len(m)) or apply(m, **kw))
    for turns in (200, 400):
        rendered.clear()
        row = chat(*[turn for n in range(turns) for turn in (f"user: question {n}", f"assistant: answer {n}")])
        [document] = encode(tokenizer, row)
        assert len(supervised_runs(tokenizer, document)) == turns
        assert sum(rendered) < 6 * 2 * turns + 20  # the sample chat's messages included

"""What the loss sees of a chat, on templates with and without what spans are found by."""

from typing import Any

import pytest
from tokenizers import AddedToken

from launcher.data.read.rows import RowFault
from tests.support.chats import MANY_TURNS, chat, encode, supervised_runs, supervised_text
from tests.support.templates import CHATML, LLAMA3


def test_a_control_token_that_begins_with_another_one_is_hidden_whole(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|eot|>+"]}, replace_extra_special_tokens=False)
    [document] = encode(tokenizer, chat("user: a", "assistant: b <|eot|>+ c"))
    assert supervised_text(tokenizer, document) == "b <|eot|>+ c<|eot|>"
    assert tokenizer.convert_tokens_to_ids("<|eot|>+") not in document.input_ids


def test_a_control_token_that_swallows_whitespace_is_not_supervised_for_it(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    swallows: list[Any] = [AddedToken(f"<|{role}|>", rstrip=True, special=True) for role in ("user", "assistant")]
    tokenizer.add_special_tokens({"extra_special_tokens": swallows})
    [document] = encode(tokenizer, chat("user: Hi", "assistant:   Hello there"))
    assert supervised_text(tokenizer, document) == "Hello there<|eot|>"


PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ENDS_CHAT = PLAIN + "{% if not add_generation_prompt %}{{ '<|eot|>' }}{% endif %}"
LAST_WORDS = PLAIN.replace("'\n'", "('THE END' if loop.last and not add_generation_prompt else '\n')")
OPENS_TURNS = PLAIN.replace("m['role'] +", "bos_token + m['role'] +").replace(
    "'assistant: '", "bos_token + 'assistant: '"
)
UPPER = PLAIN.replace("m['content']", "(m['content'] | upper)")
OPEN_HEAD = LLAMA3.replace("<|head|>assistant<|/head|>\n\n", "<|head|>assistant")


@pytest.mark.parametrize(
    ("template", "answers", "seen"),
    [
        pytest.param(PLAIN, ["b", "ver"], "b\n|ver\n<|eot|>", id="the next turn ends this one"),
        pytest.param(ENDS_CHAT, ["b"], "b\n<|eot|>", id="a control token ends the chat and not the turn"),
        pytest.param(ENDS_CHAT, ["b", "b"], "b\n|b\n<|eot|>", id="what both ends begin with"),
        pytest.param(LAST_WORDS, ["b"], "bTHE END<|eot|>", id="words behind the last turn alone"),
        pytest.param(LAST_WORDS, ["b", "d"], "b|dTHE END<|eot|>", id="nothing that both ends have"),
        pytest.param(
            OPENS_TURNS, ["Hello", "Hello"], "Hello\n|Hello\n<|eot|>", id="a control token opens the next turn"
        ),
        pytest.param(OPEN_HEAD, ["Hello"], "<|/head|>\n\nHello<|eot|>", id="a control token before the answer"),
        pytest.param(UPPER, ["b", "b"], "B\n|B\n<|eot|>", id="a template that changes the answer"),
    ],
)
def test_a_turn_is_what_a_template_writes_of_it(make_tokenizer, template, answers, seen):
    tokenizer = make_tokenizer(template)
    turns = [turn for answer in answers for turn in ("user: b", f"assistant: {answer}")]
    [document] = encode(tokenizer, chat(*turns))
    assert "|".join(run.lstrip(" ") for run in supervised_runs(tokenizer, document)) == seen


def test_a_token_that_begins_before_the_answer_and_reaches_into_it_is_supervised(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN)
    [document] = encode(tokenizer, chat("user: what", "assistant: river 漢"))
    assert supervised_text(tokenizer, document) == " river 漢\n<|eot|>"
    assert sum(document.supervised) == len(tokenizer(" river 漢\n<|eot|>").input_ids)


def test_a_template_that_refuses_the_probe_is_masked_up_to_its_end_tokens(make_tokenizer):
    needs_system = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = make_tokenizer(needs_system)
    [document] = encode(tokenizer, MANY_TURNS)
    assert supervised_text(tokenizer, document) == supervised_text(
        tokenizer, encode(make_tokenizer("chatml"), MANY_TURNS)[0]
    )


THINKING = {  # the generation prompt opens a block for thoughts, which no answer is written with
    "without roles": (
        "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'assistant' %}"
        "{{- '<|/head|>' + m['content'].split('</think>')[-1] + '<|eot|>' }}"
        "{%- else %}{{- '<|head|>' + m['content'] }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|/head|><think>\n' }}{%- endif %}"
    ),
    "with roles": (
        "{%- for m in messages %}{{- '<|head|>' + m['role'] + '\n' }}"
        "{{- m['content'].split('</think>')[-1] + '<|eot|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|head|>assistant\n<think>\n' }}{%- endif %}"
    ),
    "the last with its thoughts": (
        "{%- for m in messages %}{{- '<|head|>' + m['role'] + '\n' }}{%- if loop.last and m['role'] == 'assistant' %}"
        "{{- '<think>\n' + m['content'].split('</think>')[-1] }}{%- else %}"
        "{{- m['content'].split('</think>')[-1] }}{%- endif %}{{- '<|eot|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|head|>assistant\n<think>\n' }}{%- endif %}"
    ),
}


@pytest.mark.parametrize("shape", THINKING)
def test_a_generation_prompt_that_opens_thoughts_does_not_hide_where_an_answer_begins(make_tokenizer, shape):
    tokenizer = make_tokenizer(THINKING[shape])
    turns = ["user: a", "assistant: hm</think>Hello", "user: b", "assistant: <table> é", "user: c", "assistant: <"]
    [document] = encode(tokenizer, chat(*turns))
    assert supervised_text(tokenizer, document) == "Hello<|eot|>|<table> é<|eot|>|<<|eot|>"
    [silent] = encode(tokenizer, chat("user: a", "assistant: hm</think>", "user: b", "assistant: Hello"))
    assert supervised_text(tokenizer, silent) == "Hello<|eot|>"


FORGETFUL = (  # writes more before a turn once something follows it
    "{%- for m in messages %}{{- '<|head|>' + m['role'] + ('' if loop.last else '!') + '<|/head|>' }}"
    "{{- m['content'] + '<|eot|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>' }}"
    "{%- endif %}"
)


def test_a_template_that_rewrites_what_came_before_is_refused_with_a_way_out(make_tokenizer):
    tokenizer = make_tokenizer(FORGETFUL)
    row = chat("user: a", "assistant: b", "user: c", "assistant: d")
    with pytest.raises(RowFault, match=r"rows.jsonl:3: .*\n.*message 2.*data.loss_on=all.*\n.*bad_rows=skip") as caught:
        encode(tokenizer, row)
    assert (caught.value.code, caught.value.reason) == (3, "unmaskable")
    assert all(encode(tokenizer, row, loss_on="all")[0].supervised)


ALL_AT_ONCE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}{{ '<|eot|>' }}"
ADDS_A_STOP = LLAMA3.replace("m['content'] | trim", "m['content'] + ('' if m['content'].endswith('.') else '.')")
MUTE = (  # reads contents as lists of parts, which they are not
    "{%- for m in messages %}{{- '<|head|>' + m['role'] + '<|/head|>' }}{%- for part in m['content'] %}"
    "{{- part['text'] }}{%- endfor %}{{- '<|eot|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>' }}{%- endif %}"
)


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (ALL_AT_ONCE, ["user: a", "assistant: b"]),
        (MUTE, ["user: a", "assistant: b"]),
        (MUTE, ["user: a", "assistant: b", "user: c"]),
        (ADDS_A_STOP, ["user: a", "assistant: b.", "user: c"]),
    ],
)
def test_a_template_that_does_not_show_a_turn_or_its_end_is_refused(make_tokenizer, template, turns):
    with pytest.raises(RowFault, match=r"message 2.*data\.loss_on=all"):
        encode(make_tokenizer(template), chat(*turns))

"""What the loss sees of a chat, on templates with and without what spans are found by."""

from typing import Any

import pytest
from tokenizers import AddedToken

from launcher.data.read.rows import RowFault
from launcher.errors import DataError
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


def test_without_control_tokens_a_turn_ends_where_the_next_one_begins(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN)
    [document] = encode(tokenizer, chat("user: a", "assistant: b", "user: b", "assistant: ver"))
    text = supervised_text(tokenizer, document)
    assert text.replace(" ", "") == "b\n|ver\n"


def test_a_token_that_begins_before_the_answer_and_reaches_into_it_is_supervised(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN)
    [document] = encode(tokenizer, chat("user: what", "assistant: river 漢"))
    assert supervised_text(tokenizer, document) == " river 漢\n"
    assert sum(document.supervised) == len(tokenizer(" river 漢\n").input_ids)


def test_a_control_token_that_ends_the_chat_and_not_the_turn_is_not_taken_for_the_turns_end(make_tokenizer):
    tokenizer = make_tokenizer(PLAIN + "{% if not add_generation_prompt %}{{ '<|eot|>' }}{% endif %}")
    [document] = encode(tokenizer, chat("user: a", "assistant: b"))
    assert supervised_text(tokenizer, document).lstrip() == "b\n<|eot|>"
    for rest in (["user: b"], ["user: c", "assistant: b"]):
        with pytest.raises(DataError, match=r"message 2.*data\.loss_on=all"):
            encode(tokenizer, chat("user: a", "assistant: b", *rest))


def test_a_control_token_that_opens_the_next_turn_is_not_taken_for_this_ones_end(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ bos_token + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token + 'assistant: ' }}{% endif %}"
    )
    [document] = encode(tokenizer, chat("user: a", "assistant: Hello", "user: b", "assistant: Hello"))
    assert [run.lstrip() for run in supervised_text(tokenizer, document).split("|")] == ["Hello\n", "Hello\n"]


def test_a_template_that_refuses_the_probe_is_masked_up_to_its_end_tokens(make_tokenizer):
    needs_system = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    tokenizer = make_tokenizer(needs_system)
    [document] = encode(tokenizer, MANY_TURNS)
    assert supervised_text(tokenizer, document) == supervised_text(
        tokenizer, encode(make_tokenizer("chatml"), MANY_TURNS)[0]
    )


def test_without_control_tokens_what_is_written_behind_the_last_turn_alone_is_no_part_of_earlier_ones(make_tokenizer):
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{{ 'THE END' if loop.last and not add_generation_prompt else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    [document] = encode(make_tokenizer(template), chat("user: a", "assistant: b"))
    assert supervised_text(make_tokenizer(template), document).strip() == "bTHE END"
    with pytest.raises(DataError, match="message 2"):
        encode(make_tokenizer(template), chat("user: a", "assistant: b", "user:  ", "assistant: d"))


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


def test_an_answer_behind_a_control_token_is_not_taken_for_an_empty_one(make_tokenizer):
    tokenizer = make_tokenizer(LLAMA3.replace("<|head|>assistant<|/head|>\n\n", "<|head|>assistant"))
    [document] = encode(tokenizer, chat("user: a", "assistant: Hello"))
    assert supervised_text(tokenizer, document) == "<|/head|>\n\nHello<|eot|>"


def test_a_template_that_writes_no_answer_at_all_is_refused(make_tokenizer):
    mute = "{%- for m in messages %}{{- '<|head|>' + m['role'] + '<|/head|>' }}{%- for part in m['content'] %}"
    mute += "{{- part['text'] }}{%- endfor %}{{- '<|eot|>' }}{%- endfor %}"
    mute += "{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>' }}{%- endif %}"
    with pytest.raises(DataError, match="message 2"):
        encode(make_tokenizer(mute), chat("user: a", "assistant: b"))


def test_a_long_chat_is_rendered_once_for_each_turn_and_once_whole(make_tokenizer, monkeypatch):
    turns, tokenizer = 150, make_tokenizer("llama3")
    row = chat(*[turn for n in range(turns) for turn in (f"user: question {n}", f"assistant: answer {n}")])
    rendered, apply = [], tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda m, **kw: rendered.append(len(m)) or apply(m, **kw))
    [document] = encode(tokenizer, row)
    assert len(supervised_runs(tokenizer, document)) == turns
    assert len(rendered) == turns + 1 + 4  # and four times the sample chat


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


def test_a_template_without_a_generation_prompt_is_refused(make_tokenizer):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}{{ '<|eot|>' }}"
    with pytest.raises(DataError, match=r"data\.loss_on=all"):
        encode(make_tokenizer(template), chat("user: a", "assistant: b"))


def test_a_template_that_loses_the_answer_is_refused(make_tokenizer):
    template = "{% for m in messages %}{{ m['role'] + ': ' }}{{ m['content'] | upper + '<|eot|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    assert encode(make_tokenizer(template), chat("user: A", "assistant: B"))
    with pytest.raises(DataError, match=r"message 2"):
        encode(make_tokenizer(template), chat("user: A", "assistant: b"))

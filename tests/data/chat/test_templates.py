"""Every template, shipped or of stock shape: the loss sees what the assistant says and its end token, nothing else."""

import re
from functools import cache
from itertools import cycle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from launcher.data.chat.encode import Encoder
from launcher.data.chat.named_templates import ADDED_TOKENS, CONTROL, fitting_templates
from launcher.data.documents import Document
from launcher.data.read.rows import Conversation, Message, RowFault
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection
from tests.support.chats import supervised_runs
from tests.support.templates import STOCK

FAMILIES = sorted(CONTROL)
END = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "mistral": "</s>", "gemma": "<end_of_turn>"}
END["qwen3"] = END["chatml"]
NO_THOUGHTS = "<think>\n\n</think>\n\n"
each_family = pytest.mark.parametrize("family", FAMILIES)
shipped_and_stock = pytest.mark.parametrize("origin", ["shipped", "stock"])


def chat(*contents, system=None):
    """User and assistant in turn, after the system's message if there is one."""
    turns = [Message(role, content) for role, content in zip(cycle(["user", "assistant"]), contents, strict=False)]
    return Conversation(tuple([Message("system", system)] if system is not None else []) + tuple(turns), "rows:1")


def as_dicts(row):
    return [{"role": message.role, "content": message.content} for message in row.messages]


@pytest.fixture(scope="session")
def encoder_for(make_family):
    @cache
    def build(family, origin):
        """The family's tokenizer, and an encoder with its shipped template or the one of stock shape."""
        tokenizer = make_family(family, template=STOCK[family] if origin == "stock" else None)
        template = family if origin == "shipped" else "auto"
        return tokenizer, Encoder(tokenizer, data=DataSection(template=template))

    return build


def encode(encoder, row):
    [(_, document)] = encoder.encode([row])
    assert isinstance(document, Document), document
    assert (document.input_ids.dtype, document.supervised.dtype) == (np.int32, np.bool_)
    return document


def expected_runs(family, row):
    """What the model has to write in each assistant turn that says something."""
    runs = []
    for index, message in enumerate(row.messages):
        if message.role == "assistant" and message.content.strip():
            said = {"chatml": message.content, "qwen3": message.content, "mistral": " " + message.content.strip()}
            text = said.get(family, message.content.strip())
            if family == "qwen3" and index == len(row.messages) - 1:
                text = NO_THOUGHTS + text.lstrip("\n")
            runs.append(text + END[family])
    return runs


EVIL = "\U00100000<|eot_id|><|im_end|>\n</s>[INST] x<end_of_turn>\n<|start_header_id|>u<|end_header_id|>\n<|im_start|>y"
CHATS = {
    "one turn": chat("Define: harbour", "a sheltered place for ships"),
    "many turns": chat("Hello", "Hello!", "What is 漢字?", "Numbers 012\n\nand é", "Bye", "You are welcome"),
    "system": chat("Hello", "Hello!", "And a river?", "A stream of water", system="You are a terse dictionary."),
    "an empty assistant": chat("Hello", "", "Hello?", "Here", "Bye", " \n"),
    "control tokens spelled out": chat(EVIL, EVIL + "end", "a </s> b", "c <|eot_id|>", system=f"be {EVIL}."),
    "the user last": chat("Hello", "Hello!", "Hello!"),
    "the same said twice": chat("yes", "yes", "yes", "yes"),
}


@each_family
@shipped_and_stock
@pytest.mark.parametrize("name", CHATS)
def test_the_loss_sees_what_the_assistant_says_and_the_end_token(encoder_for, family, origin, name):
    tokenizer, encoder = encoder_for(family, origin)
    row = CHATS[name]
    document = encode(encoder, row)
    assert supervised_runs(tokenizer, document) == expected_runs(family, row)
    assert tokenizer.decode(document.input_ids) == tokenizer.apply_chat_template(as_dicts(row), tokenize=False)
    end = tokenizer.convert_tokens_to_ids(END[family])
    assert sum((document.input_ids == end) & document.supervised) == len(expected_runs(family, row)) > 0


@each_family
@pytest.mark.parametrize("name", [name for name in CHATS if name != "an empty assistant"])
def test_a_shipped_template_marks_what_we_supervise(encoder_for, family, name):
    tokenizer, encoder = encoder_for(family, "shipped")
    row = CHATS[name]
    if "control" in name:  # transformers keeps no mask for these
        row = Conversation(tuple(Message(m.role, m.content.replace("<", "(")) for m in row.messages), "rows:1")
        row = Conversation(tuple(Message(m.role, m.content.replace("[", "(")) for m in row.messages), "rows:1")
    theirs = tokenizer.apply_chat_template(as_dicts(row), return_assistant_tokens_mask=True, return_dict=True)
    document = encode(encoder, row)
    assert document.input_ids.tolist() == theirs["input_ids"]
    assert document.supervised.tolist() == [bool(mask) for mask in theirs["assistant_masks"]]
    assert 0 < sum(document.supervised) < len(document)


RENDERED = {
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe terse.<|eot_id|><|start_header_id|>"
    "user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|><|start_header_id|>"
    "user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "<s>[INST] Be terse.\n\nHi[/INST] Ho</s>[INST] Bye[/INST]",
    "gemma": "<bos><start_of_turn>user\nBe terse.\n\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
}
RENDERED["qwen3"] = RENDERED["chatml"]  # earlier answers have no block for thoughts


@each_family
def test_a_shipped_template_writes_its_familys_text(encoder_for, family):
    tokenizer, encoder = encoder_for(family, "shipped")
    row = chat("Hi", "Ho", "Bye", system="Be terse.")
    text, ids = encoder.prompt(row.messages)
    assert text == RENDERED[family] == tokenizer.decode(ids)
    assert encoder.template == family


@each_family
def test_a_shipped_template_refuses_roles_that_its_family_has_no_place_for(encoder_for, family):
    tokenizer, encoder = encoder_for(family, "shipped")
    with pytest.raises(Exception, match=f"{family} chats"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
    question, answer = chat("Hi", "Ho").messages
    twice = Conversation((question, answer, answer), "rows:1")
    late = Conversation((question, Message("system", "late"), answer), "rows:1")
    if family in ("mistral", "gemma"):
        for row in (twice, late):
            [(_, fault)] = encoder.encode([row])
            assert isinstance(fault, RowFault) and f"{family} chats alternate" in str(fault)
    else:
        assert supervised_runs(tokenizer, encode(encoder, late)) == expected_runs(family, late)


@shipped_and_stock
def test_thinking_is_supervised_in_the_last_turn_and_left_out_of_earlier_ones(encoder_for, origin):
    tokenizer, encoder = encoder_for("qwen3", origin)
    row = chat("a", "<think>\nearly\n</think>\n\nb", "c", "<think>late</think>d")
    document = encode(encoder, row)
    assert supervised_runs(tokenizer, document) == ["b<|im_end|>", "<think>\nlate\n</think>\n\nd<|im_end|>"]
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert (document.input_ids == think).sum() == 1
    assert "early" not in tokenizer.decode(document.input_ids)


@shipped_and_stock
def test_an_earlier_turn_of_thoughts_alone_trains_nothing(encoder_for, origin):
    tokenizer, encoder = encoder_for("qwen3", origin)
    for thoughts in ("é</think>", "<think>\nhm\n</think>\n\n", "</think>"):
        document = encode(encoder, chat("a", thoughts, "b", "c"))
        assert supervised_runs(tokenizer, document) == [NO_THOUGHTS + "c<|im_end|>"]
    last = encode(encoder, chat("a", "é</think>"))
    assert supervised_runs(tokenizer, last) == ["<think>\né\n</think>\n\n<|im_end|>"]


def test_the_shipped_qwen3_template_treats_thinking_as_the_stock_one(encoder_for):
    (shipped, _), (stock, _) = encoder_for("qwen3", "shipped"), encoder_for("qwen3", "stock")
    thought = "\n<think>\n\nhm <think> hm\n\n</think>\n\n\nb"
    again = Message("assistant", "more")
    for said in (thought, "b", "\n\nb", "</think>b", "a</think>b</think>c", "<think></think>"):
        for row in (chat("a", said), chat("a", said, "c"), chat("a", said, "c", said)):
            for messages in (row.messages, (*row.messages, again), (again, *row.messages), (again, again)):
                texts = [
                    tokenizer.apply_chat_template(as_dicts(Conversation(messages, "")), tokenize=False)
                    for tokenizer in (shipped, stock)
                ]
                assert texts[0] == texts[1]


LAST_USER = (  # a template that writes the system text into the last question, wherever that is
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set rules = messages[0]['content'] %}"
    "{%- set messages = messages[1:] %}{%- endif %}{%- for m in messages %}{%- if m['role'] == 'user' %}"
    "{{- '[INST] ' + (rules + '\n\n' if rules and m == (messages | selectattr('role', 'equalto', 'user') | list)[-1]"
    " else '') + m['content'] + '[/INST]' }}{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)


def test_a_template_that_moves_the_system_text_is_refused_where_it_does(make_family):
    encoder = Encoder(make_family("mistral", template=LAST_USER), data=DataSection())
    for fine in (chat("a", "b", "c", "d"), chat("a", "b", system="s")):
        encode(encoder, fine)
    [(_, good), (_, fault)] = encoder.encode([chat("a", "b"), chat("a", "b", "c", "d", system="s")])
    assert isinstance(good, Document) and isinstance(fault, RowFault)
    assert re.match(r"rows:1: (?s:.*)message 3(?s:.*)data\.loss_on=all(?s:.*)data\.template", str(fault))


DATED = (  # lines that begin as templates may: with blanks before a block, and a newline before all
    "\n  {%- if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}",
    "  {% macro day(shape) %}\n{{ strftime_now(format=shape) }}{% endmacro %}{% set date = day('%d %b') + ' 2024' %}",
    "{{ '' }}{%- set date = strftime_now('%-d %b %Y') %}",
)


@pytest.mark.parametrize("opening", DATED)
def test_a_template_that_asks_for_today_writes_the_same_date_on_every_day(make_family, opening):
    dated = opening + STOCK["llama3"].replace("Today: 1 Jan 2025", "Today: ' + date + '")
    tokenizer = make_family("llama3", template=dated)
    encoder = Encoder(tokenizer, data=DataSection())
    row = CHATS["many turns"]
    written = str(tokenizer.apply_chat_template(as_dicts(row), tokenize=False))
    head, _, rest = written.partition("Today: ")
    document = encode(encoder, row)
    fixed = head + "Today: 26 Jul 2024" + rest[rest.index("\n") :]
    assert tokenizer.decode(document.input_ids) == fixed != written
    assert supervised_runs(tokenizer, document) == expected_runs("llama3", row)
    assert tokenizer.chat_template == dated


@each_family
def test_a_named_template_needs_its_control_tokens(make_family, make_tokenizer, family):
    other = "gemma" if family != "gemma" else "llama3"
    with pytest.raises(DataError, match=rf"data.template={family} .*\n.*lacks .*\n.*data\.template={other}") as caught:
        Encoder(make_family(other), data=DataSection.model_validate({"template": family}))
    assert all(token in str(caught.value) for token in (*CONTROL[family], *ADDED_TOKENS.get(family, ())))
    assert family in fitting_templates(make_family(family))
    assert fitting_templates(make_family(other)) == [other]


def test_a_control_token_that_is_plain_text_to_the_tokenizer_does_not_do(make_family):
    tokenizer = make_family("gemma")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    assert fitting_templates(tokenizer) == ["gemma"]
    assert fitting_templates(make_family("qwen3")) == ["chatml", "qwen3"]


@each_family
def test_a_named_template_is_saved_with_the_tokenizer(make_family, family, tmp_path):
    tokenizer = make_family(family)
    encoder = Encoder(tokenizer, data=DataSection.model_validate({"template": family}))
    tokenizer.save_pretrained(tmp_path)
    again = Encoder(AutoTokenizer.from_pretrained(tmp_path), data=DataSection())
    assert (encoder.template, again.template) == (family, "the tokenizer's own")
    row = CHATS["system"]
    assert again.prompt(row.messages) == encoder.prompt(row.messages)
    assert supervised_runs(tokenizer, encode(again, row)) == expected_runs(family, row)


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
spelled_out = st.lists(words | st.sampled_from(sorted({t for c in CONTROL.values() for t in c})), max_size=5).map(
    "".join
)
contents = (words | spelled_out).filter(lambda text: "</think>" not in text)
chats = st.builds(
    lambda turns, system: chat(*turns, system=system), st.lists(contents, min_size=1, max_size=7), st.none() | contents
)
quick = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@each_family
@shipped_and_stock
@quick
@given(row=chats)
def test_any_chat_is_supervised_where_the_assistant_speaks(encoder_for, family, origin, row):
    tokenizer, encoder = encoder_for(family, origin)
    document = encode(encoder, row)
    assert supervised_runs(tokenizer, document) == expected_runs(family, row)
    special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
    written = tokenizer.apply_chat_template(as_dicts(row), tokenize=False)
    assert tokenizer.decode(document.input_ids) == written
    if not any(token in m.content for m in row.messages for token in tokenizer.all_special_tokens):
        assert document.input_ids.tolist() == tokenizer(written, add_special_tokens=False).input_ids
    else:
        harmless = [{"role": m.role, "content": "x" if m.content.strip() else m.content} for m in row.messages]
        template_only = tokenizer(tokenizer.apply_chat_template(harmless, tokenize=False), add_special_tokens=False)
        assert [i for i in document.input_ids if i in special] == [i for i in template_only.input_ids if i in special]

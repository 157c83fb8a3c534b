import string
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_python import PreTrainedTokenizer

from launcher.data.chat.encode import Encoder
from launcher.data.documents import Document
from launcher.data.read.rows import Message, PlainText, Row, RowFault
from launcher.errors import DataError, RecipeError
from launcher.recipe.data_section import DataSection
from tests.support.chats import MANY_TURNS, chat, encode, encoder, same, supervised_text
from tests.support.templates import CORPUS, LLAMA3, OWN_TOKENS

TURNS = list(zip(["user", "assistant"] * 3, ["a", "one", "b", "two", "c", "three"], strict=True))
WHOLE_CHAT = "<|bos|>" + "".join(f"<|head|>{role}<|/head|>\n\n{content}<|eot|>" for role, content in TURNS)
WHOLE_TEXT = "<|bos|>a river is water<|eot|>"


def turns(answer=None):
    return chat(*[f"{role}: {content}" for role, content in TURNS], answer=answer)


def text(answer=None):
    return PlainText("a river is water", "f:1", answer=answer)


@pytest.mark.parametrize(
    ("row", "loss_on", "resolved", "seen"),
    [
        (turns(), "auto", "assistant", "one<|eot|>|two<|eot|>|three<|eot|>"),
        (turns(answer=3), "auto", "completion", "two<|eot|>|three<|eot|>"),
        (turns(answer=3), "completion", "completion", "two<|eot|>|three<|eot|>"),
        (turns(), "completion", "completion", "three<|eot|>"),
        (turns(answer=3), "assistant", "assistant", "one<|eot|>|two<|eot|>|three<|eot|>"),
        (turns(answer=3), "all", "all", WHOLE_CHAT),
        (text(), "auto", "all", WHOLE_TEXT),
        (text(answer=10), "auto", "completion", " water<|eot|>"),
        (text(answer=10), "completion", "completion", " water<|eot|>"),
        (text(answer=0), "completion", "completion", "a river is water<|eot|>"),
        (text(answer=10), "all", "all", WHOLE_TEXT),
    ],
)
def test_loss_on_says_what_of_a_row_is_supervised(tokenizer, row, loss_on, resolved, seen):
    [encoded] = encoder(tokenizer, loss_on=loss_on).encode([row])
    assert encoded.loss_on == resolved
    assert supervised_text(tokenizer, encoded.document) == seen
    assert tokenizer.decode(encoded.document.input_ids) == (WHOLE_TEXT if isinstance(row, PlainText) else WHOLE_CHAT)


def test_an_empty_completion_is_not_supervised(tokenizer):
    [document] = encode(tokenizer, PlainText("a river \n", "f:1", answer=7))
    assert len(document) and not any(document.supervised)


def test_a_token_across_the_border_of_prompt_and_completion_is_supervised(tokenizer):
    [whole] = tokenizer(" river", add_special_tokens=False).input_ids
    [document] = encode(tokenizer, PlainText("a river 漢", "f:1", answer=4))  # between "ri" and "ver"
    assert supervised_text(tokenizer, document) == " river 漢<|eot|>"
    [behind] = encode(tokenizer, PlainText("a river 漢", "f:1", answer=7))
    assert supervised_text(tokenizer, behind) == " 漢<|eot|>"
    assert whole in document.input_ids[document.supervised]


def test_the_end_token_is_supervised_where_it_is_the_pad_token_too(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    tokenizer.pad_token = tokenizer.eos_token
    documents = encode(tokenizer, chat("user: Hi", "assistant: Hello"), PlainText("Hi, Hello", "f:1", answer=3))
    assert [document.input_ids[-1] for document in documents] == [tokenizer.pad_token_id] * 2
    assert all(document.supervised[-1] for document in documents)


def test_many_rows_give_what_each_gives_alone_in_their_order(tokenizer):
    rows: list[Row] = [MANY_TURNS, PlainText("a river", "f:1"), chat("user: Hi")]
    rows += [chat(f"user: Define {n}", f"assistant: {'word ' * (n % 7)}<|eot|>{n}") for n in range(600)]
    rows += [PlainText(f"{n} ships", "f:2", answer=n % 5) for n in range(20)]
    assert same(encode(tokenizer, *rows), [encode(tokenizer, row)[0] for row in rows])
    assert encoder(tokenizer).encode([]) == []


def test_begin_and_end_tokens_that_a_text_brings_along_are_not_doubled(tokenizer):
    assert same(encode(tokenizer, text()), encode(tokenizer, PlainText(WHOLE_TEXT, "f:2")))


def test_the_tokenizer_is_left_as_it_was(tokenizer):
    encode(tokenizer, chat("user: <|eot|>", "assistant: <|eot|>"))
    assert tokenizer("<|eot|>", add_special_tokens=False).input_ids == [tokenizer.eos_token_id]


def test_the_tokenizers_padding_and_truncation_stay_and_reach_no_document(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.encode_special_tokens = True
    before = backend.to_str()
    assert same(encode(tokenizer, MANY_TURNS), encode(make_tokenizer("llama3"), MANY_TURNS))
    assert (backend.to_str(), backend.encode_special_tokens) == (before, True)


def test_threads_that_encode_at_once_get_what_one_gets(tokenizer, request):
    shared = encoder(tokenizer)
    rows = [chat(f"user: {n} <|eot|> or <|head|>", f"assistant: {n} <|eot|> b") for n in range(200)]
    rows += [chat(f"user: Define {n}", "assistant: word") for n in range(200)]
    alone = encode(tokenizer, *rows)
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)  # seconds: threads take turns between any two calls
    with ThreadPoolExecutor(2) as pool:
        for items in pool.map(shared.encode, (rows, rows[::-1]) * 3):
            documents = [document for _, document in items]
            assert same(documents, alone) or same(documents, alone[::-1])


def test_a_prompt_ends_where_the_answer_begins(tokenizer):
    text, ids = encoder(tokenizer).prompt(MANY_TURNS.messages[:-1])
    [document] = encode(tokenizer, MANY_TURNS)
    assert text == tokenizer.decode(ids)
    assert text.endswith("Bye<|eot|><|head|>assistant<|/head|>\n\n")
    assert document.input_ids[: len(ids)].tolist() == ids
    assert document.supervised[len(ids)] and not document.supervised[len(ids) - 1]


def test_a_prompt_shows_spelled_out_control_tokens_as_they_were_written(tokenizer):
    text, ids = encoder(tokenizer).prompt([Message("user", "x <|eot|> y")])
    assert "x <|eot|> y<|eot|>" in text
    assert ids.count(tokenizer.eos_token_id or 0) == 1


def test_a_chat_the_template_refuses_is_a_fault_in_its_place(make_tokenizer):
    good, bad = chat("user: Hi", "assistant: Hello"), chat("user: Hi", "system: late", "assistant: Hello")
    text = PlainText("a river", "f:1")
    items = [document for _, document in encoder(make_tokenizer("chatml")).encode([good, bad, text, bad, good])]
    assert [type(item) for item in items] == [Document, RowFault, Document, RowFault, Document]
    fault = items[1]
    assert isinstance(fault, RowFault) and fault.reason == "template"
    assert str(fault).startswith("rows.jsonl:3: the chat template (the tokenizer's own) must accept")
    assert "\nFound: TemplateError: a system message comes first\n" in str(fault)
    fine = [item for item in items if isinstance(item, Document)]
    assert same(fine, encode(make_tokenizer("chatml"), good, text, good))


def test_whatever_a_template_raises_is_a_fault(make_tokenizer):
    template = "{% for m in messages %}{{ 1 // (m['content'] | length - 3) }}{{ m['content'] }}{% endfor %}<|eot|>"
    [(_, fault)] = encoder(make_tokenizer(template)).encode([chat("user: abc", "assistant: Hello")])
    assert isinstance(fault, RowFault) and "Found: ZeroDivisionError" in str(fault)
    assert "another data.template" in str(fault)


@pytest.mark.parametrize("bad_rows", ["raise", "skip"])
@pytest.mark.parametrize(("broken", "found"), [("{% if %}", "Expected"), ("{{ strftime_now() | shout }}", "No filter")])
def test_a_template_that_is_no_jinja_is_no_fault_of_a_row(make_tokenizer, broken, found, bad_rows):
    made = encoder(make_tokenizer("{{ bos_token }}\n" + broken), bad_rows=bad_rows)
    with pytest.raises(RecipeError, match=rf"(?s)^a chat template must be.*own, line 2: .*{found}.*data\.template"):
        made.encode([turns()])
    with pytest.raises(RecipeError, match="valid Jinja"):
        made.prompt(MANY_TURNS.messages)
    assert isinstance(made.encode([text()])[0].document, Document)  # plain text needs no template


def test_named_templates_without_a_default_are_listed_with_the_remedy(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = {"rag": tokenizer.chat_template, "tool_use": tokenizer.chat_template}
    with pytest.raises(
        RecipeError, match=r"(?s)default.* has rag, tool_use.*chat_template\.jinja.*data\.template=chatml"
    ):
        encode(tokenizer, turns())
    [document] = encode(tokenizer, text())  # plain text needs none
    assert len(document)


def test_chats_without_a_template_are_refused_and_texts_are_not(make_tokenizer):
    tokenizer = make_tokenizer(None)
    with pytest.raises(DataError, match=r"chat template.*\n.*\n.*data\.template=chatml.*instruct model"):
        encode(tokenizer, MANY_TURNS)  # the tokenizer has ChatML's control tokens
    with pytest.raises(DataError, match=r"chat template"):
        encoder(tokenizer).prompt(MANY_TURNS.messages)
    assert len(encode(tokenizer, PlainText("a river", "f:1"))) == 1
    assert [encoder(make_tokenizer(name)).template for name in (None, "chatml")] == ["none", "the tokenizer's own"]


@pytest.mark.parametrize(("loss_on", "lack"), [("assistant", "assistant"), ("completion", "completion")])
def test_a_loss_that_plain_text_has_no_part_for_is_refused(tokenizer, loss_on, lack):
    with pytest.raises(DataError, match=rf"f:1: data.loss_on={loss_on}.*\n.*no {lack}.*\n.*data.loss_on=auto"):
        encode(tokenizer, MANY_TURNS, PlainText("a river", "f:1"), loss_on=loss_on)
    assert len(encode(tokenizer, MANY_TURNS, loss_on=loss_on)) == 1


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(DataError, match=r"fast tokenizer.*\nFound: PythonBackend.*\n.*tokenizer.json"):
        Encoder(PreTrainedTokenizer.__new__(PreTrainedTokenizer), data=DataSection())


def sentencepiece_like(kind):
    """A tokenizer that writes a blank at the beginning of a text, or of every piece of it."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    elif kind == "byte level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    alphabet = [*string.printable.replace(" ", "▁"), *pre_tokenizers.ByteLevel.alphabet()]
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=["<unk>"])
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=LLAMA3, **OWN_TOKENS)


@pytest.mark.parametrize("kind", ["first", "always", "prepend", "byte level"])
@pytest.mark.parametrize("literal", ["<|eot|>", "<|head|><|head|>", "<|eot|>\U0010ffff<|bos|>"])
def test_a_spelled_out_control_token_gets_no_blanks_around_it(kind, literal):
    tokenizer = sentencepiece_like(kind)
    plain = chat("user: say a b", "assistant: it is a b.")
    [document] = encode(tokenizer, plain)
    expected = str(tokenizer.decode(document.input_ids)).replace("a b", f"a{literal}b")
    [spelled] = encode(tokenizer, chat(f"user: say a{literal}b", f"assistant: it is a{literal}b."))
    assert str(tokenizer.decode(spelled.input_ids)).replace("<unk>", "\U0010ffff") == expected
    assert supervised_text(tokenizer, spelled).strip().replace("<unk>", "\U0010ffff") == f"it is a{literal}b.<|eot|>"
    assert spelled.input_ids.tolist().count(tokenizer.eos_token_id) == 2
    assert spelled.supervised[-1] and max(spelled.input_ids) < len(tokenizer)


@pytest.mark.parametrize("before", ["", "\n", " ", "\n<|bos|>", " \t<|bos|>"])
@pytest.mark.parametrize("after", ["", "\n", " ", "<|eot|>\n", "<|eot|> \r\n"])
def test_a_text_rendered_beforehand_keeps_its_begin_and_end_within_whitespace(tokenizer, before, after):
    text = f"{before}a river{after}"
    framed = ("" if "<|bos|>" in before else "<|bos|>") + text + ("" if "<|eot|>" in after else "<|eot|>")
    for answer in (None, len(before)):
        [document] = encode(tokenizer, PlainText(text, "f:1", answer=answer))
        assert tokenizer.decode(document.input_ids) == framed
        assert document.supervised[document.input_ids == tokenizer.eos_token_id].all()


def test_an_answer_of_a_tokenizer_without_end_token_is_remarked(make_tokenizer):
    tokenizer = make_tokenizer("llama3")
    assert encode(tokenizer, PlainText("a river", "f:1", answer=2))[0].remarks == ()
    tokenizer.eos_token = None
    [text, blank] = encode(tokenizer, PlainText("a river", "f:1", answer=2), PlainText("a ", "f:1", answer=2))
    assert (text.remarks, blank.remarks) == (("rows_without_end_token",), ())

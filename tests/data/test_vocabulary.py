"""No id without a vector in the embedding reaches the model; ids that nothing uses are said, and padding is any id."""

import itertools

import numpy as np
import pytest

from launcher.data import stream as stream_module
from launcher.data.prepare import prepare
from launcher.data.stream import Stream
from launcher.data.vocabulary import fit_vocabulary
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection
from tests.support.templates import LLAMA3

CHAT = {"messages": [{"role": "user", "content": "a river?"}, {"role": "assistant", "content": "a stream"}]}
TEXT, TEXT_WITH_SEP = {"text": "a river"}, {"text": "a <|sep|> river"}
IN_TEMPLATE = LLAMA3.replace("'<|eot|>'", "'<|sep|>'")
IN_PROMPT = LLAMA3.replace("'<|head|>assistant<|/head|>\n\n'", "'<|head|>assistant<|/head|>\n\n<|sep|>'")


@pytest.fixture
def fit(make_tokenizer, write):
    """Prepares rows for a model with one vector less than the tokenizer has tokens: none for <|sep|>."""

    def fitted(rows, *, template="llama3", role=None, validation=0, **options):
        tokenizer = make_tokenizer(template)
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|sep|>"]})
        if role:
            setattr(tokenizer, role, "<|sep|>")
        if isinstance(validation, list):
            validation = write(validation, name="validation.jsonl")
        section = {"sources": [{"path": write(rows)}], "validation": validation, "max_length": 64, **options}
        data = prepare(DataSection.model_validate(section), tokenizer, seed=0)
        return tokenizer, *fit_vocabulary(data, tokenizer, vocabulary=len(tokenizer) - 1)

    return fitted


@pytest.mark.parametrize(
    "case",
    [
        {"rows": [TEXT, TEXT_WITH_SEP]},
        {"rows": [TEXT], "role": "eos_token"},
        {"rows": [TEXT], "role": "bos_token"},
        {"rows": [TEXT], "validation": [TEXT_WITH_SEP]},
        {"rows": [TEXT], "validation": [TEXT_WITH_SEP], "streaming": True},
        {"rows": [TEXT_WITH_SEP], "streaming": True},
        {"rows": [CHAT], "template": IN_TEMPLATE},
        {"rows": [TEXT], "template": IN_PROMPT, "validation": [CHAT], "loss_on": "all"},  # of the sample alone
    ],
)
def test_a_used_id_without_a_vector_is_an_error_that_names_the_token(fit, case):
    with pytest.raises(DataError, match=r"'<\|sep\|>' \(id \d+\)"):
        fit(**case)


def test_ids_that_nothing_uses_are_said_and_change_nothing(fit):
    tokenizer, data, used = fit([CHAT])
    [note] = data.notes
    assert f"'<|sep|>' (id {len(tokenizer) - 1})" in note
    assert data.train.pad_id == tokenizer.pad_token_id
    control = {tokenizer.convert_ids_to_tokens(i): i for i in tokenizer.added_tokens_decoder}
    assert {token for token, i in control.items() if i in used.read} == {"<|bos|>", "<|head|>", "<|/head|>", "<|eot|>"}
    assert {token for token, i in control.items() if i in used.written} == {"<|eot|>"}
    assert max(used.read) < len(tokenizer) - 1


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pad_id_without_a_vector_becomes_0_and_is_said(fit, streaming):
    tokenizer, data, _ = fit([TEXT], role="pad_token", validation=[CHAT], streaming=streaming)
    assert tokenizer.pad_token == "<|sep|>"
    assert (data.first_blocks.pad_id, data.validation.pad_id) == (0, 0)
    assert any("pad id" in note for note in data.notes)
    if isinstance(data.train, Stream):
        later = next(data.train.windows(data.train.first_window.end, number=1))
        assert later.blocks.pad_id == 0


def test_a_stream_refuses_the_window_in_which_such_an_id_comes(fit, monkeypatch):
    monkeypatch.setattr(stream_module, "WINDOW_BLOCKS", 2)
    monkeypatch.setattr(stream_module, "DRAWN_ROWS", 16)
    _, data, _ = fit([*itertools.repeat(TEXT, 60), TEXT_WITH_SEP], streaming=True)
    windows = data.train.windows(data.train.first_window.end, number=1)
    with pytest.raises(DataError, match="sep"):
        list(itertools.islice(windows, 10))


def test_the_first_token_of_a_document_is_never_written(fit):
    _, data, used = fit([TEXT])
    assert bool(data.train.documents.supervised[0])
    first = int(data.train.documents.input_ids[0])
    assert first in used.read - used.written
    assert used.read == set(np.unique(data.train.documents.input_ids).tolist())

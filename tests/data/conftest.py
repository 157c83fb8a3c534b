"""Small byte-level tokenizers: one with templates of its own, one per family with the family's control tokens."""

import json
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.templates import CONTROL, CORPUS, FAMILY_TOKENS, STOCK, TEMPLATES

MakeTokenizer = Callable[[str | None], PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def backend():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer(backend):
    def make(template):
        """A tokenizer with the template of that name, or with the template text itself; None gives it none."""
        return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=Tokenizer.from_str(backend.to_str()),
            bos_token="<|bos|>",
            eos_token="<|eot|>",
            pad_token="<|pad|>",
            additional_special_tokens=["<|head|>", "<|/head|>", "<|im_start|>", "<|im_end|>"],
            chat_template=TEMPLATES.get(template, template) if template else None,
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer("llama3")


@pytest.fixture(scope="session")
def make_family():
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bare.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )

    def make(family, *, template=None):
        """A tokenizer with the family's control tokens; its pad token is its end token."""
        tokens = FAMILY_TOKENS[family]
        made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=Tokenizer.from_str(bare.to_str()),
            **tokens,
            pad_token=tokens["eos_token"],
            chat_template=template,
        )
        if family == "qwen3":
            made.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
        return made

    return make


@pytest.fixture(scope="session")
def stock():
    return STOCK


@pytest.fixture
def write(tmp_path):
    """Writes rows (objects as JSON, bytes as they are), a line each, and gives the path."""

    def write_rows(rows, name="rows.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write_rows

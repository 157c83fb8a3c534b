"""A tokenizer in a GGUF file: pre-tokenizers by llama.cpp's names, stop tokens, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from launcher.export import gguf_vocabulary
from launcher.export.gguf_vocabulary import SPLITS
from launcher.export.proof import HARD_TEXT
from tests.conftest import TINY
from tests.support.gguf_files import opened_with


def with_parts(**parts: Any) -> Any:
    """The tiny tokenizer with other parts in its tokenizer.json."""
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY / "base")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for key, value in parts.items():
        spec[key] = {**spec[key], **value} if key == "model" else value
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
    return tokenizer


def split_by(expression: str) -> dict[str, Any]:
    made = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return dict(json.loads(made.__getstate__()))


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"pre_tokenizer": split_by(r"\p{L}+|.")}, "pre-tokenizer, for which llama.cpp has no name"),
        ({"pre_tokenizer": None}, "pre-tokenizer, for which llama.cpp has no name"),
        ({"model": {"ignore_merges": True}}, "ignore_merges=True with the pre-tokenizer gpt-2"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer"),
        ({"model": {"byte_fallback": True}}, "no byte-level BPE"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused_by_name(
    small_model: Path, parts: dict[str, Any], says: str
) -> None:
    vocabulary, found = gguf_vocabulary.vocabulary_of(opened_with(small_model, with_parts(**parts)))
    assert vocabulary is None and len(found) == 1 and says in found[0]


def test_pre_tokenizers_are_named_as_transformers_names_them(small_model: Path) -> None:
    assert {name: expression for expression, (name, _) in SPLITS.items()} == {
        name: GGUF_PRE_TOKENIZER_SPLITS[name] for name in ("llama-bpe", "qwen2", "tekken")
    }
    for expression, (name, ignores) in SPLITS.items():
        tokenizer = with_parts(pre_tokenizer=split_by(expression), model={"ignore_merges": ignores})
        vocabulary, _ = gguf_vocabulary.vocabulary_of(opened_with(small_model, tokenizer))
        assert vocabulary is not None and vocabulary.pre == name
    plain, _ = gguf_vocabulary.vocabulary_of(opened_with(small_model, with_parts()))
    assert plain is not None and (plain.pre, plain.bos, plain.eos) == ("gpt-2", True, False)
    composing, _ = gguf_vocabulary.vocabulary_of(opened_with(small_model, with_parts(normalizer={"type": "NFC"})))
    assert composing is not None and "NFC" in composing.notes[0]


def test_each_pre_tokenizer_splits_the_hard_text_in_its_own_way() -> None:
    makers = [with_parts(), *(with_parts(pre_tokenizer=split_by(expression)) for expression in SPLITS)]
    pieces = [made.backend_tokenizer.pre_tokenizer.pre_tokenize_str(HARD_TEXT) for made in makers]
    assert len({tuple(piece for piece, _ in each) for each in pieces}) == 4
    plain, *others = (made(HARD_TEXT)["input_ids"] for made in makers)
    assert all(ids != plain for ids in others)  # with the merges of the tiny tokenizer too


def test_stop_tokens_are_the_tokenizers_and_two_more_at_most(small_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    vocabulary, _ = gguf_vocabulary.vocabulary_of(opened_with(small_model, tokenizer, stops=(5, 2, 0)))
    assert vocabulary is not None and vocabulary.stops == (2, 5, 0)
    assert vocabulary.kinds[:7] == [3] * 6 + [1] and vocabulary.kinds[-1] == 5  # control, normal; no token at all
    nothing, found = gguf_vocabulary.vocabulary_of(opened_with(small_model, tokenizer, stops=(5, 4, 2, 0)))
    assert nothing is None and found == ["4 stop tokens (it has 3)"]

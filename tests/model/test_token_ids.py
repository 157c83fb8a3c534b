"""Tokens are named by text or id; one that the tokenizer or the model lacks is refused with what is near."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher.errors import RecipeError
from launcher.model.token_ids import peft_indices, token_ids_of
from tests.conftest import TINY, small_config


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY / "base")


def test_texts_and_ids_become_ids_in_ascending_order(tokenizer: Any) -> None:
    end, comma = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer(",", add_special_tokens=False)["input_ids"]
    [river] = tokenizer(" river", add_special_tokens=False)["input_ids"]
    assert " river" not in tokenizer.get_vocab()  # its vocabulary spells the blank otherwise
    found = token_ids_of([" river", "4095", "<|end|>", ","], tokenizer, vocabulary=8192)
    assert found == tuple(sorted([river, 4095, end, *comma]))
    assert token_ids_of([], tokenizer, vocabulary=8192) == ()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<|asistant|>"], r"tokenizer; '<\|asistant\|>' is none: .* tokens\.\nDid you mean <\|assistant\|>"),
        (["<|end|>", "Zzyzx qqq"], r"'Zzyzx qqq' is none.*\n.*<\|end\|>"),
        (["9000"], r"which has 9,000; id 9000 \(no token of the tokenizer\) has none\.\n.*resize_token_embeddings"),
        (["8500"], r"it has none with the id 8500\.\n"),
        (["<|end|>", "{end}"], r"must name each token once; <\|end\|> and \d+ are both id \d+"),
    ],
)
def test_a_token_that_cannot_be_trained_is_refused_with_the_remedy(
    tokenizer: Any, tokens: list[str], message: str
) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    with pytest.raises(RecipeError, match=message):
        token_ids_of([token.format(end=end) for token in tokens], tokenizer, vocabulary=9000)


def test_a_token_of_the_tokenizer_without_a_row_in_the_model_is_refused_by_name(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match=r"which has 5; id \d+ \(<\|assistant\|>\) has none"):
        token_ids_of(["<|assistant|>"], tokenizer, vocabulary=5)


@pytest.mark.parametrize("tied", [True, False])
def test_peft_is_told_the_embedding_and_a_head_of_its_own(tied: bool) -> None:
    config = small_config(tie_word_embeddings=tied)
    assert peft_indices(config, (3, 5)) == ([3, 5] if tied else {"embed_tokens": [3, 5], "lm_head": [3, 5]})
    assert peft_indices(config, ()) is None

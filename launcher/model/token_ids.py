"""Which ids the tokens of lora.trainable_tokens have, by the model's own tokenizer."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from launcher.errors import RecipeError

MAX_NEAR, MAX_SOME = 3, 8  # tokens that an error offers: near ones, else control tokens
REACH = 0.6  # likeness from which on a token is offered


def token_ids_of(tokens: Sequence[str], tokenizer: Any, *, vocabulary: int) -> tuple[int, ...]:
    """The ids of these tokens, ascending. A token is a text of the tokenizer's vocabulary, else a text that it encodes
    as one token, or an id in digits. `vocabulary`: vectors of the model.

    Raises RecipeError, for a token that the tokenizer does not know with those that are near.
    """
    named: dict[int, str] = {}
    known = {*tokenizer.get_vocab().values()} if tokens else ()
    for token in tokens:
        index = int(token) if token.isdecimal() else _id_of(token, tokenizer)
        if index >= vocabulary:
            raise RecipeError(
                f"lora.trainable_tokens must have a row in the model's embedding, which has {vocabulary:,}; "
                f"{_shown(token, index, tokenizer)} has none.\nUse a token that the model has a row for, such as a "
                "reserved one, or give it rows with Transformers: model.resize_token_embeddings(len(tokenizer)), then "
                "save_pretrained of model and tokenizer, and name that folder in model.name."
            )
        if index not in known:
            raise RecipeError(
                f"lora.trainable_tokens must be tokens of the model's tokenizer; it has none with the id {index}.\n"
                "Name a token by its text, or by an id that the tokenizer gives."
            )
        if index in named:
            raise RecipeError(
                f"lora.trainable_tokens must name each token once; {named[index]} and {token} are both id {index}.\n"
                "Leave one out."
            )
        named[index] = token
    return tuple(sorted(named))


def peft_indices(config: Any, ids: Sequence[int]) -> list[int] | dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices` for a model of transformers' `config`: those of the embedding, whose rows a tied
    head shares, else of both."""
    if not ids:
        return None
    return [*ids] if config.tie_word_embeddings else {"embed_tokens": [*ids], "lm_head": [*ids]}


def _id_of(token: str, tokenizer: Any) -> int:
    vocabulary = tokenizer.get_vocab()
    if token in vocabulary:
        return int(vocabulary[token])
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return int(ids[0])
    added = [str(one) for one in tokenizer.get_added_vocab()]  # first: those are what is trained
    near = dict.fromkeys(
        match for words in (added, list(vocabulary)) for match in get_close_matches(token, words, MAX_NEAR, REACH)
    )
    nearest, some = ", ".join([*near][:MAX_NEAR]), ", ".join(added[:MAX_SOME])
    remedy = f"Did you mean {nearest}?" if near else f"Control tokens that it has: {some}."
    raise RecipeError(
        f"lora.trainable_tokens must be tokens of the model's tokenizer; {token!r} is none: it encodes that as "
        f"{len(ids)} tokens.\n{remedy} An id in digits names a token too."
    )


def _shown(token: str, index: int, tokenizer: Any) -> str:
    text = tokenizer.convert_ids_to_tokens(index) if index < len(tokenizer) else None
    return f"id {index}" + (f" ({text})" if text else " (no token of the tokenizer)" if token.isdecimal() else "")

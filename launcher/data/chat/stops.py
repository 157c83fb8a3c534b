"""The tokens at which an answer ends. A run's samples, mode=generate and exports end there alike."""

from collections.abc import Sequence
from typing import Any

from launcher.data.chat.encode import Encoder
from launcher.data.chat.named_templates import control_tokens
from launcher.data.documents import Document
from launcher.data.read.rows import Conversation, Message
from launcher.errors import DataError, RecipeError
from launcher.recipe.data_section import DataSection

CHAT = (Message("user", "Hello"), Message("assistant", "Hello."))  # whose end token ends every turn


def stops_of_answers(tokenizer: Any, model_stops: Sequence[int]) -> list[int]:
    """`model_stops`: of the model's generation config. Then the tokenizer's eos_token, and the token that ends the
    turns of its chat template, which a base model's own settings do not name."""
    found = [*model_stops, tokenizer.eos_token_id, _end_of_turn(tokenizer)]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def _end_of_turn(tokenizer: Any) -> int | None:
    if not tokenizer.chat_template:
        return None
    try:
        [row] = Encoder(tokenizer, data=DataSection()).encode([Conversation(CHAT, where="the end of a turn")])
    except (DataError, RecipeError):  # a template that refuses this chat
        return None
    if not isinstance(row.document, Document) or not row.document.supervised.any():
        return None
    last = int(row.document.input_ids[row.document.supervised][-1])
    return last if last in control_tokens(tokenizer) else None

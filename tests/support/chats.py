"""Chats as tests write them, and what the loss sees of their documents."""

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from launcher.data.chat.encode import Encoder
from launcher.data.documents import Document
from launcher.data.read.rows import Conversation, Message, Row, RowFault
from launcher.recipe.data_section import DataSection


def chat(*turns: str, answer: int | None = None) -> Conversation:
    """Turns as "role: content"."""
    return Conversation(tuple(Message(*turn.split(": ", 1)) for turn in turns), where="rows.jsonl:3", answer=answer)


MANY_TURNS = chat(
    "system: You are a terse dictionary.",
    "user: Define the word: harbour",
    "assistant: a sheltered place for ships",
    "user: Thank you. What is 漢字?",
    "assistant: Numbers 012 and accents: é ü",
    "user: Bye",
    "assistant: You are welcome!",
)


def encoder(tokenizer: PreTrainedTokenizerFast, **options: Any) -> Encoder:
    return Encoder(tokenizer, data=DataSection.model_validate({"sources": [{"path": "unread.jsonl"}], **options}))


def encode(tokenizer: PreTrainedTokenizerFast, *rows: Row, **options: Any) -> list[Document]:
    """The rows' documents; raises the first fault."""
    documents = []
    for _, document in encoder(tokenizer, **options).encode(rows):
        if isinstance(document, RowFault):
            raise document
        documents.append(document)
    return documents


def supervised_runs(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[str]:
    """The text of each unbroken run of supervised tokens."""
    runs: list[list[int]] = [[]]
    for token, supervised in zip(document.input_ids.tolist(), document.supervised.tolist(), strict=True):
        if supervised:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [str(tokenizer.decode(run)) for run in runs if run]


def supervised_text(tokenizer: PreTrainedTokenizerFast, document: Document) -> str:
    """What the loss sees, with | where it is interrupted."""
    return "|".join(supervised_runs(tokenizer, document))


def same(one: list[Document], other: list[Document]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.supervised, b.supervised)
        for a, b in zip(one, other, strict=True)
    )

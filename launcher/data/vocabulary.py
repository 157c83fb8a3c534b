"""Every token id that reaches the model needs a vector in its embedding: another id ends in an IndexError on a CPU and
in a device-side assert on a GPU.

A tokenizer may have more tokens than the model: tokens were added, and the model was not resized. Only those that are
used are an error. Padding may be any id: it is never a target, and no document sees it.

`vocabulary` is the number of vectors: vocab_size of config.json, known before weights are read.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from launcher.data.documents import Documents, Ints
from launcher.data.pack.blocks import Blocks
from launcher.data.prepare import PreparedData
from launcher.data.stream import Stream
from launcher.errors import DataError

CHUNK = 2**24  # tokens counted at once: a count takes 8 bytes a token
MAX_NAMED = 4  # tokens in a message


@dataclass(frozen=True)
class UsedIds:
    """Token ids of the data; of a stream: of its first window."""

    read: frozenset[int] = frozenset()  # all
    written: frozenset[int] = frozenset()  # targets of the loss

    def without(self, ids: Collection[int]) -> "UsedIds":
        """All but these ids."""
        return UsedIds(self.read.difference(ids), self.written.difference(ids))


def fit_vocabulary(data: PreparedData, tokenizer: Any, *, vocabulary: int) -> tuple[PreparedData, UsedIds]:
    """The data with a pad id that the model has and notes on tokens that it lacks, and which ids are used.

    Raises DataError where a document, or the prompt of the sample, has an id without a vector; a stream does so for its
    later windows when they are read.
    """
    check = partial(check_ids, tokenizer=tokenizer, vocabulary=vocabulary)
    parts = [blocks.documents for blocks in (data.first_blocks, data.validation) if blocks is not None]
    prompt = [token for example in data.examples for token in example.prompt_ids]
    for ids in (*(documents.input_ids for documents in parts), np.array(prompt, dtype=np.int32)):
        check(ids)
    used = [_used_ids(documents) for documents in {id(documents): documents for documents in parts}.values()]
    notes = _lacking(tokenizer, vocabulary)
    train, validation = data.train, data.validation
    if isinstance(train, Stream):
        train.check = check
    pad_id = data.first_blocks.pad_id
    if pad_id >= vocabulary:
        notes.append(f"tokenizer: its pad id {pad_id} has no vector either: padded with id 0, which changes no result")
        train, validation = _padded_with_0(train), validation and replace(validation, pad_id=0)
    fitted = replace(data, train=train, validation=validation, notes=(*data.notes, *notes))
    return fitted, UsedIds(*(frozenset().union(*ids) for ids in zip(*used, strict=True)))


def check_ids(ids: Ints, *, tokenizer: Any, vocabulary: int) -> None:
    """Raise DataError where an id has no vector."""
    missing = np.unique(ids[ids >= vocabulary]).tolist()
    if missing:
        raise DataError(
            f"every token of the data needs a vector in the model's embedding, which has {vocabulary:,}.\n"
            f"Found: {_named(tokenizer, missing)}, from the tokenizer, its chat template or the rows.\n"
            "Use the tokenizer that the model was trained with, or a data.template that does without the token.\n"
            "A model that was resized to it (resize_token_embeddings) has a vector; lora.trainable_tokens trains that."
        )


def _used_ids(documents: Documents) -> tuple[frozenset[int], frozenset[int]]:
    targets = documents.supervised.copy()
    targets[documents.offsets[:-1]] = False  # nothing predicts the first token of a document
    read, written = set[int](), set[int]()
    for start in range(0, len(targets), CHUNK):
        ids, are_targets = documents.input_ids[start : start + CHUNK], targets[start : start + CHUNK]
        read.update(np.flatnonzero(np.bincount(ids)).tolist())
        written.update(np.flatnonzero(np.bincount(ids[are_targets])).tolist())
    return frozenset(read), frozenset(written)


def _lacking(tokenizer: Any, vocabulary: int) -> list[str]:
    """A note on the tokenizer's tokens without a vector."""
    missing = sorted(index for index in tokenizer.get_vocab().values() if index >= vocabulary)
    if not missing:
        return []
    named = _named(tokenizer, missing)
    return [f"tokenizer: no vector in the model for {named}: the data does not use them, a prompt must not either"]


def _named(tokenizer: Any, ids: Sequence[int]) -> str:
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(index)!r} (id {index})" for index in ids[:MAX_NAMED])
    return names + (f" and {len(ids) - MAX_NAMED:,} more" if len(ids) > MAX_NAMED else "")


def _padded_with_0(train: Blocks | Stream) -> Blocks | Stream:
    if isinstance(train, Blocks):
        return replace(train, pad_id=0)
    train.pad_id, window = 0, train.first_window
    train.first_window = replace(window, blocks=replace(window.blocks, pad_id=0))
    return train

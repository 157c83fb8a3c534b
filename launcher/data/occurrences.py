"""How often the tokens that are trained occur in the data (lora.trainable_tokens)."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from launcher.data.documents import Longs
from launcher.data.pack.blocks import Blocks
from launcher.data.prepare import PreparedData
from launcher.data.stream import Stream
from launcher.data.vocabulary import CHUNK

MAX_SHOWN = 12  # tokens whose counts a note gives


def with_occurrences(data: PreparedData, tokenizer: Any, ids: Sequence[int]) -> PreparedData:
    """The data with notes on how often the tokens `ids` occur in training: those that never do first."""
    if not ids:
        return data
    part = "the first window of the stream" if isinstance(data.train, Stream) else "an epoch"
    return replace(data, notes=(*_notes(data.first_blocks, tokenizer, ids, part), *data.notes))


def occurrences(blocks: Blocks, ids: Sequence[int]) -> tuple[Longs, Longs]:
    """How often each of `ids` occurs in the blocks, and how often as a target; [n] each. A document that lies in
    several blocks counts each time."""
    documents = blocks.documents
    times = np.bincount(blocks.block_documents, minlength=len(documents.lengths))
    slots = np.full(1 + max(int(documents.input_ids.max(initial=0)), *ids), -1)
    slots[[*ids]] = np.arange(len(ids))
    read, written = np.zeros((2, len(ids)), dtype=np.int64)
    for start in range(0, len(documents.input_ids), CHUNK):
        found = slots[documents.input_ids[start : start + CHUNK]]
        where = np.flatnonzero(found >= 0)
        document = np.searchsorted(documents.offsets, start + where, side="right") - 1
        follows = start + where != documents.offsets[document]  # nothing predicts the first token of a document
        target = documents.supervised[start + where] & follows
        read += np.bincount(found[where], weights=times[document], minlength=len(ids)).astype(np.int64)
        written += np.bincount(found[where], weights=times[document] * target, minlength=len(ids)).astype(np.int64)
    return read, written


def _notes(blocks: Blocks, tokenizer: Any, ids: Sequence[int], part: str) -> Iterator[str]:
    read, written = occurrences(blocks, ids)
    names = [f"{tokenizer.convert_ids_to_tokens(index)} (id {index})" for index in ids]
    never = [name for name, count in zip(names, read, strict=True) if not count]
    if never:
        yield (
            f"lora.trainable_tokens: {_some(never)} never occurs in the training data ({part}): its row only learns "
            "not to be written. Leave it out, or look for what the data has in its place (mode=preview)."
        )
    counts = [f"{name} {r:,} ({w:,})" for name, r, w in zip(names, read, written, strict=True) if r]
    if counts:
        yield f"lora.trainable_tokens in {part}, times read (as a target): {_some(counts)}"


def _some(entries: Sequence[str]) -> str:
    more = f" and {len(entries) - MAX_SHOWN:,} more" if len(entries) > MAX_SHOWN else ""
    return ", ".join(entries[:MAX_SHOWN]) + more

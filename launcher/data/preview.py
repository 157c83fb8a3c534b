"""The record of mode=preview: what would be trained on, read from the arrays that a training step is given.

A token is shown as supervised where the label of the position before it is that token. So the record shows the mask
that the loss sees, not the one that was intended.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np

from launcher.data.chat.named_templates import control_tokens
from launcher.data.documents import Longs
from launcher.data.pack.blocks import Blocks, blank_step_note
from launcher.data.pack.micro_batch import IGNORE, micro_batch_of
from launcher.data.prepare import PreparedData
from launcher.recipe.schema import Recipe
from launcher.records.preview import BlockPreview, DocumentPreview, LengthBin, PreviewRecord, TextPart

MAX_BINS = 10  # of the histogram
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no whole character
MAX_CHARACTER_TOKENS = 16  # decoded in search of whole characters: one has 4 at most, but may follow invalid bytes


def preview_record(
    data: PreparedData, tokenizer: Any, *, recipe: Recipe, name: str, source: str, blocks: int, world_size: int = 1
) -> PreviewRecord:
    """The record of data that was prepared with this tokenizer, with the text of the first `blocks` training blocks.

    `name` is that of the recipe, `source` the located model; `world_size` processes would train.
    """
    train, validation = data.first_blocks, data.validation
    step_blocks = recipe.train.micro_batch * recipe.train.accumulation * world_size
    widths, counts = np.unique(train.widths, return_counts=True)
    return PreviewRecord(
        recipe=name,
        model=source,
        tokenizer=f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens",
        template=data.template,
        loss_on=recipe.data.loss_on,
        loss_on_found=data.loss_on,
        batching=recipe.data.batching,
        max_length=recipe.data.max_length,
        widths=tuple(zip(widths.tolist(), counts.tolist(), strict=True)),
        blocks=tuple(block_preview(train, block, tokenizer=tokenizer) for block in range(min(blocks, len(train)))),
        total_blocks=len(train),
        part="an epoch" if train is data.train else "the first window of the stream",
        train_rows=data.train_rows,
        documents=len(train.block_documents),
        tokens=train.tokens,
        supervised_tokens=train.supervised_tokens,
        fill=train.fill,
        lengths=histogram(train.documents.lengths[train.block_documents]),
        validation_rows=data.validation_rows,
        validation_blocks=len(validation) if validation else 0,
        counts=data.counts,
        notes=(*data.notes, *blank_step_note(len(train), step_blocks)),
    )


def block_preview(blocks: Blocks, block: int, *, tokenizer: Any) -> BlockPreview:
    """The documents of a block in their order, token by token as a step gets them, and its padding."""
    batch = micro_batch_of(blocks, [block])
    ids, targets = batch.input_ids[0].tolist(), [False, *(batch.labels[0, :-1] != IGNORE).tolist()]
    documents = []
    start = 0
    for index in blocks[block].tolist():
        end = start + int(blocks.documents.lengths[index])
        parts = tuple(text_parts(ids[start:end], targets[start:end], tokenizer))
        documents.append(DocumentPreview(index + 1, end - start, sum(targets[start:end]), parts))
        start = end
    return BlockPreview(width=len(ids), documents=tuple(documents), padding=len(ids) - start)


def text_parts(ids: Sequence[int], targets: Sequence[bool], tokenizer: Any) -> Iterator[TextPart]:
    """The text of one document in runs of equal supervision; a special token is a part of its own.

    A character of several tokens is supervised if one of them is.
    """
    special = control_tokens(tokenizer)
    units = (
        ((any(targets[start:end]), start if ids[start] in special else None), text)
        for start, end, text in _units(ids, tokenizer, special)
    )
    for (supervised, special_at), run in groupby(units, key=itemgetter(0)):
        yield TextPart("".join(text for _, text in run), supervised, special=special_at is not None)


def _units(ids: Sequence[int], tokenizer: Any, special: Container[int]) -> Iterator[tuple[int, int, str]]:
    """Start, end and text of the shortest runs of tokens that are whole characters; of special tokens one by one."""

    def decode(start: int, end: int) -> str:
        return str(tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before, start = 0, 0
    while start < len(ids):
        if ids[start] in special:
            end, text = start + 1, str(tokenizer.convert_ids_to_tokens(ids[start]))
        else:
            end, text = _whole_characters(decode, before, start, limit=min(start + MAX_CHARACTER_TOKENS, len(ids)))
        yield start, end, text
        before, start = start, end


def _whole_characters(decode: Callable[[int, int], str], before: int, start: int, *, limit: int) -> tuple[int, str]:
    """The end and the text of the whole characters that begin at `start`.

    They are decoded together with the unit before, which begins at `before`: some decoders drop a blank where a text
    begins.
    """
    context, pending, end = decode(before, start), "", start
    while end < limit:
        end += 1
        with_context = decode(before, end)
        text = with_context.removeprefix(context) if with_context.startswith(context) else decode(start, end)
        if not text.endswith(REPLACEMENT):
            # If the text only went on, the replacement character stands for all of those bytes: none was to follow.
            return (end - 1, pending) if pending and text.startswith(pending) else (end, text)
        pending = text
    return end, pending


def histogram(lengths: Longs) -> tuple[LengthBin, ...]:
    """Documents by length in at most MAX_BINS bins of equal width, from the shortest to the longest document."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = -(-(longest - shortest + 1) // MAX_BINS)
    counts = np.bincount((lengths - shortest) // width)
    starts = [shortest + index * width for index in range(len(counts))]
    return tuple(
        LengthBin(start, min(start + width - 1, longest), int(count))
        for start, count in zip(starts, counts, strict=True)
    )

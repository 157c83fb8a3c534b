"""mode=preview: what a recipe would train on, read from the arrays that a training step is handed. Loads no weights.

A token is shown as supervised where the label of the position before it is that token, so what is shown is the mask
that the loss obeys and not the one that the data was meant to have.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launcher.data.documents import Bools, Longs
from launcher.data.pack.blocks import IGNORE, Blocks
from launcher.data.prepare import PreparedData, prepare
from launcher.model.families import family_of
from launcher.model.load import load_config, load_tokenizer
from launcher.recipe.schema import Recipe
from launcher.records.preview import BlockPreview, DocumentPreview, LengthBin, PreviewRecord, TextPart

BINS = 10  # of the histogram, at most
CUT = "\ufffd"  # what a decoder writes for bytes that are no whole character
MOST_TOKENS = 16  # that are looked at for whole characters: one has 4 at most, but may follow bytes that are none


def preview(recipe: Recipe, *, name: str, source: str, shipped: Path, blocks: int) -> PreviewRecord:
    """Prepares the data of the recipe called `name` as training does, and shows the first `blocks` training blocks.

    `source` is the located model, `shipped` the folder of the recipes. Writes nothing but the cache of prepared data.
    Raises RecipeError (2) and DataError (3) as training does, except for what only the device decides.
    """
    config = load_config(source, recipe.model)
    family_of(config, max_length=recipe.data.max_length)
    tokenizer = load_tokenizer(source, recipe.model, stand_in=shipped / "tiny" / "base")
    data = prepare(recipe.data, tokenizer, seed=recipe.train.seed)
    return preview_record(data, tokenizer, recipe=recipe, name=name, source=source, blocks=blocks)


def preview_record(
    data: PreparedData, tokenizer: Any, *, recipe: Recipe, name: str, source: str, blocks: int
) -> PreviewRecord:
    """The record of prepared data; `tokenizer` is the one that it was prepared with."""
    train, validation = data.first_blocks, data.validation
    widths, rows = np.unique(train.widths, return_counts=True)
    return PreviewRecord(
        recipe=name,
        model=source,
        tokenizer=f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens",
        template=data.template,
        loss_on=recipe.data.loss_on,
        loss_on_found=data.loss_on,
        batching=recipe.data.batching,
        max_length=recipe.data.max_length,
        widths=tuple(zip(widths.tolist(), rows.tolist(), strict=True)),
        blocks=tuple(block_preview(train, row, tokenizer=tokenizer) for row in range(min(blocks, train.rows))),
        total_blocks=train.rows,
        part="an epoch" if train is data.train else "the first window of the stream",
        train_rows=data.train_rows,
        documents=len(train.row_documents),
        tokens=train.tokens,
        supervised_tokens=train.supervised_tokens,
        fill=train.fill,
        lengths=histogram(train.documents.lengths[train.row_documents]),
        validation_rows=data.validation_rows,
        validation_blocks=validation.rows if validation else 0,
        counts=data.counts,
        notes=data.notes,
    )


def block_preview(blocks: Blocks, row: int, *, tokenizer: Any) -> BlockPreview:
    """Row `row` as the step gets it: its documents in their order, token by token, and what is padding."""
    arrays = blocks.arrays([row])
    ids, targets = arrays.input_ids[0], np.concatenate([[False], arrays.labels[0, :-1] != IGNORE])
    special = special_ids(tokenizer)
    documents = []
    start = 0
    for index in blocks.row_documents[blocks.row_offsets[row] : blocks.row_offsets[row + 1]]:
        end = start + int(blocks.documents.lengths[index])
        parts = text_parts(ids[start:end].tolist(), targets[start:end], tokenizer=tokenizer, special=special)
        documents.append(DocumentPreview(int(index) + 1, end - start, int(targets[start:end].sum()), tuple(parts)))
        start = end
    return BlockPreview(width=len(ids), documents=tuple(documents), padding=len(ids) - start)


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Control tokens, those included that have no role of their own in the tokenizer (Llama 3's header marks)."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset([*tokenizer.all_special_ids, *(index for index, token in added if token.special)])


def text_parts(ids: Sequence[int], targets: Bools, *, tokenizer: Any, special: frozenset[int]) -> Iterator[TextPart]:
    """The text of one document in runs of equal supervision; a special token is a part of its own.

    A character of several tokens is supervised if one of them is.
    """
    learned = targets.tolist()

    def alike(unit: "_Unit") -> tuple[bool, int]:
        return any(learned[unit.start : unit.end]), unit.start if unit.special else -1

    for (supervised, at), units in groupby(_units(ids, tokenizer=tokenizer, special=special), key=alike):
        yield TextPart("".join(unit.text for unit in units), supervised, special=at >= 0)


class _Unit(NamedTuple):
    """The fewest tokens that are whole characters together; or one special token."""

    start: int
    end: int
    text: str
    special: bool


def _units(ids: Sequence[int], *, tokenizer: Any, special: frozenset[int]) -> Iterator[_Unit]:
    def decode(start: int, end: int) -> str:
        return str(tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before, start = 0, 0
    while start < len(ids):
        control = ids[start] in special
        if control:
            end, text = start + 1, str(tokenizer.convert_ids_to_tokens(ids[start]))
        else:
            end, text = _whole_characters(decode, before, start, limit=min(start + MOST_TOKENS, len(ids)))
        yield _Unit(start, end, text, control)
        before, start = start, end


def _whole_characters(decode: Callable[[int, int], str], before: int, start: int, *, limit: int) -> tuple[int, str]:
    """Where the whole characters that begin at `start` end, and their text.

    They are decoded after the unit that begins at `before`, since some decoders drop a blank where a text begins.
    """
    context, pending, end = decode(before, start), "", start
    while end < limit:
        end += 1
        both = decode(before, end)
        text = both.removeprefix(context) if both.startswith(context) else decode(start, end)
        if not text.endswith(CUT):
            # If the text only went on, what looked like half a character was all there is of it.
            return (end - 1, pending) if pending and text.startswith(pending) else (end, text)
        pending = text
    return end, pending


def histogram(lengths: Longs) -> tuple[LengthBin, ...]:
    """Documents by length in at most BINS bins of one width, from the shortest to the longest document."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    width = -(-(longest - shortest + 1) // BINS)
    counts = np.bincount((lengths - shortest) // width)
    starts = [shortest + index * width for index in range(len(counts))]
    return tuple(
        LengthBin(start, min(start + width - 1, longest), int(count))
        for start, count in zip(starts, counts, strict=True)
    )

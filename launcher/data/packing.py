"""Documents of many lengths become rows of one length, so that every batch has the one shape that was compiled.

One row of S = 12 positions: the documents a (5 tokens, its answer a3 a4), b (4 tokens, its answer b2 b3) and a tail:

    position        0   1   2   3   4   5   6   7   8   9  10  11
    input_ids      a0  a1  a2  a3  a4  b0  b1  b2  b3   P   P   P
    labels          .   .  a3  a4   .   .  b2  b3   .   .   .   .
    position_ids    0   1   2   3   4   0   1   2   3   0   1   2
    document_ids    0   0   0   0   0   1   1   1   1   2   2   2

    N  rows         a3  token 3 of document a      .  IGNORE: no loss at this position
    S  positions    P   pad_id; the padding tail counts as one document of its own

Labels are shifted already: labels[t] is the token that position t must predict. So the last token of a document
predicts nothing, its first token is never a target, and attention within document_ids never sees a neighbour.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORE = -100
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Document:
    """One conversation or text as token ids. `supervised[t]`: token t is a target. The lists are equally long."""

    input_ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class Packed:
    """N rows of S positions, int32 [N, S] each; `lengths` int32 [N] are the non-padding tokens of each row."""

    input_ids: Ints
    labels: Ints
    position_ids: Ints
    document_ids: Ints
    lengths: Ints
    pad_id: int
    max_documents: int  # no row has more; the padding tail counts as one

    @property
    def rows(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def supervised_tokens(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORE))

    @property
    def fill(self) -> float:
        """Share (0-1) of the positions that hold a token."""
        return self.tokens / self.input_ids.size


def pack(documents: Sequence[Document], *, max_length: int, pad_id: int, seed: int) -> Packed:
    """Best-fit decreasing into rows of `max_length` positions; the same on every rank. No document is split.

    `documents` is not empty, each holds 1 to `max_length` tokens. The seed decides which of equally long ones meet.
    """
    lengths = np.array([len(d.input_ids) for d in documents])
    shuffled = np.random.default_rng(seed).permutation(len(documents))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows = _best_fit([(int(d), int(lengths[d])) for d in order], capacity=max_length)
    used = np.array([lengths[row].sum() for row in rows], dtype=np.int32)
    shape = (len(rows), max_length)
    packed = Packed(
        input_ids=np.full(shape, pad_id, np.int32),
        labels=np.full(shape, IGNORE, np.int32),
        position_ids=np.zeros(shape, np.int32),
        document_ids=np.zeros(shape, np.int32),
        lengths=used,
        pad_id=pad_id,
        max_documents=max(len(row) + int(n < max_length) for row, n in zip(rows, used, strict=True)),
    )
    for index, row in enumerate(rows):
        _fill(packed, index, [documents[d] for d in row])
    return packed


def _best_fit(items: Sequence[tuple[int, int]], *, capacity: int) -> list[list[int]]:
    """Rows of item names from (name, length) pairs, longest first: each goes where it leaves the least room.

    The open rows are kept by their free room, and `free` has bit r set while a row with room r is open: the best fit is
    the lowest bit from `length` up. An item costs one shift of `capacity` bits (32 words at 2048), beside the sort.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    free = 0
    for name, length in items:
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                free ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(name)
        if left := room - length:
            by_room[left].append(row)
            free |= 1 << left
    return rows


def _fill(packed: Packed, row: int, documents: Sequence[Document]) -> None:
    start = 0
    for index, document in enumerate(documents):
        ids = np.array(document.input_ids, np.int32)
        end = start + len(ids)
        packed.input_ids[row, start:end] = ids
        packed.labels[row, start : end - 1] = np.where(document.supervised, ids, IGNORE)[1:]
        packed.position_ids[row, start:end] = np.arange(len(ids))
        packed.document_ids[row, start:end] = index
        start = end
    tail = packed.input_ids.shape[1] - start
    packed.position_ids[row, start:] = np.arange(tail)
    packed.document_ids[row, start:] = len(documents)

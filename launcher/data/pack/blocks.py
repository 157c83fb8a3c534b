"""Rows of documents: which document lies in which row, and a row's arrays when a batch asks for them.

One row of S = 12 positions: the documents a (5 tokens, its answer a3 a4), b (4 tokens, its answer b2 b3) and a tail:

    position        0   1   2   3   4   5   6   7   8   9  10  11
    input_ids      a0  a1  a2  a3  a4  b0  b1  b2  b3   P   P   P
    labels          .   .  a3  a4   .   .  b2  b3   .   .   .   .
    position_ids    0   1   2   3   4   0   1   2   3   0   1   2
    document_ids    0   0   0   0   0   1   1   1   1   2   2   2

    N  rows         a3  token 3 of document a      .  IGNORE: no loss at this position
    S  positions    P   pad_id; the padding tail is one document of its own (to attention, several: Blocks.max_seqlen)

Labels are shifted already: labels[t] is the token that position t must predict. So the last token of a document
predicts nothing, its first token is never a target, and attention within document_ids never sees a neighbour.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.documents import Documents, Ints, Longs

IGNORE = -100


@dataclass(frozen=True)
class RowArrays:
    """Some rows of one width, int32 [rows, S] each; `lengths`, int64 [rows], are their tokens before the padding."""

    input_ids: Ints
    labels: Ints
    position_ids: Ints
    document_ids: Ints
    lengths: Longs


@dataclass(frozen=True)
class Blocks:
    """N rows. Row r has `widths[r]` positions and holds the documents row_documents[row_offsets[r]:row_offsets[r + 1]].

    A document may lie in several rows: a source whose weight repeats it. `max_seqlen`: upper bound on document length,
    passed to attention. Padding is split into pseudo-documents of at most this length. `max_documents`: most documents
    of a row, pseudo-documents included; every batch has room for as many boundaries.
    """

    documents: Documents
    row_offsets: Longs  # [N + 1]
    row_documents: Longs  # [placements]
    widths: Ints  # [N]
    pad_id: int
    max_documents: int
    max_seqlen: int

    @classmethod
    def of(cls, documents: Documents, row_documents: Longs, *, row_sizes: Longs, widths: Ints, pad_id: int) -> "Blocks":
        """`row_sizes[r]` of `row_documents` lie in row r, in order; nothing is said of their lengths."""
        offsets = np.concatenate([[0], np.cumsum(row_sizes, dtype=np.int64)])
        return cls(documents, offsets, row_documents, widths, pad_id, 0, 0).bounded(int(widths.max()))

    def bounded(self, max_seqlen: int) -> "Blocks":
        """The same rows with this upper bound on document length, and max_documents to match. A blank row never needs
        more: its pseudo-documents are as long as the bound."""
        assert max_seqlen >= self.longest_document, f"{self.longest_document} tokens, at most {max_seqlen} said"
        tails = -(-(self.widths - self.lengths) // max_seqlen)
        return replace(self, max_seqlen=max_seqlen, max_documents=int((np.diff(self.row_offsets) + tails).max()))

    @property
    def longest_document(self) -> int:
        """Tokens of the longest document that lies in a row."""
        return int(self.documents.lengths[self.row_documents].max())

    @property
    def rows(self) -> int:
        return len(self.widths)

    @property
    def shapes(self) -> tuple[int, ...]:
        """The widths there are, ascending: each is a planned shape."""
        return tuple(int(width) for width in np.unique(self.widths))

    @property
    def lengths(self) -> Longs:
        """Tokens of each row, [N]."""
        return self._sums(self.documents.lengths)

    @property
    def targets(self) -> Longs:
        """Supervised tokens of each row, [N]."""
        return self._sums(self.documents.targets)

    def most_targets(self, rows: int) -> dict[int, int]:
        """By width: the supervised tokens of the `rows` rows that have the most. Whatever the order and the rank, no
        micro batch of so many rows has more, as none holds a row twice."""
        targets = self.targets
        return {width: int(np.sort(targets[self.widths == width])[-rows:].sum()) for width in self.shapes}

    @property
    def alone(self) -> bool:
        """Whether no row holds more than one document."""
        return bool((np.diff(self.row_offsets) <= 1).all())

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def supervised_tokens(self) -> int:
        return int(self.targets.sum())

    @property
    def fill(self) -> float:
        """Share (0-1) of the positions that hold a token."""
        return self.tokens / int(self.widths.sum(dtype=np.int64))

    def arrays(self, rows: Sequence[int] | Longs) -> RowArrays:
        """These rows, all of one width; -1 stands for a blank one, which is all tail: no token, no target, no trace in
        loss or gradient. Blank rows alone have the least width."""
        numbers = np.asarray(rows, dtype=np.int64)
        real = numbers[numbers >= 0]
        width = int(self.widths[real[0]] if len(real) else self.widths.min())
        assert (self.widths[real] == width).all(), "the rows of a batch have one width"
        held = np.where(numbers < 0, 0, self.row_offsets[numbers + 1] - self.row_offsets[numbers])
        # Of each document that lies in one of the rows:
        documents = self.row_documents[_ranges(self.row_offsets[numbers], held)]
        sizes = self.documents.offsets[documents + 1] - self.documents.offsets[documents]
        row = np.repeat(np.arange(len(numbers)), held)
        lengths = np.bincount(row, weights=sizes, minlength=len(numbers)).astype(np.int64)
        start = row * width + np.cumsum(sizes) - sizes - (np.cumsum(lengths) - lengths)[row]
        # Of each of their tokens:
        position = _ranges(np.zeros_like(sizes), sizes)
        place = np.repeat(start, sizes) + position
        source = np.repeat(self.documents.offsets[documents], sizes) + position
        predicted = position > 0
        tokens = self.documents.input_ids[source]
        targets = np.where(self.documents.supervised[source], tokens, IGNORE)

        shape = (len(numbers), width)
        tail = np.broadcast_to(np.arange(width) - lengths[:, None], shape)  # where tokens lie, overwritten
        return RowArrays(
            input_ids=_scattered(np.full(shape, self.pad_id), place, tokens),
            labels=_scattered(np.full(shape, IGNORE), place[predicted] - 1, targets[predicted]),
            position_ids=_scattered(tail, place, position),
            document_ids=_scattered(
                np.broadcast_to(held[:, None], shape), place, np.repeat(_ranges(0 * held, held), sizes)
            ),
            lengths=lengths,
        )

    def _sums(self, values: Longs) -> Longs:
        sums = np.concatenate([[0], np.cumsum(values[self.row_documents])])
        return sums[self.row_offsets[1:]] - sums[self.row_offsets[:-1]]


def _ranges(starts: Longs, sizes: Longs) -> Longs:
    """starts[i], starts[i] + 1, ... of sizes[i] numbers each, one after another."""
    ends = np.cumsum(sizes)
    return np.repeat(starts - ends + sizes, sizes) + np.arange(ends[-1] if len(ends) else 0)


def _scattered(background: NDArray[Any], places: Longs, values: NDArray[Any]) -> Ints:
    """A copy of `background` with `values` at `places`, counted over the flattened array."""
    array = background.astype(np.int32)
    array.reshape(-1)[places] = values
    return array

"""Rows of several sources become documents that fit, with a count for everything that was left out."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from launcher.data.chat import Encoder
from launcher.data.documents import Document, Documents, Longs
from launcher.data.formats import read_rows
from launcher.data.rows import Conversation, Row, RowFault
from launcher.data.sources import Feed
from launcher.data.splits import digest
from launcher.errors import DataError
from launcher.recipe.schema import DataSection

CHUNK = 1024  # rows rendered and tokenised at once


@dataclass
class Encoded:
    """The usable rows. Row r is the `ordinals[r]`-th of source `sources[r]`, and has the documents whose `rows` is r:
    one, or several if it was split."""

    parts: list[Documents] = field(default_factory=list)  # flat: an object for each of millions would weigh more
    pending: list[Document] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=list)
    loss_on: Counter[str] = field(default_factory=Counter)  # rows by what the loss sees of them

    def add(self, row: Row, documents: Sequence[Document], *, source: int, ordinal: int, seed: int) -> None:
        self.rows += [len(self.digests)] * len(documents)
        self.pending += documents
        if len(self.pending) >= CHUNK:
            self._flush()
        self.digests.append(digest(row, seed=seed))
        self.sources.append(source)
        self.ordinals.append(ordinal)

    def flat(self) -> Documents:
        """All documents, in order; what they were collected in is given up."""
        self._flush()
        parts, self.parts = self.parts, []
        return Documents.joined(parts)

    def _flush(self) -> None:
        self.parts.append(Documents.of(self.pending))
        self.pending = []

    def documents_of(self, rows: Longs) -> Longs:
        """The documents of these rows, in this order; a row that is named twice has its documents twice."""
        owners = np.array(self.rows, np.int64)
        starts, ends = np.searchsorted(owners, rows, "left"), np.searchsorted(owners, rows, "right")
        counts = ends - starts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(starts, counts) + within


def encode_sources(
    sources: Sequence[Sequence[Feed]], encoder: Encoder, *, data: DataSection, seed: int, counts: Counter[str]
) -> Encoded:
    """The usable rows of the sources. Adds to `counts` what prepare() names.

    Raises DataError: a row is faulty with bad_rows "raise", too long with too_long "raise", or none is left.
    """
    encoded = Encoded()
    for index, feeds in enumerate(sources):
        before = Counter(counts)
        found = len(encoded.digests)
        rows = (row for feed in feeds for row in read_rows(feed, bad_rows=data.bad_rows, counts=counts))
        for ordinal, row, documents in fitted_rows(rows, encoder, data=data, counts=counts):
            encoded.add(row, documents, source=index, ordinal=ordinal, seed=seed)
            encoded.loss_on[encoder.loss_on(row)] += 1
        if len(encoded.digests) == found:
            raise nothing_left(feeds, counts - before)
    return encoded


def fitted_rows(
    rows: Iterable[Row], encoder: Encoder, *, data: DataSection, counts: Counter[str]
) -> Iterator[tuple[int, Row, list[Document]]]:
    """(ordinal, row, its documents of at most max_length tokens and at least one target) of the rows that have any."""
    rows, start = iter(rows), 0
    while chunk := list(islice(rows, CHUNK)):
        for ordinal, (row, document) in enumerate(zip(chunk, encoder.encode(chunk), strict=True), start):
            if isinstance(document, RowFault):
                if data.bad_rows == "raise":
                    raise document
                counts[f"rows_dropped_{document.reason}"] += 1
                continue
            if encoder.loss_on(row) != "all":
                counts["empty_assistant_turns"] += _empty_turns(row)
            pieces = _fitted(row, document, data=data, counts=counts)
            learnable = [piece for piece in pieces if piece.supervised[1:].any()]  # nothing predicts a first token
            if learnable:
                if len(learnable) < len(pieces):
                    counts["pieces_dropped_zero_supervised"] += len(pieces) - len(learnable)
                yield ordinal, row, learnable
            elif pieces:
                counts["rows_dropped_zero_supervised"] += 1
        start += len(chunk)


def _empty_turns(row: Row) -> int:
    messages = row.messages if isinstance(row, Conversation) else ()
    return sum(m.role == "assistant" and not m.content.strip() for m in messages)


def _fitted(row: Row, document: Document, *, data: DataSection, counts: Counter[str]) -> list[Document]:
    length, most = len(document), data.max_length
    if length <= most:
        return [document]
    if data.too_long == "raise":
        raise DataError(
            f"{row.where}: with data.too_long=raise a row holds at most data.max_length={most} tokens.\n"
            f"Found: {length} tokens.\nRaise data.max_length, or set data.too_long=truncate, split or drop."
        )
    if data.too_long == "drop":
        counts["rows_dropped_too_long"] += 1
        return []
    counts["split" if data.too_long == "split" else "truncated"] += 1
    starts = range(0, length, most) if data.too_long == "split" else [0]
    return [Document(document.input_ids[s : s + most], document.supervised[s : s + most]) for s in starts]


def nothing_left(feeds: Sequence[Feed], counts: Counter[str]) -> DataError:
    """The error for feeds without one usable row; `counts` are those of reading them."""
    dropped = ", ".join(f"{n} {reason}" for reason, n in counts.items() if "dropped" in reason)
    return DataError(
        f"{', '.join(feed.name for feed in feeds)}: 0 usable rows; a source needs one that holds a token to learn.\n"
        f"Found: {counts['rows_read']} rows read{'; ' if dropped else ''}{dropped}.\n"
        'Give rows with an answer, like {"messages": [{"role": "user", "content": "…"}, …]} or {"text": "…"},\n'
        "raise data.max_length, or set data.loss_on=all."
    )

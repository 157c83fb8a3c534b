"""Rows of several sources become documents that fit, with a count for everything that was left out."""

import gc
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from launcher.data.chat.encode import Encoder
from launcher.data.documents import Document, Documents, Longs
from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Conversation, Row, RowFault
from launcher.data.read.sources import Feed
from launcher.data.splits import digest
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection

CHUNK = 1024  # documents that are joined, or rows of a stream that are drawn, at once


@dataclass(frozen=True)
class Fitted:
    """A row with its documents, each of at most max_length tokens and at least one target."""

    ordinal: int  # among the rows given
    row: Row
    documents: list[Document]
    digest: bytes  # of the row's content


class Fitter:
    """Makes documents of rows as data.too_long and data.bad_rows say, and counts what it leaves out.

    `without` holds digests of rows that are left out, since they validate.
    """

    def __init__(self, encoder: Encoder, *, data: DataSection, seed: int, without: Collection[bytes] = ()) -> None:
        self.encoder = encoder
        self._data, self._seed = data, seed
        self._without = frozenset(without)

    def fit(self, rows: Iterable[Row], counts: Counter[str]) -> Iterator[Fitted]:
        """The rows that have something to learn, in order."""
        for ordinal, (row, document) in enumerate(self.encoder.encoded(rows)):
            found = digest(row, seed=self._seed)
            documents = [] if self._is_left_out(document, found, counts) else self._pieces(row, document, counts)
            if documents:
                yield Fitted(ordinal, row, documents, found)

    def _is_left_out(self, document: Document | RowFault, found: bytes, counts: Counter[str]) -> bool:
        if isinstance(document, RowFault):
            if self._data.bad_rows == "raise":
                raise document
            counts[f"rows_dropped_{document.reason}"] += 1
            return True
        if found in self._without:
            counts["rows_dropped_in_validation"] += 1
            return True
        return False

    def _pieces(self, row: Row, document: Document | RowFault, counts: Counter[str]) -> list[Document]:
        assert isinstance(document, Document)
        if self.encoder.loss_on(row) != "all":
            counts["empty_assistant_turns"] += _empty_turns(row)
        pieces = _cut(row, document, data=self._data)
        learnable = [piece for piece in pieces if piece.supervised[1:].any()]  # nothing predicts a first token
        if not pieces:
            counts["rows_dropped_too_long"] += 1
        elif not learnable:
            counts["rows_dropped_zero_supervised"] += 1
        elif len(document) > self._data.max_length:
            counts["split" if self._data.too_long == "split" else "truncated"] += 1
            if len(learnable) < len(pieces):
                counts["pieces_dropped_zero_supervised"] += len(pieces) - len(learnable)
        return learnable


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
    loss_on: list[str] = field(default_factory=list)  # what the loss sees of the row
    is_chat: list[bool] = field(default_factory=list)

    def add(self, fitted: Fitted, *, source: int, loss_on: str) -> None:
        self.rows += [len(self.digests)] * len(fitted.documents)
        self.pending += fitted.documents
        if len(self.pending) >= CHUNK:
            self._flush()
        self.digests.append(fitted.digest)
        self.sources.append(source)
        self.ordinals.append(fitted.ordinal)
        self.loss_on.append(loss_on)
        self.is_chat.append(isinstance(fitted.row, Conversation))

    def flat(self) -> Documents:
        """All documents, in order; what they were collected in is given up."""
        self._flush()
        parts, self.parts = self.parts, []
        return Documents.of(parts)

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
    sources: Sequence[Sequence[Feed]], fitter: Fitter, *, bad_rows: str, counts: Counter[str]
) -> Encoded:
    """The usable rows of the sources. Adds to `counts` what prepare() names.

    Raises DataError: a row is faulty with bad_rows "raise", too long with too_long "raise", or a source has none left.
    """
    encoded = Encoded()
    for index, feeds in enumerate(sources):
        before, found = Counter(counts), len(encoded.digests)
        rows = (row for feed in feeds for row in read_rows(feed, bad_rows=bad_rows, counts=counts))
        with _old_objects_left_alone():
            for fitted in fitter.fit(rows, counts):
                encoded.add(fitted, source=index, loss_on=fitter.encoder.loss_on(fitted.row))
        if len(encoded.digests) == found:
            raise nothing_left(feeds, counts - before)
    return encoded


@contextmanager
def _old_objects_left_alone() -> Iterator[None]:
    """Keeps the garbage collector from looking through half a million objects of the libraries every ten thousand rows:
    a tenth of the time that preparing takes.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _empty_turns(row: Row) -> int:
    messages = row.messages if isinstance(row, Conversation) else ()
    return sum(m.role == "assistant" and not m.content.strip() for m in messages)


def _cut(row: Row, document: Document, *, data: DataSection) -> list[Document]:
    """The document in pieces of at most max_length tokens: one, several with "split", none with "drop"."""
    length, most = len(document), data.max_length
    if length <= most:
        return [document]
    if data.too_long == "raise":
        raise DataError(
            f"{row.where}: with data.too_long=raise a row holds at most data.max_length={most} tokens.\n"
            f"Found: {length} tokens.\nRaise data.max_length, or set data.too_long=truncate, split or drop."
        )
    starts = {"split": range(0, length, most), "drop": range(0)}.get(data.too_long, range(1))
    return [Document(document.input_ids[s : s + most], document.supervised[s : s + most]) for s in starts]


def nothing_left(feeds: Sequence[Feed], counts: Counter[str]) -> DataError:
    """The error for feeds without one usable row; `counts` are those of reading them."""
    dropped = ", ".join(f"{n} {reason}" for reason, n in counts.items() if "dropped" in reason)
    remedy = (
        'Give rows with an answer, like {"messages": [{"role": "user", "content": "…"}, …]} or {"text": "…"},\n'
        "raise data.max_length, or set data.loss_on=all."
    )
    return DataError(
        f"{', '.join(feed.name for feed in feeds)}: 0 usable rows; a source needs one that holds a token to learn.\n"
        f"Found: {counts['rows_read']} rows read{'; ' if dropped else ''}{dropped}.\n"
        + (remedy if counts["rows_read"] else "It is empty: name another, or fill it.")
    )

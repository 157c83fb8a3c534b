"""Encoded rows become documents that fit, with a count for everything that is left out."""

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from launcher.data.chat.encode import EncodedRow
from launcher.data.chat.render import CUT, ENDLESS
from launcher.data.documents import Document, Documents, Longs
from launcher.data.read.rows import Conversation, Feed, Row, RowFault
from launcher.data.splits import digest
from launcher.errors import DataError
from launcher.recipe.data_section import DataSection
from launcher.records.counts import CUT_OFF, counts_in_words


class FittedRow(NamedTuple):
    """A row with its documents, each of at most max_length tokens and at least one target; none if it is left out."""

    row: Row
    loss_on: str  # what the loss sees of it: assistant, last, completion or all
    digest: bytes  # of its content
    documents: list[Document]


def fit_rows(
    encoded: Iterable[tuple[Row, EncodedRow]],
    counts: Counter[str],
    *,
    data: DataSection,
    seed: int,
    excluded: Collection[bytes] = frozenset(),
) -> Iterator[FittedRow]:
    """Every row, in order, its documents cut or dropped as data.too_long says. Adds what is left out to `counts`.

    `excluded`: digests of the rows that validate, which are dropped. `seed` is that of the digests.

    Raises DataError: a row is too long with too_long "raise", or (a RowFault) faulty with bad_rows "raise".
    """
    for row, (loss_on, document) in encoded:
        row_digest = digest(row, seed=seed)
        documents: list[Document] = []
        if isinstance(document, RowFault):
            if data.bad_rows == "raise":
                raise document
            counts[f"rows_dropped_{document.reason}"] += 1
        elif row_digest in excluded:
            counts["rows_dropped_in_validation"] += 1
        else:
            if loss_on != "all":
                counts["empty_assistant_turns"] += _empty_turns(row)
            counts.update(document.remarks + _kept_ends(document, data))
            documents = _learnable_pieces(row, document, counts, data=data)
        yield FittedRow(row, loss_on, row_digest, documents)


def _empty_turns(row: Row) -> int:
    messages = row.messages if isinstance(row, Conversation) else ()
    return sum(message.role == "assistant" and message.is_blank for message in messages)


def _kept_ends(document: Document, data: DataSection) -> tuple[str, ...]:
    """The ends of the answers, CUT_OFF of those that are cut; none of a row that is dropped."""
    if len(document) <= data.max_length or data.too_long == "split":
        return document.ends
    if data.too_long != "truncate":
        return ()
    seen = document.supervised[: data.max_length + 1]  # an answer may end where the row is cut
    whole = int((seen[:-1] & ~seen[1:]).sum())
    return document.ends[:whole] + (CUT_OFF,) * len(document.ends[whole:])


def _learnable_pieces(row: Row, document: Document, counts: Counter[str], *, data: DataSection) -> list[Document]:
    pieces = _cut(row, document, data=data)
    learnable = [piece for piece in pieces if piece.supervised[1:].any()]  # nothing predicts a first token
    if not pieces:
        counts["rows_dropped_too_long"] += 1
    elif not learnable:
        counts["rows_dropped_zero_supervised"] += 1
    elif len(document) > data.max_length:
        counts["split" if data.too_long == "split" else "truncated"] += 1
        if len(learnable) < len(pieces):
            counts["pieces_dropped_zero_supervised"] += len(pieces) - len(learnable)
    return learnable


def _cut(row: Row, document: Document, *, data: DataSection) -> list[Document]:
    """The document in pieces of at most max_length tokens: one, several with "split", none with "drop"."""
    length, width = len(document), data.max_length
    if length <= width:
        return [document]
    if data.too_long == "raise":
        raise DataError(
            f"{row.where}: with data.too_long=raise a row holds at most data.max_length={width} tokens.\n"
            f"Found: {length} tokens.\nRaise data.max_length, or set data.too_long=truncate, split or drop."
        )
    starts = {"split": range(0, length, width), "drop": range(0)}.get(data.too_long, range(1))
    pieces = [(document.input_ids[s : s + width], document.supervised[s : s + width]) for s in starts]
    return [Document(*piece, cut_from=length) for piece in pieces]


@dataclass
class UsableRows:
    """The rows that have documents, in order. There may be millions, so little is kept of each."""

    sizes: list[int] = field(default_factory=list)  # documents of the row
    sources: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    loss_on: list[str] = field(default_factory=list)
    is_chat: list[bool] = field(default_factory=list)
    longest: int = 0  # of the rows that were cut: their tokens before
    _input_ids: "array[int]" = field(default_factory=lambda: array("i"))  # of all documents; Document.supervised below
    _supervised: bytearray = field(default_factory=bytearray)
    _lengths: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sizes)

    def add(self, fitted: FittedRow, *, source: int) -> None:
        self.sizes.append(len(fitted.documents))
        self.sources.append(source)
        self.digests.append(fitted.digest)
        self.loss_on.append(fitted.loss_on)
        self.is_chat.append(isinstance(fitted.row, Conversation))
        for document in fitted.documents:
            self._input_ids.frombytes(document.input_ids.tobytes())
            self._supervised += document.supervised.tobytes()
            self._lengths.append(len(document))
            self.longest = max(self.longest, document.cut_from)

    @property
    def documents(self) -> Documents:
        """All documents, in order; no copy."""
        input_ids, supervised = np.frombuffer(self._input_ids, np.int32), np.frombuffer(self._supervised, np.bool_)
        return Documents(input_ids, supervised, np.cumsum([0, *self._lengths], dtype=np.int64))

    def documents_of(self, rows: Longs) -> Longs:
        """Indices of the documents of these rows, in this order; a row that is named twice has its documents twice."""
        all_sizes = np.array(self.sizes, np.int64)
        starts, sizes = (np.cumsum(all_sizes) - all_sizes)[rows], all_sizes[rows]
        within_row = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(starts, sizes) + within_row


def notes_on(counts: Mapping[str, int]) -> tuple[str, ...]:
    """What the model cannot learn from the rows that one would expect it to."""
    notes = {
        CUT: "the chat template leaves out text of {}, such as thoughts or tools: it trains nothing; set another "
        "data.template",
        ENDLESS: "in {}, an answer does not end with a token that stops generation: it does not teach the model to "
        "stop; set a data.template that has one, or stop at the next turn's opening when generating",
    }
    rows_read = counts["rows_read"]
    return tuple(
        "data: " + note.format(f"{counts[name]:,} of {rows_read:,} rows")
        for name, note in notes.items()
        if counts[name]
    )


def nothing_left(feeds: Sequence[Feed], counts: Counter[str]) -> DataError:
    """The error for feeds without one usable row; `counts` are those of reading them."""
    reasons = {
        key: count for key, count in counts.items() if key.startswith(("rows_dropped", "pieces_dropped")) or key == CUT
    }
    found = {"rows_read": counts["rows_read"]} | reasons
    remedy = (
        'Give rows with an answer, like {"messages": [{"role": "user", "content": "…"}, …]} or {"text": "…"},\n'
        "raise data.max_length, or set data.loss_on=all."
    )
    return DataError(
        f"{', '.join(feed.name for feed in feeds)}: 0 usable rows; a source needs one that holds a token to learn.\n"
        f"Found: {counts_in_words(found)}.\n"
        + (remedy if counts["rows_read"] else "It is empty: name another, or fill it.")
    )

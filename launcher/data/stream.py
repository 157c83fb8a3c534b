"""Training on data that the disk does not hold: sources are read while training, a window of documents at a time.

A window is some thousand documents, laid out and shuffled like an epoch of blocks. A thread reads the next window while
this one is trained on; earlier windows are dropped, so memory is bounded by two windows.

    sources    r0 r1 r2 ... r9000 | r9001 ...           read from the beginning again when they end
    windows    [      window 0    ] [   window 1 ...    every rank reads all of it, and takes its share of each step

So steps do not depend on the number of ranks, and no rank has to ask another for its counts.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import NamedTuple

import numpy as np

from launcher.data.chat.workers import EncoderPool
from launcher.data.documents import Document, Documents, Ints
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.buckets import bucket
from launcher.data.pack.fit import fit_rows, nothing_left
from launcher.data.pack.packing import pack
from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Feed, Row
from launcher.errors import CheckpointError
from launcher.recipe.data_section import DataSection

WINDOW_BLOCKS = 1024  # tokens of a window, counted in full blocks
DRAWN_ROWS = 1024  # rows that are drawn together
DOCUMENTS_MARGIN = 1.25  # blocks of later windows may hold more documents than any of the first window, by this factor


class Position(NamedTuple):
    """Where a source stands."""

    passes: int  # done
    rows: int  # done of this pass


@dataclass(frozen=True)
class Window:
    """Some thousand documents, laid out; what reading them counted; where the sources stand after them."""

    blocks: Blocks
    counts: Counter[str]
    loss_on: Counter[str]  # rows by what the loss sees of them
    end: list[Position]
    longest: int  # of the rows that were cut: their tokens before


@dataclass
class Stream:
    """Sources to be read while training. Reads its first window at once, so that faults there come before training.

    Without weights the sources are read one after another, as if they were one; with weights, each row is drawn from
    one of them. `counts` are those of the windows that training has begun with, the first one included.
    """

    sources: Sequence[Sequence[Feed]]
    pool: EncoderPool
    data: DataSection
    pad_id: int
    seed: int
    excluded: frozenset[bytes]  # digests of rows that validate
    validation_counts: Counter[str]
    min_max_documents: int  # of the validation blocks
    check: Callable[[Ints], None] | None = None  # is given the token ids of every later window; raises DataError
    max_documents: int = field(init=False, default=0)  # as in Blocks; not known before the first window
    first_window: Window = field(init=False)

    def __post_init__(self) -> None:
        weights = [source.weight for source in self.data.sources if source.weight is not None]
        self.shares = np.array(weights) / sum(weights) if weights else None
        if not weights:
            self.sources = [[feed for feeds in self.sources for feed in feeds]]
        window = next(self.windows(self.beginning, number=0))
        # A block of whole documents and a tail: never fewer than two.
        margin = round((window.blocks.max_documents - 1) * DOCUMENTS_MARGIN) + 1
        self.max_documents = max(2, margin, self.min_max_documents)
        self.first_window = replace(window, blocks=replace(window.blocks, max_documents=self.max_documents))
        self.counts = self.validation_counts + window.counts

    @property
    def beginning(self) -> list[Position]:
        return [Position(0, 0) for _ in self.sources]

    @property
    def passes_note(self) -> str:
        """How often the first window goes over the sources."""
        passes = max(position.passes for position in self.first_window.end)
        if not passes:
            return "data: streamed; the number of its rows is not known"
        return f"data: streamed; short of a window, so that the first one goes over it up to {passes + 1} times"

    def windows(self, start: Sequence[Position], *, number: int) -> Iterator[Window]:
        """Window `number`, before which the sources stand at `start`, and those after it.

        Raises DataError like prepare(), and CheckpointError for a position that a source does not have.
        """
        reader = StreamReader(self, start)
        for window in count(number):
            yield reader.read_window(window)

    def lay_out(self, documents: Documents, *, seed: int) -> Blocks:
        indices, width = np.arange(len(documents)), self.data.max_length
        if self.data.batching == "padded":
            blocks = bucket(documents, indices, widths=(width,), pad_id=self.pad_id)
        else:
            limit = self.max_documents - 1 if self.max_documents else None
            blocks = pack(documents, indices, max_length=width, pad_id=self.pad_id, seed=seed, limit=limit)
        return replace(blocks, max_documents=self.max_documents or blocks.max_documents)


class StreamReader:
    """Endless rows of a stream's sources, from given positions on, and the windows that are made of them.

    Raises CheckpointError for a position that a source does not have.
    """

    def __init__(self, stream: Stream, positions: Sequence[Position]) -> None:
        self._stream = stream
        self._counts: Counter[str] = Counter()  # of the window that is read
        self._positions = list(positions)
        self._useful_sources: set[int] = set()  # those that gave a document
        self._first_passes = [position.passes for position in positions]
        self._rows = [self._one_pass(source) for source in range(len(positions))]
        for source, position in enumerate(positions):
            for number in range(position.rows):  # read over, not encoded
                if next(self._rows[source], None) is None:
                    raise CheckpointError(
                        f"a stream's state must lie within its sources; source {source + 1} ends after {number} rows.\n"
                        f"Found: {position.rows} rows.\nResume with the data.sources of the checkpoint."
                    )

    def read_window(self, number: int) -> Window:
        """The next window, drawn and shuffled by the stream's seed and its number."""
        stream, counts = self._stream, self._counts
        counts.clear()  # rows that were read over were counted when they were first read
        documents: list[Document] = []
        loss_on: Counter[str] = Counter()
        tokens_left, longest = WINDOW_BLOCKS * stream.data.max_length, 0
        random = np.random.default_rng((stream.seed, number))
        while tokens_left > 0:
            sources, rows = self.draw(random, DRAWN_ROWS)
            encoded = stream.pool.encode(rows)
            fitted = fit_rows(encoded, counts, data=stream.data, seed=stream.seed, excluded=stream.excluded)
            for source, row in zip(sources, fitted, strict=True):
                if row.documents:
                    documents += row.documents
                    tokens_left -= sum(map(len, row.documents))
                    loss_on[row.loss_on] += 1
                    longest = max(longest, row.documents[0].cut_from)
                    self._useful_sources.add(source)
            self._check_useful()
        joined = Documents.of(documents)
        if stream.check:
            stream.check(joined.input_ids)
        blocks = stream.lay_out(joined, seed=int(random.integers(2**32)))
        return Window(blocks, Counter(counts), loss_on, list(self._positions), longest)

    def draw(self, random: np.random.Generator, number: int) -> tuple[list[int], list[Row]]:
        """`number` rows and the source of each, drawn by weight."""
        sources = random.choice(len(self._rows), size=number, p=self._stream.shares).tolist()
        return sources, [self._next(source) for source in sources]

    def _check_useful(self) -> None:
        """Raise DataError for a source of which a whole pass gave no document: it would be read for ever."""
        for source, position in enumerate(self._positions):
            if position.passes - self._first_passes[source] > 1 and source not in self._useful_sources:
                raise nothing_left(self._stream.sources[source], self._counts)

    def _one_pass(self, source: int) -> Iterator[Row]:
        return read_rows(self._stream.sources[source], data=self._stream.data, counts=self._counts)

    def _next(self, source: int) -> Row:
        passes, rows_done = self._positions[source]
        row = next(self._rows[source], None)
        if row is not None:
            self._positions[source] = Position(passes, rows_done + 1)
            return row
        if not rows_done:
            raise nothing_left(self._stream.sources[source], self._counts)
        self._positions[source] = Position(passes + 1, 0)
        self._rows[source] = self._one_pass(source)
        return self._next(source)

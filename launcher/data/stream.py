"""Training on what the disk does not hold: sources are read while training, a window of documents at a time.

A window is some thousand documents, laid out and shuffled like an epoch of rows. The next one is read by a thread while
this one is trained on, and of those behind nothing is kept: memory is bounded by two windows.

    sources    r0 r1 r2 ... r9000 | r9001 ...           read from the beginning again when they end
    windows    [      window 0    ] [   window 1 ...    every rank reads all of it, and takes its share of each step

So steps do not depend on the number of ranks, and no rank has to ask another for its counts.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from launcher.data.blocks import Blocks
from launcher.data.buckets import bucket
from launcher.data.chat import Encoder
from launcher.data.documents import Document, Documents
from launcher.data.encoded import CHUNK, fitted_rows, nothing_left
from launcher.data.formats import read_rows
from launcher.data.loader import LoaderState, StepBatch, TrainLoader
from launcher.data.packing import pack
from launcher.data.rows import Row
from launcher.data.sources import Feed
from launcher.errors import CheckpointError
from launcher.recipe.schema import DataSection

WINDOW_BLOCKS = 1024  # a window's tokens, in full rows
ROOM = 1.25  # rows of later windows may hold so many documents more than any of the first

Place = tuple[int, int]  # in a source: passes done, rows of this pass done


class StreamState(LoaderState):
    """`epoch` is the window here; `places` is where each source stood before it."""

    places: list[Place]


@dataclass
class Stream:
    """Sources to be read while training. Made with its first window, so that what is wrong there is found beforehand.

    Without weights the sources are read one after the other, as one; with weights, each row is drawn from one of them.
    """

    sources: Sequence[Sequence[Feed]]
    weights: Sequence[float] | None
    encoder: Encoder
    data: DataSection
    pad_id: int
    seed: int
    counts: Counter[str]
    loss_on: Counter[str] = field(default_factory=Counter)  # rows so far by what the loss sees of them
    max_documents: int = 0  # as in Blocks; 0 until the first window tells
    first: Blocks = field(init=False)
    behind_first: list[Place] = field(init=False)  # where the sources stand behind it

    def __post_init__(self) -> None:
        if self.weights is None:
            self.sources = [[feed for feeds in self.sources for feed in feeds]]
        reader = _Reader(self, self.beginning)
        self.first = self.window(reader, number=0)
        self.behind_first = reader.places
        self.max_documents = round((self.first.max_documents - 1) * ROOM) + 1
        self.first = replace(self.first, max_documents=self.max_documents)

    @property
    def beginning(self) -> list[Place]:
        return [(0, 0) for _ in self.sources]

    def rows_of(self, source: int) -> Iterator[Row]:
        """One pass over a source."""
        for feed in self.sources[source]:
            yield from read_rows(feed, bad_rows=self.data.bad_rows, counts=self.counts)

    def window(self, reader: "_Reader", *, number: int) -> Blocks:
        """The next window. Raises DataError like prepare()."""
        documents: list[Document] = []
        room = WINDOW_BLOCKS * self.data.max_length
        random = np.random.default_rng((self.seed, number))
        while room > 0:
            rows = reader.draw(random, CHUNK)
            for _, row, pieces in fitted_rows(rows, self.encoder, data=self.data, counts=self.counts):
                self.loss_on[self.encoder.loss_on(row)] += 1
                documents += pieces
                room -= sum(map(len, pieces))
            if not documents and all(passes for passes, _ in reader.places):
                raise nothing_left([feed for feeds in self.sources for feed in feeds], self.counts)
        return self._laid_out(Documents.of(documents), seed=int(random.integers(2**32)))

    def _laid_out(self, documents: Documents, *, seed: int) -> Blocks:
        every, width = np.arange(len(documents)), self.data.max_length
        if self.data.batching == "padded":
            blocks = bucket(documents, every, widths=(width,), pad_id=self.pad_id)
        else:
            most = self.max_documents - 1 if self.max_documents else None
            blocks = pack(documents, every, max_length=width, pad_id=self.pad_id, seed=seed, most=most)
        return replace(blocks, max_documents=self.max_documents or blocks.max_documents)


class _Reader:
    """Endless rows of a stream's sources from given places on."""

    def __init__(self, stream: Stream, places: Sequence[Place]) -> None:
        self._stream = stream
        self.places: list[Place] = [tuple(place) for place in places]  # type: ignore[misc]
        self._passes = [stream.rows_of(index) for index in range(len(places))]
        counted = Counter(stream.counts)
        for rows, (_, done) in zip(self._passes, places, strict=True):
            for _ in range(done):  # read, not tokenised; counted already
                next(rows, None)
        stream.counts.clear()
        stream.counts.update(counted)

    def draw(self, random: np.random.Generator, number: int) -> list[Row]:
        """So many rows, each of a source drawn by weight."""
        weights = self._stream.weights
        share = None if weights is None else np.array(weights) / sum(weights)
        return [self._next(int(source)) for source in random.choice(len(self._passes), size=number, p=share)]

    def _next(self, source: int) -> Row:
        passes, done = self.places[source]
        row = next(self._passes[source], None)
        if row is not None:
            self.places[source] = (passes, done + 1)
            return row
        if not done:
            raise nothing_left(self._stream.sources[source], self._stream.counts)
        self.places[source] = (passes + 1, 0)
        self._passes[source] = self._stream.rows_of(source)
        return self._next(source)


class StreamLoader(Iterator[StepBatch]):
    """Endless optimizer steps over the windows of a stream; like TrainLoader, with the window as a step's epoch."""

    def __init__(self, stream: Stream, *, micro_batch: int, accumulation: int, rank: int, world_size: int) -> None:
        self._stream = stream
        self._batch = {"micro_batch": micro_batch, "accumulation": accumulation}
        self._place = {"rank": rank, "world_size": world_size}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._reader = _Reader(stream, stream.behind_first)
        self._begin(stream.first, number=0, places=stream.beginning)

    def __next__(self) -> StepBatch:
        if self._used_up:
            blocks, places = self._following.result(), self._behind
            self._begin(blocks, number=self._number + 1, places=places)
        return replace(next(self._loader), epoch=self._number)

    def state(self) -> StreamState:
        """For `restore`, in a loader of the same stream and step size; plain JSON."""
        if self._used_up:
            return StreamState(epoch=self._number + 1, offset=0, places=self._behind)
        return StreamState(epoch=self._number, offset=self._loader.state()["offset"], places=self._places)

    def restore(self, state: StreamState) -> None:
        """Go on as the loader would have that gave this state: rows before its window are read over, not tokenised.

        Raises CheckpointError for a state that no loader of this stream can give.
        """
        places: list[Place] = [(passes, done) for passes, done in state["places"]]
        if len(places) != len(self._stream.sources):
            raise CheckpointError(
                "a stream's state must tell where each source stands; "
                f"this stream has {len(self._stream.sources)}.\nFound: {len(places)}.\n"
                "Resume with the data.sources of the checkpoint."
            )
        self._reader = _Reader(self._stream, places)
        blocks = self._stream.window(self._reader, number=state["epoch"])
        self._begin(blocks, number=state["epoch"], places=places)
        self._loader.restore({"epoch": 0, "offset": state["offset"]})

    @property
    def _used_up(self) -> bool:
        return self._loader.state()["epoch"] > 0

    def _begin(self, blocks: Blocks, *, number: int, places: list[Place]) -> None:
        """Serve a window, and read the one behind it meanwhile."""
        self._number, self._places = number, places
        self._behind = list(self._reader.places)
        self._loader = TrainLoader(blocks, **self._batch, **self._place, seed=self._stream.seed + number)
        self._following: Future[Blocks] = self._thread.submit(self._stream.window, self._reader, number=number + 1)


def train_loader(
    data: Blocks | Stream, *, micro_batch: int, accumulation: int, rank: int, world_size: int, seed: int
) -> TrainLoader | StreamLoader:
    """This rank's endless optimizer steps; a stream brings its own seed."""
    place = {"micro_batch": micro_batch, "accumulation": accumulation, "rank": rank, "world_size": world_size}
    return StreamLoader(data, **place) if isinstance(data, Stream) else TrainLoader(data, **place, seed=seed)

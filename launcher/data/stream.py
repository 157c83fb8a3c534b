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

from launcher.data.documents import Document, Documents
from launcher.data.loader import LoaderState, StepBatch, TrainLoader
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.buckets import bucket
from launcher.data.pack.fit import CHUNK, Fitter, nothing_left
from launcher.data.pack.packing import pack
from launcher.data.read.formats import read_rows
from launcher.data.read.rows import Row
from launcher.data.read.sources import Feed
from launcher.errors import CheckpointError
from launcher.recipe.data_section import DataSection

WINDOW_BLOCKS = 1024  # a window's tokens, in full rows
ROOM = 1.25  # rows of later windows may hold so many documents more than any of the first

Place = tuple[int, int]  # in a source: passes done, rows of this pass done


class StreamState(LoaderState):
    """`epoch` is the window here. `places` is where each source stood before it, `counts` what was counted so far."""

    places: list[Place]
    counts: dict[str, int]


@dataclass(frozen=True)
class Window:
    """Some thousand documents, laid out; what reading them counted; where the sources stand behind them."""

    blocks: Blocks
    counts: Counter[str]
    loss_on: Counter[str]  # rows by what the loss sees of them
    behind: list[Place]


@dataclass
class Stream:
    """Sources to be read while training. Made with its first window, so that what is wrong there is found beforehand.

    Without weights the sources are read one after the other, as one; with weights, each row is drawn from one of them.
    `counts` are those of the windows that training has begun with, `first` among them.
    """

    sources: Sequence[Sequence[Feed]]
    weights: Sequence[float] | None
    fitter: Fitter
    data: DataSection
    pad_id: int
    seed: int
    beside: Counter[str]  # counts of the validation data
    room_for: int = 0  # documents that a row of the validation blocks has, the padding tail counted
    max_documents: int = 0  # as in Blocks; 0 until the first window tells
    opening: Window = field(init=False)

    def __post_init__(self) -> None:
        if self.weights is None:
            self.sources = [[feed for feeds in self.sources for feed in feeds]]
        opening = self.window(Reader(self, self.beginning), number=0)
        # A row of whole documents and a tail: never fewer than two.
        self.max_documents = max(2, round((opening.blocks.max_documents - 1) * ROOM) + 1, self.room_for)
        self.opening = replace(opening, blocks=replace(opening.blocks, max_documents=self.max_documents))
        self.counts = self.beside + self.opening.counts

    @property
    def first(self) -> Blocks:
        return self.opening.blocks

    @property
    def beginning(self) -> list[Place]:
        return [(0, 0) for _ in self.sources]

    def window(self, reader: "Reader", *, number: int) -> Window:
        """The next window. Raises DataError like prepare()."""
        documents: list[Document] = []
        room = WINDOW_BLOCKS * self.data.max_length
        random = np.random.default_rng((self.seed, number))
        counts: Counter[str] = Counter()
        loss_on: Counter[str] = Counter()
        while room > 0:
            drawn = reader.draw(random, CHUNK)
            for fitted in self.fitter.fit([row for _, row in drawn], counts):
                documents += fitted.documents
                room -= sum(map(len, fitted.documents))
                loss_on[self.fitter.encoder.loss_on(fitted.row)] += 1
                reader.useful.add(drawn[fitted.ordinal][0])
            counts.update(reader.taken_counts())
            reader.check_useful(counts)
        blocks = self._laid_out(Documents.of(documents), seed=int(random.integers(2**32)))
        return Window(blocks, counts, loss_on, list(reader.places))

    def _laid_out(self, documents: Documents, *, seed: int) -> Blocks:
        every, width = np.arange(len(documents)), self.data.max_length
        if self.data.batching == "padded":
            blocks = bucket(documents, every, widths=(width,), pad_id=self.pad_id)
        else:
            most = self.max_documents - 1 if self.max_documents else None
            blocks = pack(documents, every, max_length=width, pad_id=self.pad_id, seed=seed, most=most)
        return replace(blocks, max_documents=self.max_documents or blocks.max_documents)


class Reader:
    """Endless rows of a stream's sources from given places on. Raises CheckpointError for a place that is not there."""

    def __init__(self, stream: Stream, places: Sequence[Place]) -> None:
        self._stream = stream
        self._counts: Counter[str] = Counter()
        self.places: list[Place] = list(places)
        self.useful: set[int] = set()  # sources that gave a document
        self._began = [passes for passes, _ in places]
        self._passes = [self._pass_over(index) for index in range(len(places))]
        for index, (_, done) in enumerate(places):
            for number in range(done):  # read, not tokenised
                if next(self._passes[index], None) is None:
                    raise CheckpointError(
                        f"a stream's state must lie within its sources; source {index + 1} ends after {number} rows.\n"
                        f"Found: {done} rows.\nResume with the data.sources of the checkpoint."
                    )
        self._counts.clear()  # counted already, when they were first read

    def draw(self, random: np.random.Generator, number: int) -> list[tuple[int, Row]]:
        """So many (source, row), each source drawn by weight."""
        weights = self._stream.weights
        share = None if weights is None else np.array(weights) / sum(weights)
        drawn = random.choice(len(self._passes), size=number, p=share).tolist()
        return [(source, self._next(source)) for source in drawn]

    def taken_counts(self) -> Counter[str]:
        """What reading has counted since this was asked last."""
        taken = Counter(self._counts)
        self._counts.clear()
        return taken

    def check_useful(self, counts: Counter[str]) -> None:
        """Raise DataError for a source of which a whole pass gave no document: it would be read for ever."""
        for source, (passes, _) in enumerate(self.places):
            if passes - self._began[source] > 1 and source not in self.useful:
                raise nothing_left(self._stream.sources[source], counts)

    def _pass_over(self, source: int) -> Iterator[Row]:
        for feed in self._stream.sources[source]:
            yield from read_rows(feed, bad_rows=self._stream.data.bad_rows, counts=self._counts)

    def _next(self, source: int) -> Row:
        passes, done = self.places[source]
        row = next(self._passes[source], None)
        if row is not None:
            self.places[source] = (passes, done + 1)
            return row
        if not done:
            raise nothing_left(self._stream.sources[source], self._counts)
        self.places[source] = (passes + 1, 0)
        self._passes[source] = self._pass_over(source)
        return self._next(source)


class StreamLoader(Iterator[StepBatch]):
    """Endless optimizer steps over the windows of a stream; like TrainLoader, with the window as a step's epoch."""

    def __init__(self, stream: Stream, *, micro_batch: int, accumulation: int, rank: int, world_size: int) -> None:
        self._stream = stream
        self._shape = (micro_batch, accumulation, rank, world_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stream")  # the one that reads
        self._reader: Future[Reader] | None = None
        self._following: Future[Window] | None = None
        stream.counts.clear()
        stream.counts.update(stream.beside)
        self._begin(stream.opening, number=0, places=stream.beginning)

    def __next__(self) -> StepBatch:
        if self._used_up:
            window = self._read_ahead().result()
            self._following = None
            self._begin(window, number=self._number + 1, places=self._behind)
        self._read_ahead()
        return replace(next(self._loader), epoch=self._number)

    def state_dict(self) -> StreamState:
        """For `load_state_dict`, in a loader of the same stream and step size; plain JSON."""
        if self._used_up:
            return StreamState(epoch=self._number + 1, offset=0, places=self._behind, counts=dict(self._stream.counts))
        offset = self._loader.state_dict()["offset"]
        return StreamState(epoch=self._number, offset=offset, places=self._places, counts=dict(self._counted_before))

    def load_state_dict(self, state: StreamState) -> None:
        """Go on as the loader would have that gave this state: rows before its window are read over, not tokenised.

        Raises CheckpointError for a state that no loader of this stream can give.
        """
        places = self._checked(state)
        if self._following is not None:
            self._following.cancel()
        self._reader, self._following = None, None
        number, window = state["epoch"], self._stream.opening
        if number:  # the first was laid out before it was known how many documents a row may have
            self._number, self._behind = number - 1, places
            window = self._read_ahead().result()
            self._following = None
        self._stream.counts.clear()
        self._stream.counts.update(state["counts"])
        self._begin(window, number=number, places=places)
        self._loader.load_state_dict({"epoch": 0, "offset": state["offset"]})

    def _checked(self, state: StreamState) -> list[Place]:
        try:
            places = [(int(passes), int(done)) for passes, done in state["places"]]
            numbers = [state["epoch"], state["offset"], *(number for place in places for number in place)]
            if isinstance(state["counts"], dict) and min(numbers) >= 0 and len(places) == len(self._stream.sources):
                return places
        except (KeyError, TypeError, ValueError):
            pass
        raise CheckpointError(
            "a stream's state must tell the window, the step in it and where each source stands; "
            f"this stream has {len(self._stream.sources)} source(s).\nFound: {str(state)[:200]}.\n"
            "Resume with the data.sources of the checkpoint."
        )

    @property
    def _used_up(self) -> bool:
        return self._loader.state_dict()["epoch"] > 0

    def _read_ahead(self) -> Future[Window]:
        """The window behind this one, which the thread reads while this one is trained on."""
        if self._following is None:
            if self._reader is None:
                self._reader = self._thread.submit(Reader, self._stream, self._behind)
            reader, number = self._reader, self._number + 1
            self._following = self._thread.submit(lambda: self._stream.window(reader.result(), number=number))
        return self._following

    def _begin(self, window: Window, *, number: int, places: list[Place]) -> None:
        micro_batch, accumulation, rank, world_size = self._shape
        self._number, self._places, self._behind = number, places, window.behind
        self._counted_before = Counter(self._stream.counts)
        self._stream.counts.update(window.counts)
        self._loader = TrainLoader(
            window.blocks,
            micro_batch=micro_batch,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            seed=self._stream.seed + number,
        )


def train_loader(
    data: Blocks | Stream, *, micro_batch: int, accumulation: int, rank: int, world_size: int, seed: int
) -> TrainLoader | StreamLoader:
    """This rank's endless optimizer steps; a stream brings its own seed."""
    place = {"micro_batch": micro_batch, "accumulation": accumulation, "rank": rank, "world_size": world_size}
    return StreamLoader(data, **place) if isinstance(data, Stream) else TrainLoader(data, **place, seed=seed)

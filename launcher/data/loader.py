"""Rows become the micro batches of one rank, in an order that does not depend on how many ranks there are.

A plan is an array of row numbers [steps, accumulation, world, B]: in optimizer step s and micro step a, rank r takes
the rows plan[s, a, r], all of one width. -1 stands for a blank row (padding without labels).

One width (packed, padded):    the shuffled rows, cut into steps of accumulation * world * B. So 1 rank x 8 micro steps,
                               8 x 1 and 2 x 4 see the same rows in the same step.
Several widths (bucketed):     the shuffled rows of each width, cut into micro batches of B; then these, shuffled, cut
                               into steps, and ordered by width in a step: ranks that work at once have equal work.
Blank rows fill the last micro batch of each width and the last step: every row is seen once an epoch, in few shapes.

    B micro batch    S positions    D max_documents
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np
import torch

from launcher.data.documents import Ints, Longs
from launcher.data.pack.blocks import IGNORE, Blocks, RowArrays
from launcher.data.stream import Position, Stream, StreamReader, Window
from launcher.errors import CheckpointError


@dataclass(frozen=True)
class MicroBatch:
    """B rows of S positions for one forward pass. S is one of the run's planned widths, all else is alike in a run."""

    input_ids: torch.Tensor  # int64 [B, S]
    labels: torch.Tensor  # int64 [B, S], already shifted, IGNORE where there is no loss
    position_ids: torch.Tensor  # int64 [B, S], from 0 in each document
    document_ids: torch.Tensor  # int32 [B, S], from 0 in each row
    cu_seqlens: torch.Tensor  # int32 [B*D + 1], over the flattened B*S, tails cut to Blocks.max_seqlen, B*S as filler
    tokens: int  # non-padding
    supervised_tokens: int

    def to(self, device: torch.device | str) -> "MicroBatch":
        """The batch on `device`. For CUDA through pinned memory, so that the host does not wait for the copy."""
        cuda = torch.device(device).type == "cuda"

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if cuda else tensor).to(device, non_blocking=cuda)

        return replace(
            self,
            input_ids=moved(self.input_ids),
            labels=moved(self.labels),
            position_ids=moved(self.position_ids),
            document_ids=moved(self.document_ids),
            cu_seqlens=moved(self.cu_seqlens),
        )


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: this rank's micro batches, and the counts of all ranks and micro batches together.

    The rows are the same on every rank, so the global counts need no collective.
    """

    micro_batches: tuple[MicroBatch, ...]
    tokens: int
    supervised_tokens: int
    epoch: int  # 0-based


class LoaderState(TypedDict):
    """Where a loader is: the next step is the `offset`-th (0-based) of this epoch (0-based)."""

    epoch: int
    offset: int


class TrainLoader(Iterator[StepBatch]):
    """Endless optimizer steps over the rows, reshuffled every epoch by (seed, epoch)."""

    def __init__(
        self, blocks: Blocks, *, micro_batch: int, accumulation: int, rank: int, world_size: int, seed: int
    ) -> None:
        self._blocks = blocks
        self._step_shape = (accumulation, world_size, micro_batch)
        self._rank = rank
        self._seed = seed
        self._lengths, self._targets = blocks.lengths, blocks.targets
        self._state = LoaderState(epoch=0, offset=0)
        self._plan = self._planned(0)
        self.steps_per_epoch = len(self._plan)  # whatever the order, each width has so many micro batches

    def __next__(self) -> StepBatch:
        epoch, offset = self._state["epoch"], self._state["offset"]
        plan = self._plan[offset]
        if offset + 1 < self.steps_per_epoch:
            self._state = LoaderState(epoch=epoch, offset=offset + 1)
        else:
            self._enter(LoaderState(epoch=epoch + 1, offset=0))
        real = plan[plan >= 0]
        return StepBatch(
            micro_batches=tuple(micro_batch_of(self._blocks, rows) for rows in plan[:, self._rank]),
            tokens=int(self._lengths[real].sum()),
            supervised_tokens=int(self._targets[real].sum()),
            epoch=epoch,
        )

    def state(self) -> LoaderState:
        """For `restore`, in a loader of the same rows, seed and step size; plain JSON."""
        return self._state.copy()

    def restore(self, state: LoaderState) -> None:
        """Go on as the loader would have that gave this state; none of the rows before are touched.

        Raises CheckpointError for a state that no loader of these rows can give.
        """
        numbers = [state.get(key) for key in ("epoch", "offset")]
        if not all(type(n) is int and n >= 0 for n in numbers) or state["offset"] >= self.steps_per_epoch:
            raise CheckpointError(
                "a loader state must name an epoch from 0 and a step of it; "
                f"with these rows and this step size an epoch has the steps 0 to {self.steps_per_epoch - 1}.\n"
                f"Found: {state}.\n"
                "Resume with the data, data.batching, train.micro_batch and accumulation of the checkpoint."
            )
        self._enter(LoaderState(epoch=state["epoch"], offset=state["offset"]))

    def _enter(self, state: LoaderState) -> None:
        self._state, self._plan = state, self._planned(state["epoch"])

    def _planned(self, epoch: int) -> Longs:
        """The epoch's plan, [steps, accumulation, world, B]."""
        rng = np.random.default_rng((self._seed, epoch))
        accumulation, world_size, micro_batch = self._step_shape
        micro_batches = _cut(rng.permutation(self._blocks.rows), self._blocks.widths, micro_batch)
        if len(self._blocks.shapes) > 1:
            rng.shuffle(micro_batches)  # rows of one width are in a random order already
        filled = _filled(micro_batches, accumulation * world_size)
        widths = np.where(filled[:, 0] < 0, 0, self._blocks.widths[filled[:, 0]]).reshape(-1, accumulation * world_size)
        widest_first = np.argsort(-widths, axis=1, kind="stable")[:, :, None]
        steps = np.take_along_axis(filled.reshape(*widths.shape, micro_batch), widest_first, axis=1)
        return steps.reshape(-1, *self._step_shape)


def eval_batches(blocks: Blocks, *, micro_batch: int, rank: int, world_size: int) -> list[MicroBatch]:
    """This rank's share of all rows: disjoint, exhaustive over the ranks, and equally many batches on each of them."""
    plan = _filled(_cut(np.arange(blocks.rows), blocks.widths, micro_batch), world_size)
    return [micro_batch_of(blocks, rows) for rows in plan[rank::world_size]]


def sample_batch(blocks: Blocks, width: int, *, micro_batch: int) -> MicroBatch:
    """A micro batch of the first rows of this width, of which there is at least one; for warm-up."""
    rows = np.flatnonzero(blocks.widths == width)[:micro_batch]
    return micro_batch_of(blocks, _filled(rows, micro_batch))


def micro_batch_of(blocks: Blocks, rows: Longs) -> MicroBatch:
    """Rows of one width, -1 for a blank one."""
    arrays = blocks.arrays(rows)
    return MicroBatch(
        input_ids=torch.from_numpy(arrays.input_ids.astype(np.int64)),
        labels=torch.from_numpy(arrays.labels.astype(np.int64)),
        position_ids=torch.from_numpy(arrays.position_ids.astype(np.int64)),
        document_ids=torch.from_numpy(arrays.document_ids),
        cu_seqlens=torch.from_numpy(_cu_seqlens(arrays, blocks.max_seqlen, len(rows) * blocks.max_documents + 1)),
        tokens=int(arrays.lengths.sum()),
        supervised_tokens=int(np.count_nonzero(arrays.labels != IGNORE)),
    )


def _cut(order: Longs, widths: Ints, micro_batch: int) -> Longs:
    """The rows `order` as micro batches of one width each, [micro batches, B], those of the least width first."""
    found = widths[order]
    return np.concatenate(
        [_filled(order[found == width], micro_batch).reshape(-1, micro_batch) for width in np.unique(found)]
    )


def _filled(rows: Longs, multiple: int) -> Longs:
    """`rows` ([n] or [n, B]) with as many blank ones behind as make n a multiple."""
    return np.concatenate([rows, np.full((-len(rows) % multiple, *rows.shape[1:]), -1)])


def _cu_seqlens(arrays: RowArrays, max_seqlen: int, size: int) -> Ints:
    """The padding tail as documents of at most `max_seqlen` positions."""
    document_ids = arrays.document_ids
    starts = np.ones_like(document_ids, dtype=bool)  # a row's first position always starts a document
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    tail = np.arange(document_ids.shape[1]) - arrays.lengths[:, None]
    starts |= (tail > 0) & (tail % max_seqlen == 0)
    cu_seqlens = np.full(size, document_ids.size, np.int32)
    found = np.flatnonzero(starts)
    cu_seqlens[: len(found)] = found
    return cu_seqlens


class StreamState(LoaderState):
    """`epoch` is the window. `positions`: where each source stood before it; `counts`: what was counted until then."""

    positions: list[Position]
    counts: dict[str, int]


class StreamLoader(Iterator[StepBatch]):
    """Endless optimizer steps over the windows of a stream; like TrainLoader, with the window as a step's epoch."""

    def __init__(self, stream: Stream, *, micro_batch: int, accumulation: int, rank: int, world_size: int) -> None:
        self._stream = stream
        self._shape = {"micro_batch": micro_batch, "accumulation": accumulation, "rank": rank, "world_size": world_size}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stream")  # reads windows ahead
        self._reader: Future[StreamReader] | None = None
        self._next_window: Future[Window] | None = None
        stream.counts.clear()
        stream.counts.update(stream.validation_counts)
        self._begin(stream.first_window, number=0, start=stream.beginning)

    def __next__(self) -> StepBatch:
        if self._window_is_done:
            window = self._read_ahead().result()
            self._next_window = None
            self._begin(window, number=self._number + 1, start=self._end)
        self._read_ahead()
        return replace(next(self._loader), epoch=self._number)

    def state_dict(self) -> StreamState:
        """For `load_state_dict`, in a loader of the same stream and step size; plain JSON."""
        if self._window_is_done:
            return StreamState(epoch=self._number + 1, offset=0, positions=self._end, counts=dict(self._stream.counts))
        offset = self._loader.state()["offset"]
        counts = dict(self._counts_before)
        return StreamState(epoch=self._number, offset=offset, positions=self._start, counts=counts)

    def load_state_dict(self, state: StreamState) -> None:
        """Go on as the loader would have that gave this state: rows before its window are read over, not encoded.

        Raises CheckpointError for a state that no loader of this stream can give.
        """
        positions = self._checked_positions(state)
        if self._next_window is not None:
            self._next_window.cancel()
        self._reader, self._next_window = None, None
        number, window = state["epoch"], self._stream.first_window
        if number:  # the first was laid out before it was known how many documents a block may have
            self._number, self._end = number - 1, positions
            window = self._read_ahead().result()
            self._next_window = None
        self._stream.counts.clear()
        self._stream.counts.update(state["counts"])
        self._begin(window, number=number, start=positions)
        self._loader.restore({"epoch": 0, "offset": state["offset"]})

    def _checked_positions(self, state: StreamState) -> list[Position]:
        try:
            positions = [Position(int(passes), int(rows)) for passes, rows in state["positions"]]
            numbers = [state["epoch"], state["offset"], *(number for position in positions for number in position)]
            if isinstance(state["counts"], dict) and min(numbers) >= 0 and len(positions) == len(self._stream.sources):
                return positions
        except (KeyError, TypeError, ValueError):
            pass
        raise CheckpointError(
            "a stream's state must tell the window, the step in it and where each source stands; "
            f"this stream has {len(self._stream.sources)} source(s).\nFound: {str(state)[:200]}.\n"
            "Resume with the data.sources of the checkpoint."
        )

    @property
    def _window_is_done(self) -> bool:
        return self._loader.state()["epoch"] > 0

    def _read_ahead(self) -> Future[Window]:
        """The window after this one, which the thread reads while this one is trained on."""
        if self._next_window is None:
            if self._reader is None:
                self._reader = self._thread.submit(StreamReader, self._stream, self._end)
            reader, number = self._reader, self._number + 1
            self._next_window = self._thread.submit(lambda: self._stream.read_window(reader.result(), number=number))
        return self._next_window

    def _begin(self, window: Window, *, number: int, start: list[Position]) -> None:
        self._number, self._start, self._end = number, start, window.end
        self._counts_before = Counter(self._stream.counts)
        self._stream.counts.update(window.counts)
        self._loader = TrainLoader(window.blocks, **self._shape, seed=self._stream.seed + number)


def train_loader(
    data: Blocks | Stream, *, micro_batch: int, accumulation: int, rank: int, world_size: int, seed: int
) -> TrainLoader | StreamLoader:
    """This rank's endless optimizer steps; a stream brings its own seed."""
    shape = {"micro_batch": micro_batch, "accumulation": accumulation, "rank": rank, "world_size": world_size}
    return StreamLoader(data, **shape) if isinstance(data, Stream) else TrainLoader(data, **shape, seed=seed)

"""Blocks become the micro batches of one rank, in an order that does not depend on how many ranks there are.

A plan is an array of block numbers [steps, accumulation, world, B]: in optimizer step s and micro step a, rank r takes
the blocks plan[s, a, r], all of one width. -1 stands for a blank block (padding without labels).

One width (packed, padded):    the shuffled blocks, cut into steps of accumulation * world * B. So 1 rank x 8 micro
                               steps, 8 x 1 and 2 x 4 see the same blocks in the same step.
Several widths (bucketed):     the shuffled blocks of each width, cut into micro batches of B; then these, shuffled, cut
                               into steps, and ordered by width in a step: ranks that work at once have equal work.
Blank blocks fill the last micro batch of each width and the last step: an epoch shows every block once, in few shapes.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, TypedDict

import numpy as np

from launcher.data.documents import Ints, Longs
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.micro_batch import MicroBatch, micro_batch_of
from launcher.data.stream import Position, Stream, Window
from launcher.errors import CheckpointError


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step: this rank's micro batches, and the counts of all ranks and micro batches together.

    Every rank has all the blocks, so the global counts need no collective.
    """

    micro_batches: tuple[MicroBatch, ...]
    tokens: int
    supervised_tokens: int
    epoch: int  # 0-based


class StepShape(NamedTuple):
    """How an optimizer step is cut."""

    micro_batch: int  # blocks of a micro batch
    micro_batches: int  # of all ranks together

    @property
    def blocks(self) -> int:
        return self.micro_batch * self.micro_batches


class LoaderState(TypedDict):
    """Where a loader is: the next step is the `offset`-th (0-based) of this epoch (0-based)."""

    epoch: int
    offset: int


class TrainLoader(Iterator[StepBatch]):
    """Endless optimizer steps over the blocks, reshuffled every epoch by (seed, epoch)."""

    def __init__(
        self, blocks: Blocks, *, micro_batch: int, accumulation: int, rank: int, world_size: int, seed: int
    ) -> None:
        self._blocks = blocks
        self._plan_shape = (accumulation, world_size, micro_batch)
        self._shape = StepShape(micro_batch, accumulation * world_size)
        self._rank = rank
        self._seed = seed
        self._lengths, self._targets = blocks.lengths, blocks.targets
        self._state, self._plan = LoaderState(epoch=0, offset=0), self._plan_of(epoch=0)
        self.steps_per_epoch = len(self._plan)  # in every order, each width has as many micro batches

    def __next__(self) -> StepBatch:
        epoch, offset = self._state["epoch"], self._state["offset"]
        plan = self._plan[offset]
        if offset + 1 < self.steps_per_epoch:
            self._state = LoaderState(epoch=epoch, offset=offset + 1)
        else:
            self._enter(LoaderState(epoch=epoch + 1, offset=0))
        real = plan[plan >= 0]
        return StepBatch(
            micro_batches=tuple(micro_batch_of(self._blocks, numbers) for numbers in plan[:, self._rank]),
            tokens=int(self._lengths[real].sum()),
            supervised_tokens=int(self._targets[real].sum()),
            epoch=epoch,
        )

    def state_dict(self) -> LoaderState:
        """For `load_state_dict`, in a loader of the same blocks, seed and step size; plain JSON."""
        return self._state.copy()

    def load_state_dict(self, state: LoaderState, *, saved_by: StepShape | None = None) -> int:
        """Go on as the loader that gave this state would have; no earlier block is read. If `saved_by`, the step shape
        of that loader, is another one, this one goes on at its first step that repeats no block; returns how many
        blocks are left out by that.

        Raises CheckpointError for a state that no loader of these blocks and that step shape can give, and where the
        order of micro batches depends on the step shape.
        """
        saved_by = saved_by or self._shape
        numbers, steps = [state.get(key) for key in ("epoch", "offset")], self._steps_in(saved_by)
        if not all(type(n) is int and n >= 0 for n in numbers) or state["offset"] >= steps:
            raise CheckpointError(
                "a loader state must name an epoch from 0 and a step of it; "
                f"with these blocks and this step size an epoch has the steps 0 to {steps - 1}.\n"
                f"Found: {state}.\n"
                "Resume with the data, data.batching, train.micro_batch and accumulation of the checkpoint."
            )
        target, left_out = self._translated(state["epoch"], state["offset"], saved_by)
        self._enter(target)
        return left_out

    def _steps_in(self, shape: StepShape) -> int:
        """Steps of an epoch that is cut like this."""
        _, counts = np.unique(self._blocks.widths, return_counts=True)
        micro_batches = sum(-(-count // shape.micro_batch) for count in counts.tolist())
        return -(-micro_batches // shape.micro_batches)

    def _translated(self, epoch: int, offset: int, saved_by: StepShape) -> tuple[LoaderState, int]:
        """Where the epoch goes on here after `offset` steps of that shape, and the blocks that are left out."""
        if saved_by == self._shape or not offset:
            return LoaderState(epoch=epoch, offset=offset), 0
        if saved_by.micro_batch != self._shape.micro_batch and len(self._blocks.shapes) > 1:
            raise CheckpointError(
                "with blocks of several widths the order of an epoch depends on train.micro_batch, which may not "
                f"change within one; {saved_by.micro_batch} in the state, {self._shape.micro_batch} here.\n"
                "Keep train.micro_batch, and change train.accumulation."
            )
        done = offset * saved_by.blocks
        step = -(-done // self._shape.blocks)
        left_out = int((self._order_of(epoch).reshape(-1)[done : step * self._shape.blocks] >= 0).sum())
        at_end = step >= self.steps_per_epoch
        return LoaderState(epoch=epoch + at_end, offset=0 if at_end else step), left_out

    def _enter(self, state: LoaderState) -> None:
        self._state, self._plan = state, self._plan_of(state["epoch"])

    def _order_of(self, epoch: int) -> Longs:
        """The epoch's micro batches in the order in which steps take them, [micro batches, B]."""
        rng = np.random.default_rng((self._seed, epoch))
        micro_batches = _cut(rng.permutation(len(self._blocks)), self._blocks.widths, self._shape.micro_batch)
        if len(self._blocks.shapes) > 1:
            rng.shuffle(micro_batches)  # blocks of one width are in a random order already
        return micro_batches

    def _plan_of(self, epoch: int) -> Longs:
        """The epoch's plan, [steps, accumulation, world, B]."""
        micro_batches = _filled(self._order_of(epoch), self._shape.micro_batches)
        first = micro_batches[:, 0]
        widths = np.where(first < 0, 0, self._blocks.widths[first]).reshape(-1, self._shape.micro_batches)
        widest_first = np.argsort(-widths, axis=1, kind="stable")[:, :, None]
        steps = np.take_along_axis(micro_batches.reshape(*widths.shape, -1), widest_first, axis=1)
        return steps.reshape(-1, *self._plan_shape)


@dataclass(frozen=True)
class EvalBatches:
    """Micro batches, each made when its turn comes: all together they would take 28 bytes a position."""

    blocks: Blocks
    plan: Longs  # [micro batches, B]: numbers of blocks

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[MicroBatch]:
        return (micro_batch_of(self.blocks, numbers) for numbers in self.plan)


def eval_batches(blocks: Blocks, *, micro_batch: int, rank: int, world_size: int) -> EvalBatches:
    """This rank's share of all blocks: disjoint, exhaustive over the ranks, and as many batches on each of them."""
    plan = _filled(_cut(np.arange(len(blocks)), blocks.widths, micro_batch), world_size)
    return EvalBatches(blocks, plan[rank::world_size])


def sample_batch(blocks: Blocks, width: int, *, micro_batch: int) -> MicroBatch:
    """A micro batch of the first blocks of this width, of which there is at least one; for warm-up."""
    numbers = np.flatnonzero(blocks.widths == width)[:micro_batch]
    return micro_batch_of(blocks, _filled(numbers, micro_batch))


def _cut(order: Longs, widths: Ints, micro_batch: int) -> Longs:
    """The blocks `order` in micro batches of one width each, [micro batches, B], the least width first."""
    ordered = widths[order]
    by_width = (order[ordered == width] for width in np.unique(ordered))
    return np.concatenate([_filled(numbers, micro_batch).reshape(-1, micro_batch) for numbers in by_width])


def _filled(numbers: Longs, multiple: int) -> Longs:
    """`numbers` ([n] or [n, B]), followed by as many blank blocks as make n a multiple."""
    return np.concatenate([numbers, np.full((-len(numbers) % multiple, *numbers.shape[1:]), -1)])


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
        self._next_window: Future[Window] | None = None
        beginning = StreamState(epoch=0, offset=0, positions=stream.beginning, counts=stream.validation_counts)
        self._start_at(beginning)

    def __next__(self) -> StepBatch:
        if self._window_is_done:
            window, number = self._read_ahead().result(), self._number + 1
            self._begin(window, self._loader_of(window, number), number=number, start=self._end)
        self._read_ahead()
        return replace(next(self._loader), epoch=self._number)

    def state_dict(self) -> StreamState:
        """For `load_state_dict`, in a loader of the same stream and step size; plain JSON."""
        if self._window_is_done:
            return StreamState(epoch=self._number + 1, offset=0, positions=self._end, counts=dict(self._stream.counts))
        offset = self._loader.state_dict()["offset"]
        counts = dict(self._counts_before)
        return StreamState(epoch=self._number, offset=offset, positions=self._start, counts=counts)

    def load_state_dict(self, state: StreamState, *, saved_by: StepShape | None = None) -> int:
        """Go on as the loader would have that gave this state: rows before its window are read over, not encoded.
        `saved_by` and what is returned: as of TrainLoader; an epoch is a window.

        Raises CheckpointError, before anything changes, for a state that no loader of this stream can give.
        """
        self._check_positions(state)
        return self._start_at(state, saved_by=saved_by)

    def _check_positions(self, state: StreamState) -> None:
        try:
            positions = [Position(*position) for position in state["positions"]]
            numbers = [state["epoch"], state["offset"], *state["counts"].values(), *chain.from_iterable(positions)]
            if all(type(n) is int and n >= 0 for n in numbers) and len(positions) == len(self._stream.sources):
                return
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        raise CheckpointError(
            "a stream's state must tell the window, the step in it, where each source stands and what was counted; "
            f"this stream has {len(self._stream.sources)} source(s).\nFound: {str(state)[:200]}.\n"
            "Resume with the data.sources of the checkpoint."
        )

    @property
    def _window_is_done(self) -> bool:
        return self._loader.state_dict()["epoch"] > 0

    def _read_ahead(self) -> Future[Window]:
        """The window after this one, which the thread reads while this one is trained on."""
        if self._next_window is None:
            self._next_window = self._thread.submit(next, self._windows)
        return self._next_window

    def _start_at(self, state: StreamState, *, saved_by: StepShape | None = None) -> int:
        number, positions = state["epoch"], [Position(*position) for position in state["positions"]]
        window = self._stream.first_window
        if number:  # the first was laid out before it was known how many documents a block may have
            windows = self._stream.windows(positions, number=number)
            window = self._thread.submit(next, windows).result()
        else:
            windows = self._stream.windows(window.end, number=1)
        loader = self._loader_of(window, number)
        left_out = loader.load_state_dict({"epoch": 0, "offset": state["offset"]}, saved_by=saved_by)
        # Nothing is refused from here on, and nothing has changed until here: a refused loader goes on as before.
        if self._next_window is not None:
            self._next_window.cancel()
        self._windows = windows
        self._stream.counts.clear()
        self._stream.counts.update(state["counts"])
        self._begin(window, loader, number=number, start=positions)
        return left_out

    def _begin(self, window: Window, loader: TrainLoader, *, number: int, start: list[Position]) -> None:
        self._next_window = None
        self._number, self._start, self._end = number, start, window.end
        self._counts_before = Counter(self._stream.counts)
        self._stream.counts.update(window.counts)
        self._loader = loader

    def _loader_of(self, window: Window, number: int) -> TrainLoader:
        return TrainLoader(window.blocks, **self._shape, seed=self._stream.seed + number)


def train_loader(
    data: Blocks | Stream, *, micro_batch: int, accumulation: int, rank: int, world_size: int, seed: int
) -> TrainLoader | StreamLoader:
    """This rank's endless optimizer steps; a stream brings its own seed."""
    shape = {"micro_batch": micro_batch, "accumulation": accumulation, "rank": rank, "world_size": world_size}
    return StreamLoader(data, **shape) if isinstance(data, Stream) else TrainLoader(data, **shape, seed=seed)

"""The order of blocks: an epoch shows each once, however many ranks there are, and a state gives the same order on."""

import json
import math
import tracemalloc
from collections.abc import Sequence
from functools import cache
from itertools import islice, takewhile

import numpy as np
import pytest

from launcher.data import loader as module
from launcher.data.documents import Documents
from launcher.data.loader import StepBatch, StepShape, TrainLoader, eval_batches, sample_batch
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.buckets import bucket
from launcher.data.pack.micro_batch import MicroBatch
from launcher.data.pack.packing import pack
from launcher.errors import CheckpointError
from tests.support.documents import documents_of

NAMES = range(101, 122)  # of 21 blocks: the first token of one of their documents. No step size here divides 21
WIDTHS = {"packed": (16,), "bucketed": (8, 16, 24)}


def named(lengths: Sequence[int]) -> Documents:
    """The first documents begin with the names, all other tokens are 5."""
    documents = documents_of(lengths)
    documents.input_ids[:] = 5
    documents.input_ids[documents.offsets[: len(NAMES)]] = NAMES
    return documents


@cache
def blocks_of(batching: str) -> Blocks:
    """Packed: blocks of 16 positions, each with a document of 9 tokens and one or two more. Bucketed: blocks of three
    widths, 11, 7 and 3 of them."""
    order = np.random.default_rng(0).permutation(21)
    if batching == "packed":
        blocks = pack(named([9] * 21 + [4] * 21 + [3] * 10), np.arange(52), max_length=16, pad_id=0, seed=0)
    else:
        blocks = bucket(named([8] * 11 + [16] * 7 + [21] * 3), order, widths=WIDTHS["bucketed"], pad_id=0)
    assert len(blocks) == 21 and blocks.shapes == WIDTHS[batching]
    return blocks


@pytest.fixture(scope="module", params=["packed", "bucketed"])
def blocks(request):
    return blocks_of(request.param)


def loader(
    blocks: Blocks, *, world: int = 1, rank: int = 0, accumulation: int = 8, seed: int = 0, micro_batch: int = 1
) -> TrainLoader:
    return TrainLoader(
        blocks, micro_batch=micro_batch, accumulation=accumulation, rank=rank, world_size=world, seed=seed
    )


def epoch_of(blocks: Blocks, *, world: int, accumulation: int, micro_batch: int) -> list[tuple[StepBatch, ...]]:
    """[step][rank] of the first epoch."""
    loaders = [
        loader(blocks, world=world, rank=rank, accumulation=accumulation, micro_batch=micro_batch)
        for rank in range(world)
    ]
    return list(zip(*(islice(one, one.steps_per_epoch) for one in loaders), strict=True))


def batches_of(*steps: StepBatch) -> list[MicroBatch]:
    return [batch for step in steps for batch in step.micro_batches]


def names_in(batches: Sequence[MicroBatch]) -> list[int]:
    """The names of the blocks in these batches; 0 for a blank one."""
    return [next((n for n in ids.tolist() if n > 100), 0) for batch in batches for ids in batch.input_ids]


def names_of(*steps: StepBatch) -> list[int]:
    return sorted(names_in(batches_of(*steps)))


@pytest.mark.parametrize(("world", "accumulation"), [(2, 2), (4, 1)])
def test_each_step_sees_the_same_blocks_and_counts_however_they_are_spread(blocks, world, accumulation):
    reference = epoch_of(blocks, world=1, accumulation=4, micro_batch=2)
    spread = epoch_of(blocks, world=world, accumulation=accumulation, micro_batch=2)
    for ranks, [single] in zip(spread, reference, strict=True):
        assert names_of(*ranks) == names_of(single)
        counts = (single.tokens, single.supervised_tokens, single.epoch)
        assert {(rank.tokens, rank.supervised_tokens, rank.epoch) for rank in ranks} == {counts}
        batches = batches_of(*ranks)
        assert counts[:2] == (sum(b.tokens for b in batches), sum(b.supervised_tokens for b in batches))
    assert sum(single.supervised_tokens for [single] in reference) == blocks.supervised_tokens
    assert names_of(*reference[0]) != names_of(*reference[1])


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_an_epoch_shows_every_block_once_in_micro_batches_of_the_planned_shapes(
    blocks, world, accumulation, micro_batch
):
    steps = epoch_of(blocks, world=world, accumulation=accumulation, micro_batch=micro_batch)
    batches = [batch for ranks in steps for batch in batches_of(*ranks)]
    names = names_in(batches)
    assert sorted(name for name in names if name) == list(NAMES)
    assert {tuple(b.input_ids.shape) for b in batches} == {(micro_batch, width) for width in blocks.shapes}
    assert {tuple(b.cu_seqlens.shape) for b in batches} == {(micro_batch * blocks.max_documents + 1,)}
    assert 0 in names
    if len(blocks.shapes) == 1:
        assert not any(0 in names_of(*ranks) for ranks in steps[:-1])


def test_bucketed_widths_are_mixed_over_the_epoch_and_ranks_have_equal_work_at_once():
    steps = epoch_of(blocks_of("bucketed"), world=2, accumulation=2, micro_batch=1)
    widths = [[[b.input_ids.shape[1] for b in rank.micro_batches] for rank in ranks] for ranks in steps]
    sizes = [sum(one) + sum(other) for one, other in widths][:-1]  # the last step has blanks
    assert sizes != sorted(sizes) and sizes != sorted(sizes, reverse=True)
    for one, other in widths:
        assert one[0] >= other[0] >= one[1] >= other[1]  # in order of width over [accumulation, world]


def test_epochs_follow_one_another_in_new_orders_that_are_the_seeds(blocks):
    def order(seed: int) -> list[list[int]]:
        one = loader(blocks, accumulation=2, seed=seed)
        steps = list(islice(one, 2 * one.steps_per_epoch))
        assert [step.epoch for step in steps] == [0] * one.steps_per_epoch + [1] * one.steps_per_epoch
        return [[n for n in names_in(batches_of(*steps)) if n] for steps in np.split(np.array(steps), 2)]

    assert order(1) == order(1) != order(2)
    first, second = order(1)
    assert first != second and sorted(first) == sorted(second) == list(NAMES)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_has_every_block_once_in_equally_many_batches_on_each_rank(blocks, world):
    shares = [eval_batches(blocks, micro_batch=3, rank=rank, world_size=world) for rank in range(world)]
    batches = [batch for share in shares for batch in share]
    assert len({len(share) for share in shares}) == 1
    assert sorted(name for name in names_in(batches) if name) == list(NAMES)
    assert sum(b.supervised_tokens for b in batches) == blocks.supervised_tokens
    assert {tuple(b.input_ids.shape) for b in batches} == {(3, width) for width in blocks.shapes}


def test_evaluation_holds_one_batch_at_a_time():
    """Kept, 28 bytes a position would stay for the whole run."""
    blocks = pack(documents_of([1000] * 100), np.arange(100), max_length=1000, pad_id=0, seed=0)
    one_pass = len(blocks) * 1000 * 28
    tracemalloc.start()
    try:
        batches = eval_batches(blocks, micro_batch=1, rank=0, world_size=1)
        assert sum(batch.tokens for batch in batches) == sum(batch.tokens for batch in batches) == blocks.tokens
        assert tracemalloc.get_traced_memory()[1] < one_pass / 10
    finally:
        tracemalloc.stop()


def test_a_sample_has_the_width_asked_for_and_is_filled_up_with_blanks():
    sample = sample_batch(blocks_of("bucketed"), 24, micro_batch=5)
    assert tuple(sample.input_ids.shape) == (5, 24)
    assert sorted(names_in([sample])) == [0, 0, *NAMES[-3:]]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_a_state_gives_the_exact_next_steps_from_anywhere(blocks, world, accumulation):
    def shown(step: StepBatch) -> list[object]:
        return [names_in(step.micro_batches), step.tokens, step.supervised_tokens, step.epoch]

    for rank in range(world):
        place = {"world": world, "rank": rank, "accumulation": accumulation, "micro_batch": 2}
        whole = loader(blocks, **place)
        states, steps = [], []
        for _ in range(2 * whole.steps_per_epoch + 1):
            states.append(json.dumps(whole.state_dict()))
            steps.append(shown(next(whole)))
        assert [json.loads(state)["offset"] for state in states[:2]] == [0, 1]
        for offset, state in enumerate(states):
            resumed = loader(blocks, **place)
            resumed.load_state_dict(json.loads(state))
            assert json.dumps(resumed.state_dict()) == state
            assert [shown(step) for step in islice(resumed, len(steps) - offset)] == steps[offset:]
        assert steps[0] != steps[whole.steps_per_epoch]


def test_resuming_reads_no_earlier_block(monkeypatch):
    read: list[int] = []
    original = module.micro_batch_of
    monkeypatch.setattr(module, "micro_batch_of", lambda b, numbers: read.append(len(numbers)) or original(b, numbers))
    one = loader(blocks_of("packed"), accumulation=4)
    one.load_state_dict({"epoch": 1000, "offset": one.steps_per_epoch - 1})
    assert read == []
    assert next(one).epoch == 1000
    assert read == [1] * 4
    assert one.state_dict() == {"epoch": 1001, "offset": 0}


@pytest.mark.parametrize(
    "state",
    [{"epoch": 0, "offset": 3}, {"epoch": -1, "offset": 0}, {"epoch": 0, "offset": 0.5}, {"epoch": 0}, {"offset": "1"}],
)
def test_a_state_that_cannot_be_is_refused(state):
    one = loader(blocks_of("packed"))
    assert one.steps_per_epoch == 3
    one.state_dict()["offset"] = 2  # of a copy
    with pytest.raises(CheckpointError, match=r"(?s)steps 0 to 2.*Found: .*micro_batch") as caught:
        one.load_state_dict(state)
    assert len(str(caught.value).splitlines()) <= 5
    assert one.state_dict() == {"epoch": 0, "offset": 0}


def translated(blocks: Blocks, saved: dict[str, int], here: dict[str, int], *, steps: int) -> tuple[list[int], ...]:
    """The blocks before `steps` steps of the one cut and those after it in the other one, to the end of the epoch, and
    how many are left out."""
    first = loader(blocks, **saved)
    before = [n for step in islice(first, steps) for n in names_in(step.micro_batches)]
    second = loader(blocks, **here)
    shape = StepShape(saved["micro_batch"], saved["accumulation"])
    left_out = second.load_state_dict(first.state_dict(), saved_by=shape)
    after = [n for step in takewhile(lambda step: not step.epoch, second) for n in names_in(step.micro_batches)]
    return [n for n in before if n], [n for n in after if n], [left_out]


@pytest.mark.parametrize("saved", [(2, 4), (1, 3), (3, 2), (1, 1)])
@pytest.mark.parametrize("here", [(1, 8), (2, 4), (2, 3), (5, 1), (1, 40)])
def test_in_steps_of_another_cut_no_block_comes_twice_and_those_left_out_are_counted(saved, here):
    blocks = blocks_of("packed")
    cuts = [{"micro_batch": size, "accumulation": count} for size, count in (saved, here)]
    size, total = math.prod(saved), math.prod(here)
    for steps in range(-(-21 // size)):
        before, after, [left_out] = translated(blocks, *cuts, steps=steps)
        assert len({*before, *after}) == len(before) + len(after) == 21 - left_out
        assert left_out < total and (left_out == 0 or size % total)
        assert steps or not left_out


def test_bucketed_micro_batches_may_be_dealt_out_anew_but_not_cut_anew_within_an_epoch():
    blocks = blocks_of("bucketed")
    old, new = {"micro_batch": 2, "accumulation": 2}, {"micro_batch": 2, "accumulation": 3}
    for steps in range(4):
        before, after, [left_out] = translated(blocks, old, new, steps=steps)
        assert len({*before, *after}) == len(before) + len(after) == 21 - left_out and left_out <= 4
    assert translated(blocks, old, {"micro_batch": 1, "accumulation": 4}, steps=0)[2] == [0]
    with pytest.raises(CheckpointError, match=r"(?s)depends on train.micro_batch.*2 in the state, 1 here.*Keep"):
        translated(blocks, old, {"micro_batch": 1, "accumulation": 4}, steps=1)

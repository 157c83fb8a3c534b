import time
from itertools import islice

import numpy as np
import pytest
import torch

from launcher.data.documents import Document, Documents
from launcher.data.loader import MicroBatch, StepBatch, TrainLoader, eval_batches, micro_batch_of, sample_batch
from launcher.data.pack.blocks import IGNORE, Blocks
from launcher.data.pack.buckets import bucket, lay_out
from launcher.data.pack.packing import pack
from launcher.recipe.data_section import DataSection

ROWS = 21  # not divisible by 8
PAD = 0


def documents_of(parts: list[tuple[list[int], list[bool]]]) -> Documents:
    return Documents.of(Document(np.array(ids, np.int32), np.array(supervised)) for ids, supervised in parts)


@pytest.fixture(scope="module")
def packed() -> Blocks:
    """Rows of 16 positions, each with a document of 9 tokens that begins with 100 + its number and one or two more."""
    parts = [([100 + i] + [5] * 8, [True] * 9) for i in range(ROWS)]
    parts += [([6] * 4, [True] * 4) for _ in range(ROWS)]
    parts += [([7] * 3, [False, True, True]) for _ in range(ROWS // 2)]
    made = pack(documents_of(parts), np.arange(len(parts)), max_length=16, pad_id=PAD, seed=0)
    assert made.rows == ROWS
    return made


@pytest.fixture(scope="module")
def bucketed() -> Blocks:
    """Rows of three widths, 11, 7 and 3 of them; a document begins with 100 + its number."""
    lengths = [8] * 11 + [16] * 7 + [21] * 3
    parts = [([100 + i] + [5] * (n - 1), [True] * n) for i, n in enumerate(lengths)]
    data = DataSection(batching="bucketed", max_length=32)
    indices = np.random.default_rng(0).permutation(ROWS)
    made, _ = lay_out(documents_of(parts), indices, indices[:0], data=data, pad_id=PAD, seed=0)
    assert made.rows == ROWS
    assert made.shapes == (8, 16, 24)
    return made


def loader(
    blocks: Blocks, *, world: int = 1, rank: int = 0, accumulation: int = 8, seed: int = 0, micro_batch: int = 1
) -> TrainLoader:
    return TrainLoader(
        blocks, micro_batch=micro_batch, accumulation=accumulation, rank=rank, world_size=world, seed=seed
    )


def epoch_of(packed: Blocks, *, world: int, accumulation: int, seed: int = 0) -> list[list[StepBatch]]:
    """[step][rank] of the first epoch."""
    loaders = [loader(packed, world=world, rank=r, accumulation=accumulation, seed=seed) for r in range(world)]
    return [list(ranks) for ranks in zip(*(islice(one, one.steps_per_epoch) for one in loaders), strict=True)]


def names(batches: list[MicroBatch] | tuple[MicroBatch, ...]) -> list[int]:
    """The numbers of the rows in the batches; -1 for a blank one."""
    rows = [row for batch in batches for row in batch.input_ids]
    return [next((int(t) - 100 for t in row if t >= 100), -1) for row in rows]


def names_of(ranks: list[StepBatch]) -> list[int]:
    return sorted(name for step in ranks for name in names(step.micro_batches))


SPLITS = [(1, 8), (8, 1), (2, 4)]


@pytest.mark.parametrize(("world", "accumulation"), SPLITS[1:])
def test_each_step_sees_the_same_rows_however_they_are_spread(packed: Blocks, world: int, accumulation: int) -> None:
    reference = epoch_of(packed, world=1, accumulation=8)
    spread = epoch_of(packed, world=world, accumulation=accumulation)
    assert [names_of(ranks) for ranks in spread] == [names_of(ranks) for ranks in reference]
    for ranks, [single] in zip(spread, reference, strict=True):
        counts = (single.tokens, single.supervised_tokens, single.epoch)
        assert [(rank.tokens, rank.supervised_tokens, rank.epoch) for rank in ranks] == [counts] * world
    assert names_of(reference[0]) != names_of(reference[1])


@pytest.mark.parametrize(("world", "accumulation"), SPLITS)
def test_an_epoch_shows_every_row_once_and_blanks_only_in_its_last_step(
    packed: Blocks, world: int, accumulation: int
) -> None:
    steps = [names_of(ranks) for ranks in epoch_of(packed, world=world, accumulation=accumulation)]
    assert [len(step) for step in steps] == [8, 8, 8]
    assert sorted(name for step in steps for name in step if name >= 0) == list(range(ROWS))
    assert [step.count(-1) for step in steps] == [0, 0, 3]


def test_global_counts_are_the_sum_over_ranks_and_micro_batches(packed: Blocks) -> None:
    total = 0
    for ranks in epoch_of(packed, world=2, accumulation=4):
        batches = [batch for step in ranks for batch in step.micro_batches]
        assert ranks[0].tokens == sum(int((b.input_ids != PAD).sum()) for b in batches)
        assert ranks[0].tokens == sum(b.tokens for b in batches)
        assert ranks[0].supervised_tokens == sum(int((b.labels != IGNORE).sum()) for b in batches)
        total += ranks[0].supervised_tokens
    assert total == packed.supervised_tokens


def test_epochs_follow_one_another_in_new_orders(packed: Blocks) -> None:
    steps = list(islice(loader(packed), 6))
    assert [step.epoch for step in steps] == [0, 0, 0, 1, 1, 1]
    first, second = ([n for s in steps if s.epoch == e for n in names(s.micro_batches)] for e in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_one_seed_gives_one_order_and_another_seed_another(packed: Blocks) -> None:
    runs = [[names(s.micro_batches) for s in islice(loader(packed, seed=seed), 6)] for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_cu_seqlens_are_the_document_boundaries_in_a_static_shape(packed: Blocks) -> None:
    loader_of_pairs = TrainLoader(packed, micro_batch=2, accumulation=2, rank=0, world_size=1, seed=0)
    boundaries_seen = set()
    for step in islice(loader_of_pairs, loader_of_pairs.steps_per_epoch):
        for batch in step.micro_batches:
            starts = [
                row * 16 + position
                for row in range(2)
                for position in range(16)
                if position == 0 or batch.document_ids[row, position] != batch.document_ids[row, position - 1]
            ]
            filler = 2 * packed.max_documents + 1 - len(starts)
            assert batch.cu_seqlens.tolist() == starts + [32] * filler
            assert all(batch.position_ids.flatten()[start] == 0 for start in starts)
            boundaries_seen.add(len(starts))
    assert len(boundaries_seen) > 1  # the static shape covered batches that differ


def test_the_padding_is_documents_that_keep_to_the_bound() -> None:
    documents = documents_of([([1] * 4, [True] * 4), ([2] * 14, [True] * 14)])
    blocks = bucket(documents, np.arange(2), widths=(16,), pad_id=PAD).bounded(14)
    small = bucket(documents, np.arange(1), widths=(16,), pad_id=PAD).bounded(5)
    batches = [(blocks, [0, 1, -1]), (small, [0, -1])]
    assert [micro_batch_of(b, np.array(rows)).cu_seqlens.tolist() for b, rows in batches] == [
        [0, 4, 16, 30, 32, 46, 48],
        [0, 4, 9, 14, 16, 21, 26, 31, 32],
    ]
    assert micro_batch_of(small, np.array([0])).document_ids.tolist() == [[0] * 4 + [1] * 12]


def test_every_batch_has_the_declared_types_and_shapes(packed: Blocks) -> None:
    for step in islice(loader(packed), 3):
        for batch in step.micro_batches:
            for name in ("input_ids", "labels", "position_ids"):
                assert getattr(batch, name).dtype == torch.int64
            assert batch.document_ids.dtype == batch.cu_seqlens.dtype == torch.int32
            for name in ("input_ids", "labels", "position_ids", "document_ids"):
                assert getattr(batch, name).shape == (1, 16)
            assert batch.cu_seqlens.shape == (packed.max_documents + 1,)


def test_a_blank_row_is_one_unsupervised_document_of_padding(packed: Blocks) -> None:
    blank = list(islice(loader(packed), 3))[-1].micro_batches[-1]
    assert (blank.tokens, blank.supervised_tokens) == (0, 0)
    assert blank.input_ids.eq(PAD).all() and blank.labels.eq(IGNORE).all() and blank.document_ids.eq(0).all()
    assert blank.position_ids[0].tolist() == list(range(16))
    assert blank.cu_seqlens.tolist() == [0] + [16] * packed.max_documents


@pytest.mark.parametrize("world", [1, 2, 4])
def test_eval_batches_are_disjoint_exhaustive_and_equally_many_on_every_rank(packed: Blocks, world: int) -> None:
    shares = [eval_batches(packed, micro_batch=3, rank=rank, world_size=world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(n for share in shares for n in names(share) if n >= 0) == list(range(ROWS))
    assert sum(b.supervised_tokens for share in shares for b in share) == packed.supervised_tokens
    assert {tuple(b.input_ids.shape) for share in shares for b in share} == {(3, 16)}


WORLDS = [(1, 4), (2, 2), (4, 1)]


def steps_of(blocks: Blocks, *, world: int, accumulation: int, micro_batch: int) -> list[list[StepBatch]]:
    """[rank][step] of the first epoch."""
    ranks = [
        loader(blocks, world=world, rank=rank, accumulation=accumulation, micro_batch=micro_batch)
        for rank in range(world)
    ]
    return [list(islice(one, one.steps_per_epoch)) for one in ranks]


@pytest.mark.parametrize(("world", "accumulation"), WORLDS)
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_a_bucketed_epoch_shows_every_row_once_in_micro_batches_of_one_planned_shape(
    bucketed: Blocks, world: int, accumulation: int, micro_batch: int
) -> None:
    ranks = steps_of(bucketed, world=world, accumulation=accumulation, micro_batch=micro_batch)
    batches = [batch for steps in ranks for step in steps for batch in step.micro_batches]
    assert sorted(n for n in names(batches) if n >= 0) == list(range(ROWS))
    assert {tuple(b.input_ids.shape) for b in batches} == {(micro_batch, width) for width in (8, 16, 24)}
    assert {tuple(b.cu_seqlens.shape) for b in batches} == {(micro_batch * 2 + 1,)}
    for batch in batches:  # the width is the least that fits, so equal documents meet
        assert all(batch.input_ids.shape[1] - 8 < int((row != PAD).sum()) for row in batch.input_ids if row[0] != PAD)
    assert names(batches).count(-1) > 0 or micro_batch == 1


@pytest.mark.parametrize(("world", "accumulation"), WORLDS)
def test_a_bucketed_step_sees_the_same_rows_and_counts_however_they_are_spread(
    bucketed: Blocks, world: int, accumulation: int
) -> None:
    [reference] = steps_of(bucketed, world=1, accumulation=4, micro_batch=2)
    ranks = steps_of(bucketed, world=world, accumulation=accumulation, micro_batch=2)
    for index, single in enumerate(reference):
        spread = [steps[index] for steps in ranks]
        assert names_of(spread) == names_of([single])
        assert {(s.tokens, s.supervised_tokens) for s in spread} == {(single.tokens, single.supervised_tokens)}
        assert single.tokens == sum(b.tokens for s in spread for b in s.micro_batches)
    assert names_of(reference[:1]) != names_of(reference[1:2])


def test_bucketed_widths_are_mixed_over_the_epoch_and_alike_at_once(bucketed: Blocks) -> None:
    ranks = steps_of(bucketed, world=2, accumulation=2, micro_batch=1)
    widths = [[[b.input_ids.shape[1] for b in step.micro_batches] for step in steps] for steps in ranks]
    sizes = [sum(own) + sum(other) for own, other in zip(*widths, strict=True)][:-1]  # the last step has blanks
    assert sizes != sorted(sizes) and sizes != sorted(sizes, reverse=True)
    for own, other in zip(*widths, strict=True):
        assert own[0] >= other[0] >= own[1] >= other[1]  # in order of width over [accumulation, world]


def test_bucketed_epochs_differ_and_are_the_seeds(bucketed: Blocks) -> None:
    def order(seed: int) -> list[list[int]]:
        one = loader(bucketed, accumulation=2, seed=seed)
        return [names(step.micro_batches) for step in islice(one, 2 * one.steps_per_epoch)]

    assert order(1) == order(1) != order(2)
    half = len(order(1)) // 2
    assert order(1)[:half] != order(1)[half:]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_bucketed_evaluation_has_each_row_once_and_planned_shapes_only(bucketed: Blocks, world: int) -> None:
    shares = [eval_batches(bucketed, micro_batch=2, rank=rank, world_size=world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(n for share in shares for n in names(share) if n >= 0) == list(range(ROWS))
    assert {tuple(b.input_ids.shape) for share in shares for b in share} == {(2, 8), (2, 16), (2, 24)}


def test_a_sample_has_the_width_asked_for_and_is_filled_up_with_blanks(bucketed: Blocks) -> None:
    sample = sample_batch(bucketed, 24, micro_batch=5)
    assert tuple(sample.input_ids.shape) == (5, 24)
    assert sorted(names([sample])) == [-1, -1, 18, 19, 20]


def test_a_micro_batch_of_packed_text_is_made_in_two_milliseconds() -> None:
    lengths = np.random.default_rng(0).integers(60, 220, 3000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    documents = Documents(np.zeros(offsets[-1], np.int32), np.ones(offsets[-1], np.bool_), offsets)
    blocks = pack(documents, np.arange(3000), max_length=2048, pad_id=PAD, seed=0)
    assert 10 < 3000 / blocks.rows < 20
    one = loader(blocks, accumulation=1, micro_batch=2)
    next(one)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        next(one)
        times.append(time.perf_counter() - start)
    assert sorted(times)[25] < 2e-3  # 0.3 ms where this was written


def test_a_batch_moves_whole(packed: Blocks) -> None:
    batch = next(iter(loader(packed))).micro_batches[0]
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert [t.device.type for t in tensors] == ["meta"] * 5
    assert moved.tokens == batch.tokens > 0

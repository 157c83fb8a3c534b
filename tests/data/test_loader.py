from itertools import islice

import numpy as np
import pytest
import torch

from launcher.data.loader import MicroBatch, StepBatch, TrainLoader, eval_batches
from launcher.data.packing import IGNORE, Document, Packed, pack

ROWS = 21  # not divisible by 8
PAD = 0


@pytest.fixture(scope="module")
def packed() -> Packed:
    """Rows of 16 positions, each with a document of 9 tokens that begins with 100 + its number and one or two more."""
    documents = [Document([100 + i] + [5] * 8, [True] * 9) for i in range(ROWS)]
    documents += [Document([6] * 4, [True] * 4) for _ in range(ROWS)]
    documents += [Document([7] * 3, [False, True, True]) for _ in range(ROWS // 2)]
    made = pack(documents, max_length=16, pad_id=PAD, seed=0)
    assert made.rows == ROWS
    return made


def loader(packed: Packed, *, world: int = 1, rank: int = 0, accumulation: int = 8, seed: int = 0) -> TrainLoader:
    return TrainLoader(packed, micro_batch=1, accumulation=accumulation, rank=rank, world_size=world, seed=seed)


def epoch_of(packed: Packed, *, world: int, accumulation: int, seed: int = 0) -> list[list[StepBatch]]:
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
def test_each_step_sees_the_same_rows_however_they_are_spread(packed: Packed, world: int, accumulation: int) -> None:
    reference = epoch_of(packed, world=1, accumulation=8)
    spread = epoch_of(packed, world=world, accumulation=accumulation)
    assert [names_of(ranks) for ranks in spread] == [names_of(ranks) for ranks in reference]
    for ranks, [single] in zip(spread, reference, strict=True):
        counts = (single.tokens, single.supervised_tokens, single.epoch)
        assert [(rank.tokens, rank.supervised_tokens, rank.epoch) for rank in ranks] == [counts] * world
    assert names_of(reference[0]) != names_of(reference[1])


@pytest.mark.parametrize(("world", "accumulation"), SPLITS)
def test_an_epoch_shows_every_row_once_and_blanks_only_in_its_last_step(
    packed: Packed, world: int, accumulation: int
) -> None:
    steps = [names_of(ranks) for ranks in epoch_of(packed, world=world, accumulation=accumulation)]
    assert [len(step) for step in steps] == [8, 8, 8]
    assert sorted(name for step in steps for name in step if name >= 0) == list(range(ROWS))
    assert [step.count(-1) for step in steps] == [0, 0, 3]


def test_global_counts_are_the_sum_over_ranks_and_micro_batches(packed: Packed) -> None:
    total = 0
    for ranks in epoch_of(packed, world=2, accumulation=4):
        batches = [batch for step in ranks for batch in step.micro_batches]
        assert ranks[0].tokens == sum(int((b.input_ids != PAD).sum()) for b in batches)
        assert ranks[0].tokens == sum(b.tokens for b in batches)
        assert ranks[0].supervised_tokens == sum(int((b.labels != IGNORE).sum()) for b in batches)
        total += ranks[0].supervised_tokens
    assert total == packed.supervised_tokens


def test_epochs_follow_one_another_in_new_orders(packed: Packed) -> None:
    steps = list(islice(loader(packed), 6))
    assert [step.epoch for step in steps] == [0, 0, 0, 1, 1, 1]
    first, second = ([n for s in steps if s.epoch == e for n in names(s.micro_batches)] for e in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_one_seed_gives_one_order_and_another_seed_another(packed: Packed) -> None:
    runs = [[names(s.micro_batches) for s in islice(loader(packed, seed=seed), 6)] for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_cu_seqlens_are_the_document_boundaries_in_a_static_shape(packed: Packed) -> None:
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


def test_every_batch_has_the_declared_types_and_shapes(packed: Packed) -> None:
    for step in islice(loader(packed), 3):
        for batch in step.micro_batches:
            for name in ("input_ids", "labels", "position_ids"):
                assert getattr(batch, name).dtype == torch.int64
            assert batch.document_ids.dtype == batch.cu_seqlens.dtype == torch.int32
            for name in ("input_ids", "labels", "position_ids", "document_ids"):
                assert getattr(batch, name).shape == (1, 16)
            assert batch.cu_seqlens.shape == (packed.max_documents + 1,)


def test_a_blank_row_is_one_unsupervised_document_of_padding(packed: Packed) -> None:
    blank = list(islice(loader(packed), 3))[-1].micro_batches[-1]
    assert (blank.tokens, blank.supervised_tokens) == (0, 0)
    assert blank.input_ids.eq(PAD).all() and blank.labels.eq(IGNORE).all() and blank.document_ids.eq(0).all()
    assert blank.position_ids[0].tolist() == list(range(16))
    assert blank.cu_seqlens.tolist() == [0] + [16] * packed.max_documents


def test_blanks_leave_the_packed_rows_untouched(packed: Packed) -> None:
    before = packed.labels.copy()
    list(islice(loader(packed), 3))
    assert np.array_equal(packed.labels, before)
    assert packed.supervised_tokens > 0


@pytest.mark.parametrize("world", [1, 2, 4])
def test_eval_batches_are_disjoint_exhaustive_and_equally_many_on_every_rank(packed: Packed, world: int) -> None:
    shares = [eval_batches(packed, micro_batch=3, rank=rank, world_size=world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(n for share in shares for n in names(share) if n >= 0) == list(range(ROWS))
    assert sum(b.supervised_tokens for share in shares for b in share) == packed.supervised_tokens
    assert {tuple(b.input_ids.shape) for share in shares for b in share} == {(3, 16)}


def test_a_batch_moves_whole(packed: Packed) -> None:
    batch = next(iter(loader(packed))).micro_batches[0]
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert [t.device.type for t in tensors] == ["meta"] * 5
    assert moved.tokens == batch.tokens > 0

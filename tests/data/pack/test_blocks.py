"""What blocks know of themselves: counts, bounds, and how many targets a micro batch has at most."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.documents import Documents
from launcher.data.loader import TrainLoader, eval_batches, sample_batch
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.buckets import bucket, lay_out
from launcher.data.pack.micro_batch import IGNORE, micro_batch_of
from launcher.data.pack.packing import pack
from launcher.recipe.data_section import DataSection
from tests.support.documents import documents_of


def packed(*lengths: int, width: int) -> Blocks:
    return pack(documents_of(lengths), np.arange(len(lengths)), max_length=width, pad_id=0, seed=0)


def test_blocks_count_their_tokens_targets_and_documents():
    supervised = np.array([*"x..xx..xx"]) == "x"  # nothing predicts the first
    blocks = pack(documents_of([5, 4], supervised=supervised), np.arange(2), max_length=12, pad_id=0, seed=0)
    assert (len(blocks), blocks.max_documents, blocks.shapes, blocks[0].tolist()) == (1, 3, (12,), [0, 1])
    assert (blocks.tokens, blocks.supervised_tokens, blocks.fill) == (9, 4, 0.75)
    assert not blocks.single_documents
    assert packed(5, 4, width=8).single_documents


def test_a_block_without_padding_has_no_pseudo_document():
    assert packed(4, 4, width=8).max_documents == 2
    assert packed(4, 3, width=8).max_documents == 3


def test_a_bound_on_documents_makes_room_for_the_pieces_of_padding_and_of_a_blank_block():
    blocks = packed(4, 3, 4, width=8)  # 4 + 4, and 3 with padding of 5
    assert (blocks.max_seqlen, blocks.max_documents) == (8, 2)
    assert [blocks.bounded(n).max_documents for n in (8, 5, 4)] == [2, 2, 3]
    single = packed(4, width=8).bounded(4)
    assert (single.max_seqlen, single.max_documents) == (4, 2)
    assert packed(4, 4, width=8).bounded(4).max_documents == 2
    assert packed(3, width=3).bounded(8).max_documents == 1
    with pytest.raises(AssertionError, match="4 tokens, at most 3 said"):
        blocks.bounded(3)


def with_random_targets(lengths: list[int], seed: int) -> Documents:
    """Each document has targets of a density of its own."""
    rng = np.random.default_rng(seed)
    return documents_of(lengths, supervised=np.concatenate([rng.random(n) < rng.random() for n in lengths]))


@given(
    lengths=st.lists(st.integers(1, 32), min_size=2, max_size=40),
    batching=st.sampled_from(["packed", "bucketed", "padded"]),
    micro_batch=st.integers(1, 4),
    world=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_no_micro_batch_has_more_targets_than_the_bound_of_its_width(lengths, batching, micro_batch, world, seed):
    """Three epochs of every rank, evaluation and warm-up; blank blocks of the last batches and ranks included."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    data = DataSection(batching=batching, max_length=32)
    train, validation = np.split(order, [len(order) // 2])
    for blocks in lay_out(with_random_targets(lengths, seed), train, validation, data=data, pad_id=0, seed=seed):
        assert blocks is not None
        bound = blocks.max_targets(micro_batch)
        batches = [sample_batch(blocks, width, micro_batch=micro_batch) for width in blocks.shapes]
        for rank in range(world):
            loader = TrainLoader(
                blocks, micro_batch=micro_batch, accumulation=2, rank=rank, world_size=world, seed=seed
            )
            steps = islice(loader, 3 * loader.steps_per_epoch)
            batches += [micro for step in steps for micro in step.micro_batches]
            batches += eval_batches(blocks, micro_batch=micro_batch, rank=rank, world_size=world)
        for batch in batches:
            assert int((batch.labels != IGNORE).sum()) <= bound[batch.labels.shape[1]]


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_the_bound_is_what_the_blocks_with_the_most_targets_have_together(micro_batch):
    documents = with_random_targets([8] * 11 + [16] * 7 + [21] * 3, seed=0)
    blocks = bucket(documents, np.arange(21), widths=(8, 16, 24), pad_id=0)
    bound = blocks.max_targets(micro_batch)
    assert list(bound) == [8, 16, 24]
    for width, max_targets in bound.items():
        of_width = np.flatnonzero(blocks.widths == width)
        fullest = of_width[np.argsort(-blocks.targets[of_width], kind="stable")[:micro_batch]]
        assert micro_batch_of(blocks, fullest).supervised_tokens == max_targets > 0

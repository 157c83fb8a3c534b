"""Packed blocks are full, are their seed's, and are made fast."""

from collections.abc import Sequence

import numpy as np
import pytest

from launcher.data.documents import Longs
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.packing import pack
from tests.support.counting import lines_run
from tests.support.documents import documents_of


def packed(lengths: Sequence[int] | Longs, *, max_length: int, seed: int = 0, limit: int | None = None) -> Blocks:
    indices = np.arange(len(lengths))
    return pack(documents_of(lengths), indices, max_length=max_length, pad_id=0, seed=seed, limit=limit)


def best_fit_by_search(lengths: list[int], capacity: int) -> list[int]:
    """The loads of the blocks, the plain way: look at every block for every document."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [block for block, load in enumerate(loads) if load + length <= capacity]
        if fitting:
            loads[max(fitting, key=lambda block: loads[block])] += length
        else:
            loads.append(length)
    return loads


@pytest.mark.parametrize(
    ("mean", "spread", "capacity", "fuller"),
    [(48, 7, 256, True), (30, 3, 150, True), (700, 60, 2048, False), (48, 7, 128, False)],
)
def test_no_packing_has_more_blocks_than_best_fit_and_similar_short_documents_have_fewer(
    mean, spread, capacity, fuller
):
    for seed in range(5):
        lengths = np.random.default_rng(seed).normal(mean, spread, 400).astype(int).tolist()
        blocks, plain = packed(lengths, max_length=capacity), best_fit_by_search(lengths, capacity)
        assert len(blocks) < len(plain) if fuller else len(blocks) == len(plain)
        assert sorted(blocks.block_documents) == list(range(400))


def test_the_blocks_of_the_drawing():
    blocks = packed([9, 6, 5, 4, 3, 3], max_length=12)
    assert [blocks.documents.lengths[documents].tolist() for documents in blocks] == [[9, 3], [6, 5], [4, 3]]


def test_a_block_with_the_most_documents_it_may_hold_is_closed():
    free, bounded = (packed([5] * 40, max_length=100, limit=limit) for limit in (None, 7))
    assert max(len(documents) for documents in free) == 20
    assert max(len(documents) for documents in bounded) == 7
    assert bounded.max_documents == 8  # and the padding
    assert sorted(bounded.block_documents) == list(range(40))


@pytest.mark.parametrize(
    ("multiple", "max_length"),
    [(1, 2048), (2, 32_767)],  # no block of an odd length is ever full
)
@pytest.mark.parametrize("count", [5_000, 20_000])
def test_packing_a_document_costs_forty_lines_at_most_however_many_there_are(count, multiple, max_length):
    lengths = np.random.default_rng(0).lognormal(4.8, 0.5, count).astype(int).clip(8, 2048)
    documents, blocks = documents_of(lengths // multiple * multiple), []
    lines = lines_run(lambda: blocks.append(pack(documents, np.arange(count), max_length=max_length, pad_id=0, seed=0)))
    assert 10 * count < lines < 40 * count
    assert blocks[0].fill > 0.9

import time

import numpy as np
import pytest

from launcher.data.documents import Documents
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.packing import pack


def documents_of(lengths: list[int] | np.ndarray) -> Documents:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = int(offsets[-1])
    return Documents(np.arange(tokens, dtype=np.int32), np.ones(tokens, np.bool_), offsets)


def packed(lengths: list[int] | np.ndarray, *, max_length: int, seed: int = 0, most: int | None = None) -> Blocks:
    return pack(documents_of(lengths), np.arange(len(lengths)), max_length=max_length, pad_id=0, seed=seed, most=most)


def best_fit_by_search(lengths: list[int], capacity: int) -> list[int]:
    """The loads of the rows, the plain way: look at every row for every document."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, load in enumerate(loads) if load + length <= capacity]
        if fitting:
            loads[max(fitting, key=lambda row: loads[row])] += length
        else:
            loads.append(length)
    return sorted(loads)


@pytest.mark.parametrize(
    ("mean", "spread", "capacity", "fuller"),
    [(48, 7, 256, True), (30, 3, 150, True), (700, 60, 2048, False), (48, 7, 128, False)],
)
def test_no_packing_has_more_rows_than_best_fit_and_similar_short_documents_have_fewer(
    mean: int, spread: int, capacity: int, fuller: bool
) -> None:
    for seed in range(5):
        lengths = np.random.default_rng(seed).normal(mean, spread, 400).astype(int).tolist()
        blocks, plain = packed(lengths, max_length=capacity), best_fit_by_search(lengths, capacity)
        assert blocks.rows < len(plain) if fuller else blocks.rows == len(plain)
        assert sorted(blocks.row_documents) == list(range(400))


def test_the_rows_of_the_drawing() -> None:
    blocks = packed([9, 6, 5, 4, 3, 3], max_length=12)
    rows = [blocks.documents.lengths[d].tolist() for d in np.split(blocks.row_documents, blocks.row_offsets[1:-1])]
    assert rows == [[9, 3], [6, 5], [4, 3]]


def test_a_row_with_the_most_documents_it_may_hold_is_closed() -> None:
    lengths = [5] * 40
    free, bounded = packed(lengths, max_length=100), packed(lengths, max_length=100, most=7)
    assert np.diff(free.row_offsets).max() == 20
    assert np.diff(bounded.row_offsets).max() == 7
    assert bounded.max_documents == 8  # and the tail
    assert sorted(bounded.row_documents) == list(range(40))


@pytest.mark.parametrize("max_length", [512, 2048])
def test_short_documents_fill_at_least_97_percent(max_length: int) -> None:
    lengths = np.random.default_rng(0).lognormal(4.2, 0.6, 3000).astype(int).clip(8, max_length)
    blocks = packed(lengths, max_length=max_length)
    assert blocks.fill >= 0.97
    assert blocks.rows < len(lengths)


def test_one_seed_gives_one_packing_and_another_seed_another() -> None:
    lengths = [1 + i % 9 for i in range(60)]
    one, same, other = (packed(lengths, max_length=16, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(one.row_documents, same.row_documents)
    assert not np.array_equal(one.row_documents, other.row_documents)


def test_a_document_longer_than_a_row_is_not_packed() -> None:
    with pytest.raises(AssertionError, match="cut to max_length"):
        packed([17], max_length=16)


def test_a_hundred_thousand_documents_are_packed_in_two_seconds_and_a_batch_made_in_two_milliseconds() -> None:
    lengths = np.random.default_rng(0).lognormal(4.8, 0.5, 100_000).astype(int).clip(8, 2048)
    documents = documents_of(lengths)
    start = time.perf_counter()
    blocks = pack(documents, np.arange(len(documents)), max_length=2048, pad_id=0, seed=0)
    assert time.perf_counter() - start < 2  # 0.1 s where this was written
    assert len(documents) / blocks.rows > 10
    odd = documents_of(lengths // 2 * 2)  # no row of an odd length is ever full
    start = time.perf_counter()
    assert pack(odd, np.arange(len(odd)), max_length=32_767, pad_id=0, seed=0).fill > 0.99
    assert time.perf_counter() - start < 2.5  # 0.6 s where this was written
    start = time.perf_counter()
    for row in range(0, 200, 2):
        blocks.arrays([row, row + 1])
    assert (time.perf_counter() - start) / 100 < 2e-3  # 0.2 ms where this was written

import re

import numpy as np
import pytest

from launcher.data import packing
from launcher.data.packing import IGNORE, Document, Packed, pack


def document(length: int, *, first: int = 1, supervised_from: int = 0) -> Document:
    return Document(list(range(first, first + length)), [t >= supervised_from for t in range(length)])


def documents_of(packed: Packed) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of every document of every row, the padding tail left out."""
    found = []
    for row in range(packed.rows):
        used = int(packed.lengths[row])
        ids = packed.document_ids[row, :used]
        for index in range(int(ids.max()) + 1):
            where = np.flatnonzero(ids == index)
            found.append((packed.input_ids[row, where].tolist(), packed.labels[row, where].tolist()))
    return found


def drawn(name: str) -> list[str]:
    lines = [line.split() for line in (packing.__doc__ or "").splitlines()]
    return next(line[1:] for line in lines if line[:1] == [name] and len(line) == 13)


def test_the_drawn_row_is_what_pack_makes() -> None:
    names = {"P": 0, ".": IGNORE} | {f"a{i}": 10 + i for i in range(5)} | {f"b{i}": 20 + i for i in range(4)}
    a = document(5, first=10, supervised_from=3)
    b = document(4, first=20, supervised_from=2)
    packed = pack([b, a], max_length=12, pad_id=0, seed=0)
    assert packed.rows == 1
    for name in ("input_ids", "labels"):
        assert getattr(packed, name)[0].tolist() == [names[cell] for cell in drawn(name)]
    for name in ("position_ids", "document_ids"):
        assert getattr(packed, name)[0].tolist() == [int(cell) for cell in drawn(name)]
    assert packed.max_documents == 3
    assert (packed.tokens, packed.supervised_tokens, packed.fill) == (9, 4, 0.75)
    assert re.search("a3 +a4", packing.__doc__ or "")


def test_the_last_token_of_a_document_never_predicts_the_next_documents_first() -> None:
    packed = pack([document(n, first=100 * n) for n in (3, 4, 5)], max_length=12, pad_id=0, seed=0)
    assert packed.rows == 1
    for tokens, labels in documents_of(packed):
        assert labels == [*tokens[1:], IGNORE]
    assert packed.supervised_tokens == 2 + 3 + 4


def test_every_document_is_packed_exactly_once_and_whole() -> None:
    rng = np.random.default_rng(3)
    documents = [document(int(n), first=1000 * i) for i, n in enumerate(rng.integers(1, 65, 300))]
    packed = pack(documents, max_length=64, pad_id=7, seed=1)
    assert sorted(tokens for tokens, _ in documents_of(packed)) == sorted(d.input_ids for d in documents)
    assert packed.tokens == sum(len(d.input_ids) for d in documents)


def test_a_row_without_a_tail_counts_no_padding_document() -> None:
    assert pack([document(4), document(4)], max_length=8, pad_id=0, seed=0).max_documents == 2
    assert pack([document(4), document(3)], max_length=8, pad_id=0, seed=0).max_documents == 3


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


def test_each_document_goes_where_it_leaves_the_least_room() -> None:
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, 60, 80).tolist()
        packed = pack([document(n) for n in lengths], max_length=100, pad_id=0, seed=seed)
        assert sorted(packed.lengths.tolist()) == best_fit_by_search(lengths, 100)
    assert packed.rows > 1


@pytest.mark.parametrize("max_length", [512, 2048])
def test_short_documents_fill_at_least_97_percent(max_length: int) -> None:
    lengths = np.random.default_rng(0).lognormal(4.2, 0.6, 3000).astype(int).clip(8, max_length)
    packed = pack([document(int(n)) for n in lengths], max_length=max_length, pad_id=0, seed=0)
    assert packed.fill >= 0.97
    assert packed.rows < len(lengths)


def test_one_seed_gives_one_packing_and_another_seed_another() -> None:
    documents = [document(1 + i % 9, first=100 * i) for i in range(60)]
    one, same, other = (pack(documents, max_length=16, pad_id=0, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(one.input_ids, same.input_ids)
    assert not np.array_equal(one.input_ids, other.input_ids)

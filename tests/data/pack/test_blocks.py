"""What a row's arrays hold, however documents were laid out in rows."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from launcher.data.documents import Document, Documents
from launcher.data.pack import blocks as module
from launcher.data.pack.blocks import IGNORE, Blocks
from launcher.data.pack.buckets import lay_out
from launcher.data.pack.packing import pack
from launcher.recipe.data_section import DataSection

PAD = 0


def document(length: int, *, first: int = 1, supervised_from: int = 0) -> Document:
    ids = np.arange(first, first + length, dtype=np.int32)
    return Document(ids, np.arange(length) >= supervised_from)


def drawn(name: str) -> list[str]:
    lines = [line.split() for line in (module.__doc__ or "").splitlines()]
    return next(line[1:] for line in lines if line[:1] == [name] and len(line) == 13)


@pytest.fixture
def drawn_blocks() -> Blocks:
    pair = Documents.of([document(4, first=20, supervised_from=2), document(5, first=10, supervised_from=3)])
    return pack(pair, np.arange(2), max_length=12, pad_id=PAD, seed=0)


def test_the_drawn_row_is_what_a_row_holds(drawn_blocks: Blocks) -> None:
    names = {"P": PAD, ".": IGNORE} | {f"a{i}": 10 + i for i in range(5)} | {f"b{i}": 20 + i for i in range(4)}
    arrays = drawn_blocks.arrays([0])
    for name in ("input_ids", "labels"):
        assert getattr(arrays, name)[0].tolist() == [names[cell] for cell in drawn(name)]
    for name in ("position_ids", "document_ids"):
        assert getattr(arrays, name)[0].tolist() == [int(cell) for cell in drawn(name)]
    assert re.search("a3 +a4", module.__doc__ or "")


def test_a_block_counts_its_tokens_targets_and_documents(drawn_blocks: Blocks) -> None:
    assert (drawn_blocks.rows, drawn_blocks.max_documents, drawn_blocks.shapes) == (1, 3, (12,))
    assert (drawn_blocks.tokens, drawn_blocks.supervised_tokens, drawn_blocks.fill) == (9, 4, 0.75)


def test_a_row_without_a_tail_counts_no_padding_document() -> None:
    full, with_tail = (Documents.of([document(4), document(n)]) for n in (4, 3))
    assert pack(full, np.arange(2), max_length=8, pad_id=PAD, seed=0).max_documents == 2
    assert pack(with_tail, np.arange(2), max_length=8, pad_id=PAD, seed=0).max_documents == 3


def test_a_bound_on_documents_makes_room_for_the_pieces_of_a_tail_and_of_a_blank_row() -> None:
    documents = Documents.of([document(4), document(3), document(4)])
    blocks = pack(documents, np.arange(3), max_length=8, pad_id=PAD, seed=0)  # 4 + 4, and 3 with a tail of 5
    assert (blocks.max_seqlen, blocks.max_documents) == (8, 2)
    assert [blocks.bounded(n).max_documents for n in (8, 5, 4)] == [2, 2, 3]
    single = pack(documents, np.arange(1), max_length=8, pad_id=PAD, seed=0).bounded(4)
    assert (single.max_seqlen, single.max_documents) == (4, 2)
    no_tail = pack(Documents.of([document(4)] * 2), np.arange(2), max_length=8, pad_id=PAD, seed=0)
    assert (no_tail.bounded(4).max_documents, no_tail.max_documents) == (2, 2)
    alone = pack(Documents.of([document(3)]), np.arange(1), max_length=3, pad_id=PAD, seed=0)
    assert alone.bounded(8).max_documents == 1
    with pytest.raises(AssertionError, match="4 tokens, at most 3 said"):
        blocks.bounded(3)


def test_a_blank_row_has_no_token_no_target_and_the_width_of_its_batch(drawn_blocks: Blocks) -> None:
    for arrays in (drawn_blocks.arrays([0, -1]), drawn_blocks.arrays([-1, -1])):
        assert arrays.input_ids[1].tolist() == [PAD] * 12
        assert arrays.labels[1].tolist() == [IGNORE] * 12
        assert arrays.position_ids[1].tolist() == list(range(12))
        assert arrays.document_ids[1].tolist() == [0] * 12
    assert drawn_blocks.arrays([0, -1]).lengths.tolist() == [9, 0]


def test_rows_of_two_widths_are_no_batch() -> None:
    documents = Documents.of([document(4), document(20)])
    blocks, _ = lay_out(
        documents, np.arange(2), np.arange(0), data=DataSection(batching="bucketed"), pad_id=PAD, seed=0
    )
    with pytest.raises(AssertionError, match="one width"):
        blocks.arrays([0, 1])


def test_the_documents_may_lie_in_files_that_cannot_be_written(tmp_path) -> None:
    documents = Documents.of([document(n, first=100 * n) for n in (3, 5, 7)])
    mapped = []
    for name in ("input_ids", "supervised", "offsets"):
        np.save(tmp_path / name, getattr(documents, name))
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    blocks, same = (pack(d, np.arange(3), max_length=8, pad_id=PAD, seed=0) for d in (Documents(*mapped), documents))
    for name, array in vars(blocks.arrays([0, 1])).items():
        assert np.array_equal(array, getattr(same.arrays([0, 1]), name))
    assert blocks.arrays([0]).labels.any()


lengths_and_masks = st.lists(st.lists(st.booleans(), min_size=1, max_size=24), min_size=1, max_size=30)


def documents_of(masks: list[list[bool]]) -> Documents:
    """Documents whose tokens are all different, and none of them padding."""
    made, first = [], PAD + 1
    for mask in masks:
        made.append(Document(np.arange(first, first + len(mask), dtype=np.int32), np.array(mask)))
        first += len(mask)
    return Documents.of(made)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    masks=lengths_and_masks,
    repeats=st.lists(st.integers(0, 29), max_size=12),
    batching=st.sampled_from(["packed", "bucketed", "padded"]),
    max_length=st.integers(24, 90),
    seed=st.integers(0, 5),
)
def test_every_document_is_there_whole_as_often_as_asked_and_learns_from_nothing_but_itself(
    masks: list[list[bool]], repeats: list[int], batching: str, max_length: int, seed: int
) -> None:
    documents = documents_of(masks)
    indices = np.array([*range(len(masks)), *(i for i in repeats if i < len(masks))])
    data = DataSection.model_validate({"batching": batching, "max_length": max_length})
    blocks, validation = lay_out(documents, indices, indices[:0], data=data, pad_id=PAD, seed=seed)
    assert validation is None
    found: Counter[int] = Counter()
    tokens = supervised = 0
    for row in range(blocks.rows):
        arrays = blocks.arrays([row])
        ids, labels, positions, numbers = (getattr(arrays, name)[0] for name in list(vars(arrays))[:4])
        assert len(ids) == blocks.widths[row] <= max_length
        held = blocks.row_documents[blocks.row_offsets[row] : blocks.row_offsets[row + 1]]
        used = int(documents.lengths[held].sum())
        assert used == arrays.lengths[0] == blocks.lengths[row] <= len(ids)
        pieces = [np.flatnonzero(numbers == number) for number in range(int(numbers.max()) + 1)]
        assert len(pieces) == len(held) + (used < len(ids)) <= blocks.max_documents
        for where in pieces:  # padding too: contiguous, and positions begin anew
            assert positions[where].tolist() == list(range(len(where))) == (where - where[0]).tolist()
        for index, where in zip(held, pieces, strict=False):
            whole = documents[index]
            assert ids[where].tolist() == whole.input_ids.tolist()
            wanted = np.where(whole.supervised, whole.input_ids, IGNORE)[1:]
            assert labels[where].tolist() == [*wanted, IGNORE]
        assert (ids[used:] == PAD).all() and (labels[used:] == IGNORE).all()
        found.update(held.tolist())
        tokens += used
        supervised += int((labels != IGNORE).sum())
    assert found == Counter(indices.tolist())
    assert (tokens, supervised) == (blocks.tokens, blocks.supervised_tokens)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(masks=lengths_and_masks, batching=st.sampled_from(["packed", "bucketed", "padded"]), seed=st.integers(0, 5))
def test_a_layout_is_its_seeds_and_both_parts_have_room_for_the_same_boundaries(
    masks: list[list[bool]], batching: str, seed: int
) -> None:
    assume(len(masks) > 1)
    documents, cut = documents_of(masks), len(masks) // 2
    data = DataSection.model_validate({"batching": batching, "max_length": 24})
    parts = (np.arange(cut), np.arange(cut, len(masks)))
    (train, validation), (again, _) = (lay_out(documents, *parts, data=data, pad_id=PAD, seed=seed) for _ in range(2))
    assert np.array_equal(train.row_documents, again.row_documents)
    assert np.array_equal(train.row_offsets, again.row_offsets)
    assert validation is not None
    assert train.max_documents == validation.max_documents
    assert sorted(train.row_documents) == parts[0].tolist()
    assert sorted(validation.row_documents) == parts[1].tolist()

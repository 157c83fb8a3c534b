import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from launcher.data.documents import Documents
from launcher.data.pack.buckets import MOST_WIDTHS, WORTH, bucket, choose_widths, lay_out
from launcher.recipe.data_section import DataSection
from tests.conftest import TINY


def positions(widths: tuple[int, ...], lengths: np.ndarray) -> int:
    """Of rows that hold one document each, in the least width that fits."""
    return int(np.array(widths)[np.searchsorted(widths, lengths)].sum())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 76), min_size=1, max_size=60), max_length=st.sampled_from([76, 80, 200]))
def test_no_other_widths_of_that_number_pad_less_and_six_would_save_little(lengths: list[int], max_length: int) -> None:
    found = np.array(lengths)
    widths = choose_widths(found, max_length=max_length)
    candidates = sorted({min(-(-n // 8) * 8, max_length) for n in lengths})
    assert len(widths) <= MOST_WIDTHS
    assert set(widths) <= set(candidates)
    assert widths[-1] == candidates[-1]

    def least(number: int) -> int:
        chosen = combinations(candidates[:-1], number - 1)
        return min(positions((*some, candidates[-1]), found) for some in chosen)

    ours, best = positions(widths, found), least(min(MOST_WIDTHS, len(candidates)))
    assert ours == least(len(widths))
    assert ours * (1 - WORTH) <= best
    assert len(widths) == 1 or least(len(widths) - 1) * (1 - WORTH) > best  # one fewer would not do


def test_very_long_documents_are_given_widths_in_no_time_at_all() -> None:
    lengths = np.random.default_rng(0).integers(1, 131_072, 20_000)
    widths = choose_widths(lengths, max_length=131_072)
    assert len(widths) == MOST_WIDTHS
    assert positions(widths, lengths) < 1.2 * lengths.sum()


@pytest.fixture(scope="module")
def shipped() -> Documents:
    """The shipped instruction set as the tokenizer renders it; every token supervised, the tokens all zero."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    lines = (TINY / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = tokenizer.apply_chat_template([json.loads(line)["messages"] for line in lines], tokenize=False)
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Documents(np.zeros(offsets[-1], np.int32), np.ones(offsets[-1], np.bool_), offsets)


@pytest.mark.parametrize("max_length", [256, 2048])
def test_the_shipped_set_fills_97_percent_packed_and_more_bucketed_than_padded(
    shipped: Documents, max_length: int
) -> None:
    assert shipped.lengths.max() <= 256
    fill = {}
    for batching in ("packed", "bucketed", "padded"):
        data = DataSection.model_validate({"batching": batching, "max_length": max_length})
        indices = np.arange(len(shipped))
        blocks, _ = lay_out(shipped, indices, indices[:0], data=data, pad_id=0, seed=0)
        assert blocks.tokens == shipped.lengths.sum()
        assert len(blocks.shapes) <= (MOST_WIDTHS if batching == "bucketed" else 1)
        fill[batching] = blocks.fill
    assert fill["packed"] >= 0.97
    assert fill["bucketed"] >= 0.8
    assert fill["padded"] < 0.5


def test_training_and_validation_share_their_widths() -> None:
    lengths = np.array([10] * 50 + [30] * 50 + [100])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    documents = Documents(np.zeros(offsets[-1], np.int32), np.ones(offsets[-1], np.bool_), offsets)
    data = DataSection(batching="bucketed", max_length=128)
    train, validation = lay_out(documents, np.arange(100), np.arange(90, 101), data=data, pad_id=0, seed=0)
    assert validation is not None
    assert (train.shapes, validation.shapes) == ((16, 32), (32, 104))
    assert train.max_documents == validation.max_documents == 2


@pytest.mark.parametrize(
    ("lengths", "max_seqlen"),
    [((10, 90, 130), 256), ((10, 128), 128), ((400, 1000), 1000), ((900,), 1000), ((7,), 128)],
)
def test_documents_are_bounded_by_the_tile_that_holds_the_longest_of_both_parts(
    lengths: tuple[int, ...], max_seqlen: int
) -> None:
    offsets = np.concatenate([[0], np.cumsum([5, *lengths])])
    documents = Documents(np.zeros(offsets[-1], np.int32), np.ones(offsets[-1], np.bool_), offsets)
    data = DataSection(batching="packed", max_length=1000)
    everything, short = np.arange(1, len(offsets) - 1), np.zeros(1, np.int64)
    for parts in ((everything, short), (short, everything)):
        for blocks in lay_out(documents, *parts, data=data, pad_id=0, seed=0):
            assert blocks is not None and blocks.max_seqlen == max_seqlen
            tail = 1000 - blocks.lengths
            assert blocks.max_documents >= max(1 + -(-tail.max() // max_seqlen), -(-1000 // max_seqlen))


def test_a_document_without_a_width_is_not_laid_out() -> None:
    documents = Documents(np.zeros(9, np.int32), np.ones(9, np.bool_), np.array([0, 9]))
    with pytest.raises(AssertionError, match="over all documents"):
        bucket(documents, np.arange(1), widths=(8,), pad_id=0)

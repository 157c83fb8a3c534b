"""How documents are laid out: the widths that are chosen, what training and validation share."""

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from launcher.data.pack.buckets import MAX_WIDTHS, MIN_POSITIONS_SAVED, choose_widths, lay_out
from launcher.recipe.data_section import DataSection
from tests.conftest import TINY
from tests.support.documents import documents_of


def positions(widths: tuple[int, ...], lengths: np.ndarray) -> int:
    """Of blocks that hold one document each, in the least width that fits."""
    return int(np.array(widths)[np.searchsorted(widths, lengths)].sum())


@settings(max_examples=60, derandomize=True)
@given(lengths=st.lists(st.integers(1, 76), min_size=1, max_size=60), max_length=st.sampled_from([76, 80, 200]))
def test_no_other_widths_of_that_number_pad_less_and_six_would_save_little(lengths, max_length):
    widths = choose_widths(np.array(lengths), max_length=max_length)
    candidates = sorted({min(-(-n // 8) * 8, max_length) for n in lengths})
    assert len(widths) <= MAX_WIDTHS
    assert set(widths) <= set(candidates)
    assert widths[-1] == candidates[-1]

    def least(number: int) -> int:
        chosen = combinations(candidates[:-1], number - 1)
        return min(positions((*some, candidates[-1]), np.array(lengths)) for some in chosen)

    ours, best = positions(widths, np.array(lengths)), least(min(MAX_WIDTHS, len(candidates)))
    assert ours == least(len(widths))
    assert ours * (1 - MIN_POSITIONS_SAVED) <= best
    assert len(widths) == 1 or least(len(widths) - 1) * (1 - MIN_POSITIONS_SAVED) > best  # one fewer would not do


def test_very_long_documents_are_given_widths_in_no_time_at_all():
    lengths = np.random.default_rng(0).integers(1, 131_072, 20_000)
    widths = choose_widths(lengths, max_length=131_072)
    assert len(widths) == MAX_WIDTHS
    assert positions(widths, lengths) < 1.2 * lengths.sum()


@pytest.fixture(scope="module")
def shipped():
    """The shipped instruction set at the lengths that the tokenizer gives it."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    lines = (TINY / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = tokenizer.apply_chat_template([json.loads(line)["messages"] for line in lines], tokenize=False)
    return documents_of([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])


@pytest.mark.parametrize("max_length", [256, 2048])
def test_the_shipped_set_fills_97_percent_packed_and_more_bucketed_than_padded(shipped, max_length):
    assert shipped.lengths.max() <= 256
    fill = {}
    for batching in ("packed", "bucketed", "padded"):
        data = DataSection.model_validate({"batching": batching, "max_length": max_length})
        indices = np.arange(len(shipped))
        blocks, _ = lay_out(shipped, indices, indices[:0], data=data, pad_id=0, seed=0)
        assert blocks.tokens == shipped.lengths.sum()
        assert len(blocks.shapes) <= (MAX_WIDTHS if batching == "bucketed" else 1)
        fill[batching] = blocks.fill
    assert fill["packed"] >= 0.97
    assert fill["bucketed"] >= 0.8
    assert fill["padded"] < 0.5


def test_training_and_validation_share_their_widths():
    documents = documents_of([10] * 50 + [30] * 50 + [100])
    data = DataSection(batching="bucketed", max_length=128)
    train, validation = lay_out(documents, np.arange(100), np.arange(90, 101), data=data, pad_id=0, seed=0)
    assert validation is not None
    assert (train.shapes, validation.shapes) == ((16, 32), (32, 104))
    assert train.max_documents == validation.max_documents == 2


@pytest.mark.parametrize(
    ("lengths", "max_seqlen"),
    [((10, 90, 130), 256), ((10, 128), 128), ((400, 1000), 1000), ((900,), 1000), ((7,), 128)],
)
def test_documents_are_bounded_by_the_tile_that_holds_the_longest_of_both_parts(lengths, max_seqlen):
    documents = documents_of([5, *lengths])
    data = DataSection(batching="packed", max_length=1000)
    everything, short = np.arange(1, len(documents)), np.zeros(1, np.int64)
    for parts in ((everything, short), (short, everything)):
        for blocks in lay_out(documents, *parts, data=data, pad_id=0, seed=0):
            assert blocks is not None and blocks.max_seqlen == max_seqlen
            needed = np.diff(blocks.block_offsets) - (blocks.lengths - 1000) // max_seqlen
            assert blocks.max_documents >= max(needed.max(), -(-1000 // max_seqlen))


@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
def test_a_layout_is_its_seeds_and_each_part_has_its_own_documents(batching):
    lengths = np.random.default_rng(0).integers(1, 24, 60)
    data, parts = DataSection.model_validate({"batching": batching, "max_length": 24}), np.split(np.arange(60), [40])
    layouts = [lay_out(documents_of(lengths), *parts, data=data, pad_id=0, seed=seed) for seed in (0, 0, 1)]
    (train, validation), (again, _), (other, _) = layouts
    assert validation is not None and train.max_documents == validation.max_documents
    assert [sorted(part.block_documents) for part in (train, validation)] == [part.tolist() for part in parts]
    assert [d.tolist() for d in train] == [d.tolist() for d in again]
    assert ([d.tolist() for d in train] != [d.tolist() for d in other]) == (batching == "packed")

"""What a micro batch holds, however documents were laid out in blocks."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.pack import micro_batch as module
from launcher.data.pack.blocks import Blocks
from launcher.data.pack.buckets import bucket, lay_out
from launcher.data.pack.micro_batch import IGNORE, MicroBatch, micro_batch_of
from launcher.data.pack.packing import pack
from launcher.recipe.data_section import DataSection
from tests.support.counting import lines_run
from tests.support.documents import documents_of

PAD = 0
ROWS = ("input_ids", "labels", "position_ids", "document_ids")


@pytest.fixture
def drawn_blocks():
    """The block that the module draws: document a has the tokens 1 to 5, b 6 to 9."""
    supervised = np.array([*"...xx..xx"]) == "x"
    return pack(documents_of([5, 4], supervised=supervised), np.arange(2), max_length=12, pad_id=PAD, seed=0)


def drawn(name: str) -> list[int]:
    names = {"P": PAD, ".": IGNORE} | {f"a{i}": 1 + i for i in range(5)} | {f"b{i}": 6 + i for i in range(4)}
    lines = [line.split() for line in (module.__doc__ or "").splitlines()]
    cells = next(line[1:] for line in lines if line[:1] == [name] and len(line) == 13)
    return [names[cell] if cell in names else int(cell) for cell in cells]


def test_a_batch_holds_the_block_that_is_drawn(drawn_blocks):
    batch = micro_batch_of(drawn_blocks.bounded(12), [0])
    for name in ROWS:
        assert getattr(batch, name)[0].tolist() == drawn(name)
    assert (batch.tokens, batch.supervised_tokens) == (9, 4)
    [whole, in_pieces] = re.findall(r"[\d ]+12", (module.__doc__ or "").split("cu_seqlens")[1])[:2]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 12]
    assert [int(n) for n in whole.split()] == [0, 5, 9, 12, 12]
    assert [int(n) for n in in_pieces.split()] == [0, 5, 9, 11, 12]


def test_every_batch_has_the_declared_types_and_shapes(drawn_blocks):
    batch = micro_batch_of(drawn_blocks, [0, -1])
    assert {name: getattr(batch, name).dtype for name in ROWS[:3]} == dict.fromkeys(ROWS[:3], torch.int64)
    assert batch.document_ids.dtype == batch.cu_seqlens.dtype == torch.int32
    assert {tuple(getattr(batch, name).shape) for name in ROWS} == {(2, 12)}
    assert batch.cu_seqlens.shape == (2 * drawn_blocks.max_documents + 1,)


def test_a_blank_block_is_padding_without_loss_in_the_width_of_its_batch(drawn_blocks):
    for batch in (micro_batch_of(drawn_blocks, [0, -1]), micro_batch_of(drawn_blocks, [-1, -1])):
        assert batch.input_ids[1].tolist() == [PAD] * 12
        assert batch.labels[1].tolist() == [IGNORE] * 12
        assert batch.position_ids[1].tolist() == list(range(12))
        assert batch.document_ids[1].tolist() == [0] * 12
    assert (batch.tokens, batch.supervised_tokens) == (0, 0)
    assert batch.cu_seqlens.tolist() == [0, 12] + [24] * 5


def test_the_padding_is_pseudo_documents_within_the_bound():
    blocks = bucket(documents_of([4, 14]), np.arange(2), widths=(16,), pad_id=PAD).bounded(14)
    short = bucket(documents_of([4]), np.arange(1), widths=(16,), pad_id=PAD).bounded(5)
    assert micro_batch_of(blocks, [0, 1, -1]).cu_seqlens.tolist() == [0, 4, 16, 30, 32, 46, 48]
    assert micro_batch_of(short, [0, -1]).cu_seqlens.tolist() == [0, 4, 9, 14, 16, 21, 26, 31, 32]
    assert micro_batch_of(short, [0]).document_ids.tolist() == [[0] * 4 + [1] * 12]


def test_the_ignored_label_is_the_one_that_torch_ignores_by_default():
    logits, labels = torch.randn(2, 5), torch.tensor([3, IGNORE])
    assert torch.nn.functional.cross_entropy(logits, labels) == torch.nn.functional.cross_entropy(
        logits[:1], labels[:1]
    )


def test_a_batch_moves_whole(drawn_blocks):
    batch = micro_batch_of(drawn_blocks, [0])
    moved = batch.to("meta")
    assert isinstance(moved, MicroBatch)
    assert [v.device.type for v in vars(moved).values() if isinstance(v, torch.Tensor)] == ["meta"] * 5
    assert (moved.tokens, moved.supervised_tokens) == (batch.tokens, batch.supervised_tokens)


@pytest.mark.parametrize("longest", [220, 2000])
def test_a_micro_batch_costs_twenty_lines_a_document_and_none_a_token(longest):
    lengths = np.random.default_rng(0).integers(longest // 2, longest, 3000)
    blocks = pack(documents_of(lengths), np.arange(3000), max_length=16_384, pad_id=PAD, seed=0)
    documents = len(blocks[0]) + len(blocks[1])
    assert 10 * documents < lines_run(lambda: micro_batch_of(blocks, [0, 1])) < 20 * documents


@settings(max_examples=150, derandomize=True)
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=24), min_size=1, max_size=30),
    repeats=st.lists(st.integers(0, 29), max_size=12),
    batching=st.sampled_from(["packed", "bucketed", "padded"]),
    max_length=st.integers(24, 90),
    seed=st.integers(0, 5),
)
def test_every_document_is_there_whole_as_often_as_asked_and_learns_from_nothing_but_itself(
    masks, repeats, batching, max_length, seed
):
    documents = documents_of([len(mask) for mask in masks], supervised=np.concatenate(masks))
    indices = np.array([*range(len(masks)), *(i for i in repeats if i < len(masks))])
    data = DataSection.model_validate({"batching": batching, "max_length": max_length})
    blocks, validation = lay_out(documents, indices, indices[:0], data=data, pad_id=PAD, seed=seed)
    assert validation is None
    placed: Counter[int] = Counter()
    tokens = supervised = 0
    for block in range(len(blocks)):
        batch = micro_batch_of(blocks, [block])
        check_block(batch, blocks, block)
        assert batch.input_ids.shape[1] == blocks.widths[block] <= max_length
        assert batch.tokens == blocks.lengths[block]
        placed.update(blocks[block].tolist())
        tokens += batch.tokens
        supervised += batch.supervised_tokens
    assert placed == Counter(indices.tolist())
    assert (tokens, supervised) == (blocks.tokens, blocks.supervised_tokens)


def check_block(batch: MicroBatch, blocks: Blocks, block: int) -> None:
    """The one block of `batch` holds its documents, one after another, then padding."""
    documents, indices = blocks.documents, blocks[block].tolist()
    ids, labels, positions, numbers = (getattr(batch, name)[0].numpy() for name in ROWS)
    used, starts = int(documents.lengths[indices].sum()), []
    pieces = [np.flatnonzero(numbers == number) for number in range(int(numbers.max()) + 1)]
    assert len(pieces) == len(indices) + (used < len(ids))
    for places in pieces:  # padding too: contiguous, and positions begin anew
        assert positions[places].tolist() == list(range(len(places))) == (places - places[0]).tolist()
        starts.append(int(places[0]))
    for index, places in zip(indices, pieces, strict=False):
        whole = documents[index]
        assert ids[places].tolist() == whole.input_ids.tolist()
        targets = np.where(whole.supervised, whole.input_ids, IGNORE)[1:]
        assert labels[places].tolist() == [*targets, IGNORE]
    assert (ids[used:] == PAD).all() and (labels[used:] == IGNORE).all()
    assert batch.supervised_tokens == int((labels != IGNORE).sum())
    boundaries = sorted({*starts, *range(used, len(ids), blocks.max_seqlen)})
    assert batch.cu_seqlens.tolist() == [*boundaries, *[len(ids)] * (blocks.max_documents + 1 - len(boundaries))]

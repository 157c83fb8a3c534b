"""How many targets a micro batch has at most, known before it is made: the head's product has so many rows."""

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.documents import Document, Documents
from launcher.data.loader import TrainLoader, eval_batches, micro_batch_of, sample_batch
from launcher.data.pack.blocks import IGNORE
from launcher.data.pack.buckets import lay_out
from launcher.recipe.data_section import DataSection


def documents_of(lengths: list[int], seed: int) -> Documents:
    """Each with targets of its own density."""
    rng = np.random.default_rng(seed)
    return Documents.of(Document(np.full(n, 5, np.int32), rng.random(n) < rng.random()) for n in lengths)


@given(
    lengths=st.lists(st.integers(1, 32), min_size=2, max_size=40),
    batching=st.sampled_from(["packed", "bucketed", "padded"]),
    micro_batch=st.integers(1, 4),
    world=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_no_micro_batch_has_more_targets_than_the_bound_of_its_width(
    lengths: list[int], batching: Any, micro_batch: int, world: int, seed: int
) -> None:
    """Three epochs of every rank, evaluation and warm-up; blank rows of the last batches and ranks included."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    data = DataSection(batching=batching, max_length=32)
    train, validation = np.split(order, [len(order) // 2])
    for blocks in lay_out(documents_of(lengths, seed), train, validation, data=data, pad_id=0, seed=seed):
        assert blocks is not None
        bound = blocks.most_targets(micro_batch)
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
def test_the_bound_is_what_the_rows_with_the_most_targets_have_together(micro_batch: int) -> None:
    lengths = [8] * 11 + [16] * 7 + [21] * 3
    data = DataSection(batching="bucketed", max_length=32)
    blocks, _ = lay_out(documents_of(lengths, 0), np.arange(21), np.arange(0), data=data, pad_id=0, seed=0)
    bound = blocks.most_targets(micro_batch)
    assert list(bound) == [8, 16, 24]
    for width, most in bound.items():
        of_width = np.flatnonzero(blocks.widths == width)
        fullest = of_width[np.argsort(-blocks.targets[of_width], kind="stable")[:micro_batch]]
        assert micro_batch_of(blocks, fullest).supervised_tokens == most > 0

"""Attention is told how long a document may be, and no batch says otherwise."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from launcher.model import attention as paths
from launcher.ops import document_attention as ops
from launcher.train.planned import rows_of
from launcher.train.setup import prepare
from tests.conftest import TINY, request_for
from tests.support.workers import compiled, documents

pytestmark = pytest.mark.usefixtures("clean_dynamo")
LAYERS = 2


def recipe_of(make_recipe: Callable[..., Any], *, attention: str = "auto", **data: Any) -> Any:
    """Uncompiled, rows of 512."""
    sections = {"model": {"attention": attention}, "data": {"batching": "packed", "max_length": 512, **data}}
    return make_recipe(**sections, compile={"mode": "off"}, train={"micro_batch": 1})


def test_the_model_knows_the_bound_and_a_batch_beyond_it_is_refused(make_recipe: Callable[..., Any]) -> None:
    worker = compiled(recipe_of(make_recipe), documents((60, 100)))
    assert worker.built.packed.max_seqlen == 128
    batch = next(worker.batches)
    assert float(worker.step(batch).loss_sum) > 0
    [micro] = batch.micro_batches
    joined = replace(micro, cu_seqlens=torch.where(micro.cu_seqlens < 400, 0, micro.cu_seqlens))
    max_seqlen = int(joined.cu_seqlens.diff().max())
    with pytest.raises(AssertionError, match=f"{max_seqlen} tokens of a document where .* none has more than 128"):
        worker.step(replace(batch, micro_batches=(joined,)))


def test_variable_length_attention_gets_the_bound_and_the_sample_its_own(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []

    def kernel(q: Any, k: Any, v: Any, of_q: Any, of_k: Any, most_q: int, most_k: int, **rest: Any) -> Any:
        told.append((most_q, most_k))
        return q

    monkeypatch.setattr(paths, "fused_missing", lambda *args, **rest: None)
    monkeypatch.setattr(ops, "varlen_attn", kernel)
    monkeypatch.setattr(ops, "TAKES_GROUPED_HEADS", True)
    worker = compiled(recipe_of(make_recipe, attention="varlen"), documents((60, 100)))
    told.clear()
    worker.step(next(worker.batches))
    assert told == [(128, 128)] * LAYERS
    told.clear()
    packed = worker.built.packed
    for length in (300, 20):  # longer and shorter than any document of the run
        packed.next_logits(torch.zeros(1, length, dtype=torch.int64))
    assert told == [(300, 300)] * LAYERS + [(20, 20)] * LAYERS


def test_of_a_streams_documents_nothing_is_known_but_the_row(make_recipe: Callable[..., Any]) -> None:
    held = prepare(request_for(recipe_of(make_recipe))).data
    assert rows_of(held, micro_batch=1).max_seqlen == 128
    streamed = prepare(request_for(recipe_of(make_recipe, streaming=True, validation=0))).data
    assert rows_of(streamed, micro_batch=1).max_seqlen == 512
    own = str(TINY / "validation.jsonl")
    streamed = prepare(request_for(recipe_of(make_recipe, batching="padded", streaming=True, validation=own))).data
    assert streamed.validation is not None
    assert rows_of(streamed, micro_batch=1).max_seqlen == streamed.validation.max_seqlen == 512
    assert streamed.validation.max_documents == streamed.first_blocks.max_documents == 2  # no room for a tail's pieces

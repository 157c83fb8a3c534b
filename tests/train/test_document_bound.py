"""Attention is told an upper bound on document length, and no batch exceeds it."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from launcher.model import attention as paths
from launcher.ops import document_attention as ops
from launcher.train.inputs import block_facts, prepare_inputs
from tests.conftest import TINY, request_for
from tests.support.workers import compiled, documents

pytestmark = pytest.mark.usefixtures("clean_dynamo")
LAYERS = 2


def recipe_of(make_recipe: Callable[..., Any], *, attention: str = "auto", **data: Any) -> Any:
    """Uncompiled, blocks of 512 positions."""
    sections = {"model": {"attention": attention}, "data": {"batching": "packed", "max_length": 512, **data}}
    return make_recipe(**sections, compile={"mode": "off"}, train={"micro_batch": 1})


def test_a_batch_with_a_longer_document_than_the_bound_is_refused(make_recipe: Callable[..., Any]) -> None:
    worker = compiled(recipe_of(make_recipe), documents((60, 100)))
    assert worker.built.packed.max_seqlen == 128
    batch = next(worker.batches)
    assert float(worker.step(batch).loss_sum) > 0
    [micro] = batch.micro_batches
    joined = replace(micro, cu_seqlens=torch.where(micro.cu_seqlens < 400, 0, micro.cu_seqlens))
    longest = int(joined.cu_seqlens.diff().max())
    with pytest.raises(AssertionError, match=f"a document of {longest} tokens, where max_seqlen of attention is 128"):
        worker.step(replace(batch, micro_batches=(joined,)))


@pytest.mark.skipif("enable_gqa" not in inspect.signature(varlen_attn).parameters, reason="torch has another kernel")
def test_the_kernel_gets_the_bound_in_training_and_the_length_of_the_text_in_the_sample(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[tuple[int, int]] = []

    def kernel(q: Any, k: Any, v: Any, of_q: Any, of_k: Any, max_q: int, max_k: int, **options: Any) -> Any:
        bounds.append((max_q, max_k))
        return q

    monkeypatch.setattr(paths, "fused_missing", lambda *args, **options: None)
    monkeypatch.setattr(ops, "varlen_attn", kernel)
    worker = compiled(recipe_of(make_recipe, attention="varlen"), documents((60, 100)))
    bounds.clear()
    worker.step(next(worker.batches))
    assert bounds == [(128, 128)] * LAYERS
    bounds.clear()
    for length in (300, 20):  # longer and shorter than any document of the run
        worker.built.packed.next_logits(torch.zeros(1, length, dtype=torch.int64))
    assert bounds == [(300, 300)] * LAYERS + [(20, 20)] * LAYERS


def test_of_a_streams_documents_only_the_width_of_a_block_is_known(make_recipe: Callable[..., Any]) -> None:
    def data_of(**data: Any) -> Any:
        return prepare_inputs(request_for(recipe_of(make_recipe, **data))).data

    assert block_facts(data_of(), micro_batch=1).max_seqlen == 128
    assert block_facts(data_of(streaming=True, validation=0), micro_batch=1).max_seqlen == 512
    own_validation = str(TINY / "validation.jsonl")
    padded = data_of(batching="padded", streaming=True, validation=own_validation)
    assert block_facts(padded, micro_batch=1).max_seqlen == padded.validation.max_seqlen == 512
    assert padded.validation.max_documents == padded.first_blocks.max_documents == 2  # a document and the padding

"""Attention is told how long a document may be, and no batch says otherwise."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from launcher.ops import attention as ops
from launcher.train.planned import rows_of
from launcher.train.setup import prepare
from tests.conftest import request_for
from tests.train.test_shapes import compiled, documents

pytestmark = pytest.mark.usefixtures("clean_dynamo")


def recipe_of(make_recipe: Callable[..., Any], **data: Any) -> Any:
    section = {"batching": "packed", "max_length": 512, **data}
    return make_recipe(data=section, compile={"mode": "off"}, train={"micro_batch": 1})


def test_the_model_knows_the_bound_and_a_batch_beyond_it_is_refused(make_recipe: Callable[..., Any]) -> None:
    worker = compiled(recipe_of(make_recipe), documents((60, 100)))
    assert worker.built.packed.longest == 128
    batch = next(worker.batches)
    assert float(worker.step(batch).loss_sum) > 0
    [micro] = batch.micro_batches
    joined = replace(micro, cu_seqlens=torch.where(micro.cu_seqlens < 400, 0, micro.cu_seqlens))
    longest = int(joined.cu_seqlens.diff().max())
    with pytest.raises(AssertionError, match=f"{longest} tokens of a document where .* none has more than 128"):
        worker.step(replace(batch, micro_batches=(joined,)))


def test_variable_length_attention_gets_the_bound_and_the_sample_its_own(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = compiled(recipe_of(make_recipe), documents((60, 100)))
    packed, said = worker.built.packed, []
    known = type(packed.body).forward

    def forward(self: Any, *args: Any) -> Any:
        said.append(args[-1])
        return known(self, *args)

    monkeypatch.setattr(type(packed.body), "forward", forward)
    worker.step(next(worker.batches))
    packed.next_logits(torch.zeros(1, 300, dtype=torch.int64))
    assert said == [128, 300]

    lengths: list[tuple[int, int]] = []

    def kernel(q: Any, k: Any, v: Any, of_q: Any, of_k: Any, most_q: int, most_k: int, **rest: Any) -> Any:
        lengths.append((most_q, most_k))
        return q

    monkeypatch.setattr(ops, "varlen_attn", kernel)
    states, boundaries = torch.zeros(1, 2, 512, 8), torch.tensor([0, 100, 512], dtype=torch.int32)
    for longest in (128, 600):
        assert ops.varlen_attention(states, states, states, (boundaries, longest), 1.0).shape == (1, 512, 2, 8)
    assert lengths == [(128, 128), (512, 512)]


def test_of_a_streams_documents_nothing_is_known_but_the_row(make_recipe: Callable[..., Any]) -> None:
    held = prepare(request_for(recipe_of(make_recipe))).data
    assert rows_of(held, micro_batch=1).longest == 128
    streamed = prepare(request_for(recipe_of(make_recipe, streaming=True, validation=0))).data
    assert rows_of(streamed, micro_batch=1).longest == 512

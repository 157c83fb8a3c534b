"""Positions without a target are left out of the head's product, and nothing else changes."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from launcher.data.loader import StepBatch
from launcher.train.inputs import block_facts, prepare_inputs
from tests.conftest import request_for
from tests.support.workers import compiled, documents

pytestmark = pytest.mark.usefixtures("clean_dynamo")

UNCOMPILED = {"mode": "off"}


@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
def test_losses_and_gradients_are_those_of_the_whole_product(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    recipe = make_recipe(data={"batching": batching, "max_length": 64}, compile=UNCOMPILED, train={"micro_batch": 4})
    worker = compiled(recipe, documents((5, 8, 30, 64)))
    packed = worker.built.packed
    assert packed.loss_rows(4 * 64) < 0.8 * 4 * 64

    def measured(batch: StepBatch) -> tuple[float, list[torch.Tensor]]:
        loss = float(worker.step.accumulate(batch))
        evaluated = sum(float(worker.step.eval_loss(micro)) for micro in batch.micro_batches)
        assert evaluated == pytest.approx(loss, rel=1e-6)
        return loss, [p.grad.clone() for p in worker.step.parameters if p.grad is not None]

    for _ in range(3):
        batch = next(worker.batches)
        loss, gradients = measured(batch)
        with monkeypatch.context() as patch:
            patch.setattr(packed, "loss_rows", lambda tokens: tokens)
            whole_loss, whole_gradients = measured(batch)
        assert loss == pytest.approx(whole_loss, rel=1e-6) and loss > 0
        assert max(float(g.abs().max()) for g in gradients) > 1e-3
        torch.testing.assert_close(gradients, whole_gradients, rtol=1e-4, atol=1e-6)


def test_a_batch_with_more_targets_than_the_data_had_is_refused_and_one_that_slips_through_reaches_no_weight(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = compiled(make_recipe(compile=UNCOMPILED), documents((40, 64)))
    weights = [[parameter.detach().clone() for parameter in worker.step.parameters]]

    def loss_of(batch: StepBatch) -> float:
        loss = float(worker.step(batch).loss_sum)
        weights.append([parameter.detach().clone() for parameter in worker.step.parameters])
        return loss

    assert loss_of(next(worker.batches)) > 0 and loss_of(next(worker.batches)) > 0
    batch = next(worker.batches)
    [micro] = batch.micro_batches
    uncounted = replace(batch, micro_batches=(replace(micro, supervised_tokens=0),))
    with monkeypatch.context() as patch:
        patch.setattr(worker.built.packed, "loss_rows", lambda tokens: micro.supervised_tokens - 1)
        with pytest.raises(AssertionError, match=f"{micro.supervised_tokens} targets where the data has at most"):
            loss_of(batch)
        assert np.isnan(loss_of(uncounted))
    loss_of(batch)  # the gate stays closed
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairwise(weights)]
    assert moved[1:] == [True, False, False]  # the first step has a rate of 0: warm-up


def test_of_a_streams_targets_nothing_is_known(make_recipe: Callable[..., Any]) -> None:
    held = prepare_inputs(request_for(make_recipe())).data
    [(width, targets)] = block_facts(held, micro_batch=2).targets.items()
    assert width == 64 and 0 < targets < 0.8 * 2 * 64
    assert block_facts(held, micro_batch=4).targets[64] > targets
    assert held.validation is not None
    swapped = replace(held, train=held.validation, validation=held.train)
    assert block_facts(swapped, micro_batch=2).targets[64] == targets
    streamed = prepare_inputs(request_for(make_recipe(data={"streaming": True, "validation": 0}))).data
    assert block_facts(streamed, micro_batch=2).targets == {}

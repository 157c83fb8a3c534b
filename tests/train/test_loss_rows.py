"""Rows without a target are left out of the head's product, and nothing else changes."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from launcher.data.documents import Documents
from launcher.data.loader import StepBatch
from launcher.train.make_records import start_record
from launcher.train.planned import rows_of
from launcher.train.setup import prepare
from tests.conftest import request_for
from tests.support.workers import compiled, documents

pytestmark = pytest.mark.usefixtures("clean_dynamo")

BUCKETED = {"batching": "bucketed", "max_length": 64}
UNCOMPILED = {"mode": "off"}


def questions() -> Documents:
    """Of 8 tokens, all targets but the first, or of 64, of which a third are."""
    found = documents((8, 64))
    long = np.repeat(found.lengths == 64, found.lengths)
    return replace(found, supervised=~long | (np.arange(len(long)) % 3 == 0))


def test_two_widths_of_which_one_leaves_rows_out_share_the_graphs_of_the_loss(make_recipe: Callable[..., Any]) -> None:
    worker = compiled(make_recipe(data=BUCKETED, train={"steps": 40, "micro_batch": 8}), questions())
    packed = worker.built.packed
    most = packed.loss_rows(8 * 64)
    assert 8 * 64 / 4 < most < 8 * 64 / 2 and packed.loss_rows(8 * 8) == 8 * 7
    assert packed.loss_chunk <= most
    assert start_record(worker).loss_tokens == (8 * 7, most)
    for _ in range(20):
        worker.step(next(worker.batches))
    for batch in worker.eval_batches:
        worker.plan.call(worker.step.eval_loss, batch)
    worker.plan.check()
    record = worker.observer.record()
    assert record.graphs_by_region == {"layer": 4, "loss": 2}
    assert (record.recompiles, record.compilations) == (0, record.expected_graphs)
    worker.plan.release()


@pytest.mark.parametrize("batching", ["packed", "bucketed", "padded"])
def test_losses_and_gradients_are_those_of_the_whole_product(make_recipe: Callable[..., Any], batching: str) -> None:
    recipe = make_recipe(data={"batching": batching, "max_length": 64}, compile=UNCOMPILED, train={"micro_batch": 4})
    worker = compiled(recipe, documents((5, 8, 30, 64)))
    packed = worker.built.packed
    assert packed.loss_rows(4 * 64) < 0.8 * 4 * 64
    bounds = dict(packed.loss_rows_by_tokens)
    for _ in range(3):
        batch, found = next(worker.batches), []
        for packed.loss_rows_by_tokens in (bounds, {}):
            loss = float(worker.step.accumulate(batch))
            evaluated = sum(float(worker.step.eval_loss(micro)) for micro in batch.micro_batches)
            assert evaluated == pytest.approx(loss, rel=1e-6)
            found.append((loss, [p.grad.clone() for p in worker.step.parameters if p.grad is not None]))
        (loss, gradients), (whole, of_whole) = found
        assert loss == pytest.approx(whole, rel=1e-6) and loss > 0
        assert max(float(g.abs().max()) for g in gradients) > 1e-3
        torch.testing.assert_close(gradients, of_whole, rtol=1e-4, atol=1e-6)


def test_a_batch_with_more_targets_than_the_data_had_is_refused_and_what_slips_through_reaches_no_weight(
    make_recipe: Callable[..., Any],
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
    bounds = worker.built.packed.loss_rows_by_tokens
    whole = bounds.copy()
    bounds[micro.labels.numel()] = micro.supervised_tokens - 1
    with pytest.raises(AssertionError, match=f"{micro.supervised_tokens} targets where the data has at most"):
        loss_of(batch)
    uncounted = replace(batch, micro_batches=(replace(micro, supervised_tokens=0),))
    assert np.isnan(loss_of(uncounted))
    bounds.update(whole)
    loss_of(batch)  # the gate stays closed
    moved = [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in pairwise(weights)]
    assert moved[1:] == [True, False, False]  # the first step has a rate of 0: warm-up


def test_of_a_streams_targets_nothing_is_known(make_recipe: Callable[..., Any]) -> None:
    held = prepare(request_for(make_recipe())).data
    [(width, most)] = rows_of(held, micro_batch=2).targets.items()
    assert width == 64 and 0 < most < 0.8 * 2 * 64
    assert rows_of(held, micro_batch=4).targets[64] > most
    assert held.validation is not None
    validated = replace(held, train=held.validation, validation=held.train)
    assert rows_of(validated, micro_batch=2).targets[64] == most
    streamed = prepare(request_for(make_recipe(data={"streaming": True, "validation": 0}))).data
    assert rows_of(streamed, micro_batch=2).targets == {}

"""Batches of any boundaries and planned widths compile nothing after warm-up; any other width stops the run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from launcher.data.documents import Documents
from launcher.data.pack.micro_batch import MicroBatch
from launcher.errors import ContractError
from launcher.train.describe import start_record
from launcher.train.step import arguments
from tests.support.workers import ANY, MAX_LENGTH, THREE, TWO, compiled, documents

pytestmark = pytest.mark.usefixtures("clean_dynamo")

BUCKETED = {"batching": "bucketed", "max_length": MAX_LENGTH}


def partly_supervised(lengths: tuple[int, ...]) -> Documents:
    """Documents of up to 8 tokens, all supervised, and longer ones, of which a third is."""
    data = documents(lengths)
    is_long = np.repeat(data.lengths > 8, data.lengths)
    return replace(data, supervised=~is_long | (np.arange(len(is_long)) % 3 == 0))


@pytest.mark.parametrize(("batching", "lengths", "widths"), [("packed", ANY, 1), ("bucketed", THREE, 3)])
def test_a_hundred_batches_of_varied_boundaries_and_an_odd_last_one_compile_nothing(
    make_recipe: Callable[..., Any], batching: str, lengths: tuple[int, ...], widths: int
) -> None:
    data = {"batching": batching, "max_length": MAX_LENGTH}
    worker = compiled(make_recipe(data=data, train={"steps": 100, "micro_batch": 2}), partly_supervised(lengths))
    graphs, loss_tokens = 2 * widths + 2, start_record(worker).loss_tokens
    assert len(set(loss_tokens)) == widths and loss_tokens[-1] < 0.7 * 2 * MAX_LENGTH, "positions are left out"
    assert batching == "packed" or loss_tokens[0] == 2 * 7, "all that have a target"
    assert worker.built.packed.loss_chunk < max(loss_tokens) + 8, "chunks are whole eights"
    record = worker.observer.record()
    assert record.graphs_by_region == {"layer": 2 * widths, "loss": 2}
    assert record.compilations == record.planned_graphs == record.expected_graphs == graphs
    boundaries, shapes, blanks = set(), set(), 0
    for _ in range(100):
        batch = next(worker.batches)
        worker.step(batch)
        for micro in batch.micro_batches:
            boundaries.add(tuple(micro.cu_seqlens.tolist()))
            shapes.add(tuple(micro.input_ids.shape))
            blanks += int((micro.cu_seqlens.diff() == micro.input_ids.shape[1]).sum())
    losses = [float(worker.plan.call(worker.step.eval_loss, batch)) for batch in worker.eval_batches]
    worker.plan.check()
    record = worker.observer.record()
    assert (record.compilations, record.recompiles, record.limit_hits, record.graph_breaks) == (graphs, 0, 0, 0)
    assert len(boundaries) >= (90 if batching == "packed" else 6)
    assert len(shapes) == widths
    assert blanks > 0
    assert min(losses) > 0
    narrow = arguments(MicroBatch(*(t[:, :-8] if t.dim() > 1 else t for t in arguments(micro)), 0, 0))
    with pytest.raises(ContractError, match="no recompile is allowed after warm-up"):
        worker.plan.call(worker.built.packed, *narrow)
    worker.plan.release()


def test_planned_shapes_are_counted_for_each_region(make_recipe: Callable[..., Any]) -> None:
    regions = {"scope": "regions", "regions": ["attention", "rmsnorm", "loss"]}
    worker = compiled(make_recipe(data=BUCKETED, compile=regions), documents(TWO))
    for _ in range(10):
        worker.step(next(worker.batches))
    worker.plan.check()
    record = worker.observer.record()
    assert record.graphs_by_region == {"attention": 4, "rmsnorm": 4, "loss": 2}
    assert (record.recompiles, record.compilations) == (0, record.expected_graphs)
    worker.plan.release()


def test_the_probe_of_the_saved_adapter_has_tokens_to_learn(make_recipe: Callable[..., Any]) -> None:
    worker = compiled(make_recipe(data=BUCKETED, compile={"mode": "off"}), documents(THREE))
    assert worker.probe.supervised_tokens > 10
    assert worker.batches.state_dict() == {"epoch": 0, "offset": 0}

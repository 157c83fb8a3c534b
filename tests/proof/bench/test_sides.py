"""Both sides, here in one process: the same batches, the same loss at the first step, figures of every step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from launcher.data.pack.micro_batch import IGNORE
from launcher.errors import MemoryExhausted
from launcher.ops.linear_ce import chunk_loss_and_grad
from launcher.proof.bench import side
from launcher.proof.bench.ceiling import matmul_ceiling
from launcher.proof.bench.figures import bench_record
from launcher.proof.bench.naive import NaiveStep, collate
from launcher.proof.bench.workload import (
    WARM_UP_STEPS,
    bench_data,
    bench_request,
    digest,
    step_batches,
    workload,
)
from launcher.proof.stock import supervised_documents
from launcher.records.bench import BenchRecord, OursRecord, SideRecord
from launcher.train import regions
from launcher.train.step import TrainStep
from tests.conftest import request_for

pytestmark = pytest.mark.usefixtures("clean_dynamo")
STEPS = 2


def small(make_recipe: Callable[..., Any], **sections: dict[str, Any]) -> Any:
    """The loss alone is compiled: quick."""
    base: dict[str, dict[str, Any]] = {
        "model": {"name": make_recipe().model.name, "dtype": "float32"},
        "data": {"validation": 0},
        "compile": {"backend": "aot_eager", "scope": "regions", "regions": ["loss"]},
        "train": {"steps": 1, "micro_batch": 2},
        "proof": {"bench": STEPS},
    }
    return make_recipe(**{name: base.get(name, {}) | sections.get(name, {}) for name in {*base, *sections}})


def last(events: Any) -> Any:
    *phases, record = events
    assert all(isinstance(phase, str) for phase in phases)
    return record


def benched(recipe: Any) -> BenchRecord:
    request = request_for(recipe)
    work = workload(bench_request(request))
    ours, naive = last(side.ours(request)), last(side.naive(request))
    return bench_record({}, rows=recipe.proof.bench_rows, workload=work, ours=ours, naive=naive)


@pytest.mark.parametrize(
    ("sections", "widths"),
    [
        ({"train": {"accumulation": 2}, "lora": {"r": 4, "dropout": 0.3}}, 1),
        ({"data": {"batching": "bucketed"}, "model": {"dtype": "bfloat16"}}, 3),
        ({"data": {"streaming": True, "validation": 0}}, 1),
        ({"proof": {"bench_rows": "random"}, "model": {"init": "random"}}, 1),
    ],
)
def test_both_sides_train_on_the_same_and_every_step_is_accounted_for(
    make_recipe: Callable[..., Any], sections: dict[str, Any], widths: int
) -> None:
    found = benched(small(make_recipe, **sections))
    ours, naive = found.ours, found.naive
    assert isinstance(naive, SideRecord)
    assert found.holds, found.verdicts
    assert ours.batches == naive.batches == found.workload.batches
    assert len(found.start.widths) >= min(widths, 2)
    for measured in (ours, naive):
        assert len(measured.losses) == 1 + WARM_UP_STEPS + STEPS and len(measured.steps_s) == STEPS
        assert measured.losses[0] != measured.losses[1] and not measured.failure
        assert measured.first_step_s and measured.before_mib and measured.peak_allocated_mib
    assert list(ours.phases_s) == ["imports", "data", "load", "compile", "first step"]
    assert list(naive.phases_s) == ["imports", "data", "load", "first step"]
    assert found.speed_up and found.memory_ratio
    assert (naive.ceiling_share or 0) > 0 and (ours.tokens_per_s or 0) > 0


def test_a_wrong_loss_of_one_side_is_found_at_the_first_step(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = chunk_loss_and_grad(hidden, weight, labels)
        return loss * 1.001, grad

    monkeypatch.setattr(regions, "chunk_loss_and_grad", planted)
    found = benched(small(make_recipe))
    assert [verdict.holds for verdict in found.verdicts] == [True, True, False]
    assert "same loss at step 1" in found.failure


def test_the_naive_side_sees_every_document_once_alone_in_its_row(make_recipe: Callable[..., Any]) -> None:
    request = bench_request(request_for(small(make_recipe, train={"accumulation": 2})))
    prepared = bench_data(request)
    for batch in step_batches(request, prepared):
        collated = collate(batch, pinned=False)
        packed = [
            tuple(ids.tolist())
            for micro in batch.micro_batches
            for ids, _ in supervised_documents(micro.input_ids, micro.labels, micro.document_ids)
        ]
        lengths = {ids: len(ids) for ids in packed}
        rows = [tuple(row.tolist()) for ids, _ in collated.groups for row in ids]
        assert len(rows) == len(packed) > len(batch.micro_batches)
        assert sorted(rows) == sorted(ids + (0,) * (len(row) - len(ids)) for ids, row in matched(packed, rows))
        assert sum(lengths.values()) <= batch.tokens
        assert sum(int((labels != IGNORE).sum()) for _, labels in collated.groups) == batch.supervised_tokens > 0
        assert all(ids.numel() <= batch.micro_batches[0].input_ids.numel() for ids, _ in collated.groups)


def matched(packed: list[tuple[int, ...]], rows: list[tuple[int, ...]]) -> list[tuple[Any, Any]]:
    """Each document with a row that begins with it and holds padding alone behind it."""
    found, left = [], list(rows)
    for ids in packed:
        row = next(row for row in left if row[: len(ids)] == ids and not any(row[len(ids) :]))
        left.remove(row)
        found.append((ids, row))
    return found


def test_random_rows_are_full_and_both_sides_see_them_in_the_same_shape(make_recipe: Callable[..., Any]) -> None:
    recipe = small(make_recipe, data={"max_length": 32, "validation": 0.1}, proof={"bench_rows": "random"})
    request = bench_request(request_for(recipe))
    prepared = bench_data(request)
    batches = step_batches(request, prepared)
    assert prepared.data.validation is None and any("random rows" in note for note in prepared.data.notes)
    for batch in batches:
        [micro] = batch.micro_batches
        [(ids, labels)] = collate(batch, pinned=False).groups
        assert sorted(ids.tolist()) == sorted(micro.input_ids.tolist()) and ids.shape == (2, 32)
        assert (batch.tokens, batch.supervised_tokens) == (64, 62)  # nothing follows the last of a row
        assert bool((labels[:, :-1] == ids[:, 1:]).all())
    assert len(np.unique(np.concatenate([b.micro_batches[0].input_ids for b in batches]), axis=0)) == 2 * len(batches)
    assert len(prepared.data.train) == 2 * len(batches)  # type: ignore[union-attr]


def test_a_digest_sees_one_token_one_label_and_one_boundary(make_recipe: Callable[..., Any]) -> None:
    request = bench_request(request_for(small(make_recipe)))
    batches = step_batches(request, bench_data(request))
    assert digest(batches) == digest(step_batches(request, bench_data(request)))
    for name in ("input_ids", "labels", "document_ids"):
        [micro] = batches[-1].micro_batches
        changed = getattr(micro, name).clone()
        changed[0, 3] += 1
        other = replace(batches[-1], micro_batches=(replace(micro, **{name: changed}),))
        assert digest([*batches[:-1], other]) != digest(batches)


class OutOfMemoryAtStep(NaiveStep):
    """A device that is full at the third step."""

    taken = 0

    def __call__(self, batch: Any) -> Tensor:
        self.taken += 1
        if self.taken == 3:
            raise torch.OutOfMemoryError("planted")
        return super().__call__(batch)


def test_where_the_naive_side_runs_out_of_memory_it_says_what_it_held(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side, "NaiveStep", OutOfMemoryAtStep)
    found = last(side.naive(request_for(small(make_recipe))))
    assert found.out_of_memory and "out of memory after 2 steps; held by phase: after load " in found.failure
    assert len(found.losses) == 2 and found.steps_s == ()
    assert found.peak_allocated_mib > 0 and found.before_mib and found.first_step_s


def test_where_our_side_runs_out_of_memory_it_is_an_error_that_says_what_it_held(
    make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(TrainStep, "__call__", full)
    with pytest.raises(MemoryExhausted, match="our side ran out of memory; held by phase: .*before first step "):
        list(side.ours(request_for(small(make_recipe))))


def test_the_naive_side_is_checkpointed_and_nothing_in_it_is_ours(make_recipe: Callable[..., Any]) -> None:
    request = bench_request(request_for(small(make_recipe)))
    step = NaiveStep(request, bench_data(request))
    layer = step.model.base_model.model.model.layers[0]
    assert layer.gradient_checkpointing and layer.training
    trained = {type(module).__module__.split(".")[0] for module in step.model.modules()}
    assert "launcher" not in trained and {"peft", "transformers", "bitsandbytes"} <= trained


def test_the_ceiling_is_what_a_product_reaches() -> None:
    found = matmul_ceiling(torch.float32, torch.device("cpu"))
    assert (found.dtype, found.size) == ("float32", 512) and 1e9 < found.flops_per_s < 1e14


def test_our_record_is_whole(make_recipe: Callable[..., Any]) -> None:
    found = last(side.ours(request_for(small(make_recipe, compile={"regions": ["loss", "rmsnorm"]}))))
    assert isinstance(found, OursRecord)
    assert found.compile.planned_graphs == found.compile.expected_graphs > 0
    assert found.loss_tolerance == 1e-5 and found.start.recipe == "test"
    phases = [record.phase for record in found.side.vram]
    assert phases[-3:] == ["before first step", "after first step", "after steps"]

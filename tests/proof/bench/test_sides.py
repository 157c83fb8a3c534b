"""Both sides, here in one process: the same batches, the same loss at the first step, figures of every step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from launcher.errors import MemoryExhausted
from launcher.ops.linear_ce import ChunkFunctions, chunk_loss_and_grad
from launcher.proof.bench import side
from launcher.proof.bench.ceiling import matmul_ceiling
from launcher.proof.bench.figures import bench_record
from launcher.proof.bench.naive import NaiveStep
from launcher.proof.bench.workload import WARM_UP_STEPS, bench_inputs, hash_batches, step_batches, workload
from launcher.proof.noise import with_plain_start
from launcher.proof.stock import collate
from launcher.records.bench import BenchRecord, SideRecord
from launcher.train import compiled_regions
from launcher.train.request import Request
from launcher.train.step import TrainStep
from tests.conftest import request_for

pytestmark = pytest.mark.usefixtures("clean_dynamo")
STEPS = 2
Requested = Callable[..., Request]


@pytest.fixture
def requested(make_recipe: Callable[..., Any]) -> Requested:
    """The request of a small bench with these sections; of the model only the loss is compiled, which is quick."""
    defaults: dict[str, dict[str, Any]] = {
        "model": {"dtype": "float32"},
        "data": {"validation": 0},
        "compile": {"scope": "regions", "regions": ["loss"]},
        "train": {"steps": 1},
        "proof": {"bench": STEPS},
    }

    def make(**sections: dict[str, Any]) -> Request:
        merged = {name: defaults.get(name, {}) | sections.get(name, {}) for name in {*defaults, *sections}}
        return request_for(make_recipe(**merged))  # type: ignore[no-any-return]

    return make


def last(events: Any) -> Any:
    *phases, record = events
    assert all(isinstance(phase, str) for phase in phases)
    return record


def benched(request: Request) -> BenchRecord:
    work, ours, naive = (
        last(part) for part in (workload(request), side.ours(request), side.naive(with_plain_start(request)[0]))
    )
    sides = {"naive": naive}
    return bench_record({}, rows=request.recipe.proof.bench_rows, workload=work, ours=ours, sides=sides)


@pytest.mark.parametrize(
    ("sections", "widths"),
    [
        ({"train": {"accumulation": 2}, "lora": {"dropout": 0.3}}, 1),
        ({"data": {"batching": "bucketed"}, "model": {"dtype": "bfloat16"}}, 2),
        ({"data": {"streaming": True}, "lora": {"init": "olora"}}, 1),
        ({"proof": {"bench_rows": "random"}, "model": {"init": "random"}}, 1),
    ],
)
def test_both_sides_train_on_the_same_batches_and_record_every_step(
    requested: Requested, sections: dict[str, Any], widths: int
) -> None:
    record = benched(requested(**sections))
    ours, naive = record.ours, record.naive
    assert isinstance(naive, SideRecord)
    assert record.holds, record.verdicts
    assert ours.batches == naive.batches == record.workload.batches
    assert len(record.start.widths) >= widths
    assert record.compile.planned_graphs == record.compile.expected_graphs > 0
    assert [phase.phase for phase in ours.vram][-3:] == ["before first step", "after first step", "after steps"]
    for measured in (ours, naive):
        assert len(measured.losses) == 1 + WARM_UP_STEPS + STEPS and len(measured.steps_s) == STEPS
        assert measured.losses[0] != measured.losses[1] and not measured.failure
        assert measured.first_step_s and measured.before_mib and measured.peak_allocated_mib
    assert list(ours.phases_s) == ["imports", "data", "load", "compile", "first step"]
    assert list(naive.phases_s) == ["imports", "data", "load", "first step"]
    assert record.speed_up and record.memory_ratio
    assert (naive.ceiling_share or 0) > 0 and (ours.tokens_per_s or 0) > 0


def test_a_wrong_loss_of_one_side_is_found_at_the_first_step(
    requested: Requested, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = chunk_loss_and_grad(hidden, weight, labels)
        return loss * 1.001, grad

    monkeypatch.setattr(compiled_regions, "chunk_functions", lambda cap: ChunkFunctions(loss_and_grad=planted))
    record = benched(requested())
    assert [verdict.holds for verdict in record.verdicts] == [True, True, True, False, True]
    assert record.loss_tolerance == 1e-5
    assert "same loss at step 1" in record.failure


def test_random_blocks_are_full_and_have_the_same_shape_on_both_sides(requested: Requested) -> None:
    recipe = {"data": {"max_length": 32, "too_long": "split", "validation": 0.1}, "proof": {"bench_rows": "random"}}
    request, prepared = bench_inputs(requested(**recipe))
    batches = step_batches(request, prepared)
    assert prepared.data.validation is None and any("random rows" in note for note in prepared.data.notes)
    for batch in batches:
        [micro] = batch.micro_batches
        [(ids, labels)] = collate(batch).groups
        assert sorted(ids.tolist()) == sorted(micro.input_ids.tolist()) and ids.shape == (2, 32)
        assert (batch.tokens, batch.supervised_tokens) == (64, 62)  # nothing predicts the first token of a block
        assert bool((labels[:, :-1] == ids[:, 1:]).all())
    ids = np.concatenate([batch.micro_batches[0].input_ids for batch in batches])
    assert len(np.unique(ids, axis=0)) == len(prepared.data.train) == 2 * len(batches)  # type: ignore[arg-type]


def test_the_hash_sees_one_token_one_label_and_one_boundary(requested: Requested) -> None:
    inputs = bench_inputs(requested())
    batches = step_batches(*inputs)
    assert hash_batches(batches) == hash_batches(step_batches(*inputs))
    for name in ("input_ids", "labels", "document_ids"):
        [micro] = batches[-1].micro_batches
        changed = getattr(micro, name).clone()
        changed[0, 3] += 1
        other = replace(batches[-1], micro_batches=(replace(micro, **{name: changed}),))
        assert hash_batches([*batches[:-1], other]) != hash_batches(batches)


class OutOfMemoryAtStep3(NaiveStep):
    calls = 0

    def __call__(self, batch: Any) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise torch.OutOfMemoryError("planted")
        return super().__call__(batch)


def test_a_naive_side_that_runs_out_of_memory_says_what_it_held(
    requested: Requested, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side, "NaiveStep", OutOfMemoryAtStep3)
    record = last(side.naive(requested()))
    assert record.out_of_memory and "out of memory after 2 steps; held by phase: after load " in record.failure
    assert len(record.losses) == 2 and record.steps_s == ()
    assert record.peak_allocated_mib > 0 and record.before_mib and record.first_step_s


def test_our_side_out_of_memory_is_an_error_that_says_what_it_held(
    requested: Requested, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(TrainStep, "__call__", fail)
    with pytest.raises(MemoryExhausted, match="our side ran out of memory; held by phase: .*before first step "):
        list(side.ours(requested()))


@pytest.mark.parametrize("checkpointed", [True, False])
def test_nothing_in_the_naive_side_is_ours_and_its_layers_are_recomputed_only_where_asked(
    requested: Requested, checkpointed: bool
) -> None:
    request, prepared = bench_inputs(requested())
    step = NaiveStep(request, prepared, checkpointed=checkpointed)
    layer = step.model.base_model.model.model.layers[0]
    calls: list[int] = []
    layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    padded = collate(step_batches(request, prepared)[0])
    step(padded)
    assert layer.training and len(calls) == len(padded.groups) * (2 if checkpointed else 1)
    packages = {type(module).__module__.split(".")[0] for module in step.model.modules()}
    assert "launcher" not in packages and {"peft", "transformers", "bitsandbytes"} <= packages


def test_the_naive_side_has_the_rates_of_loraplus_at_every_step(requested: Requested) -> None:
    lora, train = {"plus_ratio": 16.0}, {"lr": 1e-3, "warmup": 0, "schedule": "linear"}
    request, prepared = bench_inputs(requested(lora=lora, train=train))
    step = NaiveStep(request, prepared, checkpointed=False)
    batch = collate(step_batches(request, prepared)[0])
    names = {id(parameter): name for name, parameter in step.model.named_parameters()}
    for rate in step.rates[:2]:
        step(batch)
        rates = {
            names[id(p)].split(".")[-3]: group["lr"] for group in step.optimizer.param_groups for p in group["params"]
        }
        assert rates == pytest.approx({"lora_A": rate, "lora_B": 16 * rate})
    assert step.rates[0] > step.rates[1]


def test_the_ceiling_is_a_rate_that_a_product_reaches() -> None:
    ceiling = matmul_ceiling(torch.float32, torch.device("cpu"))
    assert (ceiling.dtype, ceiling.size) == ("float32", 512) and 1e9 < ceiling.flops_per_s < 1e14

"""A fault planted anywhere in the compiled path closes the gate. The stock models are measured once for all faults."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor

from launcher.data.loader import StepBatch
from launcher.data.pack.micro_batch import IGNORE, MicroBatch
from launcher.model import lora, packed
from launcher.ops import adapter_gradients, feed_forward, nf4, rotary
from launcher.ops.linear_ce import chunk_loss_and_grad
from launcher.ops.qlora_linear import qlora_linear
from launcher.proof.gate import HALF, Comparison, Measured, gate_of
from launcher.proof.parity import compiled_worker, measure_compiled, measure_stock, perturb, release
from launcher.proof.stock import supervised_documents
from launcher.recipe.schema import Recipe
from launcher.runtime.clock import Clock
from launcher.train import regions
from launcher.train.request import Request
from launcher.train.setup import Prepared, Worker, prepare_inputs
from tests.conftest import request_for

pytestmark = pytest.mark.usefixtures("clean_dynamo")
BATCHES = 2
Plant = Callable[[pytest.MonkeyPatch], None]


class Bench:
    """The stock sides, measured on 192-token rows of several documents, chunks of 32 tokens."""

    def __init__(self, recipe: Recipe) -> None:
        self.request: Request = request_for(recipe)
        self.prepared: Prepared = prepare_inputs(self.request)
        worker, self.batches = self.compiled()
        self.adapters = perturb(worker.built.peft, seed=0)
        self.unplanted = measure_compiled(worker, self.batches)
        release(worker)
        self.eager, self.true = (self.stock(reference=reference) for reference in (False, True))

    def compiled(self) -> tuple[Worker, list[StepBatch]]:
        worker = compiled_worker(self.request, self.prepared, clock=Clock())
        return worker, [next(worker.batches) for _ in range(BATCHES)]

    def stock(self, *, reference: bool) -> list[Measured]:
        dtype, adapters = getattr(torch, self.request.recipe.model.dtype), self.adapters
        three = self.request, self.prepared, self.batches
        return list(measure_stock(*three, dtype=dtype, adapters=adapters, reference=reference))

    def planted(self) -> Comparison:
        worker, batches = self.compiled()
        perturb(worker.built.peft, seed=0)
        found = self.compare(measure_compiled(worker, batches))
        release(worker)
        return found

    def compare(self, compiled: list[Measured]) -> Comparison:
        comparison = Comparison()
        for batch, *three in zip(self.batches, compiled, self.eager, self.true, strict=True):
            comparison.add(*three, supervised_tokens=batch.supervised_tokens)
        return comparison


@pytest.fixture(scope="module")
def bench(small_model: Any, rows_file: Any) -> Iterator[Bench]:
    yield from made_bench(small_model, rows_file, dtype="float32")


@pytest.fixture(scope="module")
def half_bench(small_model: Any, rows_file: Any) -> Iterator[Bench]:
    yield from made_bench(small_model, rows_file, dtype="bfloat16")


def made_bench(small_model: Any, rows_file: Any, *, dtype: str) -> Iterator[Bench]:
    torch._dynamo.reset()
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(small_model), "dtype": dtype},
            "lora": {"r": 4},
            "data": {"sources": [{"path": str(rows_file)}], "max_length": 192, "validation": 0},
            "compile": {"backend": "aot_eager", "scope": "regions", "regions": ["loss"]},  # little to compile: quick
            "memory": {"loss_chunk_mib": 1},
            "train": {"steps": 1, "micro_batch": 2},
            "proof": {"parity": BATCHES},
        }
    )
    made = Bench(recipe)
    for batch in made.batches:
        [micro] = batch.micro_batches
        assert len(supervised_documents(micro.input_ids, micro.labels, micro.document_ids)) > 2 * len(micro.input_ids)
    yield made
    torch._dynamo.reset()


def wrong_chunk(patch: pytest.MonkeyPatch) -> None:
    """The gradient of every loss chunk whose first label is odd is half as long again."""

    def planted(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = chunk_loss_and_grad(hidden, weight, labels)
        return loss, grad * (1.0 + 0.5 * (labels[0] % 2))

    patch.setattr(regions, "chunk_loss_and_grad", planted)


def wrong_length(patch: pytest.MonkeyPatch) -> None:
    """Every gradient has the right direction and is a hundredth too long: no cosine sees it."""

    def planted(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = chunk_loss_and_grad(hidden, weight, labels)
        return loss, grad * 1.01

    patch.setattr(regions, "chunk_loss_and_grad", planted)


def wrong_scaling(patch: pytest.MonkeyPatch) -> None:
    def planted(x: Tensor, base: Any, a: Tensor, b: Tensor, *, scaling: float, dropout: float) -> Tensor:
        return qlora_linear(x, base, a, b, scaling=scaling * 1.1, dropout=dropout)

    patch.setattr(lora, "qlora_linear", planted)


def documents_see_each_other(patch: pytest.MonkeyPatch) -> None:
    mask = packed.document_mask
    patch.setattr(packed, "document_mask", lambda documents: mask(torch.zeros_like(documents)))


def with_positions(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    stock = packed.PackedCausalLM.hidden_states

    def planted(self: Any, ids: Tensor, positions: Tensor, documents: Tensor, boundaries: Tensor) -> Tensor:
        return stock(self, ids, change(positions), documents, boundaries)

    patch.setattr(packed.PackedCausalLM, "hidden_states", planted)


def positions_restart_within_documents(patch: pytest.MonkeyPatch) -> None:
    with_positions(patch, lambda positions: positions % 5)


def wrong_gate_kernel(patch: pytest.MonkeyPatch) -> None:
    """What gate and up get is a twentieth too long in gate's half."""
    plain = feed_forward.plain_swiglu_gradient

    def planted(pair: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        gradient, h = plain(pair, dh)
        gate, up = gradient.chunk(2, -1)
        return torch.cat([gate * 1.05, up], -1), h

    patch.setattr(feed_forward, "plain_swiglu_gradient", planted)


def wrong_rotary_kernel(patch: pytest.MonkeyPatch) -> None:
    """The backward pass turns queries and keys forward."""
    plain = rotary.plain_rotary_gradient
    patch.setattr(rotary, "plain_rotary_gradient", lambda dq, dk, dv, cos, sin: plain(dq, dk, dv, cos, -sin))


def wrong_adapter_kernel(patch: pytest.MonkeyPatch) -> None:
    """The gradients of A are of a rounded B: its sign."""
    plain = adapter_gradients.plain_gradients
    patch.setattr(
        adapter_gradients,
        "plain_gradients",
        lambda dy, x, a, b, scaling: plain(dy, x, a, b.sign() * b.abs().mean(), scaling),
    )


def wrong_weight_kernel(patch: pytest.MonkeyPatch) -> None:
    """Weights are dequantised a twentieth too small, in both passes."""
    plain = nf4.plain_merged_weight
    patch.setattr(nf4, "plain_merged_weight", lambda *args: plain(*args) * 0.95)


@pytest.mark.parametrize(
    ("plant", "broken"),
    [
        (wrong_gate_kernel, {2}),
        (wrong_rotary_kernel, {1, 2}),
        (wrong_adapter_kernel, {1, 2}),
        (wrong_weight_kernel, {0, 2}),
        (wrong_chunk, {1, 2}),
        (wrong_length, {2}),
        (wrong_scaling, {0, 2}),
        (documents_see_each_other, {0, 1, 2}),
        (positions_restart_within_documents, {0, 1, 2}),
    ],
)
def test_a_planted_fault_closes_the_gate(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, plant: Plant, broken: set[int]
) -> None:
    """`broken`: which of (loss, cosine, error against fp32) must not hold; without the plant all do."""
    gate = gate_of(torch.float32)
    assert all(verdict.holds for verdict in bench.compare(bench.unplanted).verdicts(gate))
    plant(monkeypatch)
    verdicts = bench.planted().verdicts(gate)
    found = {index for index, verdict in enumerate(verdicts) if not verdict.holds}
    assert found >= broken, verdicts


@pytest.mark.parametrize(
    ("plant", "broken"),
    [
        (wrong_rotary_kernel, {1, 2}),
        (wrong_adapter_kernel, {1, 2}),
        (wrong_weight_kernel, {2}),
        (wrong_chunk, {1, 2}),
        (documents_see_each_other, {0, 1, 2}),
    ],
)
def test_a_planted_fault_closes_the_gate_of_half_precision_too(
    half_bench: Bench, monkeypatch: pytest.MonkeyPatch, plant: Plant, broken: set[int]
) -> None:
    gate = gate_of(torch.bfloat16)
    assert gate == HALF
    assert all(verdict.holds for verdict in half_bench.compare(half_bench.unplanted).verdicts(gate))
    plant(monkeypatch)
    verdicts = half_bench.planted().verdicts(gate)
    found = {index for index, verdict in enumerate(verdicts) if not verdict.holds}
    assert found >= broken, verdicts


def test_positions_that_go_on_over_documents_are_no_fault_since_rotary_attention_is_relative(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_positions(monkeypatch, lambda positions: torch.arange(positions.shape[1]).expand_as(positions))
    assert all(verdict.holds for verdict in bench.planted().verdicts(gate_of(torch.float32)))


def test_a_flipped_gradient_of_one_adapter_kind_is_named(bench: Bench) -> None:
    flipped = [
        replace(m, gradients={n: -g if "k_proj.lora_A" in n else g for n, g in m.gradients.items()})
        for m in bench.unplanted
    ]
    comparison = bench.compare(flipped)
    wrong = [(a.kind, a.matrix) for a in comparison.adapters if a.least_cosine < 0.9999]
    assert wrong == [("k", "A")]
    [row] = [a for a in comparison.adapters if (a.kind, a.matrix) == ("k", "A")]
    assert row.least_cosine == pytest.approx(-1, abs=1e-4) and row.modules == 2
    _, cosines, errors, _ = comparison.verdicts(gate_of(torch.float32))
    assert not cosines.holds and "k A -" in cosines.evidence and "q A" not in cosines.evidence
    assert not errors.holds


def test_both_sides_have_the_same_adapters_and_every_gradient_has_a_direction(bench: Bench) -> None:
    for measured in (*bench.unplanted, *bench.eager, *bench.true):
        assert measured.gradients.keys() == bench.adapters.keys()
        assert all(float(gradient.norm()) > 1e-5 for gradient in measured.gradients.values())
    assert bench.eager[0].loss != bench.eager[1].loss


def test_a_batch_without_targets_counts_as_alike(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def blank(micro: MicroBatch) -> MicroBatch:
        return replace(micro, labels=torch.full_like(micro.labels, IGNORE), supervised_tokens=0)

    batch = replace(
        bench.batches[0], micro_batches=tuple(map(blank, bench.batches[0].micro_batches)), supervised_tokens=0
    )
    monkeypatch.setattr(bench, "batches", [batch])
    worker, _ = bench.compiled()
    compiled, [stock] = measure_compiled(worker, [batch]), bench.stock(reference=False)
    release(worker)
    comparison = Comparison()
    comparison.add(*compiled, stock, stock, supervised_tokens=0)
    assert all(verdict.holds for verdict in comparison.verdicts(gate_of(torch.float32)))
    assert comparison.batches[0].gradient_error.compiled == 0


def test_a_reference_that_is_another_model_is_found_though_both_are_equally_far_from_it(bench: "Bench") -> None:
    compiled = bench.unplanted
    comparison = Comparison()
    for ours, stock in zip(compiled, bench.eager, strict=True):
        other = Measured(stock.loss, {name: gradient / 65_536 for name, gradient in stock.gradients.items()})
        comparison.add(ours, stock, other, supervised_tokens=1)
    found = {verdict.claim: verdict.holds for verdict in comparison.verdicts(gate_of(torch.float32))}
    assert found["the fp32 reference is eager's model"] is False
    assert found["gradient error against fp32 is eager's"] is True


def scattered(*, bias: float, seed: int) -> bool:
    """Whether the mean loss error of 16 batches passes in half precision: eager's errors are noise, ours are as large
    plus `bias` times the noise."""
    random, comparison, noise = np.random.default_rng(seed), Comparison(), 1e-4
    gradients = {"model.layers.0.q_proj.lora_A.weight": torch.ones(1)}
    for _ in range(16):
        losses = 1 + noise * (random.normal() + bias), 1 + noise * random.normal(), 1.0
        comparison.add(*(Measured(loss, gradients) for loss in losses), supervised_tokens=1)
    return comparison.verdicts(HALF)[-1].holds


def test_the_mean_loss_error_is_judged_beyond_its_scatter() -> None:
    assert sum(scattered(bias=0, seed=seed) for seed in range(200)) > 190  # a plain ratio of the means fails 62 of them
    assert sum(scattered(bias=3, seed=seed) for seed in range(200)) < 10

"""A fault planted anywhere in the compiled path closes the gate. The stock models are measured once per dtype."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
from launcher.records.run import Verdict
from launcher.train import planned
from launcher.train.request import Request
from launcher.train.setup import Clock, Prepared, Worker, prepare
from tests.conftest import request_for

pytestmark = pytest.mark.usefixtures("clean_dynamo")
BATCHES = 2
LOSS, COSINE, ERROR = range(3)  # places of the verdicts; ERROR is the gradient error against fp32
Plant = Callable[[pytest.MonkeyPatch], None]


class Models:
    """The three models on the same batches; the stock ones and the compiled one without a fault are measured once."""

    def __init__(self, recipe: Recipe) -> None:
        self.request: Request = request_for(recipe)
        self.gate = gate_of(getattr(torch, recipe.model.dtype))
        self.prepared: Prepared = prepare(self.request)
        worker, self.batches = self.worker()
        self.adapters = perturb(worker.built.peft, seed=0)
        self.faultless = measure_compiled(worker, self.batches)
        release(worker)
        self.eager, self.reference = (self.stock(self.batches, reference=reference) for reference in (False, True))

    def worker(self) -> tuple[Worker, list[StepBatch]]:
        worker = compiled_worker(self.request, self.prepared, clock=Clock())
        return worker, [next(worker.batches) for _ in range(BATCHES)]

    def stock(self, batches: list[StepBatch], *, reference: bool) -> list[Measured]:
        dtype, adapters = getattr(torch, self.request.recipe.model.dtype), self.adapters
        stock = measure_stock(self.request, self.prepared, batches, dtype=dtype, adapters=adapters, reference=reference)
        return list(stock)

    def verdicts(self) -> tuple[Verdict, ...]:
        """On the compiled path as it is now."""
        worker, batches = self.worker()
        perturb(worker.built.peft, seed=0)
        measured = measure_compiled(worker, batches)
        release(worker)
        return self.compare(measured).verdicts(self.gate)

    def compare(self, compiled: list[Measured]) -> Comparison:
        comparison = Comparison()
        for batch, *measured in zip(self.batches, compiled, self.eager, self.reference, strict=True):
            comparison.add(*measured, supervised_tokens=batch.supervised_tokens)
        return comparison


@pytest.fixture(scope="module")
def models_in(small_model: Path, rows_file: Path) -> Callable[[str], Models]:
    """The models by dtype, on blocks of 192 tokens that hold several documents, with loss chunks of 32 tokens."""

    @functools.cache
    def measured(dtype: str) -> Models:
        sections: dict[str, Any] = {
            "model": {"name": str(small_model), "dtype": dtype},
            "lora": {"r": 4},
            "data": {"sources": [{"path": str(rows_file)}], "max_length": 192, "validation": 0},
            "compile": {"backend": "aot_eager", "scope": "regions", "regions": ["loss"]},  # little to compile: quick
            "memory": {"loss_chunk_mib": 1},
            "train": {"steps": 1, "micro_batch": 2},
            "proof": {"parity": BATCHES},
        }
        models = Models(Recipe.model_validate(sections))
        for batch in models.batches:
            [micro] = batch.micro_batches
            assert len(supervised_documents(micro)) > 2 * len(micro.input_ids)
        return models

    return measured


@pytest.fixture
def models(models_in: Callable[[str], Models]) -> Models:
    return models_in("float32")


def plant_in_loss(patch: pytest.MonkeyPatch, factor: Callable[[Tensor], Tensor | float]) -> None:
    """Multiply the gradient of every loss chunk by `factor` of its labels."""

    def planted(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = chunk_loss_and_grad(hidden, weight, labels)
        return loss, grad * factor(labels)

    patch.setattr(planned, "chunk_loss_and_grad", planted)


def wrong_chunk(patch: pytest.MonkeyPatch) -> None:
    plant_in_loss(patch, lambda labels: 1.0 + 0.5 * (labels[0] % 2))


def wrong_length(patch: pytest.MonkeyPatch) -> None:
    """Every gradient has the right direction and is a hundredth too long: no cosine sees it."""
    plant_in_loss(patch, lambda labels: 1.01)


def wrong_scaling(patch: pytest.MonkeyPatch) -> None:
    def planted(x: Tensor, base: Any, a: Tensor, b: Tensor, *, scaling: float, dropout: float) -> Tensor:
        return qlora_linear(x, base, a, b, scaling=scaling * 1.1, dropout=dropout)

    patch.setattr(lora, "qlora_linear", planted)


def documents_see_each_other(patch: pytest.MonkeyPatch) -> None:
    mask = packed.document_mask
    patch.setattr(packed, "document_mask", lambda documents: mask(torch.zeros_like(documents)))


def change_positions(patch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    stock = packed.PackedCausalLM.hidden_states

    def planted(self: Any, ids: Tensor, positions: Tensor, documents: Tensor, boundaries: Tensor) -> Tensor:
        return stock(self, ids, change(positions), documents, boundaries)

    patch.setattr(packed.PackedCausalLM, "hidden_states", planted)


def positions_restart_within_documents(patch: pytest.MonkeyPatch) -> None:
    change_positions(patch, lambda positions: positions % 5)


def wrong_gate_kernel(patch: pytest.MonkeyPatch) -> None:
    """Gate's half of the gradient of gate and up is a twentieth too long."""
    plain = feed_forward.plain_swiglu_gradient

    def planted(pair: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        gradient, h = plain(pair, dh)
        gate, up = gradient.chunk(2, -1)
        return torch.cat([gate * 1.05, up], -1), h

    patch.setattr(feed_forward, "plain_swiglu_gradient", planted)


def wrong_rotary_kernel(patch: pytest.MonkeyPatch) -> None:
    """The backward pass rotates queries and keys forward."""
    plain = rotary.plain_rotary_gradient
    patch.setattr(rotary, "plain_rotary_gradient", lambda dq, dk, dv, cos, sin: plain(dq, dk, dv, cos, -sin))


def wrong_adapter_kernel(patch: pytest.MonkeyPatch) -> None:
    """The gradients of A are those of a B rounded to its signs."""
    plain = adapter_gradients.plain_gradients

    def planted(dy: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Any:
        return plain(dy, x, a, b.sign() * b.abs().mean(), scaling)

    patch.setattr(adapter_gradients, "plain_gradients", planted)


def wrong_weight_kernel(patch: pytest.MonkeyPatch) -> None:
    """Weights are dequantised a twentieth too small, in both passes."""
    plain = nf4.plain_merged_weight
    patch.setattr(nf4, "plain_merged_weight", lambda *args: plain(*args) * 0.95)


@pytest.mark.parametrize(
    ("dtype", "plant", "broken"),
    [
        ("float32", wrong_gate_kernel, {ERROR}),
        ("float32", wrong_rotary_kernel, {COSINE, ERROR}),
        ("float32", wrong_adapter_kernel, {COSINE, ERROR}),
        ("float32", wrong_weight_kernel, {LOSS, ERROR}),
        ("float32", wrong_chunk, {COSINE, ERROR}),
        ("float32", wrong_length, {ERROR}),
        ("float32", wrong_scaling, {LOSS, ERROR}),
        ("float32", documents_see_each_other, {LOSS, COSINE, ERROR}),
        ("float32", positions_restart_within_documents, {LOSS, COSINE, ERROR}),
        ("bfloat16", wrong_rotary_kernel, {COSINE, ERROR}),
        ("bfloat16", wrong_adapter_kernel, {COSINE, ERROR}),
        ("bfloat16", wrong_weight_kernel, {ERROR}),
        ("bfloat16", wrong_chunk, {COSINE, ERROR}),
        ("bfloat16", documents_see_each_other, {LOSS, COSINE, ERROR}),
    ],
)
def test_a_planted_fault_closes_the_gate(
    models_in: Callable[[str], Models], monkeypatch: pytest.MonkeyPatch, dtype: str, plant: Plant, broken: set[int]
) -> None:
    models = models_in(dtype)
    assert all(verdict.holds for verdict in models.compare(models.faultless).verdicts(models.gate))
    plant(monkeypatch)
    verdicts = models.verdicts()
    assert {place for place, verdict in enumerate(verdicts) if not verdict.holds} >= broken, verdicts


def test_positions_that_go_on_over_documents_are_no_fault_since_rotary_attention_is_relative(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_positions(monkeypatch, lambda positions: torch.arange(positions.shape[1]).expand_as(positions))
    assert all(verdict.holds for verdict in models.verdicts())


def test_a_flipped_gradient_of_one_adapter_kind_is_named(models: Models) -> None:
    flipped = [
        replace(m, gradients={name: -g if "k_proj.lora_A" in name else g for name, g in m.gradients.items()})
        for m in models.faultless
    ]
    comparison = models.compare(flipped)
    [wrong] = [adapter for adapter in comparison.adapters if adapter.least_cosine < 0.9999]
    assert (wrong.kind, wrong.matrix, wrong.modules) == ("k", "A", 2)
    assert wrong.least_cosine == pytest.approx(-1, abs=1e-4)
    verdicts = comparison.verdicts(models.gate)
    assert not verdicts[COSINE].holds and not verdicts[ERROR].holds
    assert "k A -" in verdicts[COSINE].evidence and "q A" not in verdicts[COSINE].evidence


def test_all_models_have_the_same_adapters_and_every_gradient_has_a_direction(models: Models) -> None:
    for measured in (*models.faultless, *models.eager, *models.reference):
        assert measured.gradients.keys() == models.adapters.keys()
        assert all(float(gradient.norm()) > 1e-5 for gradient in measured.gradients.values())
    assert models.eager[0].loss != models.eager[1].loss


def test_a_batch_without_targets_passes(models: Models) -> None:
    def without_targets(micro: MicroBatch) -> MicroBatch:
        return replace(micro, labels=torch.full_like(micro.labels, IGNORE), supervised_tokens=0)

    worker, [batch, _] = models.worker()
    batch = replace(batch, micro_batches=tuple(map(without_targets, batch.micro_batches)), supervised_tokens=0)
    [compiled], [stock] = measure_compiled(worker, [batch]), models.stock([batch], reference=False)
    release(worker)
    comparison = Comparison()
    comparison.add(compiled, stock, stock, supervised_tokens=0)
    assert all(verdict.holds for verdict in comparison.verdicts(models.gate))
    assert comparison.batches[0].gradient_error.compiled == 0


def test_a_reference_that_is_another_model_is_refused_though_both_sides_are_equally_far_from_it(models: Models) -> None:
    comparison = Comparison()
    for compiled, eager in zip(models.faultless, models.eager, strict=True):
        other = Measured(eager.loss, {name: gradient / 65_536 for name, gradient in eager.gradients.items()})
        comparison.add(compiled, eager, other, supervised_tokens=1)
    holds = {verdict.claim: verdict.holds for verdict in comparison.verdicts(models.gate)}
    assert holds["the fp32 reference is eager's model"] is False
    assert holds["gradient error against fp32 is eager's"] is True


def mean_loss_error_passes(*, bias: float, seed: int) -> bool:
    """The verdict in half precision on 16 batches with noise for errors; `bias`: how much more of it compiled has."""
    random, comparison, noise = np.random.default_rng(seed), Comparison(), 1e-4
    gradients = {"model.layers.0.q_proj.lora_A.weight": torch.ones(1)}
    for _ in range(16):
        losses = 1 + noise * (random.normal() + bias), 1 + noise * random.normal(), 1.0
        comparison.add(*(Measured(loss, gradients) for loss in losses), supervised_tokens=1)
    return comparison.verdicts(HALF)[-1].holds


def test_the_mean_loss_error_is_judged_beyond_its_scatter() -> None:
    passes = [sum(mean_loss_error_passes(bias=bias, seed=seed) for seed in range(200)) for bias in (0, 3)]
    assert passes[0] > 190 and passes[1] < 10  # a plain ratio of the means would fail 62 of the first

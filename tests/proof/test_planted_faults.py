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
from launcher.proof.gate import HALF, Comparison, Measured, gate_of
from launcher.proof.parity import compiled_worker, measure_compiled, measure_stock, perturb, release
from launcher.proof.stock import supervised_documents
from launcher.recipe.schema import Recipe
from launcher.records.run import Verdict
from launcher.runtime.clock import Clock
from launcher.train import compiled_regions
from launcher.train.inputs import Prepared, prepare_inputs
from launcher.train.request import Request
from launcher.train.setup import Worker
from tests.conftest import request_for

pytestmark = pytest.mark.usefixtures("clean_dynamo")
BATCHES = 2
LOSS, COSINE, ERROR, _, LENGTH = range(5)  # places of the verdicts; ERROR and LENGTH are against fp32
Fault = tuple[Any, str, Callable[[Any], Any]]  # the owner of a function, its name, and what makes it wrong


class Models:
    """The three models on the same batches; the stock ones and the compiled one without a fault are measured once."""

    def __init__(self, recipe: Recipe) -> None:
        self.request: Request = request_for(recipe)
        self.gate = gate_of(getattr(torch, recipe.model.dtype))
        self.prepared: Prepared = prepare_inputs(self.request)
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
        assert all(verdict.holds for verdict in models.compare(models.faultless).verdicts(models.gate))
        return models

    return measured


@pytest.fixture
def models(models_in: Callable[[str], Models]) -> Models:
    return models_in("float32")


def plant(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    owner, name, wrong = fault
    patch.setattr(owner, name, wrong(getattr(owner, name)))


def scaled_loss_gradient(factor: Callable[[Tensor], Any]) -> Fault:
    """Multiply the gradient of every loss chunk by `factor` of its labels."""

    def planted(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, grad = chunk_loss_and_grad(hidden, weight, labels)
        return loss, grad * factor(labels)

    def wrong(right: Any) -> Any:
        return lambda cap: replace(right(cap), loss_and_grad=planted)

    return compiled_regions, "chunk_functions", wrong


def changed_positions(change: Callable[[Tensor], Tensor]) -> Fault:
    def wrong(right: Any) -> Any:
        return lambda self, ids, positions, *rest: right(self, ids, change(positions), *rest)

    return packed.PackedCausalLM, "hidden_states", wrong


def larger_scaling(right: Any) -> Any:
    return lambda *args, scaling, **rest: right(*args, scaling=scaling * 1.1, **rest)


def every_document_the_first(right: Any) -> Any:
    return lambda documents: right(torch.zeros_like(documents))


def longer_gate_gradient(right: Any) -> Any:
    def planted(pair: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        gradient, h = right(pair, dh)
        gate, up = gradient.chunk(2, -1)
        return torch.cat([gate * 1.05, up], -1), h

    return planted


def rotated_forward(right: Any) -> Any:
    return lambda dq, dk, dv, cos, sin: right(dq, dk, dv, cos, -sin)


def b_rounded_to_signs(right: Any) -> Any:
    return lambda dy, x, a, b, scaling: right(dy, x, a, b.sign() * b.abs().mean(), scaling)


def smaller_weight(right: Any) -> Any:
    return lambda *args: right(*args) * 0.95


@pytest.mark.parametrize(
    ("fault", "broken", "broken_in_half"),
    [
        (scaled_loss_gradient(lambda labels: 1.0 + 0.5 * (labels[0] % 2)), {COSINE, ERROR}, {COSINE, ERROR}),
        (scaled_loss_gradient(lambda labels: 1.02), {ERROR, LENGTH}, {LENGTH}),  # no cosine sees it
        (scaled_loss_gradient(lambda labels: 0.98), {ERROR, LENGTH}, {LENGTH}),
        ((lora, "qlora_linear", larger_scaling), {LOSS, ERROR}, set()),
        ((packed, "document_mask", every_document_the_first), {LOSS, COSINE, ERROR}, {LOSS, COSINE, ERROR}),
        (changed_positions(lambda positions: positions % 5), {LOSS, COSINE, ERROR}, set()),
        ((feed_forward, "plain_swiglu_gradient", longer_gate_gradient), {ERROR, LENGTH}, {LENGTH}),
        ((rotary, "plain_rotary_gradient", rotated_forward), {COSINE, ERROR}, {COSINE, ERROR}),
        ((adapter_gradients, "plain_gradients", b_rounded_to_signs), {COSINE, ERROR}, {COSINE, ERROR}),
        ((nf4, "plain_merged_weight", smaller_weight), {LOSS, ERROR}, {ERROR}),
    ],
    ids=[
        "loss-chunk", "longer", "shorter", "scaling", "documents", "positions", "gate-kernel", "rotary-kernel",
        "adapter-kernel", "weight-kernel",
    ],
)  # fmt: skip
def test_a_planted_fault_closes_the_gate(
    models_in: Callable[[str], Models],
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
    broken: set[int],
    broken_in_half: set[int],
) -> None:
    """`broken`: the verdicts that must not hold, which without a fault do. Empty: half precision may hide it."""
    cases = [(models_in("float32"), broken)]
    cases += [(models_in(dtype), broken_in_half) for dtype in ("bfloat16", "float16")]
    plant(monkeypatch, fault)
    for models, expected in cases:
        verdicts = models.verdicts() if expected else ()
        assert {place for place, verdict in enumerate(verdicts) if not verdict.holds} >= expected, verdicts


def test_positions_that_go_on_over_documents_are_no_fault_since_rotary_attention_is_relative(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, changed_positions(lambda positions: torch.arange(positions.shape[1]).expand_as(positions)))
    assert all(verdict.holds for verdict in models.verdicts())


def test_a_flipped_gradient_of_one_adapter_kind_is_named(models: Models) -> None:
    flipped = [
        replace(m, gradients={name: -g if "k_proj.lora_A" in name else g for name, g in m.gradients.items()})
        for m in models.faultless
    ]
    comparison = models.compare(flipped)
    [wrong] = [adapter for adapter in comparison.adapters(models.gate) if adapter.least_cosine < 0.9999]
    assert (wrong.kind, wrong.matrix, wrong.modules) == ("k", "A", 2)
    assert wrong.least_cosine == pytest.approx(-1, abs=1e-4)
    verdicts = comparison.verdicts(models.gate)
    assert not verdicts[COSINE].holds and not verdicts[ERROR].holds
    assert "k A -" in verdicts[COSINE].evidence and "q A" not in verdicts[COSINE].evidence


KINDS = [f"{kind}_proj.lora_{m}" for kind in ("q", "k", "v", "o", "gate", "up", "down") for m in "AB"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("where", "factors"), [("layers.1.", (1.1,)), *((kind, (1.1, 0.9)) for kind in KINDS)])
def test_gradients_of_one_kind_or_layer_that_are_a_tenth_too_long_or_short_are_named(
    models_in: Callable[[str], Models], dtype: str, where: str, factors: tuple[float, ...]
) -> None:
    models = models_in(dtype)
    named = "layer 1" if where == "layers.1." else where.replace("_proj.lora_", " ")
    for factor in factors:
        scaled = [
            replace(m, gradients={name: g * factor if where in name else g for name, g in m.gradients.items()})
            for m in models.faultless
        ]
        comparison = models.compare(scaled)
        verdict = comparison.verdicts(models.gate)[LENGTH]
        assert not verdict.holds and f"{named} " in verdict.evidence
        wrong = [each.of for each in comparison.lengths(models.gate) if not abs(each.compiled - 1) <= each.limit]
        assert named in wrong
        assert named == "layer 1" or not [kind for kind in wrong if kind[-1] in "AB" and kind != named]


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

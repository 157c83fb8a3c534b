"""Directions of gradients in half precision: who is judged by fp32, what passes and what is found, in synthetic noise.

Gradients of 16 layers, seven kinds and two batches; compiled and eager have independent errors of known sizes."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from launcher.proof.gate import FULL, HALF, Comparison, Measured
from launcher.records.parity import Gate
from launcher.records.run import Verdict

LAYERS, BATCHES, SIZE = 16, 2, 1024
KINDS = [f"{kind}_proj.lora_{m}" for kind in ("q", "k", "v", "o", "gate", "up", "down") for m in "AB"]
EAGER, COMPILED = 0.11, 0.09  # radians; a deep model in bf16 on a GPU
Gradients = dict[str, Tensor]
Fault = Callable[[list[Gradients]], None]  # changes compiled gradients, batch by batch


def compared(*, compiled: float = COMPILED, eager: float = EAGER, fault: Fault = lambda batches: None) -> Comparison:
    """`compiled`, `eager`: the angles to fp32 of the two sides; that of a single matrix is up to a fifth larger."""
    generator, comparison = torch.Generator().manual_seed(0), Comparison()

    def noisy(r: Tensor, angle: float) -> Tensor:
        e = torch.randn(SIZE, generator=generator)
        scatter = 0.8 + 0.4 * float(torch.rand((), generator=generator))
        return r + scatter * math.tan(angle) * e * r.norm() / e.norm()

    names = [f"model.layers.{layer}.x.{kind}.weight" for layer in range(LAYERS) for kind in KINDS]
    exact = [{name: torch.randn(SIZE, generator=generator) for name in names} for _ in range(BATCHES)]
    ours, stock = ([{n: noisy(r, a) for n, r in batch.items()} for batch in exact] for a in (compiled, eager))
    fault(ours)
    for sides in zip(ours, stock, exact, strict=True):
        comparison.add(*(Measured(2.0, side) for side in sides), supervised_tokens=1)
    return comparison


def verdict(comparison: Comparison, gate: Gate = HALF) -> Verdict:
    return comparison.gradient_verdicts(gate)[0]


def turned(where: str, angle: float, *, batches: int = BATCHES) -> Fault:
    """Turn the gradients whose name contains `where` by this angle, in a direction of its own each."""

    def fault(measured: list[Gradients]) -> None:
        generator = torch.Generator().manual_seed(1)
        for gradients in measured[:batches]:
            for name in gradients:
                if where in name:
                    e = torch.randn(SIZE, generator=generator)
                    gradients[name] = gradients[name] + math.tan(angle) * e * gradients[name].norm() / e.norm()

    return fault


def test_right_gradients_that_no_path_could_bring_nearer_to_eagers_pass_by_fp32_and_it_is_said() -> None:
    comparison = compared()
    assert max(one.cosine for one in comparison.directions) < 0.995  # the gate alone would fail each of them
    found = verdict(comparison)
    assert (
        found.holds
        and "; 448 of 448 matrices are below it and about as near to fp32 as eager's, the worst " in found.evidence
    )
    assert all(v.holds for v in comparison.gradient_verdicts(HALF))
    assert all(adapter.holds for adapter in comparison.adapters(HALF))
    assert all(batch.holds for batch in comparison.judged_batches(HALF))


@pytest.mark.parametrize(
    ("where", "batches", "hidden", "found", "named"),
    [
        ("layers.5.x.q_proj.lora_A", 1, 0.10, 0.24, "q A "),
        ("x.k_proj.lora_B", BATCHES, 0.05, 0.11, "k B on the average"),
        ("layers.7.", BATCHES, 0.09, 0.16, "layer 7 on the average"),
        ("", BATCHES, 0.05, 0.11, "q A on the average"),
    ],
    ids=["matrix", "kind", "layer", "all"],
)
def test_a_turned_direction_is_found_from_an_angle_on(
    where: str, batches: int, hidden: float, found: float, named: str
) -> None:
    """With eager's own angle at 0.11: `found` is, `hidden` is not."""
    small, large = (compared(fault=turned(where, angle, batches=batches)) for angle in (hidden, found))
    assert verdict(small).holds
    assert not verdict(large).holds and f"least cosine {named}" in verdict(large).evidence
    if where.startswith("x."):
        assert [(a.kind, a.matrix) for a in large.adapters(HALF) if not a.holds] == [("k", "B")]
    if named == "q A ":
        assert [(a.kind, a.matrix) for a in large.adapters(HALF) if not a.holds] == [("q", "A")]
        assert [batch.holds for batch in large.judged_batches(HALF)] == [False, True]


def exchanged(measured: list[Gradients]) -> None:
    for gradients in measured:
        one, other = (f"model.layers.{layer}.x.v_proj.lora_A.weight" for layer in (3, 4))
        gradients[one], gradients[other] = gradients[other], gradients[one]


def without(measured: list[Gradients]) -> None:
    for gradients in measured:
        gradients["model.layers.3.x.v_proj.lora_A.weight"] = torch.zeros(SIZE)


@pytest.mark.parametrize("fault", [exchanged, without])
def test_a_wrong_layer_and_a_missing_gradient_are_found_under_the_noise(fault: Fault) -> None:
    found = verdict(compared(fault=fault))
    assert not found.holds and found.evidence.startswith("least cosine v A ") and "(layer 3, batch" in found.evidence


def test_where_eager_is_accurate_nothing_is_looser() -> None:
    """At an angle of 0.03 eager's error leaves no room: 0.1 is as wrong as it was."""
    accurate = {"compiled": 0.03, "eager": 0.03}
    assert verdict(compared(**accurate)).holds
    assert "as near to fp32" not in verdict(compared(**accurate)).evidence
    for where in ("layers.5.x.q_proj.lora_A", "x.k_proj.lora_B", "layers.7.", ""):
        assert not verdict(compared(**accurate, fault=turned(where, 0.1))).holds


def test_full_precision_is_not_judged_by_fp32() -> None:
    comparison = compared(compiled=0.01, eager=0.02)
    found = verdict(comparison, FULL)
    assert not found.holds and "as near to fp32" not in found.evidence
    assert not any(adapter.holds for adapter in comparison.adapters(FULL))


def test_eager_gradients_that_are_too_far_from_fp32_are_no_measure() -> None:
    found = verdict(compared(compiled=0.3, eager=0.4))
    assert not found.holds and "as near to fp32" not in found.evidence


def test_gradients_that_are_not_numbers_are_not_near() -> None:
    assert not verdict(
        compared(fault=lambda batches: batches[0]["model.layers.3.x.v_proj.lora_A.weight"].fill_(math.nan))
    ).holds

"""Rows without a target are left out of the head's product in captured steps too."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.compile.graphs import waits_are_errors
from launcher.data.loader import sample_batch
from launcher.data.pack.micro_batch import IGNORE
from launcher.ops.linear_ce import (
    ChunkFunctions,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from launcher.train import setup
from launcher.train.inputs import block_facts
from launcher.train.setup import Worker
from tests.support.certain_rows import check_certain_rows
from tests.support.tensors import relative_error
from tests.support.workers import built, documents, perturb

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]

MICRO_BATCH, WIDTH = 4, 256
Measured = tuple[list[float], list[float], list[Tensor]]


@pytest.fixture
def recipe_of(recipe_over: Callable[..., Any]) -> Callable[..., Any]:
    """Recipe factory: two micro batches a step, captured."""
    train = {"micro_batch": MICRO_BATCH, "accumulation": 2}
    return recipe_over({"data": {"max_length": WIDTH}, "compile": {"cuda_graphs": "on"}, "train": train})


def measured(worker: Worker) -> Measured:
    """Losses and gradients of six steps at the same perturbed weights, and losses without gradients."""
    worker.compile()
    assert worker.cuda_graphs == "on"
    perturb(worker)
    losses, evaluated, gradients = [], [], []
    for _ in range(6):
        batch = next(worker.batches)
        losses.append(float(worker.step.accumulate(batch)))
        gradients.append(torch.cat([p.grad.flatten() for p in worker.step.parameters if p.grad is not None]))
        evaluated += [float(worker.step.eval_loss(micro)) for micro in batch.micro_batches]
    worker.plan.check()
    worker.plan.release()
    return losses, evaluated, gradients


@pytest.mark.parametrize("batching", ["packed", "bucketed"])
def test_captured_steps_have_the_losses_and_gradients_of_the_whole_product(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    data = documents((40, 64))  # about half of their tokens are supervised
    worker = built(recipe_of(data={"batching": batching}), data, device="cuda")
    widths = block_facts(worker.prepared.data, micro_batch=MICRO_BATCH).widths
    assert widths == ((WIDTH,) if batching == "packed" else (64, 40))
    assert all(worker.built.packed.loss_rows(MICRO_BATCH * width) < 0.8 * MICRO_BATCH * width for width in widths)
    losses, evaluated, gradients = measured(worker)

    monkeypatch.setattr(setup, "block_facts", lambda *data, **how: replace(block_facts(*data, **how), targets={}))
    worker = built(recipe_of(data={"batching": batching}), data, device="cuda")
    assert all(worker.built.packed.loss_rows(MICRO_BATCH * width) == MICRO_BATCH * width for width in widths)
    whole_losses, whole_evaluated, whole_gradients = measured(worker)

    assert losses == pytest.approx(whole_losses, rel=1e-3) and len(set(losses)) == 6
    assert evaluated == pytest.approx(whole_evaluated, rel=1e-3)
    for ours, whole in zip(gradients, whole_gradients, strict=True):
        assert relative_error(ours, whole) < 2e-2
        assert ours is gradients[0] or relative_error(ours, gradients[0]) > 0.1


def test_a_captured_step_with_more_targets_than_the_bound_reaches_no_weight(
    recipe_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def uncounted(*blocks: Any, **how: Any) -> Any:
        return replace(sample_batch(*blocks, **how), supervised_tokens=0)

    monkeypatch.setattr(setup, "sample_batch", uncounted)
    worker = built(recipe_of())
    monkeypatch.setattr(worker.built.packed, "loss_rows", lambda tokens: 10)
    worker.compile()
    assert worker.cuda_graphs == "on"
    before = [parameter.detach().clone() for parameter in worker.step.parameters]
    for _ in range(3):
        batch = next(worker.batches)
        hidden_count = tuple(replace(micro, supervised_tokens=0) for micro in batch.micro_batches)
        assert worker.step(replace(batch, micro_batches=hidden_count)).loss_sum.isnan()
        assert worker.step.eval_loss(hidden_count[0]).isnan()
    assert all(torch.equal(a, b) for a, b in zip(before, worker.step.parameters, strict=True))
    with pytest.raises(AssertionError, match="targets where the data has at most 10"):
        worker.step(batch)
    worker.plan.release()


@pytest.mark.parametrize(("rows", "targets", "chunk"), [(4096, 2048, 512), (5000, 2425, 809), (333, 0, 40), (97, 9, 9)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_with_a_target_are_selected_and_scattered_back_without_waiting(
    rows: int, targets: int, chunk: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(rows, 64, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(1000, 64, device="cuda") / 8).to(dtype)
    labels = torch.full((rows,), IGNORE, device="cuda")
    labels[torch.randperm(rows, device="cuda")[:targets]] = torch.randint(1000, (targets,), device="cuda")
    max_targets = max(1, targets)
    loss_of = partial(linear_cross_entropy, hidden, weight, labels, chunk=chunk, functions=ChunkFunctions())
    loss_of(max_targets=max_targets)  # kernels compile
    with waits_are_errors():
        loss = loss_of(max_targets=max_targets)
        [gradient] = torch.autograd.grad(loss, hidden)
        broken = loss_of(max_targets=max_targets - 1)
    exact = hidden.detach().double().requires_grad_()
    true = linear_cross_entropy_reference(exact, weight.double(), labels)
    [true_gradient] = torch.autograd.grad(true, exact)
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-3}[dtype]
    assert loss.item() == pytest.approx(true.item(), rel=tolerance, abs=1e-6)
    assert float((gradient - true_gradient).norm()) <= tolerance * float(true_gradient.norm())
    assert not gradient[labels == IGNORE].any()
    assert broken.isnan() == (targets > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_row_whose_target_is_nearly_certain_keeps_the_gradient_of_the_other_logits(dtype: torch.dtype) -> None:
    check_certain_rows("cuda", dtype)

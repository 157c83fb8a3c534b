"""Tokens trained beside LoRA on a GPU: captured steps, no wait for the device, gradients of the kernels, stock PEFT."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.data.pack.micro_batch import IGNORE
from launcher.ops.capped_ce import chunk_functions
from launcher.ops.linear_ce import TrainedRows, linear_cross_entropy
from launcher.ops.token_rows import POSITIONS_AT_ONCE, row_gradients, row_gradients_reference
from launcher.records.run import EvalRecord, RunRecord, StepRecord
from launcher.train.history import RunHistory
from launcher.train.loop import training
from tests.conftest import request_for, stock_loss
from tests.support.workers import compiled

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]
TOKENS = {"r": 4, "trainable_tokens": ["<|user|>", "<|end|>", "<|system|>"]}  # read, written, neither


@pytest.mark.parametrize(
    ("dtype", "scope", "optimizer"),
    [("bfloat16", "layer", "adamw"), ("float16", "model", "adamw"), ("bfloat16", "regions", "adamw_8bit")],
)
def test_captured_steps_have_the_losses_of_uncaptured_ones_and_stock_peft_the_last(
    recipe_of: Callable[..., Any], tmp_path: Path, dtype: str, scope: str, optimizer: str
) -> None:
    losses, evals = [], []
    for mode in ("on", "off"):
        history = RunHistory()
        recipe = recipe_of(
            model={"dtype": dtype},
            lora=TOKENS,
            compile={"cuda_graphs": mode, "scope": scope},
            train={"steps": 12, "lr": 5e-3, "accumulation": 2, "clip": 0.5, "log_every": 1, "optimizer": optimizer},
        )
        events = list(training(request_for(recipe), history))
        [record] = [event for event in events if isinstance(event, RunRecord)]
        assert all(verdict.holds for verdict in record.verdicts), record.verdicts
        assert record.ranks[0].compile.recompiles == record.ranks[0].compile.graph_breaks == 0
        losses.append([event.loss for event in events if isinstance(event, StepRecord)])
        evals.append([event.eval_loss for event in events if isinstance(event, EvalRecord)])
        if mode == "on":
            assert record.start.cuda_graphs.startswith("on")
            stock = stock_loss(history, tmp_path, dtype=dtype, device="cuda")
    assert losses[0] == pytest.approx(losses[1], rel=5e-3) and evals[0] == pytest.approx(evals[1], rel=5e-3)
    assert stock == pytest.approx(evals[0][-1], rel=2e-3) and evals[0][-1] < 0.99 * evals[0][0]


def test_a_step_moves_the_rows_and_never_waits_for_the_device(recipe_of: Callable[..., Any]) -> None:
    worker = compiled(recipe_of(lora=TOKENS, compile={"cuda_graphs": "off"}))
    trained = worker.built.packed.trained
    assert trained is not None
    before, others = trained.head_rows.detach().clone(), worker.built.packed.head.weight[100:200].clone()
    worker.step(next(worker.batches))
    batch = next(worker.batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        worker.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (trained.head_rows != before).any(1).all()
    worker.step.eval_loss(batch.micro_batches[0])  # writes the rows of the last update
    head = worker.built.packed.head.weight
    assert torch.equal(head[trained.ids], trained.head_rows.to(head.dtype)) and torch.equal(head[100:200], others)
    worker.plan.release()


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_of_the_head_get_the_gradient_of_fp64(dtype: torch.dtype, cap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1000, 64, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(1001, 64, device="cuda") / 8).to(dtype)
    labels = torch.randint(1001, (1000,), device="cuda")
    labels[::3] = IGNORE
    ids = torch.tensor([0, int(labels[1]), 1000], device="cuda")
    trained = TrainedRows(ids, weight[ids].float().requires_grad_())
    loss = linear_cross_entropy(hidden, weight, labels, chunk=96, functions=chunk_functions(cap), trained=trained)
    [found] = torch.autograd.grad(loss, trained.rows)
    exact = weight.double().requires_grad_()
    logits = hidden.detach().double() @ exact.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    plain = partial(torch.nn.functional.cross_entropy, reduction="sum", ignore_index=IGNORE)
    [expected] = torch.autograd.grad(plain(logits, labels), exact)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-3}[dtype]
    for row, true in zip(found, expected[ids], strict=True):
        assert true.norm() > 0.05 and float((row - true).norm()) < tolerance * float(true.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_the_embedding_get_the_sum_over_positions_the_same_each_time(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(2 * POSITIONS_AT_ONCE + 7, 96, device="cuda").to(dtype)
    slots = torch.randint(-1, 5, (len(gradient),), device="cuda", dtype=torch.int32)
    found = row_gradients(gradient, slots, 5)
    expected = row_gradients_reference(gradient.cpu(), slots.cpu(), 5)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-2)
    assert torch.equal(found, row_gradients(gradient, slots, 5))

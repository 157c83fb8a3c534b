"""On a CUDA device, with generated kernels: `pytest -m gpu`."""

import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.data.documents import Documents
from launcher.data.loader import TrainLoader
from launcher.data.pack.buckets import bucket
from launcher.ops.document_attention import (
    document_mask,
    masked_attention,
    packed_attention_reference,
    varlen_attention,
)
from launcher.proof.parity import parity
from launcher.records.run import RunRecord, StepRecord
from launcher.train.loop import Progress, run
from tests.conftest import TINY, request_for, stock_loss
from tests.model.test_packed_equals_unpacked import bench_on, both_gradients, losses
from tests.support.workers import ANY, THREE, built, compiled, documents

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_seqlen", [56, 64, 500])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (8, 1)])
def test_variable_length_attention_equals_the_plain_form_with_gradients(heads, kv, dtype, max_seqlen):
    generator = torch.Generator("cuda").manual_seed(0)
    documents = torch.zeros(2, 96, dtype=torch.int32, device="cuda")
    documents[0, 40:41], documents[0, 41:], documents[1, 56:] = 1, 2, 1
    boundaries = torch.tensor([0, 40, 41, 96, 152, 192, 192], dtype=torch.int32, device="cuda")
    shapes = [(2, heads, 96, 64), (2, kv, 96, 64), (2, kv, 96, 64)]
    inputs = [torch.randn(shape, generator=generator, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]
    results = []
    for form, where in (
        (varlen_attention, (boundaries, max_seqlen)),
        (masked_attention, document_mask(documents)),
        (packed_attention_reference, documents),
    ):
        for tensor in inputs:
            tensor.grad = None
        out = form(*inputs, where, 0.1)
        out.float().square().sum().backward()
        results.append([out, *(tensor.grad.clone() for tensor in inputs)])
    for ours in results[:2]:
        for mine, plain in zip(ours, results[2], strict=True):
            error = (mine.float() - plain.float()).norm() / plain.float().norm()
            assert error < 1e-2
            assert plain.float().norm() > 0.1


def test_the_sample_may_be_longer_than_any_document_of_the_run(make_recipe):
    ids, found = torch.arange(300, device="cuda")[None], []
    for attention in ("varlen", "sdpa"):
        recipe = make_recipe(
            model={"dtype": "bfloat16", "attention": attention}, data={"max_length": 512}, compile={"mode": "off"}
        )
        packed = compiled(recipe, documents((60, 100)), device="cuda").built.packed
        assert packed.max_seqlen == 128
        found.append(packed.next_logits(ids).float())
    assert (found[0] - found[1]).norm() < 2e-2 * found[1].norm()


def train(recipe):
    events = list(run(request_for(recipe), Progress()))
    return [e for e in events if isinstance(e, StepRecord)], next(e for e in events if isinstance(e, RunRecord))


@pytest.mark.parametrize("scope", ["layer", "regions", "model"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compiled_kernels_give_the_uncompiled_losses(make_recipe, tmp_path, dtype, scope):
    runs = []
    for mode in ("strict", "off"):
        recipe = make_recipe(
            model={"dtype": dtype},
            compile={"backend": "inductor", "mode": mode, "scope": scope},
            train={"steps": 6},
            run={"output_dir": str(tmp_path / mode)},
        )
        steps, record = train(recipe)
        assert all(v.holds for v in record.verdicts)
        runs.append([s.loss for s in steps])
    assert runs[0] == pytest.approx(runs[1], rel=2e-3)
    assert runs[0][0] != runs[0][-1]


@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
def test_forward_and_backward_never_wait_for_the_device(make_recipe, attention):
    recipe = make_recipe(model={"dtype": "bfloat16", "attention": attention}, compile={"backend": "inductor"})
    worker = compiled(recipe)
    batch = next(worker.batches)
    worker.step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        worker.step(batch)
        with pytest.raises(RuntimeError):  # the guard itself can fail
            worker.step(batch).loss_sum.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_every_optimizer_trains(make_recipe, optimizer):
    steps, record = train(make_recipe(train={"optimizer": optimizer, "steps": 8, "lr": 5e-3}))
    assert steps[-1].loss < steps[0].loss
    assert all(v.holds for v in record.verdicts)


def test_stock_peft_gives_the_trained_loss_in_bfloat16(make_recipe, tmp_path):
    progress = Progress()
    list(run(request_for(make_recipe(model={"dtype": "bfloat16"}, train={"steps": 8, "lr": 5e-3})), progress))
    stock = stock_loss(progress, tmp_path, dtype="bfloat16", device="cuda")
    assert stock == pytest.approx(progress.evals[-1].eval_loss, rel=1e-3)
    assert progress.evals[-1].eval_loss < 0.99 * progress.evals[0].eval_loss


def test_the_ledger_counts_what_the_card_holds(make_recipe, tmp_path: Path):
    _, record = train(make_recipe())
    phases = {v.phase: v for v in record.ranks[0].vram}
    assert 0 < phases["after load"].allocated_mib <= phases["after adapters"].allocated_mib
    assert record.ranks[0].vram_peak_mib >= phases["after training"].allocated_mib
    assert phases["after load"].total_mib > 1000


def test_packed_documents_have_in_bfloat16_the_losses_and_gradients_they_have_alone(small_model):
    with bench_on("cuda:0", model=small_model, dtype="bfloat16", backend="inductor") as bench:
        assert bench.packed.attention == "varlen"
        packed, alone = losses(bench)
        assert packed == pytest.approx(alone, rel=2e-3)
        for ours, theirs in zip(*both_gradients(bench), strict=True):
            assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.995
            assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-2)
        bench.plan.check()


@pytest.mark.parametrize(("batching", "lengths", "widths"), [("packed", ANY, 1), ("bucketed", THREE, 3)])
def test_a_hundred_batches_of_varied_boundaries_compile_no_kernel(make_recipe, batching, lengths, widths):
    recipe = make_recipe(
        model={"dtype": "bfloat16"}, data={"batching": batching}, compile={"backend": "inductor"}, train={"steps": 100}
    )
    worker = compiled(recipe, documents(lengths), device="cuda:0")
    boundaries = set()
    for _ in range(100):
        batch = next(worker.batches)
        worker.step(batch)
        boundaries.update(tuple(micro.cu_seqlens.tolist()) for micro in batch.micro_batches)
    worker.plan.check()
    record = worker.observer.record()
    worker.plan.release()
    assert (record.recompiles, record.compilations) == (0, 2 * widths + 2)
    assert len(boundaries) > (90 if batching == "packed" else 5)


def test_packed_text_trains_at_nine_tenths_of_the_rate_of_full_random_rows(make_recipe):
    recipe = make_recipe(
        model={"name": "unsloth/Llama-3.2-1B-Instruct", "init": "random", "dtype": "bfloat16"},
        lora={"r": 16},
        data={"sources": [{"path": str(TINY / "train.jsonl")}], "max_length": 2048, "validation": 0},
        compile={"backend": "inductor"},
        train={"steps": 50, "micro_batch": 2},
    )
    worker = compiled(recipe)
    train, rng = worker.prepared.data.train, np.random.default_rng(0)
    ids = rng.integers(0, 8192, 64 * 2048).astype(np.int32)
    # Half of the tokens are supervised, as in the chats: the loss has room for no more (block_facts of train/setup.py).
    documents = Documents(ids, rng.random(len(ids)) < 0.5, np.arange(65) * 2048)
    full = replace(bucket(documents, np.arange(64), widths=(2048,), pad_id=0), max_documents=train.max_documents)
    loaders = [worker.batches, TrainLoader(full, micro_batch=2, accumulation=1, rank=0, world_size=1, seed=0)]
    rates = [[], []]
    for _ in range(23):
        for loader, found in zip(loaders, rates, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            batch = next(loader)
            worker.step(batch)
            torch.cuda.synchronize()
            found.append(batch.tokens / (time.perf_counter() - start))
    worker.plan.check()
    worker.plan.release()
    packed, random = (statistics.median(found[3:]) for found in rates)
    print(f"packed text {packed:,.0f} tok/s, full random rows {random:,.0f} tok/s, fill {train.fill:.4f}")
    assert packed >= 0.9 * random
    assert train.max_documents > 20


@pytest.mark.parametrize(("dtype", "length", "micro_batch"), [("bfloat16", 2048, 2), ("float16", 1024, 1)])
def test_packed_chats_of_the_1b_shape_peak_at_the_forecast_compiling_included(make_recipe, dtype, length, micro_batch):
    recipe = make_recipe(
        model={"name": "unsloth/Llama-3.2-1B-Instruct", "init": "random", "dtype": dtype},
        lora={"r": 16},
        data={"sources": [{"path": str(TINY / "train.jsonl")}], "max_length": length, "validation": 0},
        compile={"backend": "inductor"},
        memory={"activations": "selective"},
        train={"steps": 10, "micro_batch": micro_batch},
    )
    worker = built(recipe)
    torch.cuda.reset_peak_memory_stats()
    worker.compile()
    for _ in range(3):
        worker.step(next(worker.batches))
    torch.cuda.synchronize()
    peak, forecast = torch.cuda.max_memory_allocated() / 2**20, worker.policy.forecast_mib
    print(f"{dtype} {micro_batch} x {length}: peak {peak:,.0f} MiB, forecast {forecast:,.0f}")
    assert worker.built.packed.loss_rows(micro_batch * length) < 0.9 * micro_batch * length
    assert worker.built.packed.loss_chunk % 8 == 0
    assert 0.85 * forecast < peak < 1.03 * forecast


@pytest.mark.parametrize("scope", ["layer", "regions", "model"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_1b_shape_computes_what_stock_code_computes(make_recipe, dtype, scope):
    recipe = make_recipe(
        model={"name": "unsloth/Llama-3.2-1B-Instruct", "init": "random", "dtype": dtype},
        lora={"r": 16},
        data={"sources": [{"path": str(TINY / "train.jsonl")}], "max_length": 1024, "validation": 0},
        compile={"backend": "inductor", "scope": scope},
        train={"steps": 1, "micro_batch": 2},
        proof={"parity": 16},
    )
    *_, record = parity(request_for(recipe))
    print(dtype, scope, record.loss_error, record.gradient_error, min(a.least_cosine for a in record.adapters))
    assert record.holds, record.verdicts
    assert len(record.verdicts) == 5 and len(record.adapters) == 14

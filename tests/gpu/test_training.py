"""Training with generated kernels: the same losses, no wait, no compilation, every optimizer, stock PEFT's loss."""

import gc

import pytest
import torch

from launcher.records.run import RunRecord, StepRecord
from launcher.train import finish
from launcher.train.history import RunHistory
from launcher.train.loop import training
from launcher.train.optim import LIBRARIES
from tests.conftest import request_for, stock_loss
from tests.support.packed_and_alone import packed_and_alone
from tests.support.workers import ANY, TWO, compiled, documents

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]


def train(recipe):
    history = RunHistory()
    events = list(training(request_for(recipe), history))
    record = next(event for event in events if isinstance(event, RunRecord))
    return history, [event for event in events if isinstance(event, StepRecord)], record


@pytest.mark.parametrize(
    ("dtype", "scope", "lora"),
    [
        ("bfloat16", "layer", {}),
        ("float16", "regions", {}),
        ("bfloat16", "model", {}),
        ("float16", "layer", {}),
        ("bfloat16", "layer", {"dora": True, "rslora": True}),
        ("float16", "model", {"dora": True}),
    ],
)
def test_compiled_kernels_give_the_uncompiled_losses(recipe_of, dtype, scope, lora):
    losses = []
    for mode in ("strict", "off"):
        recipe = recipe_of(
            model={"dtype": dtype}, lora=lora, compile={"mode": mode, "scope": scope}, train={"steps": 6}
        )
        _, steps, record = train(recipe)
        assert all(verdict.holds for verdict in record.verdicts)
        losses.append([step.loss for step in steps])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert losses[0][0] != losses[0][-1]


@pytest.mark.parametrize("attention", ["varlen", "sdpa"])
def test_forward_and_backward_never_wait_for_the_device(recipe_of, attention):
    worker = compiled(recipe_of(model={"attention": attention}))
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


@pytest.mark.parametrize("optimizer", LIBRARIES)
def test_every_optimizer_trains_and_the_ledger_counts_what_the_card_holds(recipe_of, optimizer):
    gc.collect()  # what the test before left would be freed in between
    schedule = "constant" if optimizer == "schedule_free_adamw" else "cosine"
    train_section = {"optimizer": optimizer, "steps": 8, "schedule": schedule}
    train_section["lr"] = 5e-4 if "lion" in optimizer else 5e-3
    _, steps, record = train(recipe_of(compile={"backend": "aot_eager"}, train=train_section))
    assert steps[-1].loss < steps[0].loss
    assert all(verdict.holds for verdict in record.verdicts)
    phases = {phase.phase: phase for phase in record.ranks[0].vram}
    assert 0 < phases["after load"].allocated_mib <= phases["after adapters"].allocated_mib
    assert record.ranks[0].vram_peak_mib >= phases["after training"].allocated_mib
    assert phases["after load"].total_mib > 1000


@pytest.mark.parametrize("init", ["default", "pissa", "olora"])
def test_stock_peft_gives_the_trained_loss_in_bfloat16(recipe_of, tmp_path, init):
    history, *_ = train(
        recipe_of(lora={"init": init}, compile={"backend": "aot_eager"}, train={"steps": 8, "lr": 5e-3})
    )
    stock = stock_loss(history, tmp_path, dtype="bfloat16", device="cuda")
    assert stock == pytest.approx(history.evals[-1].eval_loss, rel=1e-3)
    assert history.evals[-1].eval_loss < 0.99 * history.evals[0].eval_loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_start_from_the_bases_weights_is_the_base_bit_for_bit_in_captured_steps(recipe_of, dtype):
    first, last = [], []
    for init in ("default", "pissa", "olora"):
        sections = {"lora": {"init": init}, "model": {"dtype": dtype}}
        history, _, record = train(recipe_of(**sections, compile={"cuda_graphs": "on"}, train={"steps": 4}))
        assert all(verdict.holds for verdict in record.verdicts)
        first.append(history.evals[0].eval_loss)
        last.append(history.evals[-1].eval_loss)
    assert len({*first}) == 1 and len({*last}) == 3


@pytest.mark.parametrize("init", ["loftq", "eva"])
def test_a_start_that_is_computed_trains_captured_and_stock_peft_gives_its_loss(recipe_of, tmp_path, init):
    recipe = recipe_of(lora={"init": init}, compile={"cuda_graphs": "on"}, train={"steps": 8, "lr": 5e-3})
    history, steps, record = train(recipe)
    assert all(verdict.holds for verdict in record.verdicts) and steps[-1].loss < steps[0].loss
    assert ("start is nearer to the base's files" in [v.claim for v in record.verdicts]) == (init == "loftq")
    stock = stock_loss(history, tmp_path, dtype="bfloat16", device="cuda")
    assert stock == pytest.approx(history.evals[-1].eval_loss, rel=1e-3)


def test_an_earlier_adapter_is_given_back_to_the_captured_graphs_after_samples_on_the_way(recipe_of, monkeypatch):
    monkeypatch.setattr(finish, "best_bundle", lambda checkpoints, eval_losses: checkpoints / "step-4")
    train_section = {"steps": 12, "lr": 5e-3, "eval_every": 4, "save_every": 4, "keep": 3, "keep_best": True}
    recipe = recipe_of(compile={"cuda_graphs": "on"}, train=train_section, run={"eval_samples": 2})
    history, _, record = train(recipe)
    [verdict] = [verdict for verdict in record.verdicts if verdict.claim == "the adapter is the best checkpoint's"]
    assert "after step 4 of 12" in verdict.evidence and all(verdict.holds for verdict in record.verdicts)
    assert history.eval_losses[4] > history.eval_losses[12]


def test_packed_documents_have_in_bfloat16_the_losses_and_gradients_they_have_alone(small_model):
    with packed_and_alone("cuda:0", model=small_model, dtype="bfloat16", backend="inductor") as pair:
        assert pair.packed.attention == "varlen"
        packed, alone = pair.losses()
        assert packed == pytest.approx(alone, rel=2e-3)
        for ours, theirs in zip(*pair.gradients(), strict=True):
            assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.995
            assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-2)
        pair.plan.check()


@pytest.mark.parametrize(("batching", "lengths", "widths"), [("packed", ANY, 1), ("bucketed", TWO, 2)])
def test_a_hundred_batches_of_varied_boundaries_compile_no_kernel(recipe_of, batching, lengths, widths):
    recipe = recipe_of(data={"batching": batching}, train={"steps": 100})
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
    assert len(boundaries) > (90 if batching == "packed" else 3)

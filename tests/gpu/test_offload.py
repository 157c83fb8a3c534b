"""The layers' inputs wait in host memory, copied on a stream of their own, captured or not."""

from contextlib import nullcontext
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.compile import graphs
from launcher.memory.ledger import MIB
from launcher.proof.parity import free, release
from tests.conftest import TINY, small_config
from tests.support.workers import TWO, built, compiled, documents, perturb

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]
LAYERS, ROWS, LENGTH, WIDTH = 10, 8, 2048, 512
INPUT_MIB = ROWS * LENGTH * WIDTH * 2 / MIB  # 16


@pytest.fixture(scope="module")
def wide_rows(tmp_path_factory):
    """A model folder whose layers' inputs are large beside everything else that a step keeps."""
    folder = tmp_path_factory.mktemp("wide-rows")
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": LENGTH}
    config = small_config(num_hidden_layers=LAYERS, hidden_size=WIDTH, intermediate_size=1024, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "base").save_pretrained(folder)
    return folder


@pytest.fixture
def recipe_of(recipe_over, wide_rows):
    """Recipe factory: captured, two micro batches a step of the shipped set."""
    sections = {
        "model": {"name": str(wide_rows)},
        "data": {"sources": [{"path": str(TINY / "train.jsonl")}], "max_length": LENGTH, "validation": 0.01},
        "memory": {"loss_chunk_mib": 32},
        "compile": {"cuda_graphs": "on"},
        "train": {"steps": 20, "micro_batch": ROWS, "accumulation": 2},
    }
    return recipe_over(sections)


def measured(recipe, data=None):
    """What a worker of `recipe` does: its peak, MiB over what was held before; the losses of twenty steps and of
    evaluations; the gradients of one batch, ten times over; its host buffers. The worker is gone afterwards."""
    free(torch.device("cuda"))
    torch._C._cuda_clearCublasWorkspaces()  # 32 MiB each: the first of two runs would pay for both
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    worker = compiled(recipe, data, device="cuda")
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    perturb(worker)
    batch, gradients = next(worker.batches), []
    for _ in range(10):
        worker.step.accumulate(batch)
        gradients.append([parameter.grad.cpu() for parameter in worker.step.parameters])
    losses = [float(worker.step(next(worker.batches)).loss_sum) for _ in range(20)]
    losses += [float(worker.step.eval_loss(micro)) for micro in islice(worker.eval_batches, 3)]
    worker.plan.check()
    buffers = worker.host_inputs.buffers if worker.host_inputs else {}
    result = SimpleNamespace(
        peak=peak, losses=losses, gradients=gradients, graphs=worker.cuda_graphs, compiled=worker.observer.record(),
        pinned={key: buffer.is_pinned() for key, buffer in buffers.items()},
    )  # fmt: skip
    release(worker)
    return result


def assert_close(gradients, theirs):
    """The same kernels made both, but for the order of sums that are added in memory."""
    for number, (ours, other) in enumerate(zip(gradients, theirs, strict=True)):
        assert other.norm() > 0
        assert (ours - other).norm() < 1e-2 * other.norm(), number


@pytest.mark.parametrize("captured", ["on", "off"])
def test_twenty_steps_have_the_losses_and_gradients_of_full_at_a_lower_peak(recipe_of, captured):
    full, offload = (
        measured(recipe_of(memory={"activations": activations}, compile={"cuda_graphs": captured}))
        for activations in ("full", "offload")
    )
    print(f"peak {full.peak:,.0f} MiB with full, {offload.peak:,.0f} with offload; an input has {INPUT_MIB:.0f}")
    for result in (full, offload):
        assert result.graphs == ("on" if captured == "on" else "off (as asked)")
        assert (result.compiled.recompiles, result.compiled.graph_breaks) == (0, 0)
        assert result.compiled.graphs_by_region == {"layer": 2, "loss": 2}
    assert offload.losses[0] == pytest.approx(full.losses[0], rel=1e-5)
    assert offload.losses == pytest.approx(full.losses, rel=2e-3)
    assert len({round(loss, 2) for loss in offload.losses}) == len(offload.losses)
    for gradients in offload.gradients:
        assert_close(gradients, full.gradients[0])
    assert full.peak - offload.peak >= 0.5 * (LAYERS - 4) * INPUT_MIB
    assert list(offload.pinned.values()) == [True] * (LAYERS - 2) and not full.pinned


def test_several_widths_have_buffers_of_their_own_and_each_is_captured(recipe_of):
    full, offload = (
        measured(
            recipe_of(
                memory={"activations": activations},
                data={"batching": "bucketed", "max_length": 64},
                train={"lr": 1e-4},  # random tokens are memorised: the order of sums would show in later losses
            ),
            documents(TWO),
        )
        for activations in ("full", "offload")
    )
    assert full.graphs == offload.graphs == "on"
    assert {shape for _, shape in offload.pinned} == {(ROWS, width, WIDTH) for width in (8, 64)}
    assert len(offload.pinned) == 2 * (LAYERS - 2)
    assert offload.losses == pytest.approx(full.losses, rel=2e-3)
    for gradients in offload.gradients:
        assert_close(gradients, full.gradients[0])


def test_training_goes_on_with_offload_after_a_capture_that_failed_past_the_layers(recipe_of, monkeypatch):
    def ask(module, inputs, output):
        output.sum().item()

    monkeypatch.setattr(graphs, "waits_are_errors", nullcontext)
    worker = built(recipe_of(memory={"activations": "offload"}, compile={"cuda_graphs": "auto"}))
    worker.built.packed.body.norm.register_forward_hook(ask)
    worker.compile()
    assert worker.cuda_graphs.startswith("off (capture failed: "), worker.cuda_graphs
    batch = next(worker.batches)
    uncaptured = [float(worker.step.accumulate(batch)) for _ in range(2)]
    gradients = [parameter.grad.cpu() for parameter in worker.step.parameters[1::2]]  # of B: at first A's are zero
    release(worker)
    later = compiled(recipe_of(memory={"activations": "offload"}))  # the process can still capture
    assert later.cuda_graphs == "on"
    assert [float(later.step.accumulate(batch)) for _ in range(2)] == pytest.approx(uncaptured, rel=1e-4)
    assert_close([parameter.grad.cpu() for parameter in later.step.parameters[1::2]], gradients)
    release(later)

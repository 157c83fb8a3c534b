"""The layers' inputs on the host, with streams and captured: `pytest -m gpu tests/gpu/test_offload.py`."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.compile import graphs
from launcher.proof.parity import free, release
from tests.conftest import TINY, small_config
from tests.support.workers import built, compiled, perturb

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]
MIB = 2**20
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
def recipe_of(make_recipe, wide_rows):
    """Recipe factory: generated kernels, bf16, two micro batches a step of the shipped set."""

    def make(activations, captured="on", **data):
        return make_recipe(
            model={"name": str(wide_rows), "dtype": "bfloat16"},
            data={"sources": [{"path": str(TINY / "train.jsonl")}], "max_length": LENGTH, "validation": 0.01, **data},
            memory={"activations": activations, "loss_chunk_mib": 32},
            compile={"backend": "inductor", "cuda_graphs": captured},
            train={"steps": 20, "micro_batch": ROWS, "accumulation": 2, "lr": 1e-3},
        )

    return make


def measured(recipe):
    """What a worker of `recipe` does: its peak, MiB over what was held before; the losses of twenty steps and of
    evaluations; the gradients of one batch, ten times over; its host buffers. The worker is gone afterwards."""
    free(torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    worker = compiled(recipe)
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    perturb(worker)
    batch, gradients = next(worker.batches), []
    for _ in range(10):
        worker.step.accumulate(batch)
        gradients.append([parameter.grad.cpu() for parameter in worker.step.parameters])
    losses = [float(worker.step(next(worker.batches)).loss_sum) for _ in range(20)]
    losses += [float(worker.step.eval_loss(micro)) for micro in worker.eval_batches[:3]]
    worker.plan.check()
    host = worker.host_inputs._host if worker.host_inputs else {}
    buffers = {key: buffer.is_pinned() for key, buffer in host.items()}
    found = SimpleNamespace(
        peak=peak, losses=losses, gradients=gradients, buffers=buffers, graphs=worker.cuda_graphs,
        compiled=worker.observer.record(),
    )  # fmt: skip
    release(worker)
    return found


def assert_alike(gradients, theirs):
    """Of each adapter matrix. The same kernels made both, but for the order of sums that are added in memory."""
    for number, (ours, other) in enumerate(zip(gradients, theirs, strict=True)):
        assert other.norm() > 0
        assert (ours - other).norm() < 1e-2 * other.norm(), number


@pytest.mark.parametrize("captured", ["on", "off"])
def test_twenty_steps_have_the_losses_and_gradients_of_full_at_a_lower_peak(recipe_of, captured):
    full, offload = (measured(recipe_of(activations, captured)) for activations in ("full", "offload"))
    print(f"peak {full.peak:,.0f} MiB with full, {offload.peak:,.0f} with offload; an input has {INPUT_MIB:.0f}")
    for found in (full, offload):
        assert found.graphs == ("on" if captured == "on" else "off (as asked)")
        assert (found.compiled.recompiles, found.compiled.graph_breaks) == (0, 0)
        assert found.compiled.graphs_by_region == {"layer": 2, "loss": 2}
    assert offload.losses[0] == pytest.approx(full.losses[0], rel=1e-5)
    assert offload.losses == pytest.approx(full.losses, rel=2e-3)
    assert len({round(loss, 2) for loss in offload.losses}) == len(offload.losses)
    for each in offload.gradients:
        assert_alike(each, full.gradients[0])
    assert full.peak - offload.peak >= 0.5 * (LAYERS - 4) * INPUT_MIB
    assert list(offload.buffers.values()) == [True] * (LAYERS - 2) and not full.buffers


def test_several_widths_have_buffers_of_their_own_and_each_is_captured(recipe_of):
    full, offload = (measured(recipe_of(activations, batching="bucketed")) for activations in ("full", "offload"))
    assert full.graphs == offload.graphs == "on"
    widths = {shape for _, shape in offload.buffers}
    assert len(widths) > 1 and len(offload.buffers) == len(widths) * (LAYERS - 2)
    assert offload.losses == pytest.approx(full.losses, rel=2e-3)
    for each in offload.gradients:
        assert_alike(each, full.gradients[0])


def test_after_a_capture_that_failed_behind_the_layers_training_goes_on_with_offload(recipe_of, monkeypatch):
    def ask(module, inputs, output):
        output.sum().item()

    monkeypatch.setattr(graphs, "_waits_are_errors", nullcontext)
    worker = built(recipe_of("offload", "auto"))
    worker.built.packed.body.norm.register_forward_hook(ask)
    worker.compile()
    assert worker.cuda_graphs.startswith("off (capture failed: "), worker.cuda_graphs
    batch = next(worker.batches)
    uncaptured = [float(worker.step.accumulate(batch)) for _ in range(2)]
    gradients = [parameter.grad.cpu() for parameter in worker.step.parameters[1::2]]  # of B: at first A's are zero
    release(worker)
    later = compiled(recipe_of("offload"))  # the process can still capture
    assert later.cuda_graphs == "on"
    assert [float(later.step.accumulate(batch)) for _ in range(2)] == pytest.approx(uncaptured, rel=1e-4)
    assert_alike([parameter.grad.cpu() for parameter in later.step.parameters[1::2]], gradients)
    release(later)

"""The step replayed from CUDA graphs is the step: `pytest -m gpu tests/gpu/test_cuda_graphs.py`."""

from contextlib import nullcontext

import pytest
import torch

from launcher.compile import graphs
from launcher.errors import ContractError, NonFiniteError
from launcher.proof.parity import parity
from launcher.records.run import EvalRecord, RunRecord, StepRecord
from launcher.train.loop import Progress, run
from launcher.train.step import arguments
from tests.conftest import request_for
from tests.support.workers import built, compiled, perturb

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]


@pytest.fixture
def recipe_of(make_recipe, tmp_path):
    """Recipe factory: generated kernels, bf16, two micro batches a step, a clip that always acts; a folder each."""
    made = []

    def make(**sections):
        base = {
            "model": {"dtype": "bfloat16"},
            "compile": {"backend": "inductor", "cuda_graphs": "on"},
            "train": {"steps": 50, "accumulation": 2, "clip": 0.1, "log_every": 1},
        }
        made.append(1)
        merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
        return make_recipe(**{**merged, "run": {"output_dir": str(tmp_path / f"run-{len(made)}"), "sample_tokens": 0}})

    return make


def run_through(recipe):
    events = list(run(request_for(recipe), Progress()))
    found = {kind: [e for e in events if isinstance(e, kind)] for kind in (StepRecord, EvalRecord, RunRecord)}
    return found[StepRecord], found[EvalRecord], found[RunRecord][0]


@pytest.mark.parametrize(
    ("dtype", "batching", "scope"),
    [
        ("bfloat16", "packed", "layer"),
        ("float16", "packed", "layer"),
        ("float32", "packed", "layer"),
        ("bfloat16", "bucketed", "layer"),
        ("bfloat16", "packed", "regions"),
        ("bfloat16", "packed", "model"),
    ],
)
def test_fifty_captured_steps_have_the_losses_of_uncaptured_ones(recipe_of, dtype, batching, scope):
    runs = []
    for mode in ("on", "off"):
        recipe = recipe_of(
            model={"dtype": dtype},
            data={"batching": batching},
            compile={"cuda_graphs": mode, "scope": scope},
            train={"eval_every": 20},
        )
        steps, evals, record = run_through(recipe)
        assert record.start.cuda_graphs == ("on" if mode == "on" else "off (as asked)")
        assert ("capture" in record.elapsed_s) == (mode == "on")
        assert all(verdict.holds for verdict in record.verdicts)
        assert [step.step for step in steps] == list(range(1, 51))
        assert [evaluation.step for evaluation in evals] == [0, 20, 40, 50]
        runs.append((steps, evals))
    (captured, captured_evals), (plain, plain_evals) = runs
    assert [s.loss for s in captured] == pytest.approx([s.loss for s in plain], rel=2e-3)
    assert [s.lr for s in captured] == [s.lr for s in plain]
    assert [s.grad_norm for s in captured[:10]] == pytest.approx([s.grad_norm for s in plain[:10]], rel=2e-2)
    assert [e.eval_loss for e in captured_evals] == pytest.approx([e.eval_loss for e in plain_evals], rel=2e-3)
    assert captured_evals[-1].eval_loss < 0.999 * captured_evals[0].eval_loss
    assert len({s.loss for s in captured}) == 50


def test_fp16_overflows_skip_halve_and_recover_alike(recipe_of):
    found = []
    for mode in ("on", "off"):
        worker = compiled(recipe_of(model={"dtype": "float16"}, compile={"cuda_graphs": mode}))
        worker.step.scaler.update(2.0**30)
        results = [worker.step(next(worker.batches)).metrics.tolist() for _ in range(30)]
        found.append(([r[3] for r in results], [r[2] for r in results], worker.step.scaler.get_scale()))
        losses = [r[0] for r in results]
        assert all(torch.isfinite(p).all() for p in worker.step.parameters)
        worker.plan.release()
    assert found[0] == found[1]
    skipped, rates, scale = found[0]
    halved = int(sum(skipped))
    assert 1 < halved < 25 and scale == 2.0 ** (30 - halved)
    assert skipped[:2] == [1.0, 1.0] and skipped[-1] == 0.0
    assert rates[0] == rates[1]
    assert all(loss == loss for loss in losses)


def test_what_is_replayed_reads_the_new_batch(recipe_of):
    worker = compiled(recipe_of())
    perturb(worker)
    replayed, direct = [], []
    for _ in range(8):
        batch = next(worker.batches)
        replayed.append(float(worker.step.accumulate(batch)))
        with torch.no_grad():
            losses = [worker.built.packed(*arguments(micro.to("cuda"))) for micro in batch.micro_batches]
        direct.append(float(sum(losses)))
        evaluated = [float(worker.step.eval_loss(micro)) for micro in batch.micro_batches]
        assert sum(evaluated) == pytest.approx(direct[-1], rel=1e-4)
    worker.plan.check()
    worker.plan.release()
    assert replayed == pytest.approx(direct, rel=2e-3)
    assert len(set(replayed)) == 8


def test_dropout_is_drawn_anew_at_each_replay_and_again_alike_from_the_same_seed(recipe_of):
    worker = compiled(recipe_of(lora={"r": 4, "dropout": 0.3}))
    perturb(worker)
    batch = next(worker.batches)
    torch.manual_seed(5)
    first = [float(worker.step.accumulate(batch)) for _ in range(4)]
    torch.manual_seed(5)
    again = [float(worker.step.accumulate(batch)) for _ in range(4)]
    assert len({round(loss, 3) for loss in first}) == 4
    assert again == pytest.approx(first, rel=1e-4)
    [micro, _] = batch.micro_batches
    assert float(worker.step.eval_loss(micro)) == float(worker.step.eval_loss(micro))
    worker.plan.release()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_capture_leaves_no_trace_in_weights_optimizer_scale_or_random_numbers(recipe_of, dtype):
    captured = compiled(recipe_of(model={"dtype": dtype}, lora={"r": 4, "dropout": 0.1}))
    drawn = torch.randn(4, device="cuda")
    torch.manual_seed(captured.recipe.train.seed)
    assert torch.equal(drawn, torch.randn(4, device="cuda"))
    assert not any(value.any() for state in captured.step.optimizer.state.values() for value in state.values())
    assert not any(parameter.grad.any() for parameter in captured.step.parameters)
    weights = [parameter.detach().clone() for parameter in captured.step.parameters]
    scale = captured.step.scaler.get_scale()
    captured.plan.release()
    plain = compiled(recipe_of(model={"dtype": dtype}, lora={"r": 4, "dropout": 0.1}, compile={"cuda_graphs": "off"}))
    assert all(torch.equal(a, b) for a, b in zip(weights, plain.step.parameters, strict=True))
    assert scale == plain.step.scaler.get_scale()
    plain.step(next(plain.batches))
    plain.step(next(plain.batches))  # the first has a rate of 0, where there is a warm-up
    assert any(value.any() for state in plain.step.optimizer.state.values() for value in state.values())
    plain.plan.release()


def waiting(worker):
    """Make the model ask the device in every forward, outside what is compiled."""

    def ask(module, inputs, output):
        output.sum().item()

    worker.built.packed.embed.register_forward_hook(ask)


@pytest.mark.parametrize("found_in", ["rehearsal", "capture"])
def test_a_model_that_waits_for_the_device_is_trained_uncaptured_and_the_report_says_why(
    recipe_of, monkeypatch, found_in
):
    if found_in == "capture":
        monkeypatch.setattr(graphs, "_waits_are_errors", nullcontext)
    worker = built(recipe_of(compile={"cuda_graphs": "auto"}, lora={"r": 4, "dropout": 0.1}))
    waiting(worker)
    worker.compile()
    assert worker.cuda_graphs.startswith("off (capture failed: "), worker.cuda_graphs
    print(worker.cuda_graphs)
    reserved = torch.cuda.memory_reserved()
    assert torch.randn(3, device="cuda").isfinite().all()
    losses = [float(worker.step(next(worker.batches)).loss_sum) for _ in range(6)]
    assert len(set(losses)) == 6 and all(loss > 0 for loss in losses)
    assert torch.cuda.memory_reserved() < reserved + 512 * 2**20
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    worker.plan.check()
    worker.plan.release()
    later = compiled(recipe_of())  # the process can still capture
    assert later.cuda_graphs == "on"
    assert float(later.step(next(later.batches)).loss_sum) > 0
    later.plan.release()


def test_where_graphs_are_insisted_on_a_failed_capture_ends_the_run(recipe_of):
    worker = built(recipe_of())
    waiting(worker)
    with pytest.raises(ContractError, match="must be captured; it failed: ") as caught:
        worker.compile()
    assert caught.value.code == 9
    worker.plan.release()


def test_memory_does_not_grow_over_two_hundred_steps(recipe_of):
    worker = compiled(recipe_of(train={"steps": 200}))
    allocated, reserved = [], []
    for _ in range(200):
        result = worker.step(next(worker.batches))
        torch.cuda.synchronize()
        allocated.append(torch.cuda.memory_allocated())
        reserved.append(torch.cuda.memory_reserved())
    assert float(result.loss_sum) > 0
    assert allocated[1] == allocated[49] == allocated[199]
    assert reserved[199] <= reserved[1] * 1.01
    phases = [phase.phase for phase in worker.ledger.phases]
    assert phases[-2:] == ["after compile", "after capture"]
    worker.plan.release()


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw"])
def test_bitsandbytes_updates_stay_uncaptured_beside_captured_micro_steps(recipe_of, optimizer):
    evals = []
    for mode in ("on", "off"):
        steps, found, record = run_through(
            recipe_of(train={"optimizer": optimizer, "lr": 5e-3, "steps": 12}, compile={"cuda_graphs": mode})
        )
        assert all(verdict.holds for verdict in record.verdicts)
        evals.append(found[-1].eval_loss)
        if mode == "on":
            assert record.start.cuda_graphs == f"on, but for the update of {optimizer}"
            assert found[-1].eval_loss < 0.99 * found[0].eval_loss
    assert evals[0] == pytest.approx(evals[1], rel=5e-3)


def test_a_weight_that_turns_nan_ends_a_captured_run_at_its_step_with_the_figures_of_all_before(recipe_of):
    progress = Progress()
    with pytest.raises(NonFiniteError, match="step 5 has loss nan") as caught:
        for event in run(request_for(recipe_of(train={"steps": 20})), progress):
            if isinstance(event, StepRecord) and event.step == 3:  # read while step 4 is under way
                with torch.no_grad():
                    progress.worker.step.parameters[0].view(-1)[0] = float("nan")
                before = [parameter.detach().clone() for parameter in progress.worker.step.parameters[1:]]
    assert caught.value.step == 5
    assert [step.step for step in progress.steps] == [1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(before, progress.worker.step.parameters[1:], strict=True))
    progress.worker.plan.release()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parity_measures_what_is_replayed(recipe_of, dtype):
    recipe = recipe_of(model={"dtype": dtype}, train={"steps": 1}, data={"validation": 0}, proof={"parity": 4})
    *_, record = parity(request_for(recipe))
    assert record.start.cuda_graphs == "on"
    alike = [verdict for verdict in record.verdicts if verdict.claim.startswith("compiled ")]
    assert len(alike) == 2 and all(verdict.holds for verdict in alike), alike  # 4 batches scatter against fp32

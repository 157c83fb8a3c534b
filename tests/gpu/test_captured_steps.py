"""A step replayed from CUDA graphs is the step that is not captured."""

import math
from contextlib import nullcontext

import pytest
import torch

from launcher.compile import graphs
from launcher.compile.plan import Plan
from launcher.errors import ContractError, NonFiniteError
from launcher.memory.ledger import MIB
from launcher.records.run import EvalRecord, RunRecord, StepRecord
from launcher.train.history import RunHistory
from launcher.train.loop import training
from launcher.train.step import arguments
from tests.conftest import request_for
from tests.support.workers import built, compiled, perturb

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]


# With dropout, one dtype for all: each combination has kernels of its own to compile.
DROPOUT = {"model": {"dtype": "float16"}, "lora": {"r": 4, "dropout": 0.3}}


@pytest.fixture
def recipe_of(recipe_over):
    """Recipe factory: captured, two micro batches a step, a clip that always acts."""
    train = {"steps": 50, "accumulation": 2, "clip": 0.1, "log_every": 1}
    return recipe_over({"compile": {"cuda_graphs": "on"}, "train": train})


def run_through(recipe):
    events = list(training(request_for(recipe), RunHistory()))
    steps, evals, [record] = (
        [e for e in events if isinstance(e, kind)] for kind in (StepRecord, EvalRecord, RunRecord)
    )
    return steps, evals, record


@pytest.mark.parametrize(
    ("dtype", "batching", "scope"),
    [
        ("bfloat16", "packed", "layer"),
        ("float16", "bucketed", "layer"),
        ("float32", "packed", "regions"),
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
        compiled = record.ranks[0].compile
        assert (compiled.steps, compiled.steps_compiled) == (50, 50)
        assert compiled.evaluations == compiled.evaluations_compiled >= 4
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


def test_fp16_overflows_skip_halve_and_recover_as_in_uncaptured_steps(recipe_of):
    outcomes = []
    for mode in ("on", "off"):
        worker = compiled(recipe_of(model={"dtype": "float16"}, compile={"cuda_graphs": mode}))
        worker.step.scaler.update(2.0**30)
        results = [worker.step(next(worker.batches)).metrics.tolist() for _ in range(30)]
        losses, _, rates, skipped, _ = zip(*results, strict=True)
        outcomes.append((skipped, rates, worker.step.scaler.get_scale()))
        assert all(math.isfinite(loss) for loss in losses)
        assert all(torch.isfinite(p).all() for p in worker.step.parameters)
        worker.plan.release()
    assert outcomes[0] == outcomes[1]
    skipped, rates, scale = outcomes[0]
    halved = int(sum(skipped))
    assert 1 < halved < 25 and scale == 2.0 ** (30 - halved)
    assert skipped[:2] == (1.0, 1.0) and skipped[-1] == 0.0
    assert rates[0] == rates[1]


def test_a_replay_reads_the_new_batch(recipe_of):
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


def test_a_replay_counts_as_the_calls_of_its_capture_and_an_uncaptured_step_as_its_own(recipe_of):
    recipe = {"compile": {"mode": "warn"}}
    for mode, compiled_steps in (("on", 2), ("off", 1)):
        recipe["compile"]["cuda_graphs"] = mode
        worker = compiled(recipe_of(**recipe))
        worker.step(next(worker.batches))
        with torch.compiler.set_stance("force_eager"):  # a replay runs no Python
            worker.step(next(worker.batches))
        record = worker.observer.record()
        assert (record.steps, record.steps_compiled) == (2, compiled_steps)
        assert record.calls["layer"] == record.calls["layer backward"] == len(worker.built.packed.body.layers)
        worker.plan.release()


def test_a_capture_of_what_does_not_run_compiled_stops_a_strict_run(recipe_of):
    worker, arm = built(recipe_of()), Plan.arm

    def lose(plan):
        arm(plan)
        worker.built.packed.body.layers[0]._compiled_call_impl = None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "arm", lose)
        with pytest.raises(ContractError, match="every micro batch must run compiled code"):
            worker.compile()
    worker.plan.release()
    later = compiled(recipe_of())  # the process can still capture
    assert later.cuda_graphs == "on"
    later.plan.release()


def test_each_replay_draws_a_new_dropout_mask_and_a_seed_repeats_them(recipe_of):
    worker = compiled(recipe_of(**DROPOUT))
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


def test_capture_leaves_no_trace_in_weights_optimizer_scale_or_random_numbers(recipe_of):
    captured = compiled(recipe_of(**DROPOUT))
    drawn = torch.randn(4, device="cuda")
    torch.manual_seed(captured.recipe.train.seed)
    assert torch.equal(drawn, torch.randn(4, device="cuda"))
    assert not any(value.any() for state in captured.step.optimizer.state.values() for value in state.values())
    assert not any(parameter.grad.any() for parameter in captured.step.parameters)
    weights = [parameter.detach().clone() for parameter in captured.step.parameters]
    scale = captured.step.scaler.get_scale()
    captured.plan.release()
    plain = compiled(recipe_of(**DROPOUT, compile={"cuda_graphs": "off"}))
    assert all(torch.equal(a, b) for a, b in zip(weights, plain.step.parameters, strict=True))
    assert scale == plain.step.scaler.get_scale()
    for _ in range(2):  # the first has a rate of 0, where there is a warm-up
        plain.step(next(plain.batches))
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
        monkeypatch.setattr(graphs, "waits_are_errors", nullcontext)
    worker = built(recipe_of(**DROPOUT, compile={"cuda_graphs": "auto"}))
    waiting(worker)
    worker.compile()
    assert worker.cuda_graphs.startswith("off (capture failed: "), worker.cuda_graphs
    reserved = torch.cuda.memory_reserved()
    assert torch.randn(3, device="cuda").isfinite().all()
    losses = [float(worker.step(next(worker.batches)).loss_sum) for _ in range(6)]
    assert len(set(losses)) == 6 and all(loss > 0 for loss in losses)
    assert torch.cuda.memory_reserved() < reserved + 512 * MIB
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    worker.plan.check()
    worker.plan.release()
    later = compiled(recipe_of())  # the process can still capture
    assert later.cuda_graphs == "on"
    assert float(later.step(next(later.batches)).loss_sum) > 0
    later.plan.release()


def test_a_failed_capture_ends_a_run_that_requires_graphs(recipe_of):
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


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "schedule_free_adamw"])
def test_updates_of_other_optimizers_stay_uncaptured_while_micro_steps_are_captured(recipe_of, optimizer):
    """Evaluations are captured too: with schedule_free_adamw they see the averages, at the same addresses."""
    last_losses = []
    for mode in ("on", "off"):
        train = {"optimizer": optimizer, "lr": 5e-3, "steps": 12, "schedule": "constant", "eval_every": 4}
        _, evals, record = run_through(recipe_of(train=train, compile={"cuda_graphs": mode}))
        assert all(verdict.holds for verdict in record.verdicts)
        last_losses.append(evals[-1].eval_loss)
        if mode == "on":
            assert record.start.cuda_graphs == f"on, but for the update of {optimizer}"
            assert evals[-1].eval_loss < 0.99 * evals[0].eval_loss
    assert last_losses[0] == pytest.approx(last_losses[1], rel=5e-3)


def test_a_weight_that_becomes_nan_ends_a_captured_run_at_its_step_with_the_metrics_of_all_before(recipe_of):
    progress = RunHistory()
    with pytest.raises(NonFiniteError, match="step 5 has loss nan") as caught:
        for event in training(request_for(recipe_of(train={"steps": 20})), progress):
            if isinstance(event, StepRecord) and event.step == 3:  # read while step 4 is under way
                with torch.no_grad():
                    progress.worker.step.parameters[0].view(-1)[0] = float("nan")
                before = [parameter.detach().clone() for parameter in progress.worker.step.parameters[1:]]
    assert caught.value.step == 5
    assert [step.step for step in progress.steps] == [1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(before, progress.worker.step.parameters[1:], strict=True))
    progress.worker.plan.release()

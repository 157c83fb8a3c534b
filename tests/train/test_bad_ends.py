"""The ends that a run can come to other than its good one, and what they leave."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.checkpoint import adapter
from launcher.errors import CheckpointError, ContractError, NonFiniteError
from launcher.model.packed import PackedCausalLM
from launcher.records.run import StepRecord
from launcher.train import setup
from launcher.train.history import RunHistory
from launcher.train.loop import training
from tests.conftest import request_for
from tests.support.runs import events_of

pytestmark = pytest.mark.usefixtures("clean_dynamo")


def poison(monkeypatch, *, training_call=None):
    """Make the packed model's given training forward NaN, or every evaluating one."""
    original, training_calls = PackedCausalLM.forward, []

    def forward(self, *inputs):
        loss = original(self, *inputs)
        if torch.is_grad_enabled():
            training_calls.append(1)
            return loss * float("nan") if len(training_calls) == training_call else loss
        return loss if training_call else loss * float("nan")

    monkeypatch.setattr(PackedCausalLM, "forward", forward)


def adapter_of(history):
    return {n: p.detach().clone() for n, p in history.worker.built.peft.named_parameters() if p.requires_grad}


def test_a_nan_loss_that_is_read_late_ends_the_run_with_code_5_and_the_weights_of_the_step_before(
    make_recipe, monkeypatch, tmp_path
):
    train, uncompiled = {"log_every": 4, "schedule": "constant", "warmup": 0}, {"mode": "off"}
    poison(monkeypatch, training_call=4)  # the first is the warm-up's: step 3
    history = RunHistory()
    with pytest.raises(NonFiniteError, match="step 3 has loss nan") as caught:
        events_of(make_recipe(train={**train, "steps": 6}, compile=uncompiled), history)
    assert (caught.value.code, caught.value.step) == (5, 3)
    assert [step.step for step in history.steps] == [1, 2]
    monkeypatch.undo()
    healthy, folder = RunHistory(), {"output_dir": str(tmp_path / "healthy")}
    events_of(make_recipe(train={**train, "steps": 2}, compile=uncompiled, run=folder), healthy)
    weights, expected = adapter_of(history), adapter_of(healthy)
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert all(weights[name].any() for name in weights if "lora_B" in name), "which starts at zero"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("planted"), MemoryError()])
def test_steps_whose_metrics_were_not_read_yet_are_recorded_when_memory_runs_out(make_recipe, monkeypatch, error):
    calls, original = [], PackedCausalLM.forward

    def forward(self, *batch):
        calls.append(self.training and torch.is_grad_enabled())
        if sum(calls) == 4:  # the first is the warm-up's: step 3
            raise error
        return original(self, *batch)

    monkeypatch.setattr(PackedCausalLM, "forward", forward)
    history = RunHistory()
    with pytest.raises(type(error)):
        events_of(make_recipe(train={"log_every": 4, "steps": 6}, compile={"mode": "off"}), history)
    assert [step.step for step in history.steps] == [1, 2]


def test_an_eval_loss_that_is_not_finite_ends_the_run(make_recipe, monkeypatch):
    poison(monkeypatch)
    with pytest.raises(NonFiniteError, match="eval loss must be finite"):
        events_of(make_recipe(compile={"mode": "off"}))


def test_an_adapter_that_is_wrong_on_disk_fails_the_run_after_its_record(make_recipe, monkeypatch, tmp_path):
    original = adapter.save_adapter

    def save(model, tokenizer, folder):
        original(model, tokenizer, folder)
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor * 1.001 for name, tensor in load_file(file).items()}, file)

    monkeypatch.setattr(adapter, "save_adapter", save)
    events = []
    with pytest.raises(CheckpointError, match="must give back what was trained"):
        events.extend(training(request_for(make_recipe(compile={"mode": "off"})), RunHistory()))
    assert [verdict.claim for verdict in events[-1].verdicts if not verdict.holds] == ["saved adapter reloads"]
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_shape_that_was_not_planned_stops_a_strict_run(make_recipe, monkeypatch):
    original = setup.eval_batches

    def cut(blocks, **options):
        first, second, *others = original(blocks, **options)
        fields = {f: getattr(second, f)[:, :32] for f in ("input_ids", "labels", "position_ids", "document_ids")}
        return [first, replace(second, **fields), *others]

    monkeypatch.setattr(setup, "eval_batches", cut)
    with pytest.raises(ContractError, match="no recompile is allowed after warm-up") as caught:
        events_of(make_recipe(data={"validation": 0.5}))
    assert caught.value.code == 9


@pytest.mark.parametrize("mode", ["strict", "warn"])
def test_a_run_whose_layers_lose_their_compiled_code_stops_or_says_so(make_recipe, mode):
    history, events = RunHistory(), []

    def run_through():
        for event in training(request_for(make_recipe(compile={"mode": mode}, data={"validation": 0})), history):
            events.append(event)
            if isinstance(event, StepRecord) and event.step == 2:
                history.worker.built.packed.body.layers[1]._compiled_call_impl = None

    if mode == "strict":
        with pytest.raises(
            ContractError, match=r"layer 2, layer backward 2, loss 1\); one ran layer 1, layer backward"
        ):
            run_through()
        assert len(history.steps) == 2
        return
    run_through()
    [broken] = [verdict for verdict in events[-1].verdicts if not verdict.holds]
    assert broken.claim == "every step ran compiled" and broken.evidence.startswith("2 of 4 steps, 0 of 2 evaluated")
    assert events[-1].ranks[0].compile.fallbacks == ()

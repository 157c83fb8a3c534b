"""Metrics of steps that still run are read later, in order, and none is lost."""

from unittest.mock import Mock

import pytest
import torch

from launcher.errors import ContractError
from launcher.model.packed import PackedCausalLM
from launcher.train import metrics
from launcher.train.history import RunHistory
from launcher.train.loop import training
from launcher.train.metrics import MetricsReader
from launcher.train.step import StepResult
from tests.conftest import request_for


def enqueue(reader, *loss_sums):
    """Enqueue a step with each of these losses; the next step overwrites its metrics at once."""
    for loss_sum in loss_sums:
        metrics = torch.tensor([loss_sum, 2.0, 0.5, 0.0, 0.0], dtype=torch.float64)
        reader.add(StepResult(metrics), None)
        metrics.fill_(9.0)


def losses(steps):
    return [step.loss_sum for step in steps]


def test_on_a_cpu_every_step_is_read_at_once_as_it_was():
    enqueue(reader := MetricsReader(), 1.0)
    [step] = reader.read(all=False)
    assert (step.loss_sum, step.grad_norm, step.lr, step.skipped) == (1.0, 2.0, 0.5, False)
    assert reader.read(all=True) == []


def test_a_running_step_is_left_until_the_next_one_or_until_all_are_asked_for(monkeypatch):
    copies = []

    def copy_to_host(tensor):
        copies.append(Mock(torch.cuda.Event))
        return tensor.clone(), copies[-1]

    monkeypatch.setattr(metrics, "copy_to_host", copy_to_host)
    enqueue(reader := MetricsReader(), 1.0)
    assert reader.read(all=False) == []
    enqueue(reader, 2.0)
    assert losses(reader.read(all=False)) == [1.0]
    enqueue(reader, 3.0, 4.0)
    assert losses(reader.read(all=False)) == [2.0, 3.0]
    assert losses(reader.read(all=True)) == [4.0]
    waits = [copied.synchronize.call_count for copied in copies]
    assert waits == [1, 0, 1, 1], "one wait a read: for the last copy, which ends the others"


def test_the_time_between_two_reads_is_shared_by_the_steps_read(monkeypatch):
    now = iter([10.0, 16.0, 16.0, 30.0, 31.0, 31.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    enqueue(reader := MetricsReader(), 1.0, 2.0, 3.0)
    assert [step.step_s for step in reader.read(all=True)] == [2.0, 2.0, 2.0]
    reader.restart()
    enqueue(reader, 4.0)
    assert [step.step_s for step in reader.read(all=True)] == [1.0]


@pytest.mark.usefixtures("clean_dynamo")
def test_the_good_steps_before_a_broken_contract_are_read_even_if_not_due(make_recipe, monkeypatch):
    original, calls = PackedCausalLM.forward, []

    def forward(self, *inputs):
        calls.extend([1] if torch.is_grad_enabled() else [])
        if len(calls) == 4:  # the first is the warm-up's: step 3
            inputs = [t[:, :32] if t.ndim == 2 else t for t in inputs]
        return original(self, *inputs)

    monkeypatch.setattr(PackedCausalLM, "forward", forward)
    progress = RunHistory()
    recipe = make_recipe(train={"steps": 6, "log_every": 4}, data={"validation": 0})
    with pytest.raises(ContractError, match="no recompile is allowed"):
        list(training(request_for(recipe), progress))
    assert [step.step for step in progress.steps] == [1, 2]
    progress.worker.plan.release()

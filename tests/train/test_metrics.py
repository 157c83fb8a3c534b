"""Figures are read late where they are on their way, in order, and none is lost."""

import pytest
import torch

from launcher.errors import ContractError
from launcher.model.packed import PackedCausalLM
from launcher.train import metrics as readings
from launcher.train.loop import RunHistory, run
from launcher.train.metrics import Pending
from launcher.train.step import StepResult
from tests.conftest import request_for


class Event:
    """A copy to the host that is done once it was waited for."""

    def __init__(self):
        self.waits = 0

    def synchronize(self):
        self.waits += 1


def result(number):
    return StepResult(torch.tensor([number, 2.0, 0.5, 0.0], dtype=torch.float64))


def losses(found):
    return [reading.loss_sum for reading in found]


def test_on_a_cpu_every_step_is_read_at_once():
    pending = Pending()
    pending.add(result(1.0), None)
    [reading] = pending.read(all=False)
    assert (reading.loss_sum, reading.grad_norm, reading.lr, reading.skipped) == (1.0, 2.0, 0.5, False)
    assert pending.read(all=True) == []


def test_a_step_on_its_way_is_left_until_the_next_or_until_all_are_wanted():
    pending = Pending()
    events = []

    def add(number):
        pending.add(result(number), None)
        batch, host, _ = pending._steps[-1]
        events.append(Event())
        pending._steps[-1] = batch, host, events[-1]

    add(1.0)
    assert pending.read(all=False) == []
    add(2.0)
    assert losses(pending.read(all=False)) == [1.0]
    add(3.0)
    add(4.0)
    assert losses(pending.read(all=False)) == [2.0, 3.0]
    assert losses(pending.read(all=True)) == [4.0]
    assert [event.waits for event in events] == [1, 0, 1, 1]  # the last of those read; the others lie before it


def test_the_figures_are_those_of_the_step_though_the_next_overwrites_them():
    pending, figures = Pending(), result(1.0)
    pending.add(figures, None)
    figures.metrics.fill_(9.0)
    assert losses(pending.read(all=True)) == [1.0]


def test_the_time_of_a_step_is_that_between_two_reads_shared_by_those_read(monkeypatch):
    now = iter([10.0, 16.0, 16.0, 30.0, 31.0, 31.0])
    monkeypatch.setattr(readings.time, "perf_counter", lambda: next(now))
    pending = Pending()
    for number in (1.0, 2.0, 3.0):
        pending.add(result(number), None)
    assert [reading.step_s for reading in pending.read(all=True)] == [2.0, 2.0, 2.0]
    pending.restart()
    pending.add(result(4.0), None)
    assert [reading.step_s for reading in pending.read(all=True)] == [1.0]


@pytest.mark.usefixtures("clean_dynamo")
def test_the_good_steps_before_a_broken_contract_are_read_though_they_were_not_due(make_recipe, monkeypatch):
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
        list(run(request_for(recipe), progress))
    assert [step.step for step in progress.steps] == [1, 2]
    progress.worker.plan.release()

"""A signal ends the run even where the exception that it raised never came through."""

import os
import signal
from contextlib import suppress

import pytest
import torch

from launcher.model import build as model_build
from launcher.runtime import signals as stopping
from launcher.train.loop import Progress, run
from tests.conftest import request_for

pytestmark = pytest.mark.usefixtures("clean_dynamo")


@pytest.fixture(autouse=True)
def handlers():
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)
    stopping._arrived.clear()


@pytest.mark.parametrize(
    ("signum", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, stopping.Terminated)]
)
def test_a_signal_that_is_swallowed_ends_the_run_at_the_next_step(make_recipe, monkeypatch, signum, error):
    original, calls = model_build.PackedCausalLM.forward, []

    def forward(self, *inputs):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 3:  # the first is the warm-up's: step 2
            with suppress(BaseException):  # as C code does that clears errors
                os.kill(os.getpid(), signum)
        return original(self, *inputs)

    monkeypatch.setattr(model_build.PackedCausalLM, "forward", forward)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stopping.listen()
    progress = Progress()
    with pytest.raises(error):
        for _ in run(request_for(make_recipe(train={"steps": 6}, compile={"mode": "off"})), progress):
            pass
    assert sum(calls) == 3
    assert [step.step for step in progress.steps] == [1, 2]


def test_in_a_background_job_sigint_stays_ignored_and_nothing_is_remembered_from_before():
    stopping._arrived.append(KeyboardInterrupt)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopping.listen()
    os.kill(os.getpid(), signal.SIGINT)
    stopping.raise_if_stopped()


def test_a_second_sigterm_does_not_interrupt_the_ending():
    stopping.listen()
    with pytest.raises(stopping.Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(stopping.Terminated):
        stopping.raise_if_stopped()

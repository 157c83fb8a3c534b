"""A signal ends the run even where the exception that it raised was swallowed."""

import os
import signal
from contextlib import suppress

import pytest
import torch

from launcher.model.packed import PackedCausalLM
from launcher.runtime.signals import Terminated, listen, raise_if_stopped
from launcher.train.loop import RunHistory, run
from tests.conftest import request_for

pytestmark = pytest.mark.usefixtures("clean_dynamo")


@pytest.fixture(autouse=True)
def handlers():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    listen()  # forgets what was received
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(("signum", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_that_is_swallowed_ends_the_run_at_the_next_step(make_recipe, monkeypatch, signum, error):
    original, training_calls = PackedCausalLM.forward, []

    def forward(self, *inputs):
        training_calls.extend([1] if torch.is_grad_enabled() else [])
        if torch.is_grad_enabled() and len(training_calls) == 3:  # the first is the warm-up's: step 2
            with suppress(BaseException):  # as C code does that clears errors
                os.kill(os.getpid(), signum)
        return original(self, *inputs)

    monkeypatch.setattr(PackedCausalLM, "forward", forward)
    listen()
    history = RunHistory()
    with pytest.raises(error):
        list(run(request_for(make_recipe(train={"steps": 6}, compile={"mode": "off"})), history))
    assert len(training_calls) == 3
    assert [step.step for step in history.steps] == [1, 2]


def test_listening_forgets_what_was_received_before_and_an_ignored_sigint_stays_ignored():
    listen()
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        raise_if_stopped()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a job in the background
    listen()
    os.kill(os.getpid(), signal.SIGINT)
    raise_if_stopped()


def test_a_second_sigterm_does_not_interrupt_the_ending():
    listen()
    with pytest.raises(Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Terminated):
        raise_if_stopped()

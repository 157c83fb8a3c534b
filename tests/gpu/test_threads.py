"""On a GPU autograd runs, and compiles, the backward pass in a thread of its own: what is set must hold there."""

import threading

import pytest
import torch
import torch._dynamo
from torch._inductor.graph import GraphLowering

from tests.support.plans import Block, plan_for

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("clean_dynamo")]


def test_autograds_thread_compiles_without_padding_and_refuses_recompiles(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    lowered, armed, run = [], [], GraphLowering.run

    def spy(self, *arguments):
        lowered.append((self.is_backward, torch._inductor.config.shape_padding, threading.get_ident()))
        return run(self, *arguments)

    monkeypatch.setattr(GraphLowering, "run", spy)
    plan, observer = plan_for(block := Block().cuda(), backend="inductor")

    def forward_and_backward():
        x = torch.ones(2, 8, device="cuda", requires_grad=True)
        y = block(x)
        y.register_hook(lambda _: armed.append((torch._dynamo.config.error_on_recompile, threading.get_ident())))
        y.sum().backward()

    run_checked = plan.checked(forward_and_backward, tokens=2, train=True)
    plan.warm_up(run_checked)
    assert [(backward, padding) for backward, padding, _ in lowered] == [(False, False), (True, False)]
    assert lowered[1][2] != threading.get_ident(), "autograd has a thread of its own"
    plan.arm()
    assert run_checked() and observer.record().calls == {"layer": 1, "layer backward": 1}
    assert [refused for refused, _ in armed] == [False, True] and armed[1][1] != threading.get_ident()

"""A compiler that fails stops a strict run with code 9; in warn the code runs uncompiled, which is counted."""

import pytest
import torch
import torch._dynamo
from torch._dynamo.backends.common import aot_autograd

from tests.support.plans import Block, call, plan_for, refuse, stopped

pytestmark = pytest.mark.usefixtures("clean_dynamo")


@pytest.mark.parametrize("mode", ["strict", "warn"])
def test_fault_36_a_compile_error_is_counted_stops_strict_and_falls_back_in_warn(monkeypatch, mode):
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: refuse)
    plan, observer = plan_for(block := Block(), mode=mode)
    with stopped(mode, r"(?s)backend must accept the graph.*planted"):
        plan.warm_up(lambda: call(block, 2))
        assert observer.record().fallbacks
    record = observer.record()
    assert (record.backend_errors, record.graph_breaks) == (1, 0)
    assert "planted" in record.backend_error_reasons[0]


@pytest.mark.parametrize("mode", ["strict", "warn"])
def test_fault_36_a_backward_that_does_not_compile_stops_strict_and_falls_back_in_warn(monkeypatch, mode):
    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=refuse)
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: backend)
    plan, observer = plan_for(block := Block(), mode=mode)

    def forward_and_backward():
        block.zero_grad()
        block(torch.ones(2, 8)).sum().backward()

    with stopped(mode, "backend must accept the graph: .*planted"):
        plan.warm_up(forward_and_backward)
        assert block.linear.weight.grad.abs().sum() > 0
        assert observer.record().fallbacks


def test_fault_36_a_missing_cpp_compiler_is_a_backend_error_that_names_it(tmp_path, monkeypatch):
    from torch._inductor import config, cpp_builder

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cpp_builder.get_cpp_compiler.cache_clear() if hasattr(cpp_builder.get_cpp_compiler, "cache_clear") else None
    plan, _ = plan_for(block := Block(), backend="inductor")
    no_compiler = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with no_compiler, stopped("strict", r"(?si)backend must accept the graph.*compiler"):
        plan.warm_up(lambda: call(block, 2))

"""What the launcher sets for the compiler holds in every thread: torch 2.12 and later keep settings by thread."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.graph import GraphLowering

from launcher.compile.dynamo_config import set_in_all_threads
from launcher.errors import ContractError
from tests.support.plans import Block, call, plan_for

pytestmark = pytest.mark.usefixtures("clean_dynamo")


def in_thread(function, *arguments):
    """The result of the call in a thread that starts now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def test_a_setting_reaches_threads_that_run_and_threads_that_start():
    def read():
        return torch._dynamo.config.error_on_recompile

    with ThreadPoolExecutor(1) as running:
        assert not running.submit(read).result()
        set_in_all_threads("error_on_recompile", True)
        assert running.submit(read).result() and in_thread(read) and read()
        set_in_all_threads("error_on_recompile", False)
        assert not (running.submit(read).result() or in_thread(read) or read())


def test_a_recompile_in_another_thread_is_refused_until_the_plan_is_released():
    plan, observer = plan_for(block := Block())
    plan.warm_up(lambda: call(block, 2))
    plan.arm()
    in_thread(plan.call, call, block, 2)
    with pytest.raises(ContractError, match=r"(?s)no recompile is allowed.*size mismatch"):
        in_thread(plan.call, call, block, 3)
    assert observer.record().recompiles == 1 and observer.record().compilations == 1
    plan.release()
    in_thread(call, block, 4)


def test_more_shapes_than_dynamos_own_limit_are_compiled_in_another_thread():
    limit = torch._dynamo.config.recompile_limit
    shapes = range(2, 2 + limit + 2)
    plan, observer = plan_for(block := Block(), graphs=len(shapes))
    in_thread(plan.warm_up, lambda: call(block, *shapes))
    assert observer.record().planned_graphs == len(shapes)
    set_in_all_threads("recompile_limit", limit)


def test_forward_and_backward_are_compiled_without_padding_whichever_thread_compiles_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    lowered, run = [], GraphLowering.run

    def spy(self, *arguments):
        lowered.append((self.is_backward, torch._inductor.config.shape_padding))
        return run(self, *arguments)

    monkeypatch.setattr(GraphLowering, "run", spy)
    plan, _ = plan_for(block := Block(), backend="inductor")
    outputs = []
    plan.warm_up(lambda: outputs.append(block(torch.ones(2, 8))))
    assert lowered == [
        (False, False)
    ]  # the backward pass is compiled when it first runs: on a GPU in autograd's thread
    in_thread(outputs[0].sum().backward)
    assert lowered == [(False, False), (True, False)]
    assert torch._inductor.config.shape_padding and in_thread(lambda: torch._inductor.config.shape_padding)


def test_every_graph_is_compiled_under_the_plans_settings_also_late_and_in_another_thread(monkeypatch):
    budgets = []

    def compiler(graph, inputs):
        budgets.append(torch._functorch.config.activation_memory_budget)
        return graph.forward

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: aot_autograd(fw_compiler=compiler))
    block = Block()
    plan, _ = plan_for(
        block, mode="warn", settings=lambda: torch._functorch.config.patch(activation_memory_budget=0.25)
    )
    plan.warm_up(lambda: call(block, 2))
    plan.arm()
    call(block, 3)
    in_thread(call, block, 4)
    assert budgets == [0.25] * 3 and torch._functorch.config.activation_memory_budget == 1.0

"""Every event that the observer counts is provoked here once, and seen."""

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from launcher.compile.observe import Observer, without_device_index
from launcher.compile.plan import Plan
from launcher.compile.regions import Region
from launcher.errors import ContractError
from launcher.recipe.schema import CompileSection

pytestmark = pytest.mark.usefixtures("clean_dynamo")


class Block(nn.Module):
    """Well-behaved."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(self.linear(x))


class Other(Block):
    def forward(self, x):
        return torch.tanh(self.linear(x))


class Breaking(Block):
    """Cannot be captured: a branch on data."""

    def forward(self, x):
        if x.sum().item() > 0:
            return x
        return self.linear(x)


def plan_for(*modules, mode="strict", graphs=1, observer=None, backend="aot_eager", name="layer"):
    observer = observer or Observer()
    compile = CompileSection(mode=mode, scope="layer", regions=[], backend=backend)
    return Plan([Region(name, graphs, modules=modules)], compile=compile, observer=observer), observer


def test_planned_graphs_are_counted_once_for_modules_that_share_them():
    blocks = [Block(), Block(), Block()]
    plan, observer = plan_for(*blocks)
    plan.warm_up(lambda: [block(torch.randn(2, 8)) for block in blocks])
    record = observer.record()
    assert (record.planned_graphs, record.expected_graphs, record.compilations) == (1, 1, 1)
    assert (record.graph_breaks, record.recompiles, record.limit_hits) == (0, 0, 0)
    assert record.forward_s > 0
    assert record.graphs_by_region == {"layer": 1}


def test_a_graph_break_stops_a_strict_run_with_its_reason_and_line():
    block = Breaking()
    plan, observer = plan_for(block)
    with pytest.raises(ContractError, match=r"no graph break is allowed") as caught:
        plan.warm_up(lambda: block(torch.randn(2, 8)))
    assert caught.value.code == 9
    assert "test_observe.py" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5
    record = observer.record()
    assert record.graph_breaks == 1
    assert "test_observe.py" in record.graph_break_reasons[0]


def test_a_graph_break_in_warn_mode_is_counted_and_the_region_runs_uncompiled():
    block = Breaking()
    plan, observer = plan_for(block, mode="warn")
    x = torch.ones(2, 8)
    plan.warm_up(lambda: block(x))
    assert torch.equal(block(x), x)
    record = observer.record()
    assert record.graph_breaks == 1
    assert "uncompiled" in record.fallbacks[0]


def test_a_recompile_after_warm_up_stops_a_strict_run_and_names_the_guard():
    block = Block()
    plan, observer = plan_for(block)
    plan.warm_up(lambda: block(torch.randn(2, 8)))
    plan.arm()
    with pytest.raises(ContractError, match="no recompile is allowed") as caught:
        plan.call(block, torch.randn(3, 8))
    assert "size mismatch" in str(caught.value)
    record = observer.record()
    assert (record.recompiles, record.graph_breaks, record.compilations, record.planned_graphs) == (1, 0, 1, 1)
    assert "size mismatch" in record.recompile_reasons[0]


def test_a_recompile_in_warn_mode_is_counted_and_the_run_goes_on():
    block = Block()
    plan, observer = plan_for(block, mode="warn")
    plan.warm_up(lambda: block(torch.randn(2, 8)))
    plan.arm()
    assert plan.call(block, torch.randn(3, 8)).shape == (3, 8)
    record = observer.record()
    assert record.recompiles == 1
    assert "size mismatch" in record.recompile_reasons[0]
    assert record.compilations == 2
    assert record.planned_graphs == 1


def test_a_recompile_during_warm_up_is_more_graphs_than_planned():
    block = Block()
    plan, observer = plan_for(block)
    with pytest.raises(ContractError, match="exactly the planned graphs"):
        plan.warm_up(lambda: [block(torch.randn(n, 8)) for n in (2, 3)])
    assert observer.record().recompiles == 1


def test_a_module_that_the_compiler_skips_is_caught():
    block = nn.Sequential(nn.Linear(8, 8))  # its code lies in torch's own files, which dynamo does not trace
    plan, _ = plan_for(block)
    with pytest.raises(ContractError) as caught:
        plan.warm_up(lambda: block(torch.randn(2, 8)))
    assert caught.value.code == 9


def test_a_module_that_the_compiler_never_saw_is_fewer_graphs_than_planned():
    plan, _ = plan_for(Block())
    with pytest.raises(ContractError, match="exactly the planned graphs"):
        plan.warm_up(lambda: None)


def test_a_new_frame_compiled_after_warm_up_is_caught_though_no_guard_failed():
    block = Block()
    plan, observer = plan_for(block)
    plan.warm_up(lambda: block(torch.randn(2, 8)))
    plan.arm()
    torch.compile(lambda x: x.sin(), backend="aot_eager")(torch.randn(3))
    with pytest.raises(ContractError, match="nothing may be compiled"):
        plan.check()
    assert observer.record().recompiles == 1


def test_a_region_too_many_does_not_make_up_for_one_too_few():
    blocks, observer = [Block(), Other()], Observer()
    regions = [Region(name, 1, modules=(block,)) for name, block in zip(("mlp", "rmsnorm"), blocks, strict=True)]
    compile = CompileSection(mode="warn", scope="regions", regions=["mlp", "rmsnorm"], backend="aot_eager")
    plan = Plan(regions, compile=compile, observer=observer)
    plan.warm_up(lambda: [blocks[0](torch.randn(n, 8)) for n in (2, 3)])
    plan.arm()
    record = observer.record()
    assert (record.planned_graphs, record.expected_graphs, record.compilations, record.recompiles) == (1, 2, 2, 1)


@pytest.mark.parametrize("mode", ["strict", "warn"])
def test_a_backward_that_does_not_compile_stops_strict_and_falls_back_in_warn(monkeypatch, mode):
    def refuse(graph, inputs):
        raise torch._inductor.exc.InductorError(RuntimeError("no backward"), None)

    backend = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=refuse)
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: backend)
    block = Block()
    plan, observer = plan_for(block, mode=mode)

    def whole():
        block.zero_grad()
        block(torch.ones(2, 8)).sum().backward()

    if mode == "strict":
        with pytest.raises(ContractError):
            plan.warm_up(whole)
    else:
        plan.warm_up(whole)
        assert block.linear.weight.grad.abs().sum() > 0
        assert observer.record().fallbacks


@torch._dynamo.config.patch(recompile_limit=1)
def test_a_limit_hit_is_counted():
    block = Block()
    plan, observer = plan_for(block, mode="warn")
    plan.warm_up(lambda: block(torch.randn(2, 8)))
    assert plan.call(block, torch.randn(3, 8)).shape == (3, 8)  # falls back
    record = observer.record()
    assert record.limit_hits == 1
    assert record.graph_breaks == 0
    assert "limit" in record.fallbacks[0]


@torch._dynamo.config.patch(recompile_limit=1)
def test_a_limit_hit_stops_a_strict_run():
    block = Block()
    plan, observer = plan_for(block)
    with pytest.raises(ContractError, match="recompile limit") as caught:
        plan.warm_up(lambda: [block(torch.randn(n, 8)) for n in (2, 3)])
    assert caught.value.code == 9
    assert observer.record().limit_hits == 1


def test_a_backend_error_stops_a_strict_run_and_falls_back_in_warn(monkeypatch):
    def refuse(graph, inputs):
        raise RuntimeError("planted")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: refuse)
    block = Block()
    plan, _ = plan_for(block)
    with pytest.raises(ContractError, match=r"(?s)backend must accept the graph.*planted"):
        plan.warm_up(lambda: block(torch.randn(2, 8)))
    plan, observer = plan_for(block, mode="warn")
    plan.warm_up(lambda: block(torch.randn(2, 8)))
    record = observer.record()
    assert record.fallbacks
    assert (record.backend_errors, record.graph_breaks) == (1, 0)
    assert "planted" in record.backend_error_reasons[0]


def test_backward_seconds_and_cache_hits_are_seen_with_inductor(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    block = Block()

    def run_once():
        plan, observer = plan_for(block, backend="inductor")
        plan.warm_up(lambda: block(torch.randn(2, 8, requires_grad=True)).sum().backward())
        return observer.record()

    cold, warm = run_once(), run_once()
    assert cold.backward_s > 0
    assert cold.cache_hits == 0
    assert warm.cache_hits > 0
    assert warm.graph_hash == cold.graph_hash


def test_a_missing_cpp_compiler_is_a_backend_error_that_names_it(tmp_path, monkeypatch):
    from torch._inductor import config, cpp_builder

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cpp_builder.get_cpp_compiler.cache_clear() if hasattr(cpp_builder.get_cpp_compiler, "cache_clear") else None
    block = Block()
    plan, _ = plan_for(block, backend="inductor")
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}), pytest.raises(ContractError) as caught:
        plan.warm_up(lambda: block(torch.randn(2, 8)))
    assert "backend must accept the graph" in str(caught.value)
    assert "compiler" in str(caught.value).lower()
    assert len(str(caught.value).splitlines()) <= 5


def test_equal_programs_have_equal_hashes_and_others_do_not():
    def hash_of(block, x):
        plan, observer = plan_for(block)
        plan.warm_up(lambda: block(x))
        return observer.record().graph_hash

    same = hash_of(Block(), torch.randn(2, 8))
    assert hash_of(Block(), torch.randn(2, 8)) == same
    assert hash_of(Block(), torch.randn(3, 8)) != same
    assert hash_of(Other(), torch.randn(2, 8)) != same


@pytest.mark.parametrize("form", ["torch.arange(8, device = device(type='cuda', index={}))", "x.to('cuda:{}')"])
def test_ranks_on_other_devices_of_one_machine_hash_alike(form):
    codes = [without_device_index(form.format(index)) for index in (0, 1)]
    assert codes[0] == codes[1]
    assert "cuda" in codes[0]
    assert without_device_index("x.view(1, 2)") != without_device_index("x.view(1, 3)")


def test_an_earlier_compilation_of_the_process_is_not_ours():
    torch.compile(lambda x: x.cos(), backend="aot_eager")(torch.randn(3))
    block = Block()
    plan, observer = plan_for(block)
    plan.warm_up(lambda: block(torch.randn(2, 8)))
    assert observer.record().compilations == 1


def test_compiling_in_place_leaves_state_dict_names_alone():
    block = Block()
    names = list(block.state_dict())
    plan_for(block)
    assert list(block.state_dict()) == names == ["linear.weight", "linear.bias"]


def test_mode_off_compiles_nothing():
    block = Block()
    plan, observer = plan_for(block, mode="off")
    plan.warm_up(lambda: block(torch.randn(2, 8)))
    record = observer.record()
    assert (record.compilations, record.expected_graphs, record.graph_hash) == (0, 0, "-")

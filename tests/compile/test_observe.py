"""Every event that the observer counts is provoked here, counted, and in strict mode stops the run."""

import pytest
import torch
import torch._dynamo

from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.compile.regions import Region
from launcher.errors import ContractError
from launcher.recipe.schema import CompileSection
from tests.support.plans import Block, Other, call, plan_for, stopped

pytestmark = pytest.mark.usefixtures("clean_dynamo")


class Breaking(Block):
    """Breaks the graph: a branch on data."""

    def forward(self, x):
        if x.sum().item() > 0:
            return x
        return self.linear(x)


def test_planned_graphs_are_counted_once_for_modules_that_share_them():
    blocks = [Block(), Block(), Block()]
    plan, observer = plan_for(*blocks)
    plan.warm_up(lambda: [call(block, 2) for block in blocks])
    record = observer.record()
    assert (record.planned_graphs, record.expected_graphs, record.compilations) == (1, 1, 1)
    assert (record.graph_breaks, record.recompiles, record.limit_hits) == (0, 0, 0)
    assert record.forward_s > 0
    assert record.graphs_by_region == {"layer": 1}


@pytest.mark.parametrize("mode", ["strict", "warn"])
def test_a_graph_break_is_counted_with_its_line_stops_strict_and_falls_back_in_warn(mode):
    plan, observer = plan_for(block := Breaking(), mode=mode)
    with stopped(mode, r"(?s)no graph break is allowed.*test_observe.py"):
        plan.warm_up(lambda: call(block, 2))
        assert torch.equal(block(torch.ones(2, 8)), torch.ones(2, 8))
        assert "uncompiled" in observer.record().fallbacks[0]
    [reason] = observer.record().graph_break_reasons
    assert observer.record().graph_breaks == 1 and "test_observe.py" in reason


@pytest.mark.parametrize(("mode", "compilations"), [("strict", 1), ("warn", 2)])
def test_a_recompile_after_warm_up_is_counted_with_its_guard_and_stops_strict(mode, compilations):
    plan, observer = plan_for(block := Block(), mode=mode)
    plan.warm_up(lambda: call(block, 2))
    plan.arm()
    with stopped(mode, r"(?s)no recompile is allowed.*size mismatch"):
        plan.call(call, block, 3)
    record = observer.record()
    assert (record.recompiles, record.compilations, record.planned_graphs) == (1, compilations, 1)
    assert record.graph_breaks == 0 and "size mismatch" in record.recompile_reasons[0]


def test_a_module_that_the_compiler_skips_or_never_saw_is_fewer_graphs_than_planned():
    skipped = torch.nn.Sequential(torch.nn.Linear(8, 8))  # its code lies in torch's own files, which dynamo skips
    for module, work in ((skipped, lambda: call(skipped, 2)), (Block(), lambda: None)):
        with stopped("strict", "no compiled frames|exactly the planned graphs"):
            plan_for(module)[0].warm_up(work)


def test_a_new_frame_compiled_after_warm_up_is_caught_though_no_guard_failed():
    plan, observer = plan_for(block := Block())
    plan.warm_up(lambda: call(block, 2))
    plan.arm()
    torch.compile(lambda x: x.sin(), backend="aot_eager")(torch.randn(3))
    with pytest.raises(ContractError, match="nothing may be compiled"):
        plan.check()
    assert observer.record().recompiles == 1


def test_a_region_with_one_graph_too_many_does_not_make_up_for_one_with_too_few():
    blocks, observer = [Block(), Other()], Observer()
    regions = [Region(name, 1, modules=(block,)) for name, block in zip(("mlp", "rmsnorm"), blocks, strict=True)]
    compile = CompileSection(mode="warn", scope="regions", regions=["mlp", "rmsnorm"], backend="aot_eager")
    plan = Plan(regions, compile=compile, observer=observer)
    plan.warm_up(lambda: call(blocks[0], 2, 3))
    plan.arm()
    record = observer.record()
    assert (record.planned_graphs, record.expected_graphs, record.compilations, record.recompiles) == (1, 2, 2, 1)


@torch._dynamo.config.patch(recompile_limit=1)
@pytest.mark.parametrize("mode", ["strict", "warn"])
def test_a_limit_hit_is_counted_stops_strict_and_falls_back_in_warn(mode):
    plan, observer = plan_for(block := Block(), mode=mode)
    with stopped(mode, "recompile limit"):
        plan.warm_up(lambda: call(block, 2))
        plan.call(call, block, 3)
        assert "limit" in observer.record().fallbacks[0]
    assert (observer.record().limit_hits, observer.record().graph_breaks) == (1, 0)


def test_backward_seconds_and_cache_hits_are_seen_with_inductor(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    block = Block()

    def run_once():
        plan, observer = plan_for(block, backend="inductor")
        plan.warm_up(lambda: block(torch.randn(2, 8, requires_grad=True)).sum().backward())
        return observer.record()

    cold, warm = run_once(), run_once()
    assert cold.backward_s > 0
    assert cold.cache_hits == 0 < cold.cache_misses
    assert warm.cache_hits == cold.cache_misses and warm.cache_misses == 0
    assert warm.graph_hash == cold.graph_hash


def test_earlier_compilations_of_the_process_are_not_counted():
    torch.compile(lambda x: x.cos(), backend="aot_eager")(torch.randn(3))
    plan, observer = plan_for(block := Block())
    plan.warm_up(lambda: call(block, 2))
    assert observer.record().compilations == 1

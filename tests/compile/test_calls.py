"""Whether compiled code is what runs: a pass over a micro batch counts its calls, whatever turned compiled code off."""

from contextlib import contextmanager

import pytest
import torch
import torch._dynamo

from launcher.errors import ContractError
from tests.support.plans import Block, plan_for

pytestmark = pytest.mark.usefixtures("clean_dynamo")


@contextmanager
def lost_compiled_call(block):
    """One of the modules is called as it was before it was compiled."""
    compiled, block._compiled_call_impl = block._compiled_call_impl, None
    yield
    block._compiled_call_impl = compiled


@contextmanager
def replaced_call(block):
    """Someone calls the module's forward by another way."""
    block._compiled_call_impl = torch.compiler.disable(block.forward)
    yield


TURNED_OFF = {
    "stance": lambda block: torch.compiler.set_stance("force_eager"),
    "eager on recompile": lambda block: torch.compiler.set_stance("eager_on_recompile"),
    "lost": lost_compiled_call,
    "replaced": replaced_call,
}


def checked_pass(mode="strict", backend="aot_eager"):
    """The second of two blocks, and a checked pass through both that has been compiled."""
    blocks = [Block(), Block()]
    plan, observer = plan_for(*blocks, mode=mode, backend=backend)

    def forward_and_backward():
        x = torch.ones(2, 8, requires_grad=True)
        for block in blocks:
            x = block(x)
        torch.autograd.grad(x.sum(), [p for block in blocks for p in block.parameters()])

    run = plan.checked(forward_and_backward, tokens=2, train=True)
    plan.warm_up(run)
    plan.arm()
    return blocks[1], run, observer


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_pass_counts_its_forward_and_backward_calls_also_of_code_from_a_cache(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for _ in ("cold", "warm"):
        _, run, observer = checked_pass(backend=backend)
        before = observer.calls.copy()
        assert run() and run()
        assert observer.calls - before == {"layer": 4, "layer backward": 4}
        assert observer.record().calls == {"layer": 2, "layer backward": 2}
    assert backend != "inductor" or observer.record().cache_hits > 0


@pytest.mark.parametrize("mode", ["strict", "warn"])
@pytest.mark.parametrize("way", ["stance", "lost", "replaced"])
def test_a_pass_that_does_not_run_compiled_stops_strict_and_is_seen_in_warn(way, mode):
    block, run, observer = checked_pass(mode)
    with TURNED_OFF[way](block):
        if mode == "warn":
            assert not run()
        else:
            with pytest.raises(ContractError, match=r"every micro batch must run compiled code \(layer 2") as caught:
                run()
            assert caught.value.code == 9 and len(str(caught.value).splitlines()) <= 5
    record = observer.record()  # nothing else sees it
    assert (record.graph_breaks, record.recompiles, record.planned_graphs, record.compilations) == (0, 0, 1, 1)


def test_a_stance_that_hides_a_recompile_is_seen():
    blocks = [Block()]
    plan, _ = plan_for(*blocks, mode="warn")
    sizes = [2]
    run = plan.checked(lambda: blocks[0](torch.ones(sizes[0], 8)).sum().backward(), tokens=2, train=True)
    plan.warm_up(run)
    with TURNED_OFF["eager on recompile"](blocks[0]):
        assert run()
        sizes[0] = 3
        assert not run()


def test_a_backward_pass_that_is_left_out_is_seen():
    block = Block()
    plan, _ = plan_for(block, mode="warn")
    run = plan.checked(lambda: block(torch.ones(2, 8)), tokens=2, train=True)
    plan.warm_up(run)
    assert not run()
    assert plan.checked(lambda: block(torch.ones(2, 8)), tokens=2, train=False)()


def test_an_uncompiled_plan_says_so():
    plan, observer = plan_for(Block(), mode="off")
    assert not plan.checked(lambda: None, tokens=2, train=True)()
    assert observer.record().calls == {}

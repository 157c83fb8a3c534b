"""What is said of a graph's inside: equal hashes mean equal programs, and what the compiler does not see has a name."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from launcher.compile import observe
from launcher.compile.contents import without_device_index
from launcher.compile.inductor_cache import OPS
from tests.support.plans import Block, Other, call, plan_for

SCHEMA = "(Tensor x) -> Tensor"

pytestmark = pytest.mark.usefixtures("clean_dynamo")


class Applied(Block):
    """Applies a function to its product."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


def autograd_function(factor):
    """An autograd function whose forward does not depend on `factor`, and its backward does."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * factor

    return Scaled.apply


def custom_operator(factor):
    """The same as a custom operator, which is opaque."""

    @torch.library.custom_op("launcher_tests::scaled", mutates_args=())
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    scaled.register_fake(torch.empty_like)
    scaled.register_autograd(lambda ctx, gradient: gradient * factor)
    return scaled


def implementation(factor):
    """A custom operator whose kernel depends on `factor`."""

    @torch.library.custom_op("launcher_tests::kernel", mutates_args=())
    def kernel(x: torch.Tensor) -> torch.Tensor:
        return x * factor

    kernel.register_fake(torch.empty_like)
    kernel.register_autograd(lambda ctx, gradient: gradient)
    return kernel


class Times:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, ctx, gradient):
        return gradient * self.factor


def formula(kind, factor):
    """A backward formula that holds `factor` in one place or another; the code is always the same."""

    def inner(gradient):
        return gradient * factor

    def by_default(ctx, gradient, by=factor):
        return gradient * by

    def by_keyword(ctx, gradient, *, by=factor):
        return gradient * by

    def product(by, ctx, gradient, *, other=1):
        return gradient * by * other

    def itself(ctx, gradient):
        return itself(ctx, gradient) if gradient is None else inner(gradient)

    kinds = {
        "default": by_default, "keyword default": by_keyword, "partial": partial(product, factor),
        "partial, by keyword": partial(product, 1, other=factor), "closure": lambda ctx, gradient: inner(gradient),
        "closure of itself": itself, "object": Times(factor), "object in a closure": None,
    }  # fmt: skip
    held = Times(factor)
    return kinds[kind] or (lambda ctx, gradient: held(ctx, gradient))


@pytest.mark.parametrize(
    "kind",
    [
        "default", "keyword default", "partial", "partial, by keyword", "closure", "closure of itself", "object",
        "object in a closure",
    ],
)  # fmt: skip
def test_the_hash_sees_what_a_backward_formula_holds(kind):
    def hashed(factor):
        operator = torch.library.custom_op("launcher_tests::held", lambda x: x * 2, mutates_args=(), schema=SCHEMA)
        operator.register_fake(torch.empty_like)
        operator.register_autograd(formula(kind, factor))
        return record_of(Applied(operator)).graph_hash

    hashes = [hashed(factor) for factor in (2, 2, 3)]
    assert hashes[0] == hashes[1] != hashes[2]


def allowed_in_graph(factor):
    return torch.compiler.allow_in_graph(lambda x: x * factor)


def checkpointed(factor):
    def body(x):
        return torch.sin(x) if factor == 2 else torch.cos(x)

    return lambda x: checkpoint(body, x, use_reentrant=False)


def record_of(block, rows=2):
    plan, observer = plan_for(block)
    plan.warm_up(lambda: call(block, rows))
    return observer.record()


def test_equal_programs_have_equal_hashes_and_others_do_not():
    hashes = [record_of(*of).graph_hash for of in ((Block(), 2), (Block(), 2), (Block(), 3), (Other(), 2))]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


@pytest.mark.parametrize("make", [autograd_function, custom_operator, implementation, allowed_in_graph, checkpointed])
def test_programs_that_differ_below_their_outermost_code_have_other_hashes(make):
    hashes = [record_of(Applied(make(factor))).graph_hash for factor in (2, 2, 3)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_hash_changes_with_an_operators_source(monkeypatch, tmp_path):
    before = record_of(Block()).graph_hash
    monkeypatch.setattr(observe, "OPS", tmp_path)
    assert record_of(Block()).graph_hash != before and Path(OPS).is_dir()


def test_opaque_calls_and_reads_by_the_host_are_named_and_counted():
    def forward(x):
        attended = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return custom(custom(attended)) + x.sum().item()

    custom = custom_operator(2)
    [graph] = record_of(Applied(forward)).graphs
    expected = {"item (the host waits)": 1, "launcher_tests.scaled": 2, "scaled_dot_product_attention": 1}
    assert graph.opaque == expected and graph.region == "layer"
    assert graph.nodes >= sum(expected.values()) + 3  # product, sum, addition
    assert record_of(Block()).graphs[0].opaque == {}


@pytest.mark.parametrize("form", ["torch.arange(8, device = device(type='cuda', index={}))", "x.to('cuda:{}')"])
def test_graph_hashes_do_not_depend_on_which_gpu_of_the_machine_a_rank_has(form):
    codes = [without_device_index(form.format(index)) for index in (0, 1)]
    assert codes[0] == codes[1]
    assert "cuda" in codes[0]
    assert without_device_index("x.view(1, 2)") != without_device_index("x.view(1, 3)")

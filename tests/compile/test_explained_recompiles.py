"""Each cause of a recompile is provoked, and explained with the user's line, both values and the remedy."""

import re
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from launcher.compile.observe import COMPILE_ERRORS, Observer
from launcher.records.explanation import Explanation
from tests.support.plans import Block, plan_for, stopped

pytestmark = pytest.mark.usefixtures("clean_dynamo")

FLAG = 1
DEF, LINE = "def forward(self, x, mask=None", "y = self.act(self.linear(x))"
PRECISION = torch.set_float32_matmul_precision
X = torch.ones(2, 16, 8)


class Model(Block):
    """Reads all that a guard can watch."""

    def __init__(self, layer_idx: int = 0) -> None:
        super().__init__()
        self.layer_idx, self.scale, self.names, self.act = layer_idx, 3, ["a"], nn.ReLU()

    def forward(self, x, mask=None, position_ids=None, factor=1):
        y = self.act(self.linear(x)) * self.scale * len(self.names) * FLAG * factor
        y = y if mask is None else y + mask
        y = y if position_ids is None else y * position_ids
        return nn.functional.dropout(y, 0.1, self.training)


class Numbered(Model):
    def forward(self, x):
        return self.linear(x) * (self.layer_idx + 1)


@contextmanager
def under(setter: Callable[[Any], Any], value: Any, back: Any):
    setter(value)
    yield
    setter(back)


@contextmanager
def changed_global():
    global FLAG
    FLAG = 2
    yield
    FLAG = 1


def changed(model: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


THREADS = torch.get_num_threads()
CPU = "CPU, BackendSelect, ADInplaceOrView"
SHAPE = "a tensor of shape (8,)"
RELU, TANH = (f"torch.nn.modules.activation.{name}" for name in ("ReLU", "Tanh"))

# What is called after warm-up; of its explanation what, line, before, now, remedy; a context around both.
RECOMPILES: dict[str, tuple[Any, ...]] = {
    "length": (lambda m: m(X[:, :15]), "a length of 15 is not one of the planned 16 (dimension 1 of x)",
               DEF, "16", "15", "Set data.batching=packed"),
    "batch": (lambda m: m(torch.ones(3, 16, 8)), "a batch of 3 is not", DEF, "2", "3", "Pad the last batch"),
    "batch of 1": (lambda m: m(X[:1]), "a batch of 1 is not", DEF, "2", "1", "1 is a size of its own"),
    "dtype": (lambda m: m.double()(X.double()), "x has another dtype", DEF, "Float", "Double", "model.dtype"),
    "rank": (lambda m: m(X[0]), "another number of dimensions", DEF, "3", "2", "same dimensions"),
    "stride": (lambda m: m(torch.ones(16, 2, 8).transpose(0, 1)), "order in memory", DEF, "128", "8", ".contiguous()"),
    "gradient": (lambda m: m(X.clone().requires_grad_()), "the input x requires a gradient in one layer",
                 DEF, "requires_grad=0", "requires_grad=1", "the hook on the embedding's output"),
    "frozen": (lambda m: (m.linear.weight.requires_grad_(False), m(X)), "the weight self.linear.weight is trained in",
               DEF, "requires_grad=1", "requires_grad=0", "Train or freeze it in all layers alike"),
    "resized": (lambda m: changed(m, linear=nn.Linear(8, 9))(X), "the weight self.linear.bias was replaced",
                DEF, "8", "9", "before warm-up"),
    "mask": (lambda m: m(X, mask=torch.ones(8)), "mask was absent and now is there",
             "if mask is None", "None", SHAPE, "in every call of the run, or in none"),
    "positions": (lambda m: m(X, position_ids=torch.ones(8)), "position_ids was absent and now is there",
                  "if position_ids is None", "None", SHAPE, "in every call of the run, or in none"),
    "no_grad": (lambda m: torch.no_grad()(lambda: m(X))(), "torch.no_grad or inference_mode is on in one call",
                DEF, "on", "off", "train.eval_every"),
    "inference_mode": (lambda m: torch.inference_mode()(lambda: m(X))(), "inference_mode is on in one call",
                       DEF, "on", "off", "outside the compiled code"),
    "of inference_mode": (lambda m: m(torch.inference_mode()(X.clone)()), "or was made in inference_mode",
                          DEF, f"{CPU}, AutogradCPU", CPU, "outside torch.inference_mode"),
    "eval": (lambda m: m.eval()(X), "between train() and eval()", "self.training", "True", "False", "in train()"),
    "autocast": (lambda m: torch.autocast("cpu", torch.bfloat16)(lambda: m(X))(), "autocast was switched",
                 DEF, "off", "on", "Leave autocast out"),
    "threads": (lambda m: m(X), "the number of threads changed", DEF, f"{THREADS}", f"{THREADS + 1}",
                "Leave it to the launcher", lambda: under(torch.set_num_threads, THREADS + 1, THREADS)),
    "deterministic": (lambda m: m(X), "deterministic algorithms", DEF, "off", "on", "Set train.deterministic",
                      lambda: under(torch.use_deterministic_algorithms, True, False)),
    "precision": (lambda m: m(X), "precision of matrix products", DEF, "highest", "high",
                  "torch.set_float32_matmul_precision once", lambda: under(PRECISION, "high", "highest")),
    "default": (lambda m: m(X), "a setting of torch", DEF, "torch.float32", "torch.float64", "before warm-up",
                lambda: under(torch.set_default_dtype, torch.float64, torch.float32)),
    "attribute": (lambda m: changed(m, scale=4)(X), "the attribute self.scale", LINE, "3", "4", "alike in all layers"),
    "items": (lambda m: (m.names.append("b"), m(X)), "(len(self.names))", LINE, "1", "2", "keep its length"),
    "global": (lambda m: m(X), "the global variable FLAG changed", LINE, "1", "2", "before warm-up", changed_global),
    "argument": (lambda m: m(X, factor=2), "factor, an argument or a variable", LINE, "1", "2", "as a tensor"),
    "module": (lambda m: changed(m, act=nn.Tanh())(X), "self.act is an object of another type",
               LINE, RELU, TANH, "Replace modules"),
}  # fmt: skip


# One of each way in which values are read without an error.
IN_WARN = ("length", "frozen", "mask", "no_grad", "autocast", "threads", "attribute", "global", "module")


def shows(explanation: Explanation, what: str, line: str, before: str, now: str, remedy: str) -> None:
    assert what in explanation.what and remedy in explanation.remedy
    assert "test_explained_recompiles.py:" in explanation.line and line in explanation.line
    assert (explanation.before, explanation.now) == (before, now)
    assert explanation.raw


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "strict") for name in RECOMPILES), *((name, "warn") for name in IN_WARN)]
)
def test_a_recompile_is_explained_with_its_line_both_values_and_the_remedy(name, mode):
    act, *expected = RECOMPILES[name][:6]
    context = RECOMPILES[name][6] if len(RECOMPILES[name]) > 6 else nullcontext
    plan, observer = plan_for(model := Model(), mode=mode)
    plan.warm_up(lambda: model(X))
    plan.arm()
    with context(), stopped(mode, re.escape(expected[0])):
        plan.call(act, model)
    [explanation] = observer.record().explanations
    shows(explanation, *expected)


def test_of_several_planned_lengths_all_are_named_whatever_else_differs():
    plan, _ = plan_for(model := Model(), graphs=4)

    def every_length():
        for length in (512, 1024):
            model(torch.ones(1, length, 8))
            with torch.no_grad():
                model(torch.ones(1, length, 8))

    plan.warm_up(every_length)
    plan.arm()
    what = "a length of 1,023 is not one of the planned 1,024, 512 .*\n.*\n.*\n  Set data.batching=packed"
    with stopped("strict", what):
        plan.call(model, torch.ones(1, 1023, 8))


@pytest.mark.parametrize(
    ("difference", "what", "before", "now"),
    [
        (lambda models: None, "the code uses its layer's number", "0", "1"),
        (
            lambda models: models[1].linear.bias.requires_grad_(False),
            "linear.bias is trained in",
            "requires",
            "requires",
        ),
    ],
)
def test_one_graph_too_many_in_warm_up_names_the_guard_that_differs(difference, what, before, now):
    models = [Numbered(0), Numbered(1)] if "number" in what else [Model(), Model()]
    difference(models)
    plan, observer = plan_for(*models)
    with stopped("strict", f"(?s)compiled layer 2.\nMore than planned: .*{what}.*before: {before}.*now: {now}"):
        plan.warm_up(lambda: [model(X) for model in models])
    assert what in observer.record().explanations[0].what


def test_a_function_that_warm_up_had_not_called_is_named():
    plan, observer = plan_for(block := Block())
    plan.warm_up(lambda: block(torch.ones(2, 8)))
    plan.arm()
    torch.compile(lambda x: x.sin(), backend="aot_eager")(torch.ones(3))
    with stopped(
        "strict", "(?s)a function was compiled that warm-up had not called\n  at .*lambda x: x.sin.*Call it in"
    ):
        plan.check()


def closure(value):
    def read(x):
        return x * value

    def write(new):
        nonlocal value
        value = new

    return read, write


@pytest.mark.parametrize(
    ("function", "first", "second", "dynamic", "what", "remedy"),
    [
        (lambda x: x @ x, (torch.ones(2, 8, 8),), (X,), True, "the first input had both alike", "such as head_dim"),
        (nn.Linear(8, 8).forward, (X,), (X[:1],), True, "a dynamic size became 1", "Pad to at least 2"),
        (lambda x, y: x + y, (X, X), (X, X.clone()), False, "two inputs are one tensor in some", "the same one in"),
        (lambda x, y: x + y, (X, X.clone()), (X, X), False, "two inputs are one tensor in some", "the same one in"),
    ],
)
def test_dynamic_sizes_and_shared_tensors_are_explained_though_no_plan_has_them(
    function, first, second, dynamic, what, remedy
):
    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=dynamic)
    compiled(*first)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(COMPILE_ERRORS) as caught:
        compiled(*second)
    explanation = Observer().explain_error(caught.value)
    assert what in explanation.what and remedy in explanation.remedy and explanation.line


def test_a_variable_around_the_function_is_explained_with_both_values():
    read, write = closure(3)
    observer, compiled = Observer(), torch.compile(read, backend="eager", fullgraph=True)
    compiled(X)
    write(4)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(COMPILE_ERRORS) as caught:
        compiled(X)
    explanation = observer.explain_error(caught.value)
    assert explanation.what.startswith("value, an argument or a variable around the function")
    assert (explanation.before, explanation.now) == ("3", "4") and "x * value" in explanation.line

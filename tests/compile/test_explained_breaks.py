"""Each cause of a graph break, a limit hit and a backend error is provoked, and explained with line and remedy."""

import logging
import re
import time
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn

from tests.support.plans import Block, call, plan_for, refuse, stopped

pytestmark = pytest.mark.usefixtures("clean_dynamo")

LOG = logging.getLogger("test")
skipped = torch.compiler.disable(lambda x: x)


# The code of a break, and of its explanation: what, now, remedy.
BREAKS: dict[str, tuple[Any, ...]] = {
    "branch": (lambda x: x if x.sum() > 0 else -x, "decides by a tensor's values", "", "torch.where"),
    "branch on item": (lambda x: x if x.sum().item() > 0 else -x, "decides by a tensor's values", "", "torch.where"),
    "loop": (lambda x: [x for _ in range(int(x.sum()))][0], "decides by a tensor's values", "", "outside the compiled"),
    "read": (lambda x: x.tolist() and x, "reads a tensor's values on the host (tolist)", "", "Keep the value a tensor"),
    "print": (lambda x: print(x.shape) or x, "prints, logs or reads (print)", "", "Move that line out"),
    "log": (lambda x: LOG.warning("x") or x, "prints, logs or reads (logging.Logger)", "", "Move that line out"),
    "file": (lambda x: input() and x, "prints, logs or reads (input)", "", "Move that line out"),
    "asked for": (lambda x: torch._dynamo.graph_break() or x, "asks for a graph break (torch._d", "", "Remove"),
    "disabled": (lambda x: skipped(x), "asks for a graph break (torch.compiler.disable)", "", "Remove that call"),
    "offload": (lambda x: torch.autograd.graph.save_on_cpu() and x, "to the host", "", "memory.activations=offload"),
    "gradient": (lambda x: x.requires_grad_(), "requires_grad_()", "", "disable_input_require_grads"),
    "error": (lambda x: 1 / 0, "raised an error", "ZeroDivisionError", "compile.mode=off"),
    "shapes": (lambda x: x @ torch.ones(3, 3), "does not accept its inputs", "RuntimeError(", "compile.mode=off"),
    "builtin": (lambda x: time.sleep(0) or x, "calls time.sleep, into which", "", "torch.library.custom_op"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["strict", "warn"])
@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")
def test_a_break_is_explained_with_its_line_and_the_remedy_in_strict_and_in_warn(name, mode):
    function, what, now, remedy = BREAKS[name]

    class Breaking(Block):
        def forward(self, x):
            return function(x)

    plan, observer = plan_for(block := Breaking(), mode=mode)
    with stopped(mode, re.escape(what)), suppress(ZeroDivisionError, RuntimeError, OSError):
        plan.warm_up(lambda: block(torch.ones(2, 8)))
    [explanation] = observer.record().explanations
    assert what in explanation.what and remedy in explanation.remedy and now in explanation.now
    assert "test_explained_breaks.py:" in explanation.line and "lambda x:" in explanation.line
    assert mode == "strict" or what in observer.record().fallbacks[0]


def test_a_generator_and_code_that_is_skipped_are_explained():
    class Generating(Block):
        def forward(self, x):
            yield x

    for module in (Generating(), nn.Sequential(nn.Linear(8, 8))):
        plan, _ = plan_for(module)
        with stopped("strict", "(?s)the compiler skipped the function: .*Compile a function that calls it"):
            plan.warm_up(lambda module=module: module(torch.ones(2, 8)))


@torch._dynamo.config.patch(recompile_limit=1)
def test_a_limit_hit_is_explained_by_the_last_guard():
    plan, observer = plan_for(model := Block())
    with stopped("strict", "recompile limit may not be reached: a batch of 3 is not"):
        plan.warm_up(lambda: call(model, 2, 3))
    [explanation] = observer.record().explanations
    assert "size mismatch" in explanation.raw and "def forward(self, x: Tensor)" in explanation.line


def test_a_backend_error_is_explained(monkeypatch):
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: refuse)
    plan, observer = plan_for(model := Block())
    with stopped("strict", "(?s)could not make code of the graph: .*planted.*Try another compile.backend"):
        plan.warm_up(lambda: call(model, 2))
    assert len(observer.record().explanations) == 1

"""Several planned shapes: each is a graph of its own, however many there are, and no other is let through."""

import pytest
import torch
import torch._dynamo
from torch import nn

from launcher.compile.observe import Observer
from launcher.compile.plan import Plan
from launcher.compile.regions import Region
from launcher.errors import ContractError
from launcher.recipe.schema import CompileSection

pytestmark = pytest.mark.usefixtures("clean_dynamo")

SHAPES = range(2, 14)  # more than dynamo's own limit of compilations for one piece of code


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


def planned_for(block: Block, graphs: int) -> tuple[Plan, Observer]:
    observer = Observer()
    compile = CompileSection(scope="layer", regions=[], backend="aot_eager")
    return Plan([Region("layer", graphs, modules=(block,))], compile=compile, observer=observer), observer


def call(block: Block) -> None:
    for rows in SHAPES:
        block(torch.ones(rows, 4))


def test_more_planned_shapes_than_dynamos_own_limit_are_compiled_and_nothing_after_them() -> None:
    with torch._dynamo.config.patch(recompile_limit=8):
        assert len(SHAPES) > torch._dynamo.config.recompile_limit
        block = Block()
        plan, observer = planned_for(block, len(SHAPES))
        plan.warm_up(lambda: call(block))
        plan.arm()
        plan.call(call, block)
        record = observer.record()
        assert record.planned_graphs == record.expected_graphs == record.compilations == len(SHAPES)
        assert (record.recompiles, record.limit_hits) == (0, 0)
        with pytest.raises(ContractError, match="no recompile is allowed after warm-up"):
            plan.call(block, torch.ones(max(SHAPES) + 1, 4))


def test_products_are_compiled_without_padding_and_the_compilers_setting_is_given_back() -> None:
    block, seen = Block(), []

    def run() -> None:
        seen.append(torch._inductor.config.shape_padding)
        call(block)

    planned_for(block, len(SHAPES))[0].warm_up(run)
    assert seen == [False] and torch._inductor.config.shape_padding


@pytest.mark.parametrize("difference", [-1, 1])
def test_one_shape_more_or_fewer_than_planned_is_refused_in_warm_up(difference: int) -> None:
    block = Block()
    plan, _ = planned_for(block, len(SHAPES) + difference)
    with pytest.raises(ContractError, match=r"exactly the planned graphs|recompile limit"):
        plan.warm_up(lambda: call(block))

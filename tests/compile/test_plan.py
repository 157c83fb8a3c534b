"""What a plan compiles: in place, every planned shape, however many, and nothing else."""

import pytest
import torch
import torch._dynamo

from launcher.errors import ContractError
from tests.support.plans import Block, call, plan_for

pytestmark = pytest.mark.usefixtures("clean_dynamo")

SHAPES = range(2, 14)  # more than dynamo's own limit of compilations for one piece of code


def test_more_planned_shapes_than_dynamos_own_limit_are_compiled_and_nothing_after_them() -> None:
    with torch._dynamo.config.patch(recompile_limit=8):
        assert len(SHAPES) > torch._dynamo.config.recompile_limit
        block = Block()
        plan, observer = plan_for(block, graphs=len(SHAPES))
        plan.warm_up(lambda: call(block, *SHAPES))
        plan.arm()
        plan.call(call, block, *SHAPES)
        record = observer.record()
        assert record.planned_graphs == record.expected_graphs == record.compilations == len(SHAPES)
        assert (record.recompiles, record.limit_hits) == (0, 0)
        with pytest.raises(ContractError, match="no recompile is allowed after warm-up"):
            plan.call(call, block, max(SHAPES) + 1)


@pytest.mark.parametrize("difference", [-1, 1])
def test_one_shape_more_or_fewer_than_planned_is_refused_in_warm_up(difference: int) -> None:
    block = Block()
    plan, observer = plan_for(block, graphs=2 + difference)
    with pytest.raises(ContractError, match="exactly the planned graphs"):
        plan.warm_up(lambda: call(block, 2, 3))
    assert observer.record().recompiles == (1 if difference < 0 else 0)


def test_compiling_in_place_leaves_state_dict_names_alone() -> None:
    block = Block()
    plan_for(block)
    assert list(block.state_dict()) == ["linear.weight", "linear.bias"]


def test_mode_off_compiles_nothing() -> None:
    block = Block()
    plan, observer = plan_for(block, mode="off")
    plan.warm_up(lambda: call(block, 2))
    record = observer.record()
    assert (record.compilations, record.expected_graphs, record.graph_hash) == (0, 0, "-")

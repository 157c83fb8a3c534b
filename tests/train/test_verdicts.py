import pytest

from launcher.records.run import EvalRecord
from launcher.train.verdicts import compile_verdicts, loss_verdict
from tests.support.records import rank_record, step_record


def compiled(**changes):
    return rank_record(0, **{"planned_graphs": 3, "expected_graphs": 3, "compilations": 3, **changes})


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"graph_breaks": 1}, "zero graph breaks"),
        ({"recompiles": 1}, "zero recompiles"),
        ({"limit_hits": 1}, "zero recompiles"),
        ({"compilations": 5}, "exactly the planned graphs"),
        ({"planned_graphs": 2, "compilations": 2}, "exactly the planned graphs"),
        ({"fallbacks": ("all",)}, "exactly the planned graphs"),
        ({"graph_hash": "xyz"}, "every rank compiled the same graphs"),
    ],
)
def test_each_verdict_fails_on_the_rank_that_breaks_its_claim(changes, claim):
    assert all(v.holds for v in compile_verdicts([compiled(), compiled()]))
    assert [v.claim for v in compile_verdicts([compiled(), compiled(**changes)]) if not v.holds] == [claim]


def test_a_loss_that_is_not_finite_fails_its_verdict():
    step = step_record(1)
    assert loss_verdict([step], [EvalRecord(0, 1.0)]).holds
    assert not loss_verdict([step, step_record(2, loss=float("nan"))], []).holds
    assert not loss_verdict([step], [EvalRecord(0, float("inf"))]).holds

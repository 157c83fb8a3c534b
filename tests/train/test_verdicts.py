import pytest

from launcher.records.run import CompileRecord, EvalRecord, RankRecord, StepRecord
from launcher.train.verdicts import compile_verdicts, loss_verdict


def compiled(**changes):
    values = {"planned_graphs": 4, "expected_graphs": 4, "compilations": 4, "graph_breaks": 0, "recompiles": 0}
    rest = {"limit_hits": 0, "backend_errors": 0, "forward_s": 1.0, "backward_s": 1.0, "cache_hits": 0}
    values = {**values, **rest, "graph_hash": "abc"}
    return RankRecord(0, "cpu", CompileRecord(**{**values, **changes}), (), 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"graph_breaks": 1}, "zero graph breaks"),
        ({"recompiles": 1}, "zero recompiles"),
        ({"limit_hits": 1}, "zero recompiles"),
        ({"compilations": 5}, "exactly the planned graphs"),
        ({"planned_graphs": 3, "compilations": 3}, "exactly the planned graphs"),
        ({"fallbacks": ("all",)}, "exactly the planned graphs"),
        ({"graph_hash": "xyz"}, "every rank compiled the same graphs"),
    ],
)
def test_each_verdict_fails_on_the_rank_that_breaks_its_claim(changes, claim):
    assert all(v.holds for v in compile_verdicts([compiled(), compiled()]))
    assert [v.claim for v in compile_verdicts([compiled(), compiled(**changes)]) if not v.holds] == [claim]


def test_a_loss_that_is_not_finite_fails_its_verdict():
    step = StepRecord(1, 1.0, 0.1, 1.0, 1, 1, 1.0, 1.0)
    assert loss_verdict([step], [EvalRecord(0, 1.0)]).holds
    assert not loss_verdict([step, StepRecord(2, float("nan"), 0.1, 1.0, 1, 1, 1.0, 1.0)], []).holds
    assert not loss_verdict([step], [EvalRecord(0, float("inf"))]).holds

import pytest

from launcher.records.run import CompileRecord
from launcher.train.verdicts import compile_verdicts


def compiled(**changes):
    values = {"planned_graphs": 4, "expected_graphs": 4, "compilations": 4, "graph_breaks": 0, "recompiles": 0}
    rest = {"limit_hits": 0, "backend_errors": 0, "forward_s": 1.0, "backward_s": 1.0, "cache_hits": 0}
    ran = {"steps": 3, "steps_compiled": 3, "evaluations": 2, "evaluations_compiled": 2}
    return CompileRecord(**{**values, **rest, **ran, "graph_hash": "abc", **changes})


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"graph_breaks": 1}, "zero graph breaks"),
        ({"recompiles": 1}, "zero recompiles"),
        ({"limit_hits": 1}, "zero recompiles"),
        ({"compilations": 5}, "exactly the planned graphs"),
        ({"planned_graphs": 3, "compilations": 3}, "exactly the planned graphs"),
        ({"fallbacks": ("all",)}, "exactly the planned graphs"),
        ({"steps_compiled": 2}, "every step ran compiled"),
        ({"evaluations_compiled": 0}, "every step ran compiled"),
        ({"steps": 0, "steps_compiled": 0}, "every step ran compiled"),
        ({"graph_hash": "xyz"}, "every rank compiled the same graphs"),
    ],
)
def test_each_verdict_fails_on_the_rank_that_breaks_its_claim(changes, claim):
    assert all(v.holds for v in compile_verdicts([compiled(), compiled()], steps=1))
    assert [v.claim for v in compile_verdicts([compiled(), compiled(**changes)], steps=1) if not v.holds] == [claim]

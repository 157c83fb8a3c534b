import pytest

from launcher.records.run import CompileRecord, StepRecord
from launcher.train.verdicts import compile_verdicts, learning_verdict
from tests.support.records import step_record


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


def steps_of(losses: list[float], *, norm: float = 1.0) -> list[StepRecord]:
    return [step_record(n, loss=loss, grad_norm=norm) for n, loss in enumerate(losses, 1)]


NOISE = [0.1, -0.1] * 20


@pytest.mark.parametrize(
    ("losses", "eval_losses", "holds"),
    [
        ([3 - n / 20 for n in range(40)], [], True),
        ([3 + n for n in NOISE], [], True),  # cannot be told
        ([3 + n / 20 for n in range(40)], [], False),
        ([3 - n / 20 for n in range(40)], [2.0, 2.5], True),  # learned by heart
        ([3 + n for n in NOISE], [2.0, 1.9], True),
        ([3 + n for n in NOISE], [2.0, 2.0], False),
        ([3 + n for n in NOISE], [2.0, 9.0], False),
    ],
)
def test_training_that_lowers_no_loss_fails_its_verdict(
    losses: list[float], eval_losses: list[float], holds: bool
) -> None:
    verdict = learning_verdict(steps_of(losses), eval_losses)
    assert verdict is not None and verdict.holds == holds, verdict


def test_a_run_without_gradients_has_learned_nothing_and_a_short_one_is_not_judged() -> None:
    falling = [3 - n / 20 for n in range(40)]
    dead = learning_verdict(steps_of(falling, norm=0.0), [2.0, 1.0])
    assert dead is not None and not dead.holds
    assert learning_verdict(steps_of(falling[:19]), [2.0, 3.0]) is None

"""The order of the processes, and what becomes of a comparison when one of them fails."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from launcher.errors import ContractError, LauncherError, MemoryExhausted
from launcher.proof.bench import compare
from launcher.proof.bench.compare import bench
from launcher.proof.bench.processes import ChildFailed
from launcher.records.bench import BenchRecord
from tests.conftest import request_for
from tests.support.records import NAIVE, OURS, WORKLOAD

Events = Callable[..., list[Any]]


@pytest.fixture
def events(make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Events:
    """The events of a bench whose processes yield the given records, or raise the given errors."""

    def run(*, naive: Any = NAIVE, plain: Any = NAIVE, ours: Any = OURS, **sections: dict[str, Any]) -> list[Any]:
        results = {"workload": WORKLOAD, "ours": ours, "naive": naive, "plain": plain}

        def run_child(task: Any, request: Any) -> Iterator[Any]:
            assert task.func is compare.measure
            [part] = task.args
            assert request.recipe.train.neftune_alpha == 0, "stock modules draw no such noise"
            assert request.recipe.lora.init == "default" or part in ("workload", "ours")
            yield f"measures {part}"
            if isinstance(results[part], Exception):
                raise results[part]
            yield results[part]

        monkeypatch.setattr(compare, "run_child", run_child)
        return list(bench(request_for(make_recipe(**sections))))

    return run


def test_data_comes_first_then_ours_then_naive_with_checkpointing_and_without(events: Events) -> None:
    *phases, record = events()
    assert phases == [
        "reading data", "measures workload", "ours: starting", "measures ours", "naive: starting", "measures naive",
        "plain: starting", "measures plain",
    ]  # fmt: skip
    assert isinstance(record, BenchRecord) and record.holds and record.notes == ()
    assert record.recipe["train"]["steps"] == 4  # as the user gave it, not as long as the measurement


def test_neftune_is_left_out_on_every_side_and_a_note_says_so(events: Events) -> None:
    record = events(train={"neftune_alpha": 5.0})[-1]
    assert record.notes == ("measured with train.neftune_alpha=0, not the recipe's 5",)
    assert record.recipe["train"]["neftune_alpha"] == 5.0


def test_stock_code_begins_at_zero_where_ours_starts_from_the_base_and_a_note_says_so(events: Events) -> None:
    record = events(lora={"init": "pissa"})[-1]
    assert record.notes == ("the stock side has lora.init=default, not pissa: its losses agree at step 1 alone",)
    assert record.recipe["lora"]["init"] == "pissa" and record.holds
    assert events(lora={"init": "pissa"}, proof={"bench_naive": "off"})[-1].notes == ()


@pytest.mark.parametrize(
    ("wanted", "parts"),
    [
        (True, ["naive", "plain"]), ("checkpointed", ["naive"]), ("plain", ["plain"]),
        (False, []),
    ],
)  # fmt: skip
def test_the_recipe_chooses_the_naive_sides(events: Events, wanted: Any, parts: list[str]) -> None:
    *phases, record = events(proof={"bench_naive": wanted})
    assert [phase[9:] for phase in phases if phase.startswith("measures")] == ["workload", "ours", *parts]
    assert record.holds
    assert [name for name, side in (("naive", record.naive), ("plain", record.plain)) if side] == parts
    compared = {"naive": record.speed_up, "plain": record.to_plain.speed_up}
    assert [name for name, speed_up in compared.items() if speed_up is not None] == parts


def test_a_plain_side_that_does_not_fit_costs_no_other_figure(events: Events) -> None:
    full = replace(NAIVE, failure="out of memory before its first step ended", out_of_memory=True, losses=())
    record = events(plain=full)[-1]
    assert record.notes == (f"plain: {full.failure}",) and record.speed_up and record.to_plain.speed_up is None


@pytest.mark.parametrize(("changes", "broken"), [({"batches": "other"}, 1), ({"losses": (2.6,)}, 2)])
def test_a_plain_side_that_does_other_work_is_a_failure_too(
    events: Events, changes: dict[str, Any], broken: int
) -> None:
    record = events(plain=replace(NAIVE, **changes))[-1]
    assert [place for place, verdict in enumerate(record.verdicts) if not verdict.holds] == [broken]


@pytest.mark.parametrize(
    ("naive", "out_of_memory"),
    [
        (replace(NAIVE, failure="out of memory after 2 steps", out_of_memory=True, steps_s=()), True),
        (ChildFailed("its process was ended by SIGKILL"), False),
        (LauncherError("no such model"), False),
    ],
)
def test_a_naive_side_that_fails_loses_none_of_our_figures(events: Events, naive: Any, out_of_memory: bool) -> None:
    failure = str(naive) if isinstance(naive, Exception) else naive.failure
    record = events(naive=naive)[-1]
    assert (record.naive.failure, record.naive.out_of_memory) == (failure, out_of_memory)
    assert record.notes == (f"naive: {failure}",)
    assert record.ours.steps_s == OURS.side.steps_s and record.ours.tokens_per_s and record.speed_up is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ContractError("a graph break"), "^a graph break"),
        (MemoryExhausted("full"), "^full"),
        (ChildFailed("its process failed: ZeroDivisionError"), "^our side: its process failed: ZeroDivisionError"),
    ],
)
def test_our_side_fails_with_its_own_error_and_a_crash_says_whose_it_was(
    events: Events, error: LauncherError, message: str
) -> None:
    with pytest.raises(type(error), match=message):
        events(ours=error)


def test_what_ran_uncompiled_is_a_note(events: Events) -> None:
    fallback = replace(OURS, compile=replace(OURS.compile, fallbacks=("all regions run uncompiled",)))
    assert events(ours=fallback)[-1].notes == ("all regions run uncompiled",)
    assert "not compiled" in events(compile={"mode": "off"})[-1].notes[0]

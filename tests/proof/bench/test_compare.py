"""The order of the processes and what becomes of a comparison when one of them fails."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from launcher.errors import ContractError, LauncherError, MemoryExhausted
from launcher.proof.bench import compare
from launcher.proof.bench.compare import bench
from launcher.proof.bench.processes import ChildFailed
from launcher.records.bench import BenchRecord
from launcher.runtime.ranks import RankInfo
from launcher.train.request import Request
from tests.conftest import ROOT
from tests.support.records import NAIVE, OURS, WORKLOAD


@pytest.fixture
def played(make_recipe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """The events of a bench whose processes end as given; an error is raised in place of the record."""

    def play(*, naive: Any = NAIVE, ours: Any = OURS, **sections: dict[str, Any]) -> list[Any]:
        ends = {compare._workload: WORKLOAD, compare._ours: ours, compare._naive: naive}

        def run_child(task: Any, request: Request) -> Iterator[Any]:
            yield task.__name__
            if isinstance(ends[task], Exception):
                raise ends[task]
            yield ends[task]

        monkeypatch.setattr(compare, "run_child", run_child)
        return list(bench(Request(make_recipe(**sections), "test", "/m", ROOT / "recipes", RankInfo(0, 0, 1, 1))))

    return play


def test_data_comes_first_then_ours_then_naive(played: Callable[..., list[Any]]) -> None:
    *phases, found = played()
    assert phases == ["reading data", "_workload", "ours: starting", "_ours", "naive: starting", "_naive"]
    assert isinstance(found, BenchRecord) and found.holds and found.notes == ()
    assert found.recipe["train"]["steps"] == 4  # as the user gave it, not as long as the measurement


def test_the_naive_side_can_be_left_out(played: Callable[..., list[Any]]) -> None:
    *phases, found = played(proof={"bench_naive": False})
    assert "_naive" not in phases and found.naive is None and found.holds


def test_a_naive_side_out_of_memory_loses_none_of_our_figures(played: Callable[..., list[Any]]) -> None:
    full = replace(NAIVE, failure="out of memory after 2 steps", out_of_memory=True, steps_s=())
    found = played(naive=full)[-1]
    assert found.naive == full and found.notes == ("naive: out of memory after 2 steps",)
    assert found.ours.steps_s == OURS.side.steps_s and found.ours.tokens_per_s and found.speed_up is None


@pytest.mark.parametrize("error", [ChildFailed("its process was ended by SIGKILL"), LauncherError("no such")])
def test_a_naive_side_that_dies_loses_none_of_our_figures(
    played: Callable[..., list[Any]], error: LauncherError
) -> None:
    found = played(naive=error)[-1]
    assert found.naive.failure == str(error) and not found.naive.out_of_memory
    assert found.ours.steps_s == OURS.side.steps_s and found.ours.tokens_per_s and str(error) in found.notes[0]


@pytest.mark.parametrize("error", [ContractError("a graph break"), MemoryExhausted("full")])
def test_our_side_fails_with_its_own_error(played: Callable[..., list[Any]], error: LauncherError) -> None:
    with pytest.raises(type(error), match=str(error)):
        played(ours=error)


def test_a_crash_of_our_side_says_whose_it_was(played: Callable[..., list[Any]]) -> None:
    with pytest.raises(ChildFailed, match="our side: its process failed"):
        played(ours=ChildFailed("its process failed: ZeroDivisionError"))


def test_what_ran_uncompiled_is_a_note(played: Callable[..., list[Any]]) -> None:
    fell_back = replace(OURS, compile=replace(OURS.compile, fallbacks=("all regions run uncompiled",)))
    assert played(ours=fell_back)[-1].notes == ("all regions run uncompiled",)
    assert "not compiled" in played(compile={"mode": "off"})[-1].notes[0]

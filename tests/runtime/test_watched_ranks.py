"""What follows from the states of all ranks: who is to blame, and that nobody is while all wait for work."""

from typing import Any

import pytest

from launcher.runtime.watched_ranks import WatchedRanks

TIMEOUT_S = 10.0


def state(beat: int, **others: Any) -> dict[str, Any]:
    place = {"host": "here", "machine": "m", "pid": 7, "step": 3, "progress": [9, 0], "timed": True, "ending": None}
    return {"beat": beat, **place, **others}


def cause(*moments: dict[int, dict[str, Any]] | None, timeout_s: float | None = TIMEOUT_S, own: int = 1) -> Any:
    """What rank `own` of three finds after these answers of rank 0, one a second. None: there was no answer."""
    ranks = WatchedRanks(own, world_size=3, timeout_s=timeout_s)
    for now, states in enumerate(moments):
        if states is not None:
            ranks.update(states, now)
    return ranks.cause(len(moments) - 1)


def moments(count: int, **by_rank: Any) -> list[dict[int, dict[str, Any]]]:
    """All three ranks speak and stand still, but for what is said of rank0, rank1 and rank2 in state's words."""
    return [{rank: state(now, **by_rank.get(f"rank{rank}", {})) for rank in range(3)} for now in range(count)]


def moved(count: int) -> list[dict[int, dict[str, Any]]]:
    return [{rank: state(now, progress=[now, 0]) for rank in range(3)} for now in range(count)]


def test_nobody_is_blamed_where_all_go_on_or_no_rank_has_spoken() -> None:
    assert cause(*moved(60)) is None
    assert cause({}) is None


def test_a_rank_that_fails_is_the_cause_in_its_own_words_also_when_it_is_gone_by_now() -> None:
    ending = {"code": 6, "reason": "memory ran out", "rank": 2, "step": 4}
    found = cause(*moments(2, rank2={"ending": ending, "gone": True}))
    assert (vars(found.ending), found.kind) == (ending, "told")


def test_a_rank_that_ended_well_is_no_cause_and_nobody_is_waited_for_any_more() -> None:
    done = {"code": 0, "reason": "done", "rank": 0, "step": 4}
    assert cause(*moments(2, rank0={"ending": done, "gone": True})) is None
    assert cause(*moments(30, rank0={"ending": done}, rank2={"progress": [8, 0]})) is None


@pytest.mark.parametrize("timeout_s", [TIMEOUT_S, None])
def test_a_rank_that_is_gone_without_a_word_is_found_at_once_whatever_the_timeout(timeout_s: float | None) -> None:
    found = cause(*moments(1, rank2={"gone": True, "step": 2}), timeout_s=timeout_s)
    assert (found.ending.code, found.ending.rank, found.ending.step, found.kind) == (8, 2, 3, "gone")
    assert "rank 2 ended without a word" in found.ending.reason and "process 7 on here" in found.ending.reason


def silent_from(second: int, rank: int, count: int) -> list[dict[int, dict[str, Any]]]:
    said = moved(count)
    for later in range(second, count):
        said[later][rank] = said[second][rank]
    return said


def test_a_rank_that_is_silent_for_the_timeout_is_stopped_though_its_progress_is_not_timed() -> None:
    assert cause(*silent_from(3, 2, 13)) is None
    found = cause(*silent_from(3, 2, 15))
    assert (found.ending.rank, found.kind) == (2, "stopped") and "run.timeout=10s" in found.ending.reason
    assert cause(*silent_from(3, 2, 60), timeout_s=None) is None


def test_a_rank_that_never_spoke_counts_as_stopped() -> None:
    begun = [{0: state(now), 1: state(now, progress=[8, 0])} for now in range(1, 60)]
    assert cause({}, *begun[:9]) is None
    found = cause({}, *begun)
    assert (found.ending.rank, found.kind) == (2, "stopped") and "It never spoke" in found.ending.reason


def test_rank_0_is_to_blame_where_no_answer_comes_and_not_the_others_of_whom_nothing_is_heard_then() -> None:
    answered = moved(3)
    assert cause(*answered, *[None] * 10) is None
    found = cause(*answered, *[None] * 11)
    assert (found.ending.rank, found.kind) == (0, "stopped")


def test_the_rank_behind_is_asleep_once_all_stand_still() -> None:
    behind = {"progress": [8, 5]}
    assert cause(*moments(11, rank2=behind)) is None
    found = cause(*moments(12, rank2=behind))
    assert (found.ending.rank, found.kind) == (2, "asleep") and "kept the others waiting" in found.ending.reason
    found = cause(*moments(12, rank1=behind, own=1))
    assert found.ending.rank == 1, "it finds itself"
    assert cause(*moments(60, rank2=behind), timeout_s=None) is None


def test_nobody_sleeps_where_one_still_moves_nobody_is_behind_or_the_one_behind_is_in_a_long_phase() -> None:
    working = [{**states, 2: state(now, progress=[8, now])} for now, states in enumerate(moments(60))]
    assert cause(*working) is None, "a slow step"
    assert cause(*moments(60)) is None, "the devices are at work"
    assert cause(*moments(60, rank2={"progress": [8, 0], "timed": False})) is None, "it saves"


def test_a_watcher_that_was_stopped_itself_counts_anew() -> None:
    ranks = WatchedRanks(1, world_size=3, timeout_s=TIMEOUT_S)
    [states] = moments(1, rank2={"progress": [8, 0]})
    ranks.update(states, 0.0)
    ranks.count_anew(3600.0)
    assert ranks.cause(3601.0) is None
    assert ranks.cause(3611.0) is not None

"""Ranks that wait for each other: here threads of one process, at a port of this machine."""

import socket
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest

from launcher.errors import DataError, LostRank, RecipeError
from launcher.runtime import rendezvous
from launcher.runtime.ranks import RankInfo
from launcher.runtime.rendezvous import tell_failure, wait_for_ranks


def rank(number: int, of: int) -> RankInfo:
    return RankInfo(number, number, of, of)


@pytest.fixture
def port(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "_waited", deque(maxlen=0))  # the ranks of a test share one
    monkeypatch.setattr(rendezvous, "_ended", {})
    return port


def test_all_ranks_meet_in_one_store(port):
    with ThreadPoolExecutor(3) as threads:
        stores = list(threads.map(lambda number: wait_for_ranks(rank(number, 3), wait_s=60), range(3)))
    stores[2].set("key", "value")
    assert stores[1].get("key") == b"value"


def test_who_is_missing_is_said_and_ends_the_wait(port, monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "SAY_AFTER_S", 0.5)
    with ThreadPoolExecutor(2) as threads:
        waits = [threads.submit(wait_for_ranks, rank(number, 4), wait_s=2) for number in (0, 2)]
    for wait in waits:
        with pytest.raises(LostRank, match=r"within data.wait_s=2 seconds; rank 1, 3 of 4 has not come to .*; 2 of 4"):
            wait.result()
    said = f"rank 1, 3 of 4 has not come to 127.0.0.1:{port}; 2 of 4 are there; waiting up to data.wait_s=2 s\n"
    assert capfd.readouterr().err == said  # once, by rank 0


def test_a_missing_first_rank_is_said_without_a_word_of_torch(port, monkeypatch, capfd):
    monkeypatch.setattr(rendezvous, "SAY_AFTER_S", 0.5)
    with pytest.raises(LostRank, match="rank 0 of 2 has not come to"):
        wait_for_ranks(rank(1, 2), wait_s=1)
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_taken_port_is_an_error_of_the_command_line(port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(RecipeError, match=f"MASTER_PORT must be free; {port} is not"):
            wait_for_ranks(rank(0, 2), wait_s=60)


class RowError(DataError):
    """Of a module that other ranks may not have imported."""


@pytest.mark.parametrize("failing", [0, 3])
def test_a_rank_that_fails_before_it_has_come_ends_the_waiting_ranks_of_other_machines(port, failing):
    """Four ranks on two machines. A rank of another machine is told the reason, not after wait_s but at once."""
    ranks = [RankInfo(number, number % 2, 4, 2) for number in range(4)]
    with ThreadPoolExecutor(4) as threads:
        waits = [threads.submit(wait_for_ranks, info, wait_s=60) for info in ranks if info.rank != failing]
        threads.submit(tell_failure, ranks[failing], RowError("rows.jsonl must be there")).result(timeout=15)
        errors = [wait.exception(timeout=15) for wait in waits]
    for error in errors:
        assert type(error) is DataError and error.code == 3
        said = f"rank {failing} on {socket.gethostname()} failed before the run began: rows.jsonl"
        assert str(error).startswith(said)
    printed = [error.rank is None for error in errors]
    assert sum(printed) == 2, "one of each machine prints it"


def test_a_rank_that_has_heard_a_failure_stays_with_its_store_until_later_ones_have_heard_it(port):
    """Three machines. Rank 0, which has the store, hears rank 1 at once; rank 2 still imports."""
    ranks = [RankInfo(number, 0, 3, 1) for number in range(3)]
    with ThreadPoolExecutor(3) as threads:
        telling = threads.submit(tell_failure, ranks[1], DataError("rows.jsonl must be there"))
        error = threads.submit(wait_for_ranks, ranks[0], wait_s=60).exception(timeout=15)
        staying = threads.submit(tell_failure, ranks[0], error)
        with pytest.raises(TimeoutError):
            staying.result(timeout=0.5)
        later = threads.submit(wait_for_ranks, ranks[2], wait_s=60).exception(timeout=15)
        assert str(later) == str(error) and error.reporter == later.reporter == 0
        for rest in (telling, staying):
            rest.result(timeout=15)


def test_a_failure_is_told_only_to_other_machines_only_by_who_has_not_waited_and_not_for_ever(port, monkeypatch):
    monkeypatch.setattr(rendezvous, "TELL_S", 0.3)
    tell_failure(RankInfo(1, 0, 2, 1), DataError("nobody is there"))
    connects = []
    monkeypatch.setattr(rendezvous, "_connect", connects.append)
    tell_failure(RankInfo(1, 1, 2, 2), DataError("its launcher ends the others"))
    monkeypatch.setattr(rendezvous, "_waited", [])
    assert not connects
    with pytest.raises(LostRank):
        wait_for_ranks(RankInfo(1, 0, 2, 1), wait_s=0)
    connects.clear()
    tell_failure(RankInfo(1, 0, 2, 1), DataError("the others wait in vain too"))
    assert not connects

"""Processes that tell each other how they are: what ends one of them ends all, with its code."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK = Path(__file__).with_name("heartbeat_rank.py")


@pytest.fixture
def begin(tmp_path: Path):
    """`begin(*deeds, timeout_s)`: a process for each, all past step 2."""
    processes: list[subprocess.Popen[str]] = []

    def start(*deeds: str, timeout_s: float = 0) -> list[subprocess.Popen[str]]:
        for rank, deed in enumerate(deeds):
            words = [sys.executable, RANK, rank, len(deeds), deed, timeout_s, tmp_path / "address"]
            processes.append(
                subprocess.Popen([str(word) for word in words], stdout=subprocess.PIPE, text=True, env={**os.environ})
            )
        for process in processes:
            assert process.stdout and process.stdout.readline() == "step 2\n"
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def ends(processes: list[subprocess.Popen[str]], *, within_s: float) -> list[tuple[int, str]]:
    """Exit codes and what was printed."""
    limit = time.monotonic() + within_s
    for process in processes:
        process.wait(timeout=max(0.1, limit - time.monotonic()))
    # Not communicate(timeout=...): what readline() has read ahead is lost to it.
    outs = [process.stdout.read() if process.stdout else "" for process in processes]
    return [(process.returncode, out) for process, out in zip(processes, outs, strict=True)]


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_fails_ends_the_ones_that_hang_and_the_ones_that_meet_its_end_with_its_own_code(begin, failing):
    deeds = ["waits", "meets it", "waits"]
    deeds[failing] = "memory"
    results = ends(begin(*deeds), within_s=15)
    assert [code for code, _ in results] == [6, 6, 6]
    assert "ends with 6 the device ran out of memory" in results[1][1]
    hanging = results[2 - failing][1]
    assert f"lost 6 {failing} the device ran out of memory" in hanging and "ends with" not in hanging


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_at_once_whatever_the_timeout(begin, killed):
    processes = begin("waits", "waits", "waits")
    processes[killed].kill()
    results = ends(processes, within_s=10)
    assert [code for code, _ in results] == [-9 if rank == killed else 8 for rank in range(3)]
    assert f"lost 8 {killed} rank {killed} ended without a word" in results[2][1] and "its last step 2" in results[2][1]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_is_killed_after_the_timeout_and_ends_the_others(begin, stopped):
    processes = begin("waits", "waits", "waits", timeout_s=3)
    processes[stopped].send_signal(signal.SIGSTOP)
    results = ends(processes, within_s=13)
    assert [code for code, _ in results] == [-9 if rank == stopped else 8 for rank in range(3)]
    assert any(f"lost 8 {stopped} rank {stopped} was silent for run.timeout=3s" in out for _, out in results)


@pytest.mark.parametrize("asleep", [0, 1])
def test_the_rank_that_sleeps_is_named_and_ends_all(begin, asleep):
    deeds = ["waits", "waits", "waits"]
    deeds[asleep] = "sleeps"
    results = ends(begin(*deeds, timeout_s=3), within_s=13)
    assert [code for code, _ in results] == [8, 8, 8]
    assert all(f"lost 8 {asleep} rank {asleep} kept the others waiting for run.timeout=3s" in out for _, out in results)


def test_a_group_that_is_suspended_for_longer_than_the_timeout_goes_on_and_ends_well(begin):
    processes = begin("steps", "steps", timeout_s=6)
    for process in reversed(processes):
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.7)  # nothing of the last one lies unread at the first one
    time.sleep(7.5)
    for process in processes:
        process.send_signal(signal.SIGCONT)
        time.sleep(1)  # meanwhile the first one finds nothing new of the other
    assert ends(processes, within_s=60) == [(0, ""), (0, "")]


def test_ranks_that_are_done_leave_each_other_alone(begin):
    assert ends(begin("ends", "ends", "ends", timeout_s=1), within_s=15) == [(0, "")] * 3

"""one_rank_first among real processes, all children of this one as a launch's ranks are children of its launcher."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from launcher.runtime.first_rank import STALE_S, one_rank_first
from launcher.runtime.ranks import RankInfo
from tests.conftest import ROOT

WORKER = """
import glob, json, os, sys, time
from launcher.data.read.rows import RowFault
from launcher.errors import DataError
from launcher.runtime.first_rank import one_rank_first
from launcher.runtime.ranks import rank_info

def work():
    report["work_at"] = time.time()
    exec(sys.argv[1])
    return "value"

def wait_for(path, files=1):
    while len(glob.glob(path)) < files:
        time.sleep(0.05)

report = {}
print("ready", file=sys.stderr, flush=True)
try:
    report["value"] = one_rank_first(rank_info(), work, wait_s=float(sys.argv[2]))
except BaseException as error:
    report["error"], report["reporter"] = [type(error).__name__, str(error)], getattr(error, "reporter", None)
print(json.dumps({**report, "torch": "torch" in sys.modules}))
"""


class Launch:
    """Ranks that do `work`, with the user's cache in `cache`."""

    def __init__(self, cache: Path, work: str = "pass", *, of: int = 2, wait_s: float = 60.0, port: int = 1) -> None:
        self.command = [sys.executable, "-c", WORKER, work, str(wait_s)]
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)}
        self.environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        self.environment |= {"WORLD_SIZE": str(of), "LOCAL_WORLD_SIZE": str(of)}
        self.files = cache / "qlora-launcher" / "launches"
        self.ranks: dict[int, subprocess.Popen[str]] = {}

    def start(self, *ranks: int) -> "Launch":
        for rank in ranks:
            environment = {**self.environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.ranks[rank] = subprocess.Popen(
                self.command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        assert all(self.ranks[rank].stderr.readline() == "ready\n" for rank in ranks)
        return self

    def wait_for_work(self) -> "Launch":
        """Until a rank has begun to work."""
        while not list(self.files.glob("*.json")):
            assert all(process.poll() is None for process in self.ranks.values()), "no rank has begun"
            time.sleep(0.05)
        return self

    def reports(self) -> list[dict[str, Any]]:
        """What each rank reports, in the order in which they did the work."""
        reports = [json.loads(process.communicate(timeout=600)[0]) for process in self.ranks.values()]
        return sorted(reports, key=lambda report: report.get("work_at", float("inf")))


@pytest.mark.parametrize("info", [RankInfo(3, 0, 4, 1), RankInfo(1, 1, 2, 2)], ids=["alone", "without a cache"])
def test_where_nothing_can_be_shared_a_rank_works_at_once(monkeypatch, tmp_path, info):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert one_rank_first(info, lambda: "value", wait_s=0.0) == "value"


def test_on_a_file_system_without_locks_a_rank_works_at_once(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fcntl.flock", flock)
    assert one_rank_first(RankInfo(1, 1, 2, 2), lambda: "value", wait_s=0.0) == "value"


def test_one_rank_works_and_the_others_after_it_at_the_same_time(tmp_path):
    """The first leaves a mark when it is done; each of the others waits, at its work, for the other one."""
    done = str(tmp_path / "done")
    work = (
        f"if not os.path.exists({done!r}):\n    time.sleep(0.2)\n    open({done!r}, 'x')\n"
        f"else:\n    open(f'{tmp_path}/{{os.getpid()}}.at-work', 'x')\n    wait_for('{tmp_path}/*.at-work', files=2)"
    )
    reports = Launch(tmp_path, work, of=3).start(1, 2, 0).reports()
    assert all(report["value"] == "value" and not report["torch"] for report in reports)


def test_the_error_of_the_first_rank_is_that_of_the_others_and_one_rank_reports_it(tmp_path):
    go = tmp_path / "go"
    fault = "raise RowFault('null', where='rows.jsonl:7', rule='a rule', found='null')"
    launch = Launch(tmp_path, f"wait_for({str(go)!r})\n{fault}", of=3).start(2).wait_for_work().start(0, 1)
    go.touch()
    first, *others = launch.reports()
    kind, message = first["error"]
    assert kind == "RowFault" and message.startswith("rows.jsonl:7: a rule\nFound: null\n")
    assert [report["error"] for report in others] == [["DataError", message]] * 2  # a class of launcher/errors.py
    assert not any("work_at" in report for report in others)
    assert [report["reporter"] for report in (first, *others)] == [2, 2, 2]


def test_an_unforeseen_error_of_the_first_rank_is_repeated_by_the_others_under_its_name(tmp_path):
    go = tmp_path / "go"
    launch = Launch(tmp_path, f"wait_for({str(go)!r})\nraise ValueError('a fault')").start(0).wait_for_work().start(1)
    go.touch()
    first, other = launch.reports()
    assert first["error"] == ["ValueError", "a fault"]
    assert other["error"] == ["LauncherError", "ValueError: a fault"] and "work_at" not in other


def test_when_the_working_rank_is_killed_the_next_one_works(tmp_path):
    go = tmp_path / "go"
    launch = Launch(tmp_path, f"wait_for({str(go)!r})").start(0).wait_for_work().start(1)
    working = launch.ranks.pop(0)
    working.kill()
    assert working.wait() == -signal.SIGKILL
    go.touch()
    assert [report["value"] for report in launch.reports()] == ["value"]


def test_waiting_ends_after_wait_s_and_names_the_process_that_works(tmp_path):
    go = tmp_path / "go"
    launch = Launch(tmp_path, f"wait_for({str(go)!r})", wait_s=1.0).start(0).wait_for_work().start(1)
    launch.ranks[1].wait()
    go.touch()
    first, other = launch.reports()
    kind, message = other["error"]
    assert kind == "LostRank"
    assert f"within data.wait_s=1 seconds; process {launch.ranks[0].pid} is still at it" in message
    assert "Raise data.wait_s, or run mode=preview first" in message
    assert first["value"] == "value"


def test_launches_do_not_see_each_other(tmp_path):
    good = Launch(tmp_path, port=1).start(0, 1)
    bad = Launch(tmp_path, "raise DataError('0 rows')", port=2).start(0, 1)
    assert [report["error"] for report in bad.reports()] == [["DataError", "0 rows"]] * 2
    assert [report["value"] for report in good.reports()] == ["value"] * 2


def test_a_later_launch_believes_nothing_of_the_former(tmp_path):
    """Both have this process as launcher, and all else that names a launch."""
    assert Launch(tmp_path, "raise DataError('0 rows')").start(0).reports()[0]["error"] == ["DataError", "0 rows"]
    later = Launch(tmp_path).start(0, 1)
    assert [report["value"] for report in later.reports()] == ["value"] * 2
    assert len(list(later.files.glob("*.json"))) == 1


def test_files_of_launches_that_have_long_ended_are_removed_but_no_held_lock(tmp_path):
    old = Launch(tmp_path).start(0)
    old.reports()
    former = set(old.files.iterdir())
    assert len(former) == 2
    with FileLock(old.files / "held.lock") as held:
        for file in old.files.iterdir():
            os.utime(file, (0, time.time() - STALE_S - 60))
        new = Launch(tmp_path, port=2).start(0)
        new.reports()
        files = set(new.files.iterdir())
    assert not former & files and len(files) == 3 and Path(held.lock_file) in files

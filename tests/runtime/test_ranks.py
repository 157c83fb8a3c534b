"""local_rank_0_first among real processes, all children of this one as a launch's ranks are children of its agent."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.runtime.ranks import RankInfo, local_rank_0_first

ROOT = Path(__file__).resolve().parents[2]
REMEDY = "Fix the row, or set data.bad_rows=skip to drop such rows and count them."
WORKER = """
import json, os, signal, sys, time
from launcher.data.read.rows import RowFault
from launcher.errors import DataError, LauncherError
from launcher.runtime.ranks import local_rank_0_first, rank_info

def work():
    told["work_at"] = time.time()
    if here.local_rank == 0:
        exec(sys.argv[1])
    told["done_at"] = time.time()
    return f"value {here.local_rank}"

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
here, told = rank_info(), {}
print("imported", file=sys.stderr, flush=True)
try:
    told["value"] = local_rank_0_first(here, work, wait_s=float(sys.argv[2]))
except BaseException as error:
    told["error"] = [type(error).__name__, str(error)]
print(json.dumps({**told, "end_at": time.time(), "torch": "torch" in sys.modules}))
"""


class Launch:
    """Ranks that do `first` in local rank 0, with TMPDIR at `folder`."""

    def __init__(self, folder: Path, first: str = "pass", *, of: int = 2, wait_s: float = 60.0, port: int = 1) -> None:
        self.command = [sys.executable, "-c", WORKER, first, str(wait_s)]
        self.environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "MASTER_PORT": str(port)}
        self.environment |= {"WORLD_SIZE": str(of), "LOCAL_WORLD_SIZE": str(of)}
        self.ranks: dict[int, subprocess.Popen[str]] = {}

    def start(self, *ranks: int) -> "Launch":
        for rank in ranks:
            environment = {**self.environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.ranks[rank] = subprocess.Popen(
                self.command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        return self

    def told(self, rank: int) -> dict[str, Any]:
        out, err = self.ranks[rank].communicate(timeout=30)
        assert out, err
        found: dict[str, Any] = json.loads(out)
        return found


def wait_for(folder: Path, pattern: str) -> Path:
    """The one path that matches, as soon as there is one."""
    for _ in range(600):
        if found := list(folder.glob(pattern)):
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no {pattern} in {folder}")


def test_alone_a_rank_just_works_and_makes_no_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert local_rank_0_first(RankInfo(3, 0, 4, 1), lambda: "value", wait_s=0.0) == "value"


def test_the_others_work_after_local_rank_0_is_done_and_nothing_is_left(tmp_path):
    launch = Launch(tmp_path, "time.sleep(1)", of=3).start(1, 2, 0)
    first, *others = (launch.told(rank) for rank in range(3))
    assert [told["value"] for told in (first, *others)] == ["value 0", "value 1", "value 2"]
    assert first["done_at"] - first["work_at"] >= 1
    assert all(told["work_at"] >= first["done_at"] for told in others)
    assert not any(told["torch"] for told in (first, *others))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("first", "raised", "reached"),
    [
        ("raise DataError('0 rows\\nGive some.')", ["DataError", "0 rows\nGive some."], None),
        (
            "raise RowFault('null', where='rows.jsonl:7', rule='a rule', found='null')",
            ["RowFault", f"rows.jsonl:7: a rule\nFound: null\n{REMEDY}"],
            "DataError",
        ),
        ("len(3)", ["TypeError", "object of type 'int' has no len()"], "LauncherError"),
        ("raise KeyboardInterrupt", ["KeyboardInterrupt", ""], "LostRank"),
    ],
)
def test_the_failure_of_local_rank_0_is_that_of_the_others_within_a_second(tmp_path, first, raised, reached):
    launch = Launch(tmp_path, f"time.sleep(0.5); {first}", of=3).start(0, 1, 2)
    told = [launch.told(rank) for rank in range(3)]
    assert told[0]["error"] == raised
    expected = {
        "LauncherError": "TypeError: object of type 'int' has no len()",
        "LostRank": "local rank 0 was stopped (KeyboardInterrupt) before it was done.",
    }
    for other in told[1:]:
        assert other["error"] == [reached or raised[0], expected.get(reached, raised[1])]
        assert "work_at" not in other
        assert abs(other["end_at"] - told[0]["end_at"]) < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("first", "heard"), [("pass", [None, None]), ("raise DataError('0 rows')", [["DataError", "0 rows"]] * 2)]
)
def test_a_rank_that_comes_late_still_hears_how_it_went(tmp_path, first, heard):
    launch = Launch(tmp_path, first).start(0)
    wait_for(tmp_path, "*/left-0")
    launch.start(1)
    assert [launch.told(rank).get("error") for rank in (0, 1)] == heard
    assert list(tmp_path.iterdir()) == []


def test_a_local_rank_0_that_is_killed_frees_the_others_soon(tmp_path):
    launch = Launch(tmp_path, "time.sleep(30)").start(1, 0)
    wait_for(tmp_path, "*/state")
    time.sleep(0.5)
    assert launch.ranks[1].poll() is None
    launch.ranks[0].kill()  # not reaped: a zombie has ended too
    killed_at = time.time()
    told = launch.told(1)
    kind, message = told["error"]
    assert kind == "LostRank" and f"its process {launch.ranks[0].pid} ended before it was done" in message
    assert told["end_at"] - killed_at < 2
    assert launch.ranks[0].wait() == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_the_others_do_not_wait_longer_than_they_must(tmp_path):
    launch = Launch(tmp_path, "time.sleep(3)", wait_s=1.0).start(0, 1)
    kind, message = launch.told(1)["error"]
    assert kind == "LostRank"
    assert f"within data.wait_s=1 seconds; its process {launch.ranks[0].pid} is still at it" in message
    assert launch.told(0)["value"] == "value 0"
    assert list(tmp_path.iterdir()) == []
    alone = Launch(tmp_path, wait_s=0.2).start(1).told(1)
    assert "it has not begun" in alone["error"][1] and list(tmp_path.iterdir()) == []


def test_a_rank_that_is_interrupted_while_it_waits_leaves_nothing(tmp_path, tmp_path_factory):
    go = tmp_path_factory.mktemp("signals") / "go"
    launch = Launch(tmp_path, f"while not os.path.exists({str(go)!r}): time.sleep(0.02)").start(0, 1)
    wait_for(tmp_path, "*/state")
    assert launch.ranks[1].stderr.readline() == "imported\n"  # from here on it waits
    time.sleep(0.3)
    launch.ranks[1].send_signal(signal.SIGINT)
    assert launch.told(1)["error"][0] == "KeyboardInterrupt"
    go.touch()
    assert launch.told(0)["value"] == "value 0"
    assert list(tmp_path.iterdir()) == []


def test_two_launches_side_by_side_do_not_meet(tmp_path):
    good = Launch(tmp_path, "time.sleep(1)", port=1).start(1, 0)
    bad = Launch(tmp_path, "time.sleep(0.5); raise DataError('0 rows')", port=2).start(1, 0)
    assert [bad.told(rank)["error"] for rank in (0, 1)] == [["DataError", "0 rows"]] * 2
    assert [good.told(rank)["value"] for rank in (0, 1)] == ["value 0", "value 1"]
    assert list(tmp_path.iterdir()) == []


def left_behind(folder: Path) -> Path:
    """The folder that a killed launch of the same name left, and would be another's but for this common parent."""
    dead = Launch(folder, "time.sleep(30)").start(0)
    state = wait_for(folder, "*/state")
    dead.ranks[0].kill()
    dead.ranks[0].communicate()
    return state.parent


@pytest.mark.parametrize("what", ["working", "done", "failed"])
def test_what_a_killed_launch_left_is_never_believed(tmp_path, what):
    state = left_behind(tmp_path) / "state"
    told = json.loads(state.read_text())
    stale = {**told, "what": what, "class": "DataError", "message": "of a former launch"}
    state.write_text(json.dumps(stale))
    launch = Launch(tmp_path, "time.sleep(0.5)").start(1)
    time.sleep(1)
    assert launch.ranks[1].poll() is None
    launch.start(0)
    first, other = launch.told(0), launch.told(1)
    assert other["value"] == "value 1" and other["work_at"] >= first["done_at"]
    assert list(tmp_path.iterdir()) == []
    if what == "failed":  # the same words of a process that lives are believed
        state.parent.mkdir(mode=0o700)
        with subprocess.Popen(["sleep", "30"]) as living:
            state.write_text(json.dumps({**stale, "pid": living.pid}))
            assert Launch(tmp_path).start(1).told(1)["error"] == ["DataError", "of a former launch"]
            living.kill()


@pytest.mark.parametrize("fault", ["link", "open to others"])
def test_a_folder_that_is_not_private_is_refused_by_every_rank(tmp_path, fault):
    folder = left_behind(tmp_path)
    if fault == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.chmod(0o755)
    launch = Launch(tmp_path).start(0, 1)
    for rank in (0, 1):
        kind, message = launch.told(rank)["error"]
        assert kind == "DiskError" and "must be this user's own and private" in message

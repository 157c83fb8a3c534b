"""A task in a process of its own: what it yields arrives, how it ends is told, and it never outlives its parent."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.errors import DataError
from launcher.proof.bench.processes import ChildFailed, run_child
from launcher.runtime.ranks import RankInfo
from launcher.train.request import Request
from tests.conftest import ROOT
from tests.proof.bench import child_tasks


@pytest.fixture
def asked(make_recipe: Callable[..., Any]) -> Request:
    return Request(make_recipe(), "test", "/models/base", ROOT / "recipes", RankInfo(0, 0, 1, 1), ("a note",))


def test_what_a_task_yields_arrives_and_its_process_is_another_one_without_torch(asked: Request) -> None:
    phase, (pid, torch_imported, seen) = run_child(child_tasks.tells, asked)
    assert phase == "a phase" and pid != os.getpid() and not torch_imported
    assert seen == asked
    assert not psutil.pid_exists(pid)


def test_an_error_meant_for_the_user_is_raised_as_it_was(asked: Request) -> None:
    with pytest.raises(DataError, match="rows must be there") as caught:
        list(run_child(child_tasks.refuses, asked))
    assert (caught.value.code, caught.value.step) == (3, 7)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (child_tasks.crashes, "ZeroDivisionError: planted"),
        (child_tasks.is_killed, "SIGKILL, as a machine that runs out of memory does"),
        (child_tasks.leaves, "without a result, with code 3"),
    ],
)
def test_any_other_end_is_told(asked: Request, task: Any, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    events = run_child(task, asked)
    assert next(events) == "a phase"
    with pytest.raises(ChildFailed, match=said):
        list(events)
    assert ("Traceback" in capfd.readouterr().err) == (task is child_tasks.crashes)


def test_a_child_is_ended_when_its_reader_stops(asked: Request) -> None:
    events = run_child(child_tasks.waits, asked)
    pid = next(events)
    assert psutil.pid_exists(pid)
    events.close()  # type: ignore[attr-defined]
    assert not psutil.pid_exists(pid)


def test_a_child_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "from pathlib import Path\n"
        "from launcher.proof.bench.processes import run_child\n"
        "from launcher.train.request import Request\n"
        "from launcher.runtime.ranks import RankInfo\n"
        "from launcher.recipe.schema import Recipe\n"
        "from tests.proof.bench import child_tasks\n"
        "if __name__ == '__main__':\n"
        "    asked = Request(Recipe(train={'steps': 1}), 'n', 's', Path(), RankInfo(0, 0, 1, 1))\n"
        "    for event in run_child(child_tasks.waits, asked):\n"
        "        print(event, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)  # nobody here may wait for it
    except psutil.NoSuchProcess:
        return False


def test_the_parent_imports_no_torch_so_that_it_holds_no_memory_of_the_device() -> None:
    code = "import sys, launcher.cli; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

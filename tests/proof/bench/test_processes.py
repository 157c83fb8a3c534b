"""A task in a child process: its events and errors arrive, and the process never outlives its parent."""

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from functools import partial
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

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
Start = Callable[[str], Generator[Any, None, None]]


@pytest.fixture
def request_(make_recipe: Callable[..., Any]) -> Request:
    return Request(make_recipe(), "test", "/models/base", ROOT / "recipes", RankInfo(0, 0, 1, 1), ("a note",))


@pytest.fixture
def start(request_: Request) -> Start:
    """The events of a child that ends in the given way."""
    return lambda ending: run_child(partial(child_tasks.task, ending), request_)  # type: ignore[return-value]


def test_events_arrive_from_another_process_that_imports_no_torch(start: Start, request_: Request) -> None:
    [(pid, torch_imported, request)] = start("done")
    assert pid != os.getpid() and not torch_imported
    assert request == request_
    assert not psutil.pid_exists(pid)


def test_an_error_meant_for_the_user_is_raised_unchanged(start: Start) -> None:
    with pytest.raises(DataError, match="rows must be there") as caught:
        list(start("error"))
    assert (caught.value.code, caught.value.step) == (3, 7)


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("crash", "its process failed: ZeroDivisionError: planted"),
        ("kill", "SIGKILL, as a machine that runs out of memory does"),
        ("exit", "without a result, with code 3"),
    ],
)
def test_any_other_end_is_a_failure_that_says_how_it_ended(
    start: Start, ending: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    events = start(ending)
    next(events)
    with pytest.raises(ChildFailed, match=message):
        next(events)
    assert ("Traceback" in capfd.readouterr().err) == (ending == "crash")


def test_a_child_ends_when_its_reader_stops(start: Start) -> None:
    events = start("wait")
    pid, *_ = next(events)
    assert psutil.pid_exists(pid)
    events.close()
    assert not psutil.pid_exists(pid)


def test_a_child_ends_with_its_parent_however_that_ends(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "from functools import partial\n"
        "from pathlib import Path\n"
        "from launcher.proof.bench.processes import run_child\n"
        "from launcher.train.request import Request\n"
        "from launcher.runtime.ranks import RankInfo\n"
        "from launcher.recipe.schema import Recipe\n"
        "from tests.proof.bench import child_tasks\n"
        "if __name__ == '__main__':\n"
        "    request = Request(Recipe(train={'steps': 1}), 'n', 's', Path(), RankInfo(0, 0, 1, 1))\n"
        "    for pid, *_ in run_child(partial(child_tasks.task, 'wait'), request):\n"
        "        print(pid, flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, script], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    parent.wait()
    # Nobody here may wait for it, so it may stay as a zombie.
    psutil.wait_procs([child], timeout=600)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_the_parent_imports_no_torch_so_that_it_holds_no_memory_of_the_device() -> None:
    code = "import sys, launcher.cli; print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "False"

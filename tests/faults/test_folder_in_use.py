"""One process at a time trains in a folder, until the last word on its run is written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from launcher import api
from launcher.checkpoint.folder import RunFolder
from launcher.checkpoint.run_files import RunFiles
from launcher.errors import CheckpointError
from launcher.records.run import EvalRecord, RunOpened
from tests.conftest import ROOT
from tests.support.arguments import replaced
from tests.support.bundles import written
from tests.support.runs import lines, trained

pytestmark = pytest.mark.usefixtures("clean_dynamo")

MakeRecipe = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A folder that this process has taken for a run."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def test_fault_07_a_folder_in_use_is_refused_before_torch_and_its_run_is_left_alone(run: RunFolder) -> None:
    files = RunFiles(0)
    for event in (RunOpened(run.path), EvalRecord(0, 3.0)):
        files.show(event)
    before = {path: path.read_bytes() for path in run.path.rglob("*")}
    program = (
        "import runpy, sys\n"
        f"sys.argv[:] = [{str(ROOT / 'launcher' / 'main.py')!r}, 'recipe=tiny', 'run.output_dir={run.path}']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=run.path.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (4, "False\n"), done.stderr
    assert f"process {os.getpid()} on" in done.stderr and str(run.path) in done.stderr
    assert {path: path.read_bytes() for path in run.path.rglob("*")} == before
    with pytest.raises(CheckpointError, match=f"process {os.getpid()} on"):  # found too where it is taken meanwhile
        RunFolder(run.path).lock()


def test_fault_07_a_folder_that_was_given_back_or_whose_run_died_is_taken(
    make_recipe: MakeRecipe, run: RunFolder
) -> None:
    run.unlock()
    assert not (run.path / "run.lock").exists()
    (run.path / "run.lock").write_text("4711 on another host")  # of a process that was killed
    trained(make_recipe(compile={"mode": "off"}))
    assert not (run.path / "run.lock").exists() and lines(run.path)


@pytest.mark.parametrize("ends", ["well", "with an error", "with a late note"])
def test_fault_07_a_folder_is_in_use_until_the_last_word_on_its_run_is_written(
    small_arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """A run that took it before would find its own status and report overwritten."""
    folder, refused = tmp_path / "run", list[str]()

    def tried(self: RunFiles, *arguments: Any, **named: Any) -> Any:
        try:
            RunFolder(folder).check_unused()
        except CheckpointError as error:
            refused.append(str(error))
        return original(self, *arguments, **named)

    late = ends == "with a late note"
    original = RunFiles.add_notes if late else RunFiles.end
    monkeypatch.setattr(RunFiles, original.__name__, tried)
    steps = "train.steps=2" if ends != "with an error" else "train.steps=1"
    if ends == "with an error":
        monkeypatch.setattr(RunFiles, "with_pages", lambda *_: 1 / 0)
    arguments = replaced(
        small_arguments[1:], "compile.mode=off", "run.sample_tokens=0", steps, f"run.output_dir={folder}"
    )
    with pytest.raises(ZeroDivisionError) if ends == "with an error" else nullcontext():
        api.run("tiny", *arguments, quiet=True)
    assert len(refused) == 1 and f"process {os.getpid()} on" in refused[0]
    assert json.loads((folder / "status.json").read_text())["code"] == (1 if ends == "with an error" else 0)
    assert not (folder / "run.lock").exists()


def test_fault_07_of_two_runs_that_begin_at_once_the_second_takes_nothing_of_the_first(run: RunFolder) -> None:
    """The second has seen an empty folder; until it takes it, the first has come to its end."""
    second = RunFolder(run.path)
    run.metrics.unlink()
    run.unlock()
    second.check(resume="auto")
    written(run.checkpoints, 1)
    run.status.write_text("theirs")
    second.check = lambda **_: None  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="must not hold another run"):
        second.create(resume="auto")
    assert run.status.read_text() == "theirs"


def test_fault_07_a_run_that_gives_its_folder_back_leaves_the_lock_of_the_next_one(run: RunFolder) -> None:
    """`discard` has removed its own already."""
    (run.path / "notes.txt").write_text("the user's")
    run.discard()
    following = RunFolder(run.path)
    following.create()
    run.unlock()
    with pytest.raises(CheckpointError, match="must not be in use"):
        RunFolder(run.path).lock()
    following.unlock()

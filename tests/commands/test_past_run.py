"""Runs read back from their folders: what was written comes back, and what cannot be read is one error."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.folder import RunFolder
from launcher.checkpoint.run_files import RunFiles
from launcher.commands.past_run import read_run
from launcher.errors import RecipeError
from launcher.records.past import UnfinishedRun
from launcher.records.run import RunOpened, RunPart, RunRecord
from launcher.report.html_page import html_of
from tests.conftest import ROOT
from tests.support.records import rank_record, run_record, shown, step_record

RECIPE = {"train": {"save_every": "10m", "lr": 2e-4}, "model": {"name": "m"}, "run": {"output_dir": None}}


def written(folder: Path, *, code: int = 0, reason: str = "done", **changes: Any) -> RunRecord:
    """A run's folder as a run leaves it, its record too."""
    RunFolder(folder).create()
    (folder / "adapter").mkdir()
    record = replace(run_record(rank_record(0), rank_record(1), recipe=RECIPE), **changes)
    start = replace(record.start, run_dir=str(folder), steps=len(record.steps))
    record = replace(record, start=start, adapter=str(folder / "adapter"))
    files = RunFiles(0, html=html_of)
    for event in (RunOpened(folder), *record.evals[:1], *record.steps, *record.evals[1:]):
        files.show(event)
    files.show(files.with_pages(record))
    files.end(code=code, reason=reason)
    return record


def unfinished(folder: Path, *, code: int | None = None) -> UnfinishedRun:
    """A folder without a report, and what is read from it."""
    written(folder)
    (folder / "report.json").unlink()
    (folder / "status.json").unlink()
    if code is not None:
        status = {"code": code, "reason": "interrupted", "rank": 0, "step": 8, "resumable": True}
        (folder / "status.json").write_text(json.dumps(status))
    run = read_run(str(folder))
    assert isinstance(run, UnfinishedRun)
    return run


def test_a_run_is_read_as_it_was_written_and_shown_as_at_its_end(tmp_path: Path) -> None:
    parts = (RunPart("a", 1, 3), RunPart("b", 4, 8, 1.5))
    record = written(tmp_path / "run", parts=parts, stopped="early", notes=("a note",))
    read = read_run(str(tmp_path / "run"))
    assert read == record and shown(read) == shown(record)
    assert html_of(record) == (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == html_of(read)


def test_a_run_is_found_by_its_files_its_adapter_and_its_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    written(folder)
    (folder / "checkpoints" / "step-8").mkdir(parents=True)
    (folder / "checkpoints" / "step-8" / "adapter").mkdir()
    for name in ("report.json", "adapter", "checkpoints", "checkpoints/step-8", "checkpoints/step-8/adapter"):
        assert read_run(str(folder / name)) == read_run(str(folder))


def test_values_that_json_lacks_come_back_as_nan(tmp_path: Path) -> None:
    steps = (step_record(1), step_record(2, loss=math.nan, grad_norm=math.inf))
    written(tmp_path / "run", steps=steps)
    read = read_run(str(tmp_path / "run"))
    assert isinstance(read, RunRecord) and math.isnan(read.steps[1].loss) and math.isnan(read.steps[1].grad_norm)


def test_a_folder_that_was_moved_is_named_where_it_is_now(tmp_path: Path) -> None:
    written(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    read = read_run(str(tmp_path / "new"))
    assert isinstance(read, RunRecord) and read.start.run_dir == str(tmp_path / "new")
    assert read.adapter == str(tmp_path / "new" / "adapter")


def test_a_report_whose_run_ended_badly_or_went_on_says_so(tmp_path: Path) -> None:
    written(tmp_path / "run", code=9, reason="zero recompiles must hold")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**vars(step_record(9)), "a_later_key": None}) + "\n")
    text = shown(read_run(str(tmp_path / "run")))
    assert "ended with code 9 after step 8: zero recompiles must hold" in text
    assert "the run went on to step 9 after this report of step 8" in text


def test_an_unfinished_run_is_shown_with_what_there_is(tmp_path: Path) -> None:
    killed = shown(unfinished(tmp_path / "killed"))
    assert "it was killed" in killed and "last step      8" in killed and "starts anew" in killed
    assert "no: it has no checkpoint" in killed and "2.3810" in killed
    for step in (2, 10):
        (tmp_path / "killed" / "checkpoints" / f"step-{step}").mkdir(parents=True)
    run = read_run(str(tmp_path / "killed"))
    assert "yes, from step 10 (2 checkpoints)" in shown(run)
    assert "code 130, rank 0: interrupted" in shown(unfinished(tmp_path / "stopped", code=130))
    holder = RunFolder(tmp_path / "killed")
    holder.lock()
    assert "a process has the folder" in shown(read_run(str(tmp_path / "killed")))
    holder.unlock()


@pytest.mark.parametrize(("code", "says"), [(0, "missing: what only it holds"), (130, "yes, from step 8")])
def test_a_run_that_was_done_and_lost_its_report_is_not_said_to_go_on(tmp_path: Path, code: int, says: str) -> None:
    unfinished(tmp_path / "run", code=code)
    (tmp_path / "run" / "checkpoints" / "step-8").mkdir(parents=True)
    text = shown(read_run(str(tmp_path / "run")))
    assert says in text and ("unfinished run" in text, "goes on" in text) == (code != 0, code != 0)


def test_a_last_line_that_was_cut_is_left_out_and_said(tmp_path: Path) -> None:
    unfinished(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')
    run = read_run(str(tmp_path / "run"))
    assert run.steps[-1].step == 8 and "the last line of metrics.jsonl is cut" in "".join(run.notes)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("report.json", "{", "report.json"),
        ("report.json", "[]", "it holds no object"),
        ("report.json", "[" * 100_000, "report.json"),
        ("report.json", {"schema": 0}, "its schema is 0, not 1"),
        ("report.json", {"start": {}}, "start.recipe: Field required"),
        ("report.json", {"ending": None, "start": [1]}, "start: "),
        ("report.json", {"ending": None, "schema": 0}, "its schema is 0, not 1"),
        ("report.json", {"ranks": [{}]}, "ranks: KeyError: 'vram'"),
        ("report.json", {"ranks": []}, "it has no ranks"),
        ("report.json", {"recipe": {}}, "no whole recipe"),
        ("report.json", {"verdicts": [{"claim": 1}]}, "verdicts.0.claim"),
        ("status.json", '{"code": "x"}', "status.json"),
        ("metrics.jsonl", 'x\n{"step": 1}\n', "line 1: "),
        ("metrics.jsonl", '{"step": 1, "loss": 2}\n', "metrics.jsonl"),
    ],
)
def test_a_file_of_another_version_or_a_broken_one_is_one_clear_error(
    tmp_path: Path, file: str, content: Any, says: str
) -> None:
    written(tmp_path / "run")
    path = tmp_path / "run" / file
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content)
    with pytest.raises(RecipeError, match="must be whole and of this version") as caught:
        read_run(str(tmp_path / "run"))
    assert says in str(caught.value) and len(str(caught.value).splitlines()) <= 5


def test_another_run_is_never_shown_in_the_place_of_the_one_that_was_named(tmp_path: Path) -> None:
    written(tmp_path)
    status = {"code": 3, "reason": "no rows", "rank": 0, "step": 0, "resumable": False}
    failed, empty = tmp_path / "runs" / "failed", tmp_path / "empty"
    for folder in (failed, empty, tmp_path / "checkpoints" / "mine"):
        folder.mkdir(parents=True)
    (failed / "status.json").write_text(json.dumps(status))
    run = read_run(str(failed))
    assert isinstance(run, UnfinishedRun) and run.folder == str(failed) and "code 3, rank 0: no rows" in shown(run)
    for folder in (empty, failed.parent, tmp_path / "checkpoints" / "mine"):
        with pytest.raises(RecipeError, match="run must be the folder of a run"):
            read_run(str(folder))


def test_where_there_is_no_run_those_beside_it_are_named(tmp_path: Path) -> None:
    written(tmp_path / "mine")
    with pytest.raises(
        RecipeError, match=rf"neither report.json, metrics.jsonl nor status.json.\nThere are {tmp_path}/mine"
    ):
        read_run(str(tmp_path / "other"))


COMMAND = """
import sys, time
from launcher.cli import main
code = main(sys.argv[1:])
print(code, "torch" in sys.modules, time.process_time() < 2)
"""


@pytest.mark.slow
def test_a_report_is_printed_without_torch_in_less_than_two_seconds(tmp_path: Path) -> None:
    written(tmp_path / "run", steps=tuple(step_record(n) for n in range(1, 2001)))
    for arguments in (["mode=report", f"run={tmp_path}/run", f"html={tmp_path}/page.html"], ["mode=compare"]):
        runs = [f"runs=[{tmp_path}/run, {tmp_path}/run]"] if arguments == ["mode=compare"] else []
        command = [sys.executable, "-c", COMMAND, *arguments, *runs]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.stdout.splitlines()[-1] == "0 False True", done.stderr
    assert (tmp_path / "page.html").is_file()

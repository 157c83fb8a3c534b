import errno
import json
import math

import pytest

from launcher.checkpoint.files import write_json
from launcher.checkpoint.folder import RunFolder, default_folder
from launcher.checkpoint.resume import Resumed, cut_back
from launcher.checkpoint.run_files import RunFiles
from launcher.errors import CheckpointError, RecipeError
from launcher.records.explanation import Explanation
from launcher.records.run import EvalRecord, RunOpened, StepRecord
from tests.support.records import run_record

WHY = Explanation("a recompile", *[""] * 5)
STEP = StepRecord(1, 2.5, 1e-3, math.inf, 9, 9, 1.0, 1.0, skipped=True)


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def files_of(folder, *, rank=0, events=(STEP,)):
    """The sink of a rank that was shown `events`."""
    files = RunFiles(rank)
    for event in (RunOpened(folder.path), *events):
        files.show(event)
    return files


def status_of(folder):
    return json.loads(folder.status.read_text())


def test_rank_0_writes_a_line_for_each_metric_and_null_for_what_json_lacks(folder):
    files_of(folder, events=(EvalRecord(0, 3.0), STEP))
    files_of(folder, rank=1, events=(EvalRecord(0, 3.0), STEP))
    evaluation, step = (json.loads(line) for line in folder.metrics.read_text().splitlines())
    assert evaluation == {"step": 0, "eval_loss": 3.0}
    assert (step["step"], step["loss"], step["grad_norm"], step["skipped"]) == (1, 2.5, None, True)


@pytest.mark.parametrize("name", ["status.json", "report.json", "adapter", "metrics.jsonl"])
def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("theirs")
    for opened in (RunFolder(tmp_path).check, RunFolder(tmp_path).create):
        with pytest.raises(CheckpointError, match="must not hold another run"):
            opened()
    RunFiles(0).end(code=4, reason="another run's folder")  # its folder was never opened
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "theirs")]


def test_a_folder_that_cannot_be_made_is_the_recipes_fault(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "run", tmp_path / "file"):
        for opened in (RunFolder(path).check, RunFolder(path).create):
            with pytest.raises(RecipeError, match="run.output_dir must be a folder that can be written"):
                opened()


def test_the_check_of_a_folder_makes_nothing_and_finds_what_may_not_be_written(tmp_path, monkeypatch):
    RunFolder(tmp_path / "new" / "run").check()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(RecipeError, match="Permission denied"):
        RunFolder(tmp_path / "new" / "run").check()


@pytest.mark.parametrize(("recipe", "name"), [("mine.yaml", "mine"), ("qwen2.5-7b", "qwen2.5-7b")])
def test_default_folders_of_one_second_differ(tmp_path, monkeypatch, recipe, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-000000")
    first = default_folder(recipe)
    RunFolder(tmp_path / first).create()
    assert [first, default_folder(recipe)] == [
        str(tmp_path / "runs" / f"{name}-20260101-000000{suffix}") for suffix in ("", "-2")
    ]


@pytest.mark.parametrize(("rank", "code", "written"), [(0, 0, True), (1, 0, False), (1, 5, True), (0, 3, True)])
def test_status_json_after_a_metric_is_rank_0s_on_success_and_else_that_of_the_failed_rank(folder, rank, code, written):
    files_of(folder, rank=rank).end(code=code, reason="why")
    assert folder.status.exists() == written
    if written:
        assert status_of(folder) == {"code": code, "reason": "why", "rank": rank, "step": 1, "resumable": False}


@pytest.mark.parametrize("others_file", [False, True])
def test_a_recipe_or_data_fault_before_the_first_metric_leaves_no_folder(folder, others_file):
    if others_file:
        (folder.path / "notes.txt").touch()
    files_of(folder, events=()).end(code=3, reason="the data differs by rank")
    assert folder.path.exists() == others_file
    assert not folder.metrics.exists() and not folder.status.exists()


def test_a_rank_that_was_quicker_to_say_how_another_ended_does_not_keep_it_from_saying_why(folder):
    first, broken = files_of(folder), files_of(folder, rank=1)
    assert first.end(code=9, reason="no recompile", step=1, rank=1)
    assert not first.end(code=9, reason="no recompile", explanations=[WHY]), "another rank's is no more telling"
    assert broken.end(code=9, reason="no recompile", explanations=[WHY])
    assert status_of(folder)["explanations"] == [vars(WHY)] and status_of(folder)["rank"] == 1


@pytest.mark.parametrize("broken", [True, False])
def test_a_run_that_goes_on_forgets_the_report_of_its_broken_contract_and_keeps_that_of_its_end(folder, broken):
    """Killed, it would else leave a report that names another end than status.json."""
    folder.page.write_text("page")
    for file in (folder.report, folder.status):
        write_json(file, {"ending": {"code": 9}} if broken else {"code": 0})
    cut_back(folder, Resumed(folder.checkpoints / "step-1", {"run": {"parts": []}}, [], 0.0, ()))
    left = {file.name for file in (folder.report, folder.page, folder.status) if file.exists()}
    assert left == (set() if broken else {"report.json", "report.html"})


def test_a_json_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "report.json"
    write_json(file, {"old": [math.nan, 1.0]})
    with pytest.raises(TypeError):
        write_json(file, {"new": object()})
    assert json.loads(file.read_text()) == {"old": [None, 1.0]}
    assert list(tmp_path.iterdir()) == [file]


def test_the_page_of_a_run_is_written_beside_its_report(folder):
    files, record = RunFiles(0, html=lambda record: f"<p>{len(record.steps)}</p>"), run_record(steps=3)
    files.show(RunOpened(folder.path))
    assert files.with_pages(record) is record and folder.page.read_text() == "<p>3</p>"


@pytest.mark.parametrize("fault", ["a bug in it", "a folder in its place", "no space"])
def test_a_page_that_cannot_be_written_is_noted_and_ends_no_run(folder, fault):
    def page(_):
        if fault == "no space":
            raise OSError(errno.ENOSPC, fault)
        if fault == "a bug in it":
            raise KeyError(fault)
        return "page"

    files = RunFiles(0, html=page)
    files.show(RunOpened(folder.path))
    if fault == "a folder in its place":
        folder.page.mkdir()
    noted = files.with_pages(run_record())
    assert "report.html could not be written" in noted.notes[-1]
    files.show(noted)
    assert "report.html could not be written" in folder.report.read_text()
    assert [path.name for path in folder.path.glob("*.part")] == []

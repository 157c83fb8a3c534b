"""The run folder: full of links, removed while training; and what is written where it should not be."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import api
from launcher.checkpoint.files import write_json
from launcher.checkpoint.folder import RunFolder, default_folder
from launcher.checkpoint.run_files import RunFiles
from launcher.errors import CheckpointError, FolderError, RecipeError
from launcher.recipe.load import resolve
from launcher.records.run import EvalRecord, Event, RunOpened, StepRecord
from launcher.runtime.ranks import RankInfo
from tests.support.arguments import replaced
from tests.support.bundles import written
from tests.support.runs import trained

pytestmark = pytest.mark.usefixtures("clean_dynamo")

STEP = StepRecord(1, 2.5, 1e-3, 1.0, 9, 9, 1.0, 1.0)
FILES = ("metrics.jsonl", "report.json", "report.html", "status.json", "run.lock")
FOLDERS = ("adapter", "checkpoints", "trackers")
MakeRecipe = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A folder that this process has taken for a run."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder with a file, which no run may change."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("theirs")
    return tmp_path / "victim"


def intact(victim: Path) -> bool:
    return [path.name for path in victim.iterdir()] == ["file"] and (victim / "file").read_text() == "theirs"


def shown(run: RunFolder, *events: Event) -> RunFiles:
    files = RunFiles(0)
    for event in (RunOpened(run.path), *events):
        files.show(event)
    return files


@pytest.mark.parametrize("name", ["../tiny", "tiny/../tiny", "../../etc/passwd", "/etc/passwd", "..", "./tiny"])
def test_fault_06_a_recipe_is_named_by_a_plain_name_or_a_yaml_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"recipe must exist|must end in \.yaml") as caught:
        resolve([f"recipe={name}"])
    assert caught.value.code == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../up", "...yaml", "a/../../b.yaml", "/etc/x.yaml", ".yaml"])
def test_fault_06_a_run_is_named_inside_runs_whatever_its_recipe_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(os.path.normpath(default_folder(name))).parent == tmp_path / "runs"


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_fault_43_a_link_in_place_of_a_file_of_the_run_is_refused(
    run: RunFolder, victim: Path, name: str, dangling: bool
) -> None:
    """In a folder with a checkpoint, from which a run would go on."""
    written(run.checkpoints, 1)
    run.unlock()
    shutil.rmtree(run.path / name) if (run.path / name).is_dir() else (run.path / name).unlink(missing_ok=True)
    target = victim / "gone" if dangling else victim / "file" if name in FILES else victim
    (run.path / name).symlink_to(target)
    with pytest.raises((RecipeError, CheckpointError)):
        RunFolder(run.path).create(resume="auto")
    assert intact(victim) and (run.path / name).is_symlink()


def test_fault_43_a_pipe_in_place_of_a_file_of_the_run_is_refused_and_not_waited_for(run: RunFolder) -> None:
    run.unlock()
    run.metrics.unlink()
    os.mkfifo(run.metrics)
    with pytest.raises(RecipeError, match=r"metrics\.jsonl in it is no plain file"):
        RunFolder(run.path).create(resume="auto")


def test_fault_43_a_link_that_comes_while_the_run_goes_on_is_not_followed(run: RunFolder, victim: Path) -> None:
    files = shown(run, EvalRecord(0, 3.0))
    for name in ("status.json", "status.json.0.part"):
        (run.path / name).symlink_to(victim / "file")
    run.metrics.unlink()
    run.metrics.symlink_to(victim / "file")
    with pytest.raises(FolderError, match="symbolic links"):
        files.show(STEP)
    run.checkpoints.symlink_to(victim)
    with pytest.raises(FolderError, match="checkpoints in it is a link"):
        written(run.checkpoints, 1)
    files.end(code=4, reason="a link")
    assert json.loads(run.status.read_text())["code"] == 4 and not run.status.is_symlink()
    assert intact(victim)


def test_fault_43_links_in_place_of_staging_files_are_removed_and_not_followed(
    make_recipe: MakeRecipe, tmp_path: Path, victim: Path
) -> None:
    folder, recipe = tmp_path / "run", make_recipe(compile={"mode": "off"}, train={"save_every": 1})
    trained(recipe, until=3)
    for name in ("adapter.part", "adapter.earlier.part", "checkpoints/step-9", "checkpoints/step-4.part"):
        (folder / name).symlink_to(victim)
    for name in (f"report.json.{os.getpid()}.part", "status.json.0.part"):
        (folder / name).symlink_to(victim / "file")
    trained(recipe)
    assert intact(victim) and not [path for path in (folder / "adapter", folder / "report.json") if path.is_symlink()]
    assert not list(folder.rglob("*.part"))


def removed(folder: Path) -> None:
    """At once: a checkpoint may be written to it at this moment, which removing file by file would meet."""
    gone = folder.rename(folder.with_name("gone"))
    shutil.rmtree(gone, ignore_errors=True)


def a_file(folder: Path) -> None:
    removed(folder)
    folder.write_text("theirs")


def anothers(folder: Path) -> None:
    removed(folder)
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("theirs")


@pytest.mark.parametrize(("moment", "lose"), [("step 2", removed), ("step 2", anothers), ("saving adapter", a_file)])
def test_fault_46_a_run_folder_that_is_lost_costs_no_training_and_what_is_in_its_place_is_left_alone(
    small_arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, lose: Any
) -> None:
    folder, rescued, original = tmp_path / "run", tmp_path / "rescued", RunFiles.show

    def show(self: RunFiles, event: Event) -> None:
        if event == moment or (isinstance(event, StepRecord) and f"step {event.step}" == moment):
            lose(folder)
        original(self, event)

    monkeypatch.setattr(RunFiles, "show", show)
    arguments = replaced(
        small_arguments[1:], "compile.mode=off", "train.steps=3", "train.save_every=1", "run.sample_tokens=0",
        f"run.output_dir={folder}", f"run.rescue_dir={rescued}",
    )  # fmt: skip
    with pytest.raises(
        FolderError, match=r"must stay, .*\nAfter step (2|3) the adapter was saved in .*rescued"
    ) as caught:
        api.run("tiny", *arguments, quiet=True)
    assert caught.value.code == 4
    [kept] = rescued.iterdir()
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {p.name for p in kept.iterdir()}
    left = {path.name: path.read_text() for path in tmp_path.glob("run/*")} if folder.is_dir() else folder.exists()
    assert left == {removed: False, a_file: True, anothers: {"metrics.jsonl": "theirs"}}[lose]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_fault_46_a_folder_that_became_read_only_ends_the_run_with_code_4(run: RunFolder) -> None:
    files = shown(run, EvalRecord(0, 3.0))
    run.path.chmod(0o500)
    try:
        files.show(STEP)  # an open file may grow
        with pytest.raises(FolderError, match="Permission denied"):
            written(run.checkpoints, 1)
    finally:
        run.path.chmod(0o700)


@pytest.mark.parametrize("mode", ["train", "parity", "bench"])
@pytest.mark.parametrize("kind", ["rows", "table", "binary", "pipe", "link to nothing", "device"])
def test_fault_48_a_report_takes_no_other_files_place(tmp_path: Path, mode: str, kind: str) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / "file"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to nothing":
        path.symlink_to(tmp_path / "nothing")
    elif kind != "device":
        content = {
            "rows": b'{"text": "a row"}\n',
            "table": b'{"schema": {"fields": []}, "data": []}',
            "binary": b"\xff",
        }
        path.write_bytes(content[kind])
    before = path.lstat()
    with pytest.raises(RecipeError, match="report=PATH must be a new file or an earlier report") as caught:
        api.make_request(resolve(["recipe=tiny", f"mode={mode}", f"report={path}"]), RankInfo(0, 0, 1, 1))
    after = path.lstat()
    assert caught.value.code == 2
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


@pytest.mark.parametrize("mark", ["metrics.jsonl", "status.json"])
@pytest.mark.parametrize("mode", ["train", "parity", "bench", "check"])
def test_fault_48_a_report_is_not_written_into_a_run(tmp_path: Path, mode: str, mark: str) -> None:
    (tmp_path / mark).touch()
    write_json(tmp_path / "report.json", {"schema": 1, "recipe": {}})
    for name in ("report.json", "new.json"):
        with pytest.raises(RecipeError, match="report=PATH must not be in a run's folder"):
            api.make_request(
                resolve(["recipe=tiny", f"mode={mode}", f"report={tmp_path / name}"]), RankInfo(0, 0, 1, 1)
            )


def test_fault_48_a_run_that_goes_on_may_be_told_its_own_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    own = [f"run.output_dir={tmp_path}", "run.resume=auto", f"report={tmp_path}/report.json"]
    api.make_request(resolve(["recipe=tiny", *own]), RankInfo(0, 0, 1, 1), trains=True)
    with pytest.raises(RecipeError, match="report=PATH must not be in a run's folder"):
        api.make_request(resolve(["recipe=tiny", "mode=check", *own]), RankInfo(0, 0, 1, 1), trains=True)


@pytest.mark.parametrize("report", [{"schema": 1, "recipe": {}}, {"schema": 12, "mode": "bench"}, None])
def test_fault_48_an_earlier_report_or_an_empty_file_may_be_replaced(tmp_path: Path, report: dict[str, Any]) -> None:
    path = tmp_path / "report.json"
    write_json(path, report) if report else path.touch()
    api.make_request(resolve(["recipe=tiny", f"report={path}"]), RankInfo(0, 0, 1, 1))

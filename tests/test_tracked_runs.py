"""Trackers in a whole run: theirs ends as the run does, and what fails in them ends nothing."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.checkpoint import run_files
from launcher.errors import SinkError
from launcher.records.run import RunRecord, StartRecord
from launcher.report.tracking_tools import TOOLS, TrackingTool
from tests.support.arguments import replaced

pytestmark = pytest.mark.usefixtures("clean_dynamo")


class Refusing:
    """A sink that fails at the start of the training."""

    def show(self, event: Any) -> None:
        if isinstance(event, StartRecord):
            raise OSError(28, "no space left on device")


class Silent(TrackingTool):
    """A tool that takes everything."""

    def start(self, config: Any, *, step: int) -> None: ...
    def log(self, rows: Any) -> None: ...
    def table(self, name: str, rows: Any, *, step: int) -> None: ...
    def summary(self, values: Any, *, step: int) -> None: ...


@pytest.fixture
def arguments(small_arguments: tuple[str, ...], tmp_path: Path) -> list[str]:
    changed = ("train.steps=2", "compile.mode=off", "run.trackers=[tensorboard]", f"run.output_dir={tmp_path / 'run'}")
    return ["tiny", *replaced(small_arguments[1:], *changed)]


@pytest.mark.parametrize("ends", ["in a failure", "after the record is seen"])
def test_a_trackers_run_ends_as_the_run_does(arguments: list[str], monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    told: list[tuple[str, int]] = []

    class Told(Silent):
        def finish(self, status: str, code: int, *, step: int) -> None:
            told.append((status, code))

    monkeypatch.setitem(TOOLS, "tensorboard", Told)
    if ends == "in a failure":
        with pytest.raises(SinkError):
            launcher.run(*arguments, sinks=[Refusing()], quiet=True)
        assert [code for _, code in told] == [1] and told[0][0].startswith("failed: SinkError")
    else:
        for event in launcher.events(*arguments):
            if isinstance(event, RunRecord):
                break
        gc.collect()
        assert told == [("finished", 0)]


def test_a_tracker_that_fails_while_it_finishes_is_noted_and_ends_no_run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where the report cannot be written a second time."""
    original = run_files.write_json

    class Failing(Silent):
        def finish(self, status: str, code: int, *, step: int) -> None:
            raise OSError(28, "no space left on device")

    def full(path: Path, content: Any) -> None:
        if path.name == "report.json" and "tracker tensorboard" in json.dumps(content["notes"]):
            raise OSError(28, "no space left on device")
        original(path, content)

    monkeypatch.setitem(TOOLS, "tensorboard", Failing)
    launcher.run(*arguments, quiet=True)
    assert "tracker tensorboard was switched off" in (tmp_path / "run" / "report.json").read_text()
    monkeypatch.setattr(run_files, "write_json", full)
    changed = replaced(arguments, f"run.output_dir={tmp_path / 'other'}")
    launcher.run(*changed, quiet=True)
    assert json.loads((tmp_path / "other" / "status.json").read_text())["code"] == 0

"""A finished run on the small model, made once, and the command line on it."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher import api, cli
from tests.conftest import fresh_dynamo

RUN = ("compile.mode=off", "train.steps=8", "train.lr=1e-2", "train.save_every=4", "lora.r=32", "lora.alpha=64")


def trained(small_arguments: tuple[str, ...], folder: Path, *changes: str) -> Path:
    """The folder of a run on the small model: RUN, with changes."""
    arguments = {argument.partition("=")[0]: argument for argument in (*small_arguments[1:], *RUN, *changes)}
    with fresh_dynamo():
        api.run("tiny", *arguments.values(), f"run.output_dir={folder}", quiet=True)
    return folder


@pytest.fixture(scope="session")
def run_folder(small_arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose adapter says something else than its base. k_proj and v_proj have square B."""
    return trained(small_arguments, tmp_path_factory.mktemp("export") / "run")


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int
    out: str
    err: str
    report: dict[str, Any]  # of report=PATH; empty where it was not written

    @property
    def broken(self) -> set[str]:
        """The claims that do not hold."""
        return {verdict["claim"] for verdict in self.report["verdicts"] if not verdict["holds"]}


Main = Callable[..., Outcome]


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """A command in this process, in the test's folder; `typed` is its standard input."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, typed: str = "") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        code = cli.main(arguments)
        printed = capsys.readouterr()
        content = json.loads(report.read_text()) if report.exists() else {}
        return Outcome(code, printed.out, printed.err, content)

    return run


@pytest.fixture
def export(main: Main, run_folder: Path) -> Main:
    """mode=export of that run to ./out."""
    return lambda *more: main("mode=export", f"run={run_folder}", "to=out", "report=report.json", *more)

"""mode=parity as a user types it: exit codes, the JSON at report=PATH, no run folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher import cli
from launcher.errors import RecipeError
from launcher.model import lora
from launcher.ops.qlora_linear import qlora_linear
from tests.conftest import ROOT

MAIN = [sys.executable, str(ROOT / "launcher" / "main.py")]


@pytest.fixture
def arguments(small_model: Path, rows_file: Path) -> list[str]:
    return [
        "recipe=tiny", "mode=parity", f"model.name={small_model}", f"data.sources=[{{path: {rows_file}}}]",
        "data.validation=0", "data.max_length=64", "compile.backend=aot_eager", "proof.parity=1",
        "train.micro_batch=1", "report=p.json",
    ]  # fmt: skip


def test_inside_the_gate_the_code_is_0_and_all_that_is_left_is_the_json(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run([*MAIN, *arguments], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "PASS" in done.stdout and "FAIL" not in done.stdout
    assert "Adapter gradients" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    report = json.loads((tmp_path / "p.json").read_text())
    assert report.keys() == {
        "schema", "mode", "holds", "recipe", "start", "compile", "gate", "batches", "adapters", "loss_error",
        "gradient_error", "verdicts", "elapsed_s", "notes",
    }  # fmt: skip
    assert report["holds"] is True and report["recipe"]["proof"]["parity"] == 1
    assert {f"{a['kind']} {a['matrix']}" for a in report["adapters"]} == {
        f"{kind} {matrix}" for kind in ("q", "k", "v", "o", "gate", "up", "down") for matrix in "AB"
    }
    [batch] = report["batches"]
    assert batch["loss"]["compiled"] == pytest.approx(batch["reference_loss"], rel=1e-4)


@pytest.mark.usefixtures("clean_dynamo")
def test_beyond_the_gate_the_code_is_9_after_the_tables_and_the_json(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planted(x: Any, base: Any, a: Any, b: Any, *, scaling: float, dropout: float) -> Any:
        return qlora_linear(x, base, a, b, scaling=scaling * 1.5, dropout=dropout)

    monkeypatch.setattr(lora, "qlora_linear", planted)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 9
    said = capsys.readouterr()
    assert "✗ FAIL" in said.out and "Adapter gradients" in said.out
    assert "must compute what stock code computes" in said.err and "(exit code 9)" in said.err
    assert len(said.err[said.err.index("error: ") :].strip().splitlines()) <= 5
    assert json.loads((tmp_path / "p.json").read_text())["holds"] is False
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_several_processes_are_refused_before_anything_is_loaded(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == RecipeError.code
    assert "one process; 2 were started" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

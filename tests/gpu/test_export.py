"""On a GPU: a finished run answers, and is exported within the thresholds in 16 bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher import api, cli
from tests.conftest import fresh_dynamo

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def run_folder(small_arguments: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in the compute dtype of this GPU."""
    folder = tmp_path_factory.mktemp("export") / "run"
    changed = ("train.steps", "train.lr", "run.output_dir")
    kept = [argument for argument in small_arguments[1:] if argument.partition("=")[0] not in changed]
    with fresh_dynamo():
        api.run(
            "tiny", *kept, "compile.mode=off", "train.steps=8", "train.lr=1e-2", f"run.output_dir={folder}", quiet=True
        )
    return folder


@pytest.mark.parametrize("options", [["on=dequantised"], ["on=original"], ["dtype=float32"], ["format=adapter"]])
def test_an_export_is_the_trained_model_and_a_changed_one_is_not(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    arguments = ["mode=export", f"run={run_folder}", "to=out", "report=report.json", *options]
    code = cli.main(arguments)
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert code == 0, report["verdicts"]
    assert report["trained_dtype"] in ("bfloat16", "float16") and report["device"] != "CPU"
    print(options, report["figures"])
    if options == ["format=adapter"]:
        return
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr("launcher.export.write.read_updates", lambda _: {})
    assert cli.main(arguments) == 4


def test_a_prompt_is_answered(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert cli.main(["mode=generate", f"run={run_folder}", "prompt=Define it.", "max_tokens=8", "base=true"]) == 0
    assert "tokens/s" in capsys.readouterr().out

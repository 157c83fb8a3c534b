"""The notebook that users begin with, and what a real kernel's cells show."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
QUICK = 'STEPS = 2\nOPTIONS = ["compile.mode=off", "data.max_length=64", "train.micro_batch=1", "run.sample_tokens=4"]'
INTERRUPTED = """
import os, signal
import launcher
class Button:
    def show(self, event):
        if getattr(event, "step", 0) == PRESSED_AT and hasattr(event, "loss"):
            os.kill(os.getpid(), signal.SIGINT)
"""
CALL = 'run = launcher.run("tiny", "train.steps=4", "run.output_dir=run", *OPTIONS, sinks=[Button()])'


def executed(notebook: Any, folder: Path) -> Any:
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return client.execute(env=environment)


def text_of(cell: Any) -> str:
    """All that a cell shows, as plain text."""
    return "".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)


def displays(cell: Any) -> list[str]:
    return [o.data["text/html"] for o in cell.outputs if o.output_type == "display_data" and "text/html" in o.data]


@pytest.fixture
def quickstart() -> Iterator[Any]:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert re.match(r"STEPS = \d+ .*\nOPTIONS = \[\]", parameters.source), "what the test replaces"
    parameters.source = QUICK
    yield notebook


def test_the_notebook_is_valid_and_has_no_output() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 8 and all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert NOTEBOOK.stat().st_size < 20_000


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs_on_a_cpu(quickstart: Any, tmp_path: Path) -> None:
    done = executed(quickstart, tmp_path)
    cells = {cell.source.splitlines()[-1]: cell for cell in done.cells if cell.cell_type == "code"}
    said = [text_of(cell) for cell in cells.values()]
    assert "torch-here.txt" not in os.listdir(tmp_path), "what is there is not installed"
    first = next(cell for source, cell in cells.items() if source.startswith("run = launcher.run"))
    [page] = displays(first)
    assert "done in" in page and "step 2/2" in page and "<svg" in page
    assert "saved adapter reloads" in text_of(first)
    assert any("No GPU here: skipped." in text for text in said)
    assert any("Which pump for well" in text and "supervised" in text for text in said), "the preview"
    model = tmp_path / "runs" / "my-model"
    assert (model / "config.json").is_file() and model.with_suffix(".zip").stat().st_size > 2**20


@pytest.mark.slow
def test_after_the_stop_button_a_kernel_goes_on(tmp_path: Path) -> None:
    cells = [
        f"{QUICK}\nPRESSED_AT = 2{INTERRUPTED}{CALL}",
        f"PRESSED_AT = 0\n{CALL}\nprint(len(run.steps), run.adapter)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.cells[0].metadata["tags"] = ["raises-exception"]
    stopped, resumed = executed(notebook, tmp_path).cells
    [failure] = [output for output in stopped.outputs if output.output_type == "error"]
    assert failure.ename == "KeyboardInterrupt" and "step 3 is saved" in failure.evalue
    assert "ended during training" in displays(stopped)[0]
    assert f"4 {tmp_path / 'run' / 'adapter'}" in text_of(resumed)

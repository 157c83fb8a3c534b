"""Where the console prints and how progress reads: terminals, pipes, notebooks; errors; nothing heavy imported."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.records.run import EvalRecord, StepRecord
from launcher.report import Progress, error, make_console


@pytest.fixture(autouse=True)
def colour_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of an ordinary terminal, wherever the tests run."""
    for name in ("NO_COLOR", "FORCE_COLOR", "JPY_PARENT_PID", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def step_record(step: int, **changes: Any) -> StepRecord:
    figures: dict[str, Any] = {
        "loss": 1.5, "lr": 2e-4, "grad_norm": 0.731, "tokens": 31_871, "supervised_tokens": 9_120, "step_s": 0.4231,
        "vram_mib": 7_491.3,
    }  # fmt: skip
    return StepRecord(step=step, **(figures | changes))


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_error_is_printed_verbatim_and_ends_with_the_exit_code() -> None:
    message = "unknown key [train.lerning_rate] [/b]\nvalue: 1\n" + "did you mean train.lr? " * 12
    for console in (make_console(io.StringIO()), Console(file=io.StringIO(), width=40, force_terminal=True)):
        error(console, message, 2)
        plain = re.sub(r"\x1b\[[\d;]*m", "", printed(console))
        assert plain == f"error: {message} (exit code 2)\n"
    assert "\x1b[" in printed(console), "red on a terminal"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_colour_unless_no_color_or_a_notebook_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_console(Terminal()).is_terminal and make_console(Terminal()).color_system is not None
    monkeypatch.setenv("NO_COLOR", "1")
    assert make_console(Terminal()).no_color
    monkeypatch.setenv("JPY_PARENT_PID", "12")  # `!python launcher/main.py` in a notebook cell has a pseudo-terminal
    assert not make_console(Terminal()).is_terminal and make_console(Terminal()).width == 120


def progress_lines(total: int, *, every: int = 1) -> list[str]:
    console = make_console(io.StringIO())
    with Progress(console, total, device="NVIDIA H200") as progress:
        progress.phase("loading the model")
        progress.evaluation(EvalRecord(0, 2.9134))
        for step in range(every, total + 1, every):
            progress.step(step_record(step))
    text = printed(console)
    assert "\x1b" not in text and "loading the model" in text and "2.9134" in text
    return [line for line in text.splitlines() if re.search(r"step +[\d,]+/[\d,]+ ", line)]


def test_progress_without_a_terminal_prints_every_step_of_a_short_run_and_about_twenty_of_a_long_one() -> None:
    assert len(progress_lines(20)) == 20
    for total, every in ((1000, 1), (1000, 7), (21, 1)):
        lines = progress_lines(total, every=every)
        assert 9 <= len(lines) <= 23
        assert all(word in line for line in lines for word in ("loss", "lr", "tok/s", "VRAM", "eta"))
        assert f"{total - total % every:,}/{total:,}" in lines[-1], "the last step is never left out"


def test_a_skipped_step_is_always_said() -> None:
    console = make_console(io.StringIO())
    with Progress(console, 1000) as progress:
        for step in range(1, 30):
            progress.step(step_record(step, skipped=step == 29))
    assert "step 29 skipped" in printed(console)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_progress_on_a_terminal_is_one_live_line_that_fits(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    with Progress(console, 100, device="NVIDIA H200") as progress:
        progress.phase("compiling")
        for step in range(1, 38):
            progress.step(step_record(step))
    plain = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", printed(console))
    last = [line for line in re.split(r"[\r\n]", plain) if "37/100" in line][-1]
    assert "loss" in last and "eta" in last and ("7,491 MiB" in last) is (width >= 80) and len(last) <= width
    assert "compiling" in plain


def test_nothing_heavy_is_imported_for_the_console() -> None:
    code = "import json, sys, launcher.report; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert "rich" in json.loads(found)
    assert not {"torch", "transformers", "numpy", "pydantic", "IPython"} & set(json.loads(found))

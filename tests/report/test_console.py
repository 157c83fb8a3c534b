"""Where the console prints: terminals, pipes and notebooks, poor encodings, errors; and that it is quick to import."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launcher.report import Screen, error, make_console
from tests.support.records import preview_record, run_record, shown, start_record, without_codes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def colour_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of an ordinary terminal, wherever the tests run."""
    for name in ("NO_COLOR", "FORCE_COLOR", "JPY_PARENT_PID", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_an_error_is_printed_verbatim_and_ends_with_the_exit_code() -> None:
    message = "unknown key [train.lerning_rate] [/b]\nvalue: 1\n" + "did you mean train.lr? " * 12
    plain, coloured = io.StringIO(), io.StringIO()
    error(make_console(plain), message, 2)
    error(Console(file=coloured, width=40, force_terminal=True), message, 2)
    assert plain.getvalue() == without_codes(coloured.getvalue()) == f"error: {message} (exit code 2)\n"
    assert "\x1b[" in coloured.getvalue(), "red on a terminal"


def test_under_a_process_launcher_an_error_stands_verbatim_between_two_rules() -> None:
    message, stream = "unknown key\nvalue: " + "x" * 300, io.StringIO()
    error(make_console(stream), message, 2, framed=True)
    first, *lines, last, end = stream.getvalue().split("\n")
    assert "\n".join(lines) == f"error: {message} (exit code 2)" and end == ""
    assert [(len(rule), rule[:3], rule[-3:]) for rule in (first, last)] == [(120, "━━ ", "━━━")] * 2


def test_a_terminal_has_colour_unless_no_color_or_a_notebook_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_console(Terminal()).is_terminal and make_console(Terminal()).color_system is not None
    monkeypatch.setenv("NO_COLOR", "1")
    assert make_console(Terminal()).no_color
    monkeypatch.setenv("JPY_PARENT_PID", "12")  # `!python launcher/main.py` in a notebook cell has a pseudo-terminal
    assert not make_console(Terminal()).is_terminal and make_console(Terminal()).width == 120


@pytest.mark.parametrize(("columns", "width"), [(None, 120), ("77", 77), ("0", 120), ("wide", 120)])
def test_a_console_that_is_no_terminal_is_plain_and_of_fixed_width(
    monkeypatch: pytest.MonkeyPatch, columns: str | None, width: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    console = make_console(io.StringIO())
    assert console.width == width and not console.is_terminal and not console.is_jupyter
    text = shown(run_record(), console)
    assert "\x1b" not in text and "PASS" in text


def test_an_output_that_is_not_unicode_gets_readable_text_and_no_crash() -> None:
    raw = io.BytesIO()
    with Screen(make_console(io.TextIOWrapper(raw, encoding="ascii")), clock=lambda: 0.0) as screen:
        for record in (start_record(model="modèle"), run_record(), preview_record()):
            screen.show(record)
    text = raw.getvalue().decode("ascii")
    assert "2 x 2,048" in text and "PASS" in text and "mod\\xe8le" in text
    assert "[[<|assistant|>]]<<Hello \\U0001f44d[[<|end|>]]>>" in text and "line end\\n" in text


def test_nothing_heavy_is_imported_for_the_console() -> None:
    code = "import json, sys, launcher.report; print(json.dumps(sorted(m.split('.')[0] for m in sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    modules = set(json.loads(done.stdout))
    assert "rich" in modules and not {"torch", "transformers", "numpy", "pydantic", "IPython"} & modules

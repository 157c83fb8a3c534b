"""Where output goes: a terminal with colour and a live line, or plain text for files, pipes and notebooks."""

import codecs
import os
import sys
from typing import IO

from rich.console import Console
from rich.text import Text

from launcher.report.figures import literal

PLAIN_WIDTH = 120  # columns when there is no terminal to ask and COLUMNS is not set
NEAREST_ASCII = {"×": "x", "·": "|", "→": ">", "✓": "+", "✗": "x", "─": "-", "━": "=", "…": "."}


def make_console(file: IO[str] | None = None) -> Console:
    """A console on `file` (standard output when None).

    On a terminal rich decides on width and colour (NO_COLOR is honoured). Elsewhere, and in a notebook, text is plain:
    no control codes even under FORCE_COLOR, no live display, COLUMNS or 120 columns wide. An encoding that lacks a
    character gets its nearest ASCII form or its escape: a report must not die of a log file's encoding.
    """
    stream = sys.stdout if file is None else file
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors=ENCODING_ERRORS)
    if stream.isatty() and not _in_notebook():
        return Console(file=file, markup=False, highlight=False, emoji=False)
    return Console(
        file=file, force_terminal=False, force_jupyter=False, color_system=None, width=_plain_width(),
        markup=False, highlight=False, emoji=False,
    )  # fmt: skip


def error(console: Console, message: str, code: int) -> None:
    """Print "error: MESSAGE (exit code CODE)", the message verbatim and never re-wrapped: paths stay whole in a log."""
    line = Text.assemble(("error: ", "bold red"), literal(message), (f" (exit code {code})", "dim"))
    console.print(line, soft_wrap=True, highlight=False)


def _in_notebook() -> bool:
    """In a kernel, or in a command that a cell started: that one has a pseudo-terminal which shows no live display.
    jupyter_client sets JPY_PARENT_PID for each kernel it starts, and the kernel's commands inherit it."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return "JPY_PARENT_PID" in os.environ or hasattr(shell, "kernel")


def _plain_width() -> int:
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) > 0 else PLAIN_WIDTH


def _nearest(failure: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(failure, UnicodeEncodeError) and failure.object[failure.start] in NEAREST_ASCII:
        return NEAREST_ASCII[failure.object[failure.start]], failure.start + 1
    return codecs.backslashreplace_errors(failure)


ENCODING_ERRORS = "launcher.nearest_ascii"
codecs.register_error(ENCODING_ERRORS, _nearest)

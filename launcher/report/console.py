"""Where output goes: a terminal with colour and a live line, or plain text for files, pipes and notebooks."""

import codecs
import os
import sys
import unicodedata
from collections.abc import Callable
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from launcher.credentials import masked
from launcher.runtime.streams import lasting

PAGE_WIDTH = 120  # columns at most: longer lines are hard to follow
NEAREST_ASCII = {"×": "x", "·": "|", "→": ">", "✓": "+", "✗": "x", "─": "-", "━": "=", "…": "."}
LAUNCHER_BELOW = "the process launcher's own traceback may follow"
# Controls, lone surrogates, line and paragraph separators, and format characters: these reorder the text beside them,
# or have no width and are not seen.
ESCAPED_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")


def make_console(file: IO[str] | None = None) -> Console:
    """A console on `file` (standard output when None).

    On a terminal rich decides on width and colour (NO_COLOR is honoured). Elsewhere, and in a notebook, text is plain:
    no control codes even under FORCE_COLOR, no live display, COLUMNS or 120 columns wide. An encoding that lacks a
    character gets its nearest ASCII form or its escape: a report must not die of a log file's encoding.
    """
    stream = sys.stdout if file is None else file
    if reconfigure := getattr(stream, "reconfigure", None):
        reconfigure(errors=ENCODING_ERRORS)
    plain: dict[str, Any] = {}
    if not stream.isatty() or _in_notebook():
        columns = os.environ.get("COLUMNS", "")
        width = columns.isdecimal() and int(columns) or PAGE_WIDTH
        plain = {"force_terminal": False, "force_jupyter": False, "color_system": None, "width": width}
    return Console(file=lasting(stream), markup=False, highlight=False, emoji=False, **plain)


def page_width(console: Console) -> int:
    return min(console.width, PAGE_WIDTH)


def literal(text: str, style: str = "") -> Text:
    """Text of a user, a model or a library, exactly as it is: no markup is read in it, and what a terminal would obey
    is shown as its escape. Line breaks and tabs stay."""
    return Text(visible(text), style)


def visible(text: str) -> str:
    """The text with an escape in place of each character that a terminal or a browser would obey or not show."""
    return "".join(map(_visible, text))


def error(
    console: Console, message: str, code: int, *, framed: bool = False, above: Callable[[], None] = lambda: None
) -> None:
    """Print "error: MESSAGE (exit code CODE)", the message verbatim and never re-wrapped: paths stay whole in a log.

    `above` prints what stands above the message. `framed`: between two rules, for the eye to find above the traceback
    that a process launcher prints after it. All is one write, so that the lines of several processes do not mix.
    """
    line = Text.assemble(("error: ", "bold red"), literal(masked(message)), (f" (exit code {code})", "dim"))

    def rule(title: str) -> None:
        width = page_width(console)
        console.print(Text(f"━━ {title} ".ljust(width, "━")[:width], "bold red"), soft_wrap=True)

    with console:  # all is written when it ends
        if framed:
            rule("qlora-launcher")
        above()
        console.print(line, soft_wrap=True, highlight=False)
        if framed:
            rule(LAUNCHER_BELOW)


def _visible(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char) not in ESCAPED_CATEGORIES:
        return char
    return char.encode("unicode_escape").decode("ascii")


def _in_notebook() -> bool:
    """In a kernel, or in a command that a cell started: its pseudo-terminal shows no live display. jupyter_client sets
    JPY_PARENT_PID for each kernel it starts, and the kernel's commands inherit it."""
    return "JPY_PARENT_PID" in os.environ or kernel_shell() is not None


def kernel_shell() -> Any:
    """IPython's shell if this process is a notebook's kernel, else None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell if hasattr(shell, "kernel") else None


def _nearest(failure: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(failure, UnicodeEncodeError) and failure.object[failure.start] in NEAREST_ASCII:
        return NEAREST_ASCII[failure.object[failure.start]], failure.start + 1
    return codecs.backslashreplace_errors(failure)


ENCODING_ERRORS = "launcher.nearest_ascii"
codecs.register_error(ENCODING_ERRORS, _nearest)

"""mode=report: a run that is over, as it was shown at its end, and as a page for a browser."""

import os
from pathlib import Path

from launcher.checkpoint.files import write_text, writing
from launcher.commands.finished_run import Invocation
from launcher.commands.past_run import read_run
from launcher.errors import RecipeError
from launcher.recipe.run_options import ReportOptions
from launcher.records.run import RunRecord
from launcher.report.console import literal
from launcher.report.html_page import PAGE_BEGIN, html_of
from launcher.report.render import print_record


def report_run(options: ReportOptions, invocation: Invocation) -> None:
    """Print the run; with html=PATH write its page too."""
    html = Path(options.html).expanduser().absolute() if options.html else None
    if html:
        _check_html(html)
    run, console = read_run(options.run), invocation.console
    for record in (run.start, run) if isinstance(run, RunRecord) else (run,):
        print_record(console, record)
    if html:
        with writing(html.parent, what="The page"):
            write_text(html, html_of(run))
        console.print(literal(f"\nthe page is in {html}", "yellow"), soft_wrap=True)


def _check_html(path: Path) -> None:
    """Raise RecipeError if the page cannot be written, or if it would replace what is no such page."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise RecipeError(f"html must be a file in a folder that can be written; {path} is not.")
    begin = b""
    if os.path.lexists(path) and path.is_file() and not path.is_symlink():
        with open(path, "rb") as file:
            begin = file.read(len(PAGE_BEGIN))
    if os.path.lexists(path) and begin != PAGE_BEGIN.encode():
        raise RecipeError(f"html must be a new file or an earlier page; {path} is neither. Choose another.")

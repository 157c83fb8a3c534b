"""mode=report: a run that is over, as it was shown at its end, and as a page for a browser."""

import re
from pathlib import Path

from launcher.checkpoint.files import write_text, writing
from launcher.commands.finished_run import Invocation
from launcher.commands.past_run import read_run
from launcher.preflight.before_torch import check_output
from launcher.recipe.run_options import ReportOptions
from launcher.records.run import RunRecord
from launcher.report.console import literal
from launcher.report.html_page import PAGE_BEGIN, html_of
from launcher.report.render import print_record


def report_run(options: ReportOptions, invocation: Invocation) -> None:
    """Print the run; with html=PATH write its page too."""
    html = Path(options.html).expanduser().absolute() if options.html else None
    if html:
        check_output("html", html, re.compile(re.escape(PAGE_BEGIN).encode()), kind="page")
    run, console = read_run(options.run), invocation.console
    for record in (run.start, run) if isinstance(run, RunRecord) else (run,):
        print_record(console, record)
    if html:
        with writing(html.parent, what="The page"):
            write_text(html, html_of(run))
        console.print(literal(f"\nthe page is in {html}", "yellow"), soft_wrap=True)

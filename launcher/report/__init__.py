"""The console: records in, text out. Imports launcher.records.run and rich, never torch; nothing here decides anything.

Every text that is not ours (paths, model output, reasons, error messages) goes through `figures.literal`, so that
neither rich's markup nor a terminal's control codes are obeyed.
"""

from launcher.report.bench import bench_page
from launcher.report.console import error, make_console
from launcher.report.parity import parity_page
from launcher.report.preview import preview_page
from launcher.report.progress import Progress
from launcher.report.run_summary import summary
from launcher.report.screen import Screen
from launcher.report.start import start_panel

__all__ = [
    "Progress",
    "Screen",
    "bench_page",
    "error",
    "make_console",
    "parity_page",
    "preview_page",
    "start_panel",
    "summary",
]

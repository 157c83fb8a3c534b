"""What people see of a run: pages are made from records (pages/) and drawn on a console (render.py, screen.py).

Imports records and rich, never torch; nothing here decides anything.
"""

from launcher.report.console import error, make_console
from launcher.report.screen import Screen

__all__ = ["Screen", "error", "make_console"]

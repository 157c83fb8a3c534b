"""What a call costs, as a count that no busy machine changes."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from tests.conftest import ROOT

PACKAGE = str(ROOT / "launcher")


def lines_run(call: Callable[[], object]) -> int:
    """How many lines of the launcher's code this thread runs in `call()`. Loops inside C are not seen."""
    lines = 0

    def in_frame(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return in_frame

    def entered(frame: FrameType, event: str, argument: Any) -> Any:
        return in_frame if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(before)
    return lines

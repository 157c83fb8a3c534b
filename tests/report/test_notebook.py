"""A run in a notebook's cell: one display redrawn in place."""

import io
import math
import time
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from launcher.records.run import EvalRecord, Note, Phase
from launcher.report import make_console
from launcher.report import notebook as live
from launcher.report.notebook import NotebookScreen, curves, drawn_points
from tests.support.records import HOSTILE, run_record, start_record, step_record


class Cell:
    """What a cell shows: the updates of its display, and its text. The test sets the clock."""

    def __init__(self) -> None:
        self.seconds, self.stream, self.updates = 0.0, io.StringIO(), []
        self.fails = False
        shell = SimpleNamespace(display_pub=self)
        self.screen = NotebookScreen(shell, make_console(self.stream), clock=lambda: self.seconds)

    def publish(self, data: dict[str, str], *, metadata: Any, transient: dict[str, str], update: bool) -> None:
        if self.fails:
            raise BrokenPipeError
        self.updates.append((update, transient["display_id"], data["text/plain"], data["text/html"]))

    def shows(self, *events: Any, each_s: float = 0.0) -> None:
        for event in events:
            self.seconds += each_s
            self.screen.show(event)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    monkeypatch.setattr(live, "UPDATE_S", 1000.0)  # the thread is silent
    made = Cell()
    with made.screen:
        monkeypatch.setattr(live, "UPDATE_S", 0.5)
        yield made


def elements(page: str) -> list[str]:
    """The names of the elements of well-formed HTML."""
    return [element.tag for element in ElementTree.fromstring(page).iter()]


def test_one_display_is_updated_in_place_at_most_every_half_second(cell: Cell) -> None:
    cell.shows("loading model", start_record(steps=100), EvalRecord(0, 3.0))
    cell.shows(*map(step_record, range(1, 51)), each_s=0.1)
    assert [update for update, *_ in cell.updates][:2] == [False, True]
    assert len({name for _, name, *_ in cell.updates}) == 1
    assert 10 <= len(cell.updates) <= 12
    assert cell.screen.headline() == "training · step 50/100 · loss 0.7143 · eval loss 3.0000 · eta 0:00:21"


def test_the_display_shows_progress_curves_and_the_last_steps_and_the_pages_are_text(cell: Cell) -> None:
    cell.shows(start_record(steps=3), EvalRecord(0, 3.0), Note("a word"), each_s=1)
    cell.shows(step_record(1), step_record(2, spike=True), step_record(3, skipped=True), EvalRecord(3, 2.0), each_s=1)
    cell.shows(run_record(), each_s=1)
    cell.screen.close(failed=False)
    page = cell.updates[-1][3]
    assert "done in 0:00:08 · step 3/3" in page and '<progress value="3" max="3"' in page
    assert elements(page).count("polyline") == 2 and elements(page).count("tr") == 4
    assert "spike" in page and "skipped: fp16 overflow" in page
    text = cell.stream.getvalue()
    assert "note: a word" in text and "trainable" in text and "─ verdicts" in text.lower()
    count = len(cell.updates)
    cell.screen.close()
    assert len(cell.updates) == count, "the last drawing stays"


def test_a_phase_tells_its_time_and_progress_and_a_failure_its_phase(cell: Cell) -> None:
    cell.shows(Phase("compiling", lambda: "graphs: layer 1 of 2"))
    cell.seconds = 65
    assert cell.screen.headline() == "compiling · 0:01:05 · graphs: layer 1 of 2"
    cell.screen.close(failed=True)
    assert cell.updates[-1][2] == "ended during compiling"


def test_text_of_others_is_escaped(cell: Cell) -> None:
    cell.shows(Phase(f"<script>alert(1)</script>{HOSTILE}", lambda: "<b>&"), each_s=1)
    assert "script" not in elements(cell.updates[-1][3]) and "&lt;script&gt;" in cell.updates[-1][3]
    assert "\x1b" not in cell.updates[-1][3] and "\x1b" not in cell.updates[-1][2]
    cell.shows(Note(HOSTILE))
    assert "\x1b" not in cell.stream.getvalue()


def test_a_display_that_takes_no_more_does_not_end_the_run(cell: Cell) -> None:
    cell.fails = True
    cell.shows("a phase", "another", each_s=1)
    assert cell.screen.lost and len(cell.updates) == 1


def test_a_thread_draws_while_a_phase_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "UPDATE_S", 0.01)
    made = Cell()
    with made.screen:
        while len(made.updates) < 4:
            made.seconds += 1
    count = len(made.updates)
    made.screen._heart.join(1)
    assert len(made.updates) == count and not made.screen._heart.is_alive()


def test_curves_leave_out_what_is_not_finite_and_long_ones_are_thinned() -> None:
    assert curves({"loss": [(1, 2.0)], "eval loss": []}) == ""
    page = curves({"loss": [(1, math.nan), (2, 2.0), (3, math.inf), (4, 2.0)], "eval loss": [(2, 1.0)]})
    assert "nan" not in page and "inf" not in page and page.count("<polyline") == 1
    assert "2.0000 to 2.0000, steps 2 to 4" in page
    long = drawn_points([(step, 1.0 + step % 2) for step in range(900)])
    assert len(long) == live.POINTS and {value for _, value in long} == {1.5}, "the means of six steps each"
    assert (long[0][0], long[-1][0]) == (0, 899)
    start = time.process_time()
    longest = drawn_points([(step, 1.0) for step in range(1_000_000)] + [(1_000_000, math.nan)])
    assert len(longest) <= live.POINTS and longest[-1][0] > 990_000
    assert time.process_time() - start < 2, "mostly the list itself"

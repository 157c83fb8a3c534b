"""How progress reads as events come: a live line on a terminal, stamped lines elsewhere."""

import io
import re
import threading
from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from launcher.records.run import EvalRecord, Phase
from launcher.report import Screen, make_console
from launcher.report import screen as report_screen
from tests.support.records import parity_record, run_record, start_record, step_record, without_codes


class Recorded:
    """A screen with its output and a clock that the test sets."""

    def __init__(self, console: Console | None = None, *, seconds: float = 0.0) -> None:
        self.seconds, self.stream = seconds, io.StringIO()
        console = console or make_console(self.stream)
        console.file = self.stream
        self.screen = Screen(console, clock=lambda: self.seconds)

    def shows(self, *events: Any, after_s: float = 0.0) -> None:
        self.seconds += after_s
        for event in events:
            self.screen.show(event)

    def beats(self, after_s: float) -> list[str]:
        """What is printed of itself when so many seconds have passed."""
        before = len(self.stream.getvalue())
        self.seconds += after_s
        self.screen.beat()
        return self.stream.getvalue()[before:].splitlines()


def screened(events: Iterable[Any], console: Console | None = None) -> str:
    recorded = Recorded(console)
    with recorded.screen:
        recorded.shows(*events)
    return recorded.stream.getvalue()


def terminal(width: int) -> Console:
    return Console(width=width, force_terminal=True, color_system=None)


def lines_of(text: str) -> list[str]:
    return re.split(r"[\r\n]+", without_codes(text))


@pytest.mark.parametrize(
    ("total", "every", "least", "most"), [(20, 1, 20, 20), (1000, 1, 9, 23), (1000, 7, 9, 23), (21, 1, 9, 23)]
)
def test_elsewhere_every_step_of_a_short_run_is_printed_and_about_twenty_of_a_long_one(
    total: int, every: int, least: int, most: int
) -> None:
    steps = [step_record(step) for step in range(every, total + 1, every)]
    text = screened(["loading the model", start_record(steps=total), EvalRecord(0, 2.9134), *steps])
    assert "\x1b" not in text and "loading the model" in text and "eval loss 2.9134 before the first update" in text
    lines = [line for line in text.splitlines() if re.search(r"^ +\d+\.\d s +step +[\d,]+/[\d,]+ ", line)]
    assert least <= len(lines) <= most
    assert len(re.findall(r"^ +0\.0 s  ", text, re.M)) == len(lines) + 2, "seconds since the run began"
    assert all(word in line for line in lines for word in ("loss", "lr", "tok/s", "VRAM", "eta"))
    assert f"{total - total % every:,}/{total:,}" in lines[-1], "the last step is never left out"
    assert max(map(len, text.splitlines())) <= 120


def test_elsewhere_all_lines_of_a_run_have_one_clock() -> None:
    recorded = Recorded(seconds=0.5)
    for event in ("importing torch", start_record(), step_record(1), EvalRecord(1, 2.0), "saving adapter"):
        recorded.shows(event, after_s=10)
    stamps = re.findall(r"^ +(\d+\.\d) s  ", recorded.stream.getvalue(), re.M)
    assert stamps == ["10.5", "30.5", "40.5", "50.5"]


def test_elsewhere_a_long_phase_says_every_half_minute_that_it_goes_on_and_sooner_how_far_it_is() -> None:
    recorded, progress = Recorded(), [""]
    recorded.shows(Phase("compiling", lambda: progress[0]))
    assert recorded.beats(29.9) == []
    assert recorded.beats(0.1) == ["    30.0 s  compiling: 30 s"]
    progress[0] = "graphs: layer 1 of 2"
    assert recorded.beats(4.9) == []
    assert recorded.beats(0.1) == ["    35.0 s  compiling: 35 s, graphs: layer 1 of 2"]
    assert recorded.beats(29.9) == []
    assert recorded.beats(0.1) == ["    65.0 s  compiling: 65 s, graphs: layer 1 of 2"]
    recorded.shows("saving adapter")
    assert recorded.beats(29.9) == [] and recorded.beats(0.1) == ["    95.0 s  saving adapter: 30 s"]


def test_elsewhere_long_steps_and_evaluations_are_not_silent_either() -> None:
    recorded = Recorded()
    recorded.shows("compiling", start_record(steps=1000))
    assert recorded.beats(40) == ["    40.0 s  training began 40 s ago"]
    recorded.shows(step_record(1), step_record(2))
    assert recorded.beats(20) == []
    [line] = recorded.beats(10)
    assert "step     2/1,000  loss" in line, "it was not due by its number"
    assert recorded.beats(35) == ["   105.0 s  step 2/1,000 ended 65 s ago"]
    recorded.shows(step_record(3), after_s=30)
    assert recorded.stream.getvalue().splitlines()[-1].startswith("   135.0 s  step     3/1,000")
    recorded.shows(run_record())
    assert recorded.beats(100) == [], "nothing is going on"


def test_what_goes_on_is_said_from_a_thread_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_screen, "BEAT_S", 0.0)
    recorded, asked = Recorded(), threading.Event()
    with recorded.screen:
        recorded.shows(Phase("compiling", lambda: asked.set() or ""))  # type: ignore[func-returns-value]
        assert asked.wait(timeout=60)
    assert recorded.beats(100) == []


def test_a_step_that_was_skipped_or_spiked_is_always_shown() -> None:
    steps = (step_record(n, skipped=n == 28, spike=n == 29) for n in range(1, 30))
    text = screened([start_record(steps=1000), *steps])
    assert "step 28 skipped" in text and "step 29 spiked" in text
    assert text.count("skipped") == text.count("spiked") == 1


@pytest.mark.parametrize("width", [40, 80, 120])
def test_on_a_terminal_progress_is_one_live_line_that_fits(width: int) -> None:
    text = screened([start_record(), "compiling", *map(step_record, range(1, 38))], terminal(width))
    last = [line for line in lines_of(text) if "37/100" in line][-1]
    assert "loss" in last and "eta" in last and len(last) <= width
    assert [word in last for word in ("lr", "tok/s", "grad norm", "MiB")] == [width >= 80] * 2 + [width > 80] * 2
    assert any(line.startswith("✓ compiling") for line in lines_of(text))


@pytest.mark.parametrize(("device", "memory"), [("cpu", "RSS 7,491 MiB"), ("NVIDIA H200", "VRAM 7,491 MiB")])
def test_memory_is_called_what_it_is_on_the_device(device: str, memory: str) -> None:
    assert memory in screened([start_record(device=device), step_record(1)])


def test_a_phase_that_fails_is_marked_as_failed() -> None:
    recorded = Recorded(terminal(80))
    with pytest.raises(ZeroDivisionError), recorded.screen as screen:
        screen.show("loading")
        raise ZeroDivisionError
    assert any(line.startswith("✗ loading") for line in lines_of(recorded.stream.getvalue()))


def test_on_a_terminal_the_live_line_of_a_phase_says_how_far_it_is() -> None:
    recorded = Recorded(terminal(60))
    with recorded.screen:
        recorded.shows(Phase("compiling", lambda: "graphs: layer 1 of 2, " + "a long list, " * 9))
    live = [line for line in lines_of(recorded.stream.getvalue()) if "compiling" in line][0]
    assert "compiling  0:00:00  graphs: layer 1 of 2" in live and live.endswith("…") and len(live) <= 60


@pytest.mark.parametrize("console", [None, terminal(100)])
def test_every_record_that_has_a_page_is_shown_and_other_events_are_ignored(console: Console | None) -> None:
    text = screened(
        [object(), start_record(), None, step_record(1), run_record(), parity_record(), "last phase"], console
    )
    order = [
        "recipe own",
        "1/100",
        "run folder runs/llama1b-20260301-120000\n",
        "─ Next",
        "parity of recipe own",
        "last phase",
    ]
    places = [text.index(word) for word in order]
    assert places == sorted(places)

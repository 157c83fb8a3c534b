"""How progress reads as events come: a live line on a terminal, stamped lines elsewhere."""

import io
import re
from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from launcher.records.run import EvalRecord
from launcher.report import Screen, make_console
from tests.support.records import parity_record, run_record, start_record, step_record, without_codes


def screened(events: Iterable[Any], console: Console | None = None) -> str:
    stream = io.StringIO()
    console = console or make_console(stream)
    console.file = stream
    with Screen(console) as screen:
        for event in events:
            screen.show(event)
    return stream.getvalue()


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
    stamps = [float(stamp) for stamp in re.findall(r"^ +(\d+\.\d) s  ", text, re.M)]
    assert len(stamps) == len(lines) + 2 and max(stamps) < 60, "seconds since the start"
    assert all(word in line for line in lines for word in ("loss", "lr", "tok/s", "VRAM", "eta"))
    assert f"{total - total % every:,}/{total:,}" in lines[-1], "the last step is never left out"
    assert max(map(len, text.splitlines())) <= 120


def test_a_skipped_step_is_always_shown() -> None:
    text = screened([start_record(steps=1000), *(step_record(n, skipped=n == 29) for n in range(1, 30))])
    assert "step 29 skipped" in text and "step 28 skipped" not in text


@pytest.mark.parametrize("width", [40, 80, 120])
def test_on_a_terminal_progress_is_one_live_line_that_fits(width: int) -> None:
    text = screened([start_record(), "compiling", *map(step_record, range(1, 38))], terminal(width))
    last = [line for line in lines_of(text) if "37/100" in line][-1]
    assert "loss" in last and "eta" in last and ("7,491 MiB" in last) is (width >= 80) and len(last) <= width
    assert any(line.startswith("✓ compiling") for line in lines_of(text))


@pytest.mark.parametrize(("device", "memory"), [("cpu", "RSS 7,491 MiB"), ("NVIDIA H200", "VRAM 7,491 MiB")])
def test_memory_is_called_what_it_is_on_the_device(device: str, memory: str) -> None:
    assert memory in screened([start_record(device=device), step_record(1)])


def test_a_phase_that_fails_is_marked_as_failed() -> None:
    console = terminal(80)
    console.file = stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), Screen(console) as screen:
        screen.show("loading")
        raise ZeroDivisionError
    assert any(line.startswith("✗ loading") for line in lines_of(stream.getvalue()))


@pytest.mark.parametrize("console", [None, terminal(100)])
def test_every_record_that_has_a_page_is_shown_and_other_events_are_ignored(console: Console | None) -> None:
    text = screened(
        [object(), start_record(), None, step_record(1), run_record(), parity_record(), "last phase"], console
    )
    order = ["recipe own", "1/100", "run folder runs/llama1b-20260301-120000\n", "parity of recipe own", "last phase"]
    places = [text.index(word) for word in order]
    assert places == sorted(places)

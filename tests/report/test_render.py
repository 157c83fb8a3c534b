"""How pages are drawn: widths, columns that do not fit, text that is not ours; and what pages are made of."""

import io
from dataclasses import is_dataclass
from typing import Any

import pytest
from rich.console import Console

from launcher.records.run import Sample, Verdict
from launcher.report import Screen, error
from launcher.report.pages import page_of
from launcher.report.pages.page import Column, Page, Section, Table
from tests.support.records import (
    ESCAPED,
    GPU,
    HOSTILE,
    PLAIN_TEXT,
    bench_of,
    parity_record,
    parts_of,
    preview_record,
    rank_record,
    run_record,
    section,
    shown,
    start_record,
)

WORKSTATION = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
REASONS = ("Dynamo cannot trace [bold]print[/bold] of builtins[0], user line model.py:12 [/]" * 3, "x" * 200)


def drawn(page: Page, width: int) -> list[str]:
    return [line.rstrip() for line in shown(page, width=width).splitlines()]


def test_columns_that_do_not_fit_are_left_out_by_priority_and_named() -> None:
    columns = [Column("a", ["1"]), Column("wide\nb", ["2"], 2), Column("c", ["3" * 9], 1), Column("dddd", ["4"])]
    page = Page([Section("T", [Table(columns)])])
    assert "".join(drawn(page, 80)[2:4]).split() == ["wide", "a", "b", "c", "dddd"]
    narrow = drawn(page, 24)
    assert narrow[2].split() == ["a", "c", "dddd"] and narrow[-2:] == ["  not shown at this", "  width: wide b"]
    assert drawn(page, 8)[4].split() == ["1", "4"], "priority 0 is always shown"


def test_a_section_without_items_is_left_out() -> None:
    assert drawn(Page([Section("Empty"), Section("Full", ["line"])]), 20) == ["", "─ Full ────────────", "  line"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("device", [GPU, "cpu", WORKSTATION])
@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_no_line_of_a_run_is_wider_than_the_console_and_no_cell_is_cut(width: int, device: str, ranks: int) -> None:
    records = [rank_record(r, device=device, graph_breaks=r, graph_break_reasons=REASONS) for r in range(ranks)]
    run = run_record(*records, steps=100, sample=Sample("p" * 500, "e " * 200, ""), start=start_record(device=device))
    text = shown(run.start, width=width) + shown(run, width=width)
    assert max(map(len, text.splitlines())) <= width
    rows = [line for line in section(text, "Ranks") if "9f86d081" in line]
    assert len(rows) == ranks and "75,312" in rows[0], "rank, hash and speed are always shown"
    assert device == WORKSTATION or "…" not in text.split("─ Ranks")[1].split("─ ")[0], "only a long name is shortened"


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_of_a_bench_is_wider_than_the_console_and_no_column_is_lost(width: int) -> None:
    text = shown(bench_of(notes=("a long note " * 30,)), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and "not shown at this width" not in text
    assert "after 2 that are not counted" in text and "step ms, median 500.0 100.0 0.20 ×" in section(text, "Steps")


def test_text_of_users_and_models_is_never_read_as_markup_or_as_control_codes() -> None:
    run = run_record(
        rank_record(0, fallbacks=(HOSTILE,)), elapsed_s={HOSTILE: 1.0}, sample=Sample(HOSTILE, HOSTILE, HOSTILE),
        verdicts=(Verdict(HOSTILE, False, HOSTILE),), start=start_record(run_dir=HOSTILE),
    )  # fmt: skip
    stream = io.StringIO()
    console = Console(file=stream, width=300, force_terminal=False)
    with Screen(console, clock=lambda: 0.0) as screen:
        screen.show(HOSTILE)
        screen.show(start_record(recipe=HOSTILE, model=HOSTILE, notes=(HOSTILE,)))
        screen.show(run)
        screen.show(preview_record(PLAIN_TEXT, notes=(HOSTILE,), template=HOSTILE, counts={HOSTILE: 1}))
    error(console, HOSTILE, 3)
    assert not set(stream.getvalue()) & {"\x1b", "\x07", "\x9b", "\r", "\b", "\ud800"}
    assert stream.getvalue().count(ESCAPED) == 1 + 3 + 8 + 3 + 1


@pytest.mark.parametrize("record", [start_record(), run_record(), parity_record(), bench_of(), preview_record()])
def test_a_page_is_plain_data_that_any_renderer_can_draw(record: Any) -> None:
    parts = [part for part in parts_of(page_of(record)) if not is_dataclass(part)]
    assert len(parts) > 20 and {type(part) for part in parts} <= {str, int, bool}

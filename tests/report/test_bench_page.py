"""mode=bench on the console: both sides, one side, a side that failed, narrow and wide, and plain text."""

import io
import math
from dataclasses import replace
from typing import Any

import pytest

from launcher.records.bench import BenchRecord, Ceiling, OursRecord, failed
from launcher.report import bench_page, make_console
from tests.records.test_bench import record, side


def page(shown: BenchRecord) -> str:
    stream = io.StringIO()
    bench_page(make_console(stream), shown)
    return stream.getvalue()


def rows(text: str, heading: str) -> list[str]:
    found = text[text.index(f"─ {heading}") :].split("\n─ ")[0].splitlines()
    return [" ".join(line.split()) for line in found]


def ours_with(**changes: Any) -> OursRecord:
    ours = record().ours
    return replace(ours, side=replace(ours.side, **changes))


def test_each_figure_stands_beside_its_other_with_the_ratio() -> None:
    text = page(record())
    assert "step ms, median 500.0 100.0 0.20 ×" in rows(text, "Steps")
    assert "80th percentile 500.0 100.0 0.20 ×" in rows(text, "Steps")
    assert "tokens/s 200 1,000 5.00 ×" in rows(text, "Steps")
    assert "of the matmul ceiling 10.0 % 50.0 % 5.00 ×" in rows(text, "Steps")
    assert "peak allocated 2,000 1,000 0.50 ×" in rows(text, "Memory")
    assert "before the first step 400 400 1.00 ×" in rows(text, "Memory")
    assert "to the end of the first step 5.0 20.0 4.00 ×" in rows(text, "Start")
    assert "1 2.5000 2.5000 0.0e+00" in rows(text, "Loss")


def test_the_end_says_what_it_comes_to() -> None:
    text = page(record())
    assert "ours 1,000 tokens/s, peak 1,000 MiB: 5.00 × the speed of naive, 0.50 × its memory" in text
    assert "compile pays back after 38 steps: our first step ends 15.0 s later" in text
    sooner = page(record(ours=ours_with(first_step_s=4.0)))
    assert "compile pays back after 0 steps: our first step ends 1.0 s sooner" in sooner
    slower = page(record(ours=ours_with(steps_s=(0.6, 0.6))))
    assert "compile never pays back" in slower and "compile never pays back" not in text


def test_the_head_says_what_was_compared() -> None:
    text = page(record())
    assert "bench of recipe own [bold]" in text and "autocast to bfloat16" in text
    assert "2 × 64, 128 × accumulation 3 of the recipe's data" in text
    assert "of random rows" in page(record(rows="random"))
    assert "90 to 100, of them 50 targets" in text
    assert "0.0 GFLOP/s: the fastest bfloat16 product of 8,192²" in text
    fast = replace(record().ours, ceiling=Ceiling("bfloat16", 8192, 7.83e14))
    assert "783 TFLOP/s: the fastest" in page(record(ours=fast))
    assert "\x1b" not in text and "\\x1b[31mnote" in text


def test_without_a_naive_side_there_is_no_column_of_it() -> None:
    text = page(record(naive=None))
    assert "naive" not in text and "step ms, median 100.0" in rows(text, "Steps")
    assert "ours 1,000 tokens/s, peak 1,000 MiB\n" in text


def test_a_naive_side_out_of_memory_leaves_what_it_held_and_all_of_ours() -> None:
    held = replace(side(0.5, first_s=5.0), steps_s=(), losses=(), first_step_s=None, failure="f", out_of_memory=True)
    text = page(record(naive=held, notes=("naive: out of memory",)))
    assert "step ms, median - 100.0 -" in rows(text, "Steps")
    assert "peak allocated 1,000 1,000 1.00 ×" in rows(text, "Memory")
    assert "naive ran out of memory" in text and "naive: out of memory" in rows(text, "Notes")
    assert "pays back" not in text and "same loss" not in text


def test_a_naive_side_that_died_has_no_figure_at_all() -> None:
    text = page(record(naive=failed("its process was ended by SIGKILL")))
    assert "naive failed" in text and "peak allocated - 1,000 -" in rows(text, "Memory")


def test_losses_that_differ_are_said_loudly() -> None:
    text = page(record(naive=side(0.5, first_s=5.0, loss=math.nan)))
    assert "✗ FAIL" in text and "nan" in text and "✗ FAIL" not in page(record())


def test_of_many_steps_a_sample_of_losses_is_shown() -> None:
    losses = tuple(2.0 - n / 1000 for n in range(124))
    many = record(ours=ours_with(losses=losses), naive=replace(side(0.5, first_s=5.0), losses=losses[:100]))
    found = rows(page(many), "Loss")
    assert "8 of 124 steps" in found[0]
    assert found[3].startswith("1 2.0000") and found[10] == "124 - 1.8770 -"


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_console_and_no_column_is_lost(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = page(record(notes=("a long note " * 30,)))
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and "behind 4 that are not counted" in text
    assert "not shown at this width" not in text and "step ms, median 500.0 100.0 0.20 ×" in rows(text, "Steps")

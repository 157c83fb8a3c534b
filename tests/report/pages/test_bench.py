"""mode=bench as a page: both sides, one side, a side that failed."""

import math
from dataclasses import replace

from launcher.records.bench import Ceiling, SideRecord
from tests.support.records import bad, bench_of, bench_side, section, shown


def test_each_figure_stands_beside_that_of_the_other_side_with_the_ratio() -> None:
    text = shown(bench_of())
    assert section(text, "Start")[3:6] == [
        "imports 1.0 1.0 1.00 ×",
        "first step 4.0 19.0 4.75 ×",
        "to the end of the first step 5.0 20.0 4.00 ×",
    ]
    assert section(text, "Memory")[3:6] == [
        "before the first step 400 400 1.00 ×",
        "peak allocated 2,000 1,000 0.50 ×",
        "peak reserved 2,100 1,100 0.52 ×",
    ]
    assert section(text, "Loss")[3:5] == ["1 2.5000 2.5000 0.0e+00", "2 2.0000 2.0000 0.0e+00"]
    assert section(text, "Steps")[3:8] == [
        "step ms, median 500.0 100.0 0.20 ×",
        "20th percentile 500.0 100.0 0.20 ×",
        "80th percentile 500.0 100.0 0.20 ×",
        "tokens/s 200 1,000 5.00 ×",
        "of the matmul ceiling 10.0 % 50.0 % 5.00 ×",
    ]


def test_the_end_says_what_it_comes_to() -> None:
    text = shown(bench_of())
    assert "ours 1,000 tokens/s, peak 1,000 MiB: 5.00 × the speed of naive, 0.50 × its memory" in text
    assert "compile pays back after 38 steps: our first step ends 15.0 s later" in text
    sooner = shown(bench_of(first_step_s=4.0))
    assert "compile pays back after 0 steps: our first step ends 1.0 s sooner" in sooner
    assert "compile never pays back" in shown(bench_of(steps_s=(0.6, 0.6)))


def test_the_head_says_what_was_compared() -> None:
    record = bench_of()
    text = " ".join(shown(record).split())
    assert "bench of recipe own [bold]" in text and "with gradient checkpointing" in text
    assert "2 × 64, 128 × accumulation 4 of the recipe's data" in text
    assert "of random rows" in shown(bench_of(rows="random"))
    assert "90 to 100, of them 50 targets" in text and "0 graph breaks, 0 recompiles, 2 hits" in text
    assert "0.0 GFLOP/s: the fastest bfloat16 product of 8,192²" in text
    assert "783 TFLOP/s: the fastest" in shown(replace(record, ceiling=Ceiling("bfloat16", 8192, 7.83e14)))


def test_a_plain_naive_side_stands_beside_the_checkpointed_one_or_in_its_place() -> None:
    both = bench_of(plain=bench_side(0.25, peak_allocated_mib=4_000.0))
    text = " ".join(shown(both).split())
    assert "step ms, median 500.0 250.0 100.0 0.20 × 0.40 ×" in section(shown(both), "Steps")
    assert "1 2.5000 2.5000 2.5000 0.0e+00" in section(shown(both), "Loss")
    assert "naive stock transformers, PEFT and bitsandbytes, autocast to bfloat16, with gradient checkpointing" in text
    assert (
        "its passes 4 to 8 a step, padded, for our 4" in text
        and "plain the same without gradient checkpointing" in text
    )
    assert "5.00 × the speed of naive, 0.50 × its memory" in text
    assert "2.50 × the speed of plain, 0.25 × its memory" in text and "beside plain, compile pays back after" in text
    full = bench_side(steps_s=(), losses=(), first_step_s=None, failure="f", out_of_memory=True)
    assert "plain ran out of memory" in shown(bench_of(plain=full)) and "5.00 × the speed" in shown(
        bench_of(plain=full)
    )
    alone = " ".join(shown(bench_of(None, plain=bench_side())).split())
    assert "plain stock transformers" in alone and "no gradient checkpointing" in alone and "naive" not in alone
    assert "peak 1,000 MiB: 5.00 × the speed of plain" in alone and "its passes 4 to 8" in alone
    assert "1 2.5000 2.5000 0.0e+00" in alone and " compile pays back after 38 steps" in alone
    assert "beside plain" not in alone and bad(bench_of(None, plain=bench_side(loss=math.nan))) == ["inf"]


def test_without_a_naive_side_there_is_no_column_of_it() -> None:
    text = shown(bench_of(None))
    assert "naive" not in text and "step ms, median 100.0" in section(text, "Steps")
    assert "ours 1,000 tokens/s, peak 1,000 MiB\n" in text


def test_a_naive_side_that_failed_leaves_what_it_had_measured_and_all_of_ours() -> None:
    full = bench_side(steps_s=(), losses=(), first_step_s=None, failure="f", out_of_memory=True)
    text = shown(bench_of(full, notes=("naive: out of memory",)))
    assert "step ms, median - 100.0 -" in section(text, "Steps")
    assert "peak allocated 2,000 1,000 0.50 ×" in section(text, "Memory")
    assert "naive ran out of memory" in text and "naive: out of memory" in section(text, "Notes")
    assert "pays back" not in text and "same loss" not in text
    died = shown(bench_of(SideRecord(failure="its process was ended by SIGKILL")))
    assert "naive failed" in died and "peak allocated - 1,000 -" in section(died, "Memory")


def test_a_first_loss_that_differs_is_a_failed_verdict() -> None:
    text = shown(bench_of(bench_side(loss=math.nan)))
    assert bad(bench_of(bench_side(loss=math.nan))) == ["inf"] and bad(bench_of()) == []
    assert "1 nan 2.5000 inf" in section(text, "Loss") and "✗ FAIL" in text and "✗ FAIL" not in shown(bench_of())


def test_of_many_steps_a_sample_of_losses_is_shown() -> None:
    losses = tuple(2.0 - n / 1000 for n in range(124))
    lines = section(shown(bench_of(bench_side(losses=losses[:100]), losses=losses)), "Loss")
    assert ", 8 of 124 steps" in lines[0] and len(lines) == 11
    assert lines[3].startswith("1 2.0000") and lines[10] == "124 - 1.8770 -"

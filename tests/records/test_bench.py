"""The arithmetic of mode=bench: percentiles, rates, pay-back, and what may not be compared."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from launcher.records.bench import (
    BenchRecord,
    Ceiling,
    OursRecord,
    SideRecord,
    Workload,
    difference,
    failed,
    pay_back,
    percentile,
)
from launcher.records.run import CompileRecord, StartRecord, VramRecord

START = StartRecord(
    recipe="own [bold]", model="/models/base", family="llama", parameters=1_000, trainable=10, device="CPU",
    world_size=1, dtype="bfloat16", quantization="nf4", attention="sdpa (as asked)", micro_batch=2, widths=(64, 128),
    accumulation=3, steps=2, optimizer="adamw", compile="strict, scope layer, inductor", batching="bucketed",
    streamed=False, template="llama3", loss_on={}, train_rows=9, train_blocks=9, validation_rows=0, fill=1.0,
    epochs=1.0, run_dir="", notes=("a \x1b[31mnote",),
)  # fmt: skip
WORK = Workload((90, 90, 100, 100), (50,) * 4, (9_000, 9_000, 10_000, 10_000), "abc")


def side(seconds: float, *, first_s: float, peak: float = 1_000.0, loss: float = 2.5) -> SideRecord:
    return SideRecord(
        phases_s={"imports": 1.0, "first step": first_s - 1}, first_step_s=first_s, losses=(loss, 2.0, 1.5, 1.0),
        steps_s=(seconds, seconds), vram=(VramRecord("before first step", 400.0, 500.0, 600.0, 9_000.0),),
        peak_allocated_mib=peak, peak_reserved_mib=peak + 100, batches="abc",
    )  # fmt: skip


def record(**changes: Any) -> BenchRecord:
    ours = OursRecord(
        side(0.1, first_s=20.0), START, CompileRecord(4, 4, 4, 0, 0, 0, 1.0, 1.0, 0, "abc"),
        Ceiling("bfloat16", 8192, 2e5), loss_tolerance=2e-3,
    )  # fmt: skip
    made = BenchRecord({}, "data", WORK, ours, side(0.5, first_s=5.0, peak=2_000.0))
    return replace(made, **changes)


@pytest.mark.parametrize("percent", [0, 20, 50, 80, 100])
@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_percentiles_are_those_of_numpy(percent: float, count: int) -> None:
    values = np.random.default_rng(count).random(count)
    assert percentile(list(values), percent) == pytest.approx(float(np.percentile(values, percent)))


@pytest.mark.parametrize(
    ("behind_s", "naive_s", "ours_s", "steps"),
    [
        (10.0, 0.3, 0.1, 50),
        (10.0, 0.31, 0.1, 48),  # 47.6: ahead at the end of the 48th
        (0.0, 0.3, 0.1, 0),
        (-5.0, 0.3, 0.1, 0),
        (10.0, 0.1, 0.1, None),
        (10.0, 0.1, 0.3, None),
        (-5.0, 0.1, 0.3, None),  # ahead at first, and overtaken
    ],
)
def test_compile_pays_back_when_the_sum_of_what_each_step_saves_is_what_the_start_cost(
    behind_s: float, naive_s: float, ours_s: float, steps: int | None
) -> None:
    assert pay_back(behind_s, naive_s=naive_s, ours_s=ours_s) == steps
    if steps:
        assert behind_s + steps * ours_s <= steps * naive_s + 1e-9
        assert behind_s + (steps - 1) * ours_s > (steps - 1) * naive_s


def test_the_figures_of_two_sides() -> None:
    found = record()
    assert found.speed_up == pytest.approx(5.0) and found.memory_ratio == pytest.approx(0.5)
    assert found.pay_back_steps == 38  # 15 s behind, 0.4 s a step: 37.5
    assert found.tokens_per_s(found.ours.side) == pytest.approx(1_000)  # of the measured steps alone: 100 in 0.1 s
    assert found.ceiling_share(found.ours.side) == pytest.approx(0.5)  # 10,000 in 0.1 s, of 200,000 a second
    assert found.ours.side.before_mib == 400.0
    assert found.holds and len(found.verdicts) == 3


def test_with_rows_of_several_widths_a_rate_is_of_steps_and_their_own_tokens() -> None:
    """Three steps of 10 tokens in 1 s and two of 100 in 10 s: 10 a second, not their mean of 46 in the median's 1."""
    mixed = replace(side(1.0, first_s=1.0), steps_s=(1.0, 10.0, 1.0, 10.0, 1.0))
    assert mixed.rate((7, 7, 10, 100, 10, 100, 10)) == pytest.approx(10)


@pytest.mark.parametrize(
    "naive", [None, failed("gone"), replace(side(0.5, first_s=5.0), failure="out of memory", out_of_memory=True)]
)
def test_without_a_naive_side_ours_keeps_its_figures_and_nothing_is_compared(naive: SideRecord | None) -> None:
    found = record(naive=naive)
    assert found.speed_up is found.memory_ratio is found.pay_back_steps is None
    assert found.tokens_per_s(found.ours.side) == pytest.approx(1_000)
    report = found.as_report()
    assert report["ours"]["step_ms"] == {"median": 100.0, "p20": 100.0, "p80": 100.0}
    if naive:
        assert report["naive"]["step_ms"] is None and report["naive"]["failure"] == naive.failure
    else:
        assert report["naive"] is None


@pytest.mark.parametrize("loss", [2.51, math.nan, math.inf])
def test_a_first_loss_beyond_the_tolerance_is_said_in_at_most_five_lines(loss: float) -> None:
    found = record(naive=side(0.5, first_s=5.0, loss=loss))
    assert not found.holds and not found.as_report()["holds"]
    assert "same loss at step 1: ours 2.500000, naive" in found.failure and "at most 2e-03" in found.failure
    assert "same batches" not in found.failure.splitlines()[1]
    assert len(found.failure.splitlines()) <= 5
    assert record(naive=side(0.5, first_s=5.0, loss=2.504)).holds


def test_other_batches_are_a_failure_though_the_losses_agree() -> None:
    found = record(naive=replace(side(0.5, first_s=5.0), batches="other"))
    assert [verdict.holds for verdict in found.verdicts] == [True, False, True] and not found.holds


@pytest.mark.parametrize("naive", [True, False])
def test_a_later_loss_that_is_not_finite_is_a_failure(naive: bool) -> None:
    whole = record() if naive else record(naive=None)
    ours = replace(whole.ours, side=replace(whole.ours.side, losses=(*whole.ours.side.losses[:3], math.nan)))
    found = replace(whole, ours=ours)
    assert whole.holds and not found.holds
    assert "all losses are finite: 1 of them are not: [nan]" in found.failure


def test_what_is_no_number_is_infinitely_far_from_everything() -> None:
    assert difference(1.0, 1.0) == 0.0 and difference(1.1, 1.0) == pytest.approx(0.1)
    assert difference(math.nan, 1.0) == difference(1.0, math.nan) == difference(math.nan, math.nan) == math.inf
    assert difference(1.0, 0.0) == math.inf and difference(0.0, 0.0) == 0.0
    assert difference(math.inf, 1.0) == math.inf

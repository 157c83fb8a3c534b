"""The arithmetic of mode=bench: percentiles, rates, pay-back, and what may not be compared."""

import math
from dataclasses import replace

import numpy as np
import pytest

from launcher.proof.bench.figures import bench_record, mean_rate, pay_back, with_figures
from launcher.proof.difference import difference
from launcher.records.bench import SideRecord
from tests.support.records import OURS, WORKLOAD, bench_of, bench_side


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_the_spread_of_steps_is_that_of_numpy(count: int) -> None:
    seconds = np.random.default_rng(count).random(count)
    workload = replace(WORKLOAD, tokens=(1,) * count, flops=(1,) * count)
    spread = with_figures(bench_side(steps_s=tuple(seconds.tolist())), workload, OURS.ceiling).step_ms
    assert spread is not None
    expected = 1000 * np.percentile(seconds, [50, 20, 80])
    assert [spread.median, spread.p20, spread.p80] == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    ("delay_s", "naive_s", "ours_s", "steps"),
    [
        (10.0, 0.3, 0.1, 50),
        (10.0, 0.31, 0.1, 48),  # 47.6: ahead at the end of the 48th
        (0.0, 0.3, 0.1, 0),
        (-5.0, 0.3, 0.1, 0),
        (10.0, 0.1, 0.1, None),
        (10.0, 0.1, 0.3, None),
        (-5.0, 0.1, 0.3, None),  # ahead at first, then overtaken
    ],
)
def test_compile_pays_back_when_the_time_saved_by_steps_equals_the_delay_of_the_start(
    delay_s: float, naive_s: float, ours_s: float, steps: int | None
) -> None:
    assert pay_back(delay_s, naive_s=naive_s, ours_s=ours_s) == steps
    if steps:
        assert delay_s + steps * ours_s <= steps * naive_s + 1e-9
        assert delay_s + (steps - 1) * ours_s > (steps - 1) * naive_s


def test_the_figures_of_two_sides() -> None:
    record = bench_of()
    assert record.speed_up == pytest.approx(5.0) and record.memory_ratio == pytest.approx(0.5)
    assert record.pay_back_steps == 38  # 15 s later, 0.4 s saved a step: 37.5
    assert record.ours.tokens_per_s == pytest.approx(1_000)  # of the measured steps alone: 100 in 0.1 s
    assert record.ours.ceiling_share == pytest.approx(0.5)  # 10,000 FLOP in 0.1 s, of 200,000 a second
    assert record.loss_differences == (0.0,) * 4
    assert record.holds and len(record.verdicts) == 4


def test_the_rate_with_blocks_of_several_widths_is_the_median_over_steps_of_their_own_tokens() -> None:
    """Three steps of 10 tokens in 1 s and two of 100 in 10 s: 10 a second, not their mean of 46 in the median's 1."""
    assert mean_rate((7, 7, 10, 100, 10, 100, 10), (1.0, 10.0, 1.0, 10.0, 1.0)) == pytest.approx(10)


@pytest.mark.parametrize(
    "naive", [None, SideRecord(failure="gone"), bench_side(failure="out of memory", out_of_memory=True)]
)
def test_without_a_finished_naive_side_ours_keeps_its_figures_and_nothing_is_compared(naive: SideRecord | None) -> None:
    record = bench_of(naive)
    assert record.speed_up is record.memory_ratio is record.pay_back_steps is None
    assert record.ours.tokens_per_s == pytest.approx(1_000) and record.ours.step_ms is not None
    assert record.naive is None or record.naive.step_ms is record.naive.tokens_per_s is None


@pytest.mark.parametrize("loss", [2.51, math.nan, math.inf])
def test_a_first_loss_beyond_the_tolerance_is_a_failure(loss: float) -> None:
    record = bench_of(bench_side(loss=loss))
    assert not record.holds
    assert "same loss at step 1: ours 2.500000, naive" in record.failure and "at most 2e-03" in record.failure
    assert "same batches" not in record.failure
    assert bench_of(bench_side(loss=2.504)).holds
    assert "ours 2.500000, plain" in bench_of(None, plain=bench_side(loss=loss)).failure


def test_other_batches_are_a_failure_though_the_losses_agree() -> None:
    record = bench_of(bench_side(batches="other"))
    assert [verdict.holds for verdict in record.verdicts] == [True, False, True, True] and not record.holds


def test_steps_that_did_not_run_compiled_are_a_failure_unless_nothing_was_to_be_compiled() -> None:
    compiled = replace(OURS, compile=replace(OURS.compile, steps_compiled=7))
    record = bench_record({}, rows="data", workload=WORKLOAD, ours=compiled, sides={})
    assert "every step ran compiled: 7 of 8 steps" in record.failure
    off = replace(OURS, compile=replace(OURS.compile, steps_compiled=0, expected_graphs=0))
    assert bench_record({}, rows="data", workload=WORKLOAD, ours=off, sides={}).holds


@pytest.mark.parametrize("naive", [bench_side(), None])
def test_a_later_loss_that_is_not_finite_is_a_failure(naive: SideRecord | None) -> None:
    record = bench_of(naive, losses=(2.5, 2.0, 1.5, math.nan))
    assert bench_of(naive).holds and not record.holds
    assert "all losses are finite: 1 of them are not: [nan]" in record.failure


def test_a_value_that_is_no_number_is_infinitely_far_from_everything() -> None:
    assert difference(1.0, 1.0) == 0.0 and difference(1.1, 1.0) == pytest.approx(0.1)
    assert difference(math.nan, 1.0) == difference(1.0, math.nan) == difference(math.nan, math.nan) == math.inf
    assert difference(1.0, 0.0) == math.inf and difference(0.0, 0.0) == 0.0
    assert difference(math.inf, 1.0) == math.inf

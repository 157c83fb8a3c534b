"""Computes the figures and verdicts of a bench from what both sides measured. Imports no torch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from launcher.proof.difference import difference
from launcher.records.bench import BenchRecord, Ceiling, OursRecord, SideRecord, SpeedComparison, Spread, Workload
from launcher.records.run import Verdict
from launcher.train.verdicts import steps_verdict


def bench_record(
    recipe: dict[str, Any], *, workload: Workload, ours: OursRecord, sides: Mapping[str, SideRecord],
    rows: str, notes: tuple[str, ...] = (),
) -> BenchRecord:  # fmt: skip
    """The record of one comparison. `recipe` is the resolved one, `rows` its proof.bench_rows; `sides`: "naive", with
    gradient checkpointing, and "plain", without, as far as they were measured."""
    side = with_figures(ours.side, workload, ours.ceiling)
    measured = {name: with_figures(other, workload, ours.ceiling) for name, other in sides.items()}
    naive, plain = measured.get("naive"), measured.get("plain")
    return BenchRecord(
        recipe=recipe, rows=rows, start=ours.start, compile=ours.compile, ceiling=ours.ceiling, workload=workload,
        ours=side, naive=naive, plain=plain, **vars(compared(side, naive)),
        to_plain=compared(side, plain), loss_tolerance=ours.loss_tolerance, notes=notes,
        verdicts=(
            *ours.loaded,
            *_verdicts(side, measured, tolerance=ours.loss_tolerance),
            *([steps_verdict([ours.compile])] if ours.compile.expected_graphs else []),
        ),
    )  # fmt: skip


def compared(ours: SideRecord, naive: SideRecord | None) -> SpeedComparison:
    """Ours beside a naive side, both with their figures."""
    if naive is None:
        return SpeedComparison()
    differences = tuple(difference(*losses) for losses in zip(ours.losses, naive.losses, strict=False))
    if not naive.step_ms:
        return SpeedComparison(loss_differences=differences)
    assert ours.step_ms and ours.first_step_s and naive.first_step_s, "both sides have finished"
    assert ours.peak_allocated_mib and naive.peak_allocated_mib
    return SpeedComparison(
        speed_up=naive.step_ms.median / ours.step_ms.median,
        memory_ratio=ours.peak_allocated_mib / naive.peak_allocated_mib,
        pay_back_steps=pay_back(
            ours.first_step_s - naive.first_step_s,
            naive_s=naive.step_ms.median / 1000,
            ours_s=ours.step_ms.median / 1000,
        ),
        loss_differences=differences,
    )


def with_figures(side: SideRecord, workload: Workload, ceiling: Ceiling) -> SideRecord:
    """The side with its step times' spread and its rates, unless it failed."""
    if side.failure:
        return side
    ms = [1000 * seconds for seconds in side.steps_s]
    p20, *_, p80 = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 4
    return replace(
        side,
        step_ms=Spread(statistics.median(ms), p20, p80),
        tokens_per_s=mean_rate(workload.tokens, side.steps_s),
        ceiling_share=mean_rate(workload.flops, side.steps_s) / ceiling.flops_per_s,
    )


def mean_rate(amounts: Sequence[int], steps_s: Sequence[float]) -> float:
    """The median over the measured steps of what a step did per second; `amounts` are of all steps.

    Not the mean amount by the median time: with blocks of several widths these belong to different steps.
    """
    measured = amounts[-len(steps_s) :]
    return statistics.median(amount / seconds for amount, seconds in zip(measured, steps_s, strict=True))


def pay_back(delay_s: float, *, naive_s: float, ours_s: float) -> int | None:
    """Steps after the first until a run that ended its first step `delay_s` later has caught up: the least N with
    delay + N * ours <= N * naive. None where its step is not faster: never."""
    if ours_s >= naive_s:
        return None
    steps = delay_s / (naive_s - ours_s)
    return max(0, math.ceil(round(steps, 6)))  # 10 / (0.3 - 0.1) is 50, not a step more


def _verdicts(ours: SideRecord, measured: Mapping[str, SideRecord], *, tolerance: float) -> list[Verdict]:
    """Whether every loss is finite, and all sides did the same work as far as they took a first step."""
    bad = [loss for side in (ours, *measured.values()) for loss in side.losses if not math.isfinite(loss)]
    finite = Verdict("all losses are finite", not bad, f"{len(bad)} of them are not: {bad[:1] or 'none'}")
    others = {name: side for name, side in measured.items() if side.losses}
    if not others:
        return [finite]
    name = max(others, key=lambda name: difference(ours.losses[0], others[name].losses[0]))
    relative = difference(ours.losses[0], others[name].losses[0])
    figures = f"ours {ours.losses[0]:.6f}, {name} {others[name].losses[0]:.6f}"
    evidence = f"{figures}: {relative:.1e} apart, at most {tolerance:.0e}"
    same = all(side.batches == ours.batches for side in others.values())
    return [
        finite,
        Verdict("both sides have the same batches", same, "by digest"),
        Verdict("both sides have the same loss at step 1", relative <= tolerance, evidence),
    ]

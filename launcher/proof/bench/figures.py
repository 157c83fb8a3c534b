"""Computes the figures and verdicts of a bench from what both sides measured. Imports no torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from launcher.proof.difference import difference
from launcher.records.bench import BenchRecord, Ceiling, OursRecord, SideRecord, Spread, Workload
from launcher.records.run import Verdict
from launcher.train.verdicts import steps_verdict


def bench_record(
    recipe: dict[str, Any], *, rows: str, workload: Workload, ours: OursRecord, naive: SideRecord | None,
    notes: tuple[str, ...] = (),
) -> BenchRecord:  # fmt: skip
    """The record of one comparison. `recipe` is the resolved one, `rows` its proof.bench_rows."""
    side = with_figures(ours.side, workload, ours.ceiling)
    naive = with_figures(naive, workload, ours.ceiling) if naive else None
    differences = [difference(*losses) for losses in zip(side.losses, naive.losses if naive else (), strict=False)]
    speed_up = memory_ratio = pay_back_steps = None
    if naive and naive.step_ms:
        assert side.step_ms and side.first_step_s and naive.first_step_s, "both sides have finished"
        assert side.peak_allocated_mib and naive.peak_allocated_mib
        speed_up = naive.step_ms.median / side.step_ms.median
        memory_ratio = side.peak_allocated_mib / naive.peak_allocated_mib
        pay_back_steps = pay_back(
            side.first_step_s - naive.first_step_s,
            naive_s=naive.step_ms.median / 1000,
            ours_s=side.step_ms.median / 1000,
        )
    return BenchRecord(
        recipe=recipe, rows=rows, start=ours.start, compile=ours.compile, ceiling=ours.ceiling, workload=workload,
        ours=side, naive=naive, speed_up=speed_up, memory_ratio=memory_ratio, pay_back_steps=pay_back_steps,
        loss_differences=tuple(differences), loss_tolerance=ours.loss_tolerance, notes=notes,
        verdicts=(
            *ours.loaded,
            *_verdicts(side, naive, tolerance=ours.loss_tolerance),
            *([steps_verdict([ours.compile])] if ours.compile.expected_graphs else []),
        ),
    )  # fmt: skip


def with_figures(side: SideRecord, workload: Workload, ceiling: Ceiling) -> SideRecord:
    """The side with its step times' spread and its rates, unless it failed."""
    if side.failure:
        return side
    ms = [1000 * seconds for seconds in side.steps_s]
    p20, *_, p80 = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 4
    return replace(
        side,
        step_ms=Spread(statistics.median(ms), p20, p80),
        tokens_per_s=rate(workload.tokens, side.steps_s),
        ceiling_share=rate(workload.flops, side.steps_s) / ceiling.flops_per_s,
    )


def rate(amounts: Sequence[int], steps_s: Sequence[float]) -> float:
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


def _verdicts(ours: SideRecord, naive: SideRecord | None, *, tolerance: float) -> list[Verdict]:
    """Whether every loss is finite, and both sides did the same work where naive took its first step."""
    losses = [*ours.losses, *(naive.losses if naive else ())]
    bad = [loss for loss in losses if not math.isfinite(loss)]
    finite = Verdict("all losses are finite", not bad, f"{len(bad)} of them are not: {bad[:1] or 'none'}")
    if naive is None or not naive.losses:
        return [finite]
    relative = difference(ours.losses[0], naive.losses[0])
    figures = f"ours {ours.losses[0]:.6f}, naive {naive.losses[0]:.6f}"
    evidence = f"{figures}: {relative:.1e} apart, at most {tolerance:.0e}"
    return [
        finite,
        Verdict("both sides have the same batches", ours.batches == naive.batches, "by digest"),
        Verdict("both sides have the same loss at step 1", relative <= tolerance, evidence),
    ]

"""What mode=bench measured: plain frozen records, rendered by report/bench.py, written to report=PATH. Stdlib only.

Ratios are ours to naive, but for the speed-up, which is naive to ours.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.records.run import REPORT_SCHEMA, CompileRecord, StartRecord, Verdict, VramRecord

BEFORE = "before first step"  # a phase of memory
WARM_UP_STEPS = 3  # behind the first one and before those that are measured: allocators fill, graphs are captured


@dataclass(frozen=True)
class Workload:
    """What each step trains on, from the first: the same on both sides."""

    tokens: tuple[int, ...]  # padding not counted
    supervised_tokens: tuple[int, ...]
    flops: tuple[int, ...]  # of the model (proof/bench/flops.py), without recomputation
    batches: str  # digest of ids, labels and document boundaries


@dataclass(frozen=True)
class Ceiling:
    """The fastest that one large matrix product ran on the device, in the dtype of the run."""

    dtype: str
    size: int  # of the two square matrices
    flops_per_s: float


@dataclass(frozen=True)
class Spread:
    """Of the measured steps."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class SideRecord:
    """One side, in a process of its own. Where it failed: what it had until then."""

    phases_s: dict[str, float]  # from the start of the process to the end of the first step, in order
    first_step_s: float | None  # the whole of that
    losses: tuple[float, ...]  # of each step, from the first: means over the supervised tokens
    steps_s: tuple[float, ...]  # the measured steps, which are the last ones
    vram: tuple[VramRecord, ...]
    peak_allocated_mib: float | None  # resident memory on a CPU, as are all figures of memory
    peak_reserved_mib: float | None
    batches: str  # digest of what it was given
    failure: str = ""
    out_of_memory: bool = False

    @property
    def before_mib(self) -> float | None:
        """Allocated before the first step."""
        return next((v.allocated_mib for v in self.vram if v.phase == BEFORE), None)

    @property
    def step_ms(self) -> Spread | None:
        if not self.steps_s or self.failure:
            return None
        ms = [1000 * s for s in self.steps_s]
        return Spread(statistics.median(ms), percentile(ms, 20), percentile(ms, 80))

    def rate(self, amounts: Sequence[int]) -> float | None:
        """Per second: the median over the measured steps of what a step did by its seconds. `amounts` are of all steps.
        Not the mean amount by the median time: with rows of several widths these belong to different steps."""
        if self.step_ms is None:
            return None
        done = amounts[-len(self.steps_s) :]
        return statistics.median(amount / s for amount, s in zip(done, self.steps_s, strict=True))


def failed(failure: str) -> SideRecord:
    """A side whose process ended without a record."""
    return SideRecord({}, None, (), (), (), None, None, "", failure)


@dataclass(frozen=True)
class OursRecord:
    """Our side, with what only it knows."""

    side: SideRecord
    start: StartRecord
    compile: CompileRecord
    ceiling: Ceiling
    loss_tolerance: float


@dataclass(frozen=True)
class BenchRecord:
    """The whole comparison. `naive` is None where it was left out."""

    recipe: dict[str, Any]  # resolved
    rows: str  # "data" or "random"
    workload: Workload
    ours: OursRecord
    naive: SideRecord | None
    notes: tuple[str, ...] = ()

    @property
    def speed_up(self) -> float | None:
        """Median step of naive to that of ours."""
        ours, naive = self.ours.side.step_ms, self.naive and self.naive.step_ms
        return naive.median / ours.median if ours and naive else None

    @property
    def memory_ratio(self) -> float | None:
        """Peak of allocated memory of ours to that of naive; None where naive did not come to its end."""
        if self.naive is None or self.naive.failure:
            return None
        return ratio(self.ours.side.peak_allocated_mib, self.naive.peak_allocated_mib)

    @property
    def pay_back_steps(self) -> int | None:
        """Steps after the first until ours is ahead of naive; None: never, or not known."""
        ours, naive = self.ours.side, self.naive
        if naive is None or ours.step_ms is None or naive.step_ms is None:
            return None
        assert ours.first_step_s is not None and naive.first_step_s is not None
        behind_s = ours.first_step_s - naive.first_step_s
        return pay_back(behind_s, naive_s=naive.step_ms.median / 1000, ours_s=ours.step_ms.median / 1000)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Whether every loss is finite, and both sides did the same work where naive took its first step."""
        sides = [side for side in (self.ours.side, self.naive) if side]
        wrong = [loss for side in sides for loss in side.losses if not math.isfinite(loss)]
        finite = Verdict("all losses are finite", not wrong, f"{len(wrong)} of them are not: {wrong[:1] or 'none'}")
        if self.naive is None or not self.naive.losses:
            return (finite,)
        ours, naive = self.ours.side.losses[0], self.naive.losses[0]
        apart = difference(ours, naive)
        said = f"ours {ours:.6f}, naive {naive:.6f}: {apart:.1e} apart, at most {self.ours.loss_tolerance:.0e}"
        return (
            finite,
            Verdict("both sides have the same batches", self.ours.side.batches == self.naive.batches, "by digest"),
            Verdict("both sides have the same loss at step 1", apart <= self.ours.loss_tolerance, said),
        )

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)

    @property
    def failure(self) -> str:
        """What the error says where the sides differ: rule, figures, remedy."""
        broken = [f"{verdict.claim}: {verdict.evidence}"[:300] for verdict in self.verdicts if not verdict.holds]
        return "\n".join(
            [
                "both sides must train on the same: their speeds cannot be compared where it says:",
                *broken,
                "mode=parity tells which part of the model differs.",
            ]
        )

    def as_report(self) -> dict[str, Any]:
        """The JSON of report=PATH (its keys are public: add, never rename)."""
        ours = self.ours
        return {
            "schema": REPORT_SCHEMA,
            "mode": "bench",
            "holds": self.holds,
            "recipe": self.recipe,
            "rows": self.rows,
            "start": asdict(ours.start),
            "compile": asdict(ours.compile),
            "ceiling": asdict(ours.ceiling),
            "workload": asdict(self.workload),
            "ours": self._figures(ours.side),
            "naive": self._figures(self.naive) if self.naive else None,
            "speed_up": self.speed_up,
            "memory_ratio": self.memory_ratio,
            "pay_back_steps": self.pay_back_steps,
            "loss_tolerance": ours.loss_tolerance,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "notes": self.notes,
        }

    def tokens_per_s(self, side: SideRecord) -> float | None:
        return side.rate(self.workload.tokens)

    def ceiling_share(self, side: SideRecord) -> float | None:
        """0-1: the model's arithmetic by the time it took, to what the device's matrix products reach."""
        return ratio(side.rate(self.workload.flops), self.ours.ceiling.flops_per_s)

    def _figures(self, side: SideRecord) -> dict[str, Any]:
        return {
            **asdict(side),
            "step_ms": asdict(side.step_ms) if side.step_ms else None,
            "tokens_per_s": self.tokens_per_s(side),
            "ceiling_share": self.ceiling_share(side),
            "before_mib": side.before_mib,
        }


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest values in order, as NumPy's default is."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def pay_back(behind_s: float, *, naive_s: float, ours_s: float) -> int | None:
    """Steps after the first until a run that ended its first step `behind_s` later has caught up: N of
    behind + N * ours <= N * naive. None: never, since its step is not faster; 0: it was not behind."""
    if ours_s >= naive_s:
        return None
    steps = behind_s / (naive_s - ours_s)
    return max(0, math.ceil(round(steps, 6)))  # 10 / (0.3 - 0.1) is 50, not a step more


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def difference(value: float, base: float) -> float:
    """|value - base| relative to base; infinite where one is not a number or base alone is 0."""
    if value == base:
        return 0.0
    apart = abs(value - base) / abs(base) if base else math.inf
    return math.inf if math.isnan(apart) else apart

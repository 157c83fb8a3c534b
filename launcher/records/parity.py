"""What mode=parity measured: plain frozen records, rendered by report/parity.py, written to report=PATH. Stdlib only.

A difference of two figures is relative to the second: |a - b| / |b|.
"""

from dataclasses import asdict, dataclass
from typing import Any

from launcher.records.run import REPORT_SCHEMA, CompileRecord, StartRecord, Verdict


@dataclass(frozen=True)
class Gate:
    """What parity demands of one compute dtype."""

    loss: float  # largest relative difference of a batch's loss, compiled and eager
    cosine: float  # least cosine of an adapter's gradients, compiled and eager
    error_ratio: float  # the compiled error against fp32 may be so many times the eager one
    error_floor: float  # plus this: where both errors are rounding noise, their ratio says nothing
    eager_error: float  # of eager's own gradients against fp32, at most: beyond it the reference is not to be trusted
    loss_batches: int  # fewer batches than this scatter too much for the mean loss error to be judged


@dataclass(frozen=True)
class Pair:
    """One figure of the compiled and one of the eager model."""

    compiled: float
    eager: float


@dataclass(frozen=True)
class ParityBatch:
    """One step batch through the three models. Losses are means over the batch's supervised tokens."""

    batch: int  # 1-based
    supervised_tokens: int
    loss: Pair
    reference_loss: float
    loss_difference: float  # compiled and eager
    least_cosine: float  # of an adapter's gradients, compiled and eager
    loss_error: Pair  # against the fp32 reference
    gradient_error: Pair  # norm of the difference from the reference over all adapters, over the norm of the reference


@dataclass(frozen=True)
class AdapterParity:
    """One kind of adapter matrix, over its modules and all batches."""

    kind: str  # "q", "k", "v", "o", "gate", "up", "down"
    matrix: str  # "A" or "B"
    modules: int
    least_cosine: float  # of the gradients, compiled and eager
    where: str  # of that least one: "layer 3, batch 2"
    norm_difference: float  # of the gradients' norms, compiled and eager: the largest
    eager_cosine: float  # least cosine of eager and reference: how far stock code itself is from fp32


@dataclass(frozen=True)
class ParityRecord:
    """The whole comparison. The weights are never updated: each batch is one measurement at the same weights."""

    recipe: dict[str, Any]  # resolved
    start: StartRecord
    compile: CompileRecord
    gate: Gate
    batches: tuple[ParityBatch, ...]
    adapters: tuple[AdapterParity, ...]
    loss_error: Pair  # means over the batches
    gradient_error: Pair
    verdicts: tuple[Verdict, ...]
    elapsed_s: dict[str, float]  # by phase, in order
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)

    @property
    def failure(self) -> str:
        """What the error of a closed gate says: rule, figures, remedy."""
        broken = [f"{verdict.claim}: {verdict.evidence}"[:300] for verdict in self.verdicts if not verdict.holds]
        return "\n".join(
            [
                "the compiled path must compute what stock code computes; it does not where it says:",
                *broken[:3],
                "Do not train with it: compile.mode=off or another compile.scope may tell which part differs.",
            ]
        )

    def as_report(self) -> dict[str, Any]:
        """The JSON of report=PATH (its keys are public: add, never rename)."""
        return {"schema": REPORT_SCHEMA, "mode": "parity", "holds": self.holds, **asdict(self)}

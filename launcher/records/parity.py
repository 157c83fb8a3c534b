"""What mode=parity measured: plain frozen records. Shown by report/pages/parity.py, written to report=PATH.

A difference of two figures is relative to the second: |a - b| / |b|.
"""

from dataclasses import dataclass

from launcher.records.proof import ProofRecord


@dataclass(frozen=True)
class DirectionRatios:
    """Where compiled and eager gradients are too far apart: the largest angle of the compiled ones to fp32's, as a
    multiple of eager's (proof/directions.py)."""

    matrix: float | None  # of one adapter matrix in one batch; None: it is judged in its kind and layer alone
    kind: float  # root mean square over one kind of adapter matrix, in all layers and batches
    layer: float  # the same over one layer, of all kinds


@dataclass(frozen=True)
class Gate:
    """What parity demands of one compute dtype."""

    loss: float  # largest relative difference of a batch's loss, compiled and eager
    cosine: float  # least cosine of an adapter's gradients, compiled and eager
    error_ratio: float  # largest compiled error against fp32, as a multiple of the eager one
    error_floor: float  # added to that: where both errors are rounding noise, their ratio says nothing
    eager_error: float  # largest error of eager's own gradients against fp32: beyond it the reference is not trusted
    loss_batches: int  # with fewer batches the mean loss error scatters too much to be judged
    length: float = 0.35  # share of eager's gradient error by which the length over all adapters may differ from 1
    part_length: float = 0.7  # the same for one kind of adapter matrix, and for one layer
    direction_ratios: DirectionRatios | None = None  # None: no gradient may be below the least cosine


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
    holds: bool = True  # no cosine of this batch alone closes the gate


@dataclass(frozen=True)
class AdapterParity:
    """One kind of adapter matrix: the worst over its modules and all batches."""

    kind: str  # "q", "k", "v", "o", "gate", "up", "down"; of trained tokens "embedding", "head"
    matrix: str  # "A" or "B"; "m": DoRA's magnitudes; "rows": of trained tokens
    modules: int
    least_cosine: float  # of the gradients, compiled and eager
    where: str  # the least cosine is: "layer 3, batch 2"
    norm_difference: float  # largest, of the gradients' norms, compiled and eager
    compiled_cosine: float  # least cosine of compiled and reference
    eager_cosine: float  # least cosine of eager and reference: how far stock code itself is from fp32
    holds: bool = True  # no cosine of this kind alone closes the gate


@dataclass(frozen=True)
class Length:
    """The length of gradients along fp32's, over all batches: c . r / r . r, which is 1 for the reference itself."""

    of: str  # "all adapters", "q A", "layer 3"
    compiled: float
    eager: float
    limit: float  # largest difference of the compiled one from 1


@dataclass(frozen=True, kw_only=True)
class ParityRecord(ProofRecord):
    """The whole comparison. The weights are never updated: each batch is one measurement at the same weights."""

    mode = "parity"
    rule = "the compiled path must compute what stock code computes; it does not where it says:"
    remedy = "Do not train with it: compile.mode=off or another compile.scope may tell which part differs."

    gate: Gate
    batches: tuple[ParityBatch, ...]
    adapters: tuple[AdapterParity, ...]
    lengths: tuple[Length, ...]
    loss_error: Pair  # means over the batches
    gradient_error: Pair
    elapsed_s: dict[str, float]  # by phase, in order

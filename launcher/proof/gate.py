"""Turns the losses and gradients of three models into figures, and figures into verdicts.

There are two kinds of demands. Compiled against eager finds a wrong formula: one flipped direction among hundreds of
adapters, one batch with a wrong loss. But a cosine does not see a gradient of wrong length, and two half-precision
paths may differ although neither is wrong. So there is also an error against fp32: the compiled path may be about as
far from the reference as stock code is, and no farther. The same is asked of the direction of each matrix that is too
far from eager's (directions.py).

In half precision that error hides a length that is wrong by a few percent, or by more in one kind of adapter. So the
length is judged alone: the gradient's component along the reference's, c . r / r . r, over all adapters, over each
kind of matrix and over each layer, in all batches. Rounding errors have no preferred direction, so their component
along r is a small part of their size, and they do not make this length grow as they do a norm. The length may differ
from 1 by eager's own difference plus a share of eager's error. Honest paths on CPUs, in bf16 and fp16 with 2 to 8
batches, took up to 0.18 of eager's error over all adapters and up to 0.36 in one kind: the shares are twice that.
"""

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from launcher.proof.difference import difference
from launcher.proof.directions import Direction, directions_by
from launcher.records.parity import AdapterParity, DirectionRatios, Gate, Length, Pair, ParityBatch
from launcher.records.run import Verdict

# fp32: both errors against the reference come from the order of summation (1e-7 to 1e-6 seen), so the floor is the
# difference that compiled and eager may have in any case.
FULL = Gate(loss=1e-5, cosine=0.9999, error_ratio=1.2, error_floor=1e-5, eager_error=1e-4, loss_batches=16)
HALF = Gate(
    loss=2e-3,
    cosine=0.995,
    error_ratio=1.2,
    error_floor=0.0,
    eager_error=0.3,
    loss_batches=16,
    direction_ratios=DirectionRatios(matrix=2.0, kind=1.2, layer=1.5),
)
ALL = "all adapters"
PARTS_SHOWN = 3  # of the parts that are wrong, in the evidence of a verdict


@dataclass(frozen=True)
class Measured:
    """One batch through one model."""

    loss: float  # mean over the supervised tokens
    gradients: Mapping[str, Tensor]  # fp32, on the CPU, by the adapter parameter's name in PEFT's model


def gate_of(dtype: torch.dtype) -> Gate:
    return FULL if dtype == torch.float32 else HALF


@dataclass
class Comparison:
    """Grows batch by batch, so that the gradients of only two of the three models have to be kept."""

    sides: tuple[str, str] = ("compiled", "eager")  # as the evidence calls them
    batches: list[ParityBatch] = field(default_factory=list)
    # By `Length.of`, the sums of c . r, e . r, r . r, |c - r|^2 and |e - r|^2.
    _products: dict[str, Tensor] = field(default_factory=dict)
    directions: list[Direction] = field(default_factory=list)  # of each adapter matrix in each batch

    def add(self, compiled: Measured, eager: Measured, reference: Measured, *, supervised_tokens: int) -> None:
        """Compare the next batch, measured in each of the models."""
        number = len(self.batches) + 1
        total, first = torch.zeros(5, dtype=torch.float64), len(self.directions)
        for name in reference.gradients:
            ours, stock, fp32 = (m.gradients[name].double().flatten() for m in (compiled, eager, reference))
            place, kind, matrix = adapter_of(name)
            apart = ours - fp32, stock - fp32
            sums = torch.stack([ours @ fp32, stock @ fp32, fp32 @ fp32, *(error @ error for error in apart)])
            total += sums
            for group in (ALL, f"{kind} {matrix}", place):
                self._products[group] = self._products.get(group, 0) + sums
            cosines = _cosine(ours, stock), _cosine(ours, fp32), _cosine(stock, fp32)
            norms = difference(float(ours.norm()), float(stock.norm()))
            self.directions.append(Direction(place, kind, matrix, number, *cosines, norm_difference=norms))
        norm, *errors = total[2:].sqrt().tolist()
        loss = Pair(compiled.loss, eager.loss)
        self.batches.append(
            ParityBatch(
                batch=number,
                supervised_tokens=supervised_tokens,
                loss=loss,
                reference_loss=reference.loss,
                loss_difference=difference(loss.compiled, loss.eager),
                least_cosine=min(one.cosine for one in self.directions[first:]),
                loss_error=Pair(*(difference(side.loss, reference.loss) for side in (compiled, eager))),
                gradient_error=Pair(*(error / norm if norm else error for error in errors)),
            )
        )

    def adapters(self, gate: Gate) -> tuple[AdapterParity, ...]:
        """Each kind of adapter matrix, the worst over its modules and the batches so far, in the order of a layer."""
        found = directions_by(gate, self.directions)
        wrong = {f"{one.kind} {one.matrix}" for one in found.wrong} | found.groups.keys()
        kinds: dict[tuple[str, str], list[Direction]] = {}
        for one in self.directions:
            kinds.setdefault((one.kind, one.matrix), []).append(one)
        return tuple(
            AdapterParity(
                *kind,
                modules=len(modules) // len(self.batches),
                least_cosine=(worst := min(modules, key=lambda one: one.cosine)).cosine,
                where=worst.where,
                norm_difference=max(one.norm_difference for one in modules),
                compiled_cosine=min(one.compiled for one in modules),
                eager_cosine=min(one.eager for one in modules),
                holds=" ".join(kind) not in wrong,
            )
            for kind, modules in kinds.items()
        )

    def judged_batches(self, gate: Gate) -> tuple[ParityBatch, ...]:
        """The batches, with what the gate says of their cosines."""
        wrong = {one.batch for one in directions_by(gate, self.directions).wrong}
        return tuple(replace(batch, holds=batch.batch not in wrong) for batch in self.batches)

    def lengths(self, gate: Gate) -> tuple[Length, ...]:
        """Of all adapters, each kind of matrix and each layer, over the batches so far."""
        lengths = []
        for group, sums in self._products.items():
            along, eager_along, square, _, eager_error = sums.tolist()
            share = gate.length if group == ALL else gate.part_length
            compiled, eager = (along / square, eager_along / square) if square else (1.0, 1.0)
            error = (eager_error / square) ** 0.5 if square else 0.0
            lengths.append(Length(group, compiled, eager, abs(eager - 1) + share * error + gate.error_floor))
        return tuple(lengths)

    @property
    def loss_error(self) -> Pair:
        return _mean([batch.loss_error for batch in self.batches])

    @property
    def gradient_error(self) -> Pair:
        return _mean([batch.gradient_error for batch in self.batches])

    def verdicts(self, gate: Gate) -> tuple[Verdict, ...]:
        """One per demand of the gate; the mean loss error only if there are enough batches to judge it."""
        verdicts = (self._losses(gate), *self.gradient_verdicts(gate))
        if len(self.batches) < gate.loss_batches:
            return verdicts
        return *verdicts, self._error("mean loss error", self.loss_error, gate, scatter=self._scatter(gate))

    def gradient_verdicts(self, gate: Gate) -> tuple[Verdict, ...]:
        """Those on directions, error, reference and lengths."""
        error = self._error("gradient error", self.gradient_error, gate)
        return self._cosines(gate), error, self._reference(gate), self._lengths(gate)

    def _scatter(self, gate: Gate) -> float:
        """Twice the standard error of the mean of compiled's error beyond what eager's allows. A single batch's error
        is rounding noise, from half to nearly three times eager's: without this, equally good paths would often fail.
        """
        excess = [b.loss_error.compiled - gate.error_ratio * b.loss_error.eager for b in self.batches]
        return 2 * statistics.stdev(excess) / len(excess) ** 0.5

    def _losses(self, gate: Gate) -> Verdict:
        worst = max(self.batches, key=lambda batch: batch.loss_difference)
        evidence = f"largest difference {worst.loss_difference:.1e} (batch {worst.batch}), at most {gate.loss:.0e}"
        return Verdict("compiled loss is eager's", worst.loss_difference <= gate.loss, evidence)

    def _cosines(self, gate: Gate) -> Verdict:
        found, cosines = directions_by(gate, self.directions), [one.cosine for one in self.directions]
        kinds = {(one.kind, one.matrix): one for one in sorted(found.wrong, key=lambda one: -one.cosine)}
        shown = [f"{one}, {one.to_fp32}" if gate.direction_ratios else str(one) for one in kinds.values()]
        groups = [f"{name} {figures}" for name, figures in found.groups.items()]
        shown = [*shown, *groups[:PARTS_SHOWN]] or [str(self.directions[cosines.index(min(cosines))])]
        evidence = f"least cosine {'; '.join(shown)}, at least {gate.cosine:g}"
        if found.by_reference:
            count, worst = f"{len(found.by_reference)} of {len(cosines)} matrices", found.by_reference[0]
            evidence += f"; {count} are below it and about as near to fp32 as {self.sides[1]}'s, "
            evidence += f"the worst {worst}, {worst.to_fp32}"
        return Verdict("compiled gradients point where eager's do", not (found.wrong or found.groups), evidence)

    def _lengths(self, gate: Gate) -> Verdict:
        def far(length: Length) -> float:
            return abs(length.compiled - 1)

        whole, *parts = sorted(self.lengths(gate), key=lambda length: (length.of != ALL, -far(length)))
        wrong = [part for part in parts if not far(part) <= part.limit]
        shown = [whole, *(wrong or parts)[: PARTS_SHOWN if wrong else 1]]
        eager = self.sides[1]
        figures = "; ".join(f"{a.of} {a.compiled:.5f}, {eager} {a.eager:.5f}, 1 ± {a.limit:.1e} allowed" for a in shown)
        holds = far(whole) <= whole.limit and not wrong
        return Verdict("compiled gradients are as long as fp32's", holds, f"length of {figures}")

    def _reference(self, gate: Gate) -> Verdict:
        """Against a wrong reference both errors would be large and their ratio 1."""
        error = self.gradient_error.eager
        evidence = f"{self.sides[1]}'s gradient error {error:.2e}, at most {gate.eager_error:g}"
        return Verdict("the fp32 reference is eager's model", error <= gate.eager_error, evidence)

    def _error(self, name: str, error: Pair, gate: Gate, *, scatter: float = 0.0) -> Verdict:
        ours, stock = self.sides
        limit = gate.error_ratio * error.eager + gate.error_floor + scatter
        floor = f" + {gate.error_floor:.0e}" if gate.error_floor else ""
        floor += f" + {scatter:.1e} for scatter" if scatter else ""
        figures = f"{ours} {error.compiled:.2e}, {stock} {error.eager:.2e}"
        evidence = f"{figures}; at most {gate.error_ratio:g} times {stock}'s{floor}"
        return Verdict(f"{name} against fp32 is eager's", error.compiled <= limit, evidence)


def adapter_of(name: str) -> tuple[str, str, str]:
    """(place, kind, matrix) of a parameter of PEFT's model, as ("layer 3", "q", "A"); "m" is DoRA's magnitudes. Of the
    rows of trained tokens: ("tokens", "embedding", "rows"), or "head"; a tied head shares the embedding's."""
    if ".trainable_tokens_delta." in name:
        return "tokens", "head" if ".lm_head." in name else "embedding", "rows"
    match = re.search(r"\.layers\.(\d+)\..*?([^.]+)\.lora_([ABm])(?:agnitude_vector)?\.", name)
    assert match, f"{name} is no adapter of a decoder layer"
    return f"layer {match[1]}", match[2].removesuffix("_proj"), match[3]


def _cosine(a: Tensor, b: Tensor) -> float:
    """1 if both are zero (a batch without targets), 0 if one is."""
    norms = float(a.norm()), float(b.norm())
    if not all(norms):
        return float(norms[0] == norms[1])
    return float(a @ b) / (norms[0] * norms[1])


def _mean(pairs: list[Pair]) -> Pair:
    return Pair(sum(p.compiled for p in pairs) / len(pairs), sum(p.eager for p in pairs) / len(pairs))

"""Turns the losses and gradients of three models into figures, and figures into verdicts.

There are two kinds of demands. Compiled against eager finds a wrong formula: one flipped direction among hundreds of
adapters, one batch with a wrong loss. But a cosine does not see a gradient of wrong length, and two half-precision
paths may differ although neither is wrong. So there is also an error against fp32: the compiled path may be about as
far from the reference as stock code is, and no farther.

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
from launcher.records.parity import AdapterParity, Gate, Length, Pair, ParityBatch
from launcher.records.run import Verdict

# fp32: both errors against the reference come from the order of summation (1e-7 to 1e-6 seen), so the floor is the
# difference that compiled and eager may have in any case.
FULL = Gate(loss=1e-5, cosine=0.9999, error_ratio=1.2, error_floor=1e-5, eager_error=1e-4, loss_batches=16)
HALF = Gate(loss=2e-3, cosine=0.995, error_ratio=1.2, error_floor=0.0, eager_error=0.3, loss_batches=16)
ALL = "all adapters"
LENGTHS_SHOWN = 3  # of the parts that are wrong, in the evidence of the verdict


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

    batches: list[ParityBatch] = field(default_factory=list)
    # By `Length.of`, the sums of c . r, e . r, r . r, |c - r|^2 and |e - r|^2.
    _products: dict[str, Tensor] = field(default_factory=dict)
    _modules: dict[tuple[str, str], list[AdapterParity]] = field(default_factory=dict)  # of each (kind, matrix)

    def add(self, compiled: Measured, eager: Measured, reference: Measured, *, supervised_tokens: int) -> None:
        """Compare the next batch, measured in each of the models."""
        number = len(self.batches) + 1
        total, cosines = torch.zeros(5, dtype=torch.float64), []
        for name in reference.gradients:
            ours, stock, fp32 = (m.gradients[name].double().flatten() for m in (compiled, eager, reference))
            place, kind, matrix = adapter_of(name)
            apart = ours - fp32, stock - fp32
            sums = torch.stack([ours @ fp32, stock @ fp32, fp32 @ fp32, *(error @ error for error in apart)])
            total += sums
            for group in (ALL, f"{kind} {matrix}", place):
                self._products[group] = self._products.get(group, 0) + sums
            cosines.append(_cosine(ours, stock))
            adapter = AdapterParity(
                kind=kind,
                matrix=matrix,
                modules=1,
                least_cosine=cosines[-1],
                where=f"{place}, batch {number}",
                norm_difference=difference(float(ours.norm()), float(stock.norm())),
                eager_cosine=_cosine(stock, fp32),
            )
            self._modules.setdefault((kind, matrix), []).append(adapter)
        norm, *errors = total[2:].sqrt().tolist()
        loss = Pair(compiled.loss, eager.loss)
        self.batches.append(
            ParityBatch(
                batch=number,
                supervised_tokens=supervised_tokens,
                loss=loss,
                reference_loss=reference.loss,
                loss_difference=difference(loss.compiled, loss.eager),
                least_cosine=min(cosines),
                loss_error=Pair(*(difference(side.loss, reference.loss) for side in (compiled, eager))),
                gradient_error=Pair(*(error / norm if norm else error for error in errors)),
            )
        )

    @property
    def adapters(self) -> tuple[AdapterParity, ...]:
        """Each kind of adapter matrix, the worst over its modules and the batches so far, in the order of a layer."""
        return tuple(
            replace(
                min(modules, key=lambda adapter: adapter.least_cosine),
                modules=len(modules) // len(self.batches),
                norm_difference=max(adapter.norm_difference for adapter in modules),
                eager_cosine=min(adapter.eager_cosine for adapter in modules),
            )
            for modules in self._modules.values()
        )

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
        verdicts = (
            self._losses(gate),
            self._cosines(gate),
            _error("gradient error", self.gradient_error, gate),
            self._reference(gate),
            self._lengths(gate),
        )
        if len(self.batches) < gate.loss_batches:
            return verdicts
        return *verdicts, _error("mean loss error", self.loss_error, gate, scatter=self._scatter(gate))

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
        wrong = [a for a in self.adapters if not a.least_cosine >= gate.cosine]
        shown = wrong or [min(self.adapters, key=lambda adapter: adapter.least_cosine)]
        cosines = "; ".join(f"{a.kind} {a.matrix} {a.least_cosine:.5f} ({a.where})" for a in shown)
        evidence = f"least cosine {cosines}, at least {gate.cosine:g}"
        return Verdict("compiled gradients point where eager's do", not wrong, evidence)

    def _lengths(self, gate: Gate) -> Verdict:
        def far(length: Length) -> float:
            return abs(length.compiled - 1)

        whole, *parts = sorted(self.lengths(gate), key=lambda length: (length.of != ALL, -far(length)))
        wrong = [part for part in parts if not far(part) <= part.limit]
        shown = [whole, *(wrong or parts)[: LENGTHS_SHOWN if wrong else 1]]
        figures = "; ".join(f"{a.of} {a.compiled:.5f}, eager {a.eager:.5f}, 1 ± {a.limit:.1e} allowed" for a in shown)
        holds = far(whole) <= whole.limit and not wrong
        return Verdict("compiled gradients are as long as fp32's", holds, f"length of {figures}")

    def _reference(self, gate: Gate) -> Verdict:
        """Against a wrong reference both errors would be large and their ratio 1."""
        error = self.gradient_error.eager
        evidence = f"eager's gradient error {error:.2e}, at most {gate.eager_error:g}"
        return Verdict("the fp32 reference is eager's model", error <= gate.eager_error, evidence)


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


def _error(name: str, error: Pair, gate: Gate, *, scatter: float = 0.0) -> Verdict:
    limit = gate.error_ratio * error.eager + gate.error_floor + scatter
    floor = f" + {gate.error_floor:.0e}" if gate.error_floor else ""
    floor += f" + {scatter:.1e} for scatter" if scatter else ""
    evidence = (
        f"compiled {error.compiled:.2e}, eager {error.eager:.2e}; at most {gate.error_ratio:g} times eager's{floor}"
    )
    return Verdict(f"{name} against fp32 is eager's", error.compiled <= limit, evidence)

"""From losses and gradients of three models to figures, and from figures to verdicts.

The two demands are of different kinds. Compiled against eager finds a wrong formula: one flipped direction among
hundreds of adapters, one batch whose loss is off. But a cosine does not see a gradient of the wrong length, and two
half-precision paths may differ where neither is wrong. Against fp32 finds those, as far as stock code's own error lets
it: the compiled path may be about as far from the truth as stock code is, and no farther. In half precision a wrong
length of a few percent, or of one kind of adapter with little weight, stays below that; the table shows it by kind.
"""

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from launcher.proof.difference import difference
from launcher.records.parity import AdapterParity, Gate, Pair, ParityBatch
from launcher.records.run import Verdict

Gradients = Mapping[str, Tensor]  # by the adapter parameter's name in PEFT's model

# fp32: both errors against the reference are summation order (1e-7 to 1e-6 seen), so the floor is what compiled and
# eager may differ in anyhow.
FULL = Gate(loss=1e-5, cosine=0.9999, error_ratio=1.2, error_floor=1e-5, eager_error=1e-4, loss_batches=16)
HALF = Gate(loss=2e-3, cosine=0.995, error_ratio=1.2, error_floor=0.0, eager_error=0.3, loss_batches=16)


@dataclass(frozen=True)
class Measured:
    """One batch through one model."""

    loss: float  # mean over the supervised tokens
    gradients: Gradients  # fp32, on the CPU


def gate_of(dtype: torch.dtype) -> Gate:
    return FULL if dtype == torch.float32 else HALF


@dataclass
class Comparison:
    """Fills up batch by batch, so that one of the three models' gradients need not be kept."""

    batches: list[ParityBatch] = field(default_factory=list)
    _kinds: dict[tuple[str, str], list[AdapterParity]] = field(default_factory=dict)

    def add(self, compiled: Measured, eager: Measured, reference: Measured, *, supervised_tokens: int) -> None:
        """The next batch, measured in each of the models."""
        number = len(self.batches) + 1
        squares = torch.zeros(3, dtype=torch.float64)  # compiled - reference, eager - reference, reference
        cosines = []
        for name in reference.gradients:
            ours, stock, true = (m.gradients[name].double().flatten() for m in (compiled, eager, reference))
            squares += torch.stack([(ours - true).square().sum(), (stock - true).square().sum(), true.square().sum()])
            layer, kind, matrix = adapter_of(name)
            cosines.append(_cosine(ours, stock))
            found = AdapterParity(
                kind=kind,
                matrix=matrix,
                modules=1,
                least_cosine=cosines[-1],
                where=f"layer {layer}, batch {number}",
                norm_difference=difference(float(ours.norm()), float(stock.norm())),
                eager_cosine=_cosine(stock, true),
            )
            self._kinds.setdefault((kind, matrix), []).append(found)
        norms = squares.sqrt().tolist()
        losses = compiled.loss, eager.loss, reference.loss
        self.batches.append(
            ParityBatch(
                batch=number,
                supervised_tokens=supervised_tokens,
                loss=Pair(*losses[:2]),
                reference_loss=losses[2],
                loss_difference=difference(*losses[:2]),
                least_cosine=min(cosines),
                loss_error=Pair(*(difference(loss, losses[2]) for loss in losses[:2])),
                gradient_error=Pair(*(norm / norms[2] if norms[2] else norm for norm in norms[:2])),
            )
        )

    @property
    def adapters(self) -> tuple[AdapterParity, ...]:
        """Each kind of adapter matrix over its modules and the batches so far, in the order of a layer."""
        return tuple(_least(found, batches=len(self.batches)) for found in self._kinds.values())

    @property
    def loss_error(self) -> Pair:
        return _mean([batch.loss_error for batch in self.batches])

    @property
    def gradient_error(self) -> Pair:
        return _mean([batch.gradient_error for batch in self.batches])

    def verdicts(self, gate: Gate) -> tuple[Verdict, ...]:
        """Each demand of the gate; the mean loss error only where there are batches enough to judge it."""
        found = [self._losses(gate), self._cosines(gate), _error("gradient error", self.gradient_error, gate)]
        found.append(self._reference(gate))
        if len(self.batches) >= gate.loss_batches:
            found.append(_error("mean loss error", self.loss_error, gate, scatter=self._scatter(gate)))
        return tuple(found)

    def _scatter(self, gate: Gate) -> float:
        """Twice the standard error of the mean excess over what eager's error allows. Single batches' errors are
        rounding noise, from half to nearly three times eager's: of two equally good paths the mean would often fail."""
        excess = [b.loss_error.compiled - gate.error_ratio * b.loss_error.eager for b in self.batches]
        return 2 * statistics.stdev(excess) / len(excess) ** 0.5

    def _losses(self, gate: Gate) -> Verdict:
        worst = max(self.batches, key=lambda batch: batch.loss_difference)
        said = f"largest difference {worst.loss_difference:.1e} (batch {worst.batch}), at most {gate.loss:.0e}"
        return Verdict("compiled loss is eager's", worst.loss_difference <= gate.loss, said)

    def _reference(self, gate: Gate) -> Verdict:
        """Beside a wrong reference everybody's error would be large, and the errors' ratio 1."""
        error = self.gradient_error.eager
        said = f"eager's gradient error {error:.2e}, at most {gate.eager_error:g}"
        return Verdict("the fp32 reference is eager's model", error <= gate.eager_error, said)

    def _cosines(self, gate: Gate) -> Verdict:
        wrong = [a for a in self.adapters if not a.least_cosine >= gate.cosine]
        shown = wrong or [min(self.adapters, key=lambda adapter: adapter.least_cosine)]
        named = "; ".join(f"{a.kind} {a.matrix} {a.least_cosine:.5f} ({a.where})" for a in shown)
        return Verdict(
            "compiled gradients point where eager's do", not wrong, f"least cosine {named}, at least {gate.cosine:g}"
        )


def adapter_of(name: str) -> tuple[int, str, str]:
    """(layer, kind, matrix) of a parameter of PEFT's model: (3, "q", "A")."""
    found = re.search(r"\.layers\.(\d+)\..*?([^.]+)\.lora_([AB])\.", name)
    assert found, f"{name} is no adapter of a decoder layer"
    return int(found[1]), found[2].removesuffix("_proj"), found[3]


def _least(found: list[AdapterParity], *, batches: int) -> AdapterParity:
    worst = min(found, key=lambda adapter: adapter.least_cosine)
    return AdapterParity(
        kind=worst.kind,
        matrix=worst.matrix,
        modules=len(found) // batches,
        least_cosine=worst.least_cosine,
        where=worst.where,
        norm_difference=max(adapter.norm_difference for adapter in found),
        eager_cosine=min(adapter.eager_cosine for adapter in found),
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    """1 where both are zero (a batch without targets), 0 where one is."""
    norms = float(a.norm()), float(b.norm())
    if not all(norms):
        return float(norms[0] == norms[1])
    return float(a @ b) / (norms[0] * norms[1])


def _mean(pairs: list[Pair]) -> Pair:
    return Pair(sum(p.compiled for p in pairs) / len(pairs), sum(p.eager for p in pairs) / len(pairs))


def _error(what: str, error: Pair, gate: Gate, *, scatter: float = 0.0) -> Verdict:
    most = gate.error_ratio * error.eager + gate.error_floor + scatter
    floor = f" + {gate.error_floor:.0e}" if gate.error_floor else ""
    floor += f" + {scatter:.1e} for scatter" if scatter else ""
    said = f"compiled {error.compiled:.2e}, eager {error.eager:.2e}; at most {gate.error_ratio:g} times eager's{floor}"
    return Verdict(f"{what} against fp32 is eager's", error.compiled <= most, said)

"""Whether gradients point where they should, also where half precision is too coarse for stock code alone to tell.

Let c and e be the gradients of one adapter matrix in one batch, compiled and eager, and r fp32's; let a be the angle of
c to r, and b that of e to r. Rounding errors of two paths are nearly independent, so the angle of c to e has the square
a^2 + b^2 though both be right. In deep models b alone is 0.1, of which the cosine, 1 - b^2 / 2, is 0.995: no other path
can then be as near to eager's gradients as the gate asks, nor could stock code itself with its sums in another order.
There r is asked: c must point to r about as well as e does, a <= ratio * b, that is

    1 - cos(c, r) <= ratio^2 * (1 - cos(e, r))

with the gate's `direction_ratios`: for the matrix in the batch; for its kind, with 1 - cos averaged over all layers and
batches; for its layer, with 1 - cos averaged over all kinds and batches. The rounding error of one matrix scatters: for
right models on CPUs a / b was 0.9 in the middle, at most 1.4 in batches of 512 tokens, 1.5 in 300, 2.3 in 60; the root
of the averages over a kind 1.02 in 300 tokens and 1.22 in 60, over a layer 1.04 and 1.34.

Where eager is accurate nothing is judged otherwise: the angle of c to e is a + b at most, so r is of help only where
b >= 0.1 / (1 + ratio). Nor is it where e is no measure, because it is itself too far from r.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from launcher.records.parity import Gate


@dataclass(frozen=True)
class Direction:
    """The gradients of one adapter matrix in one batch: their cosines, and the difference of two norms."""

    place: str  # "layer 3"
    kind: str  # "q"
    matrix: str  # "A", "B" or "m"
    batch: int  # 1-based
    cosine: float  # of compiled and eager
    compiled: float  # of compiled and fp32
    eager: float  # of eager and fp32
    norm_difference: float  # compiled and eager, relative

    @property
    def where(self) -> str:
        return f"{self.place}, batch {self.batch}"

    def __str__(self) -> str:
        return f"{self.kind} {self.matrix} {self.cosine:.5f} ({self.where})"

    @property
    def to_fp32(self) -> str:
        """The two other cosines."""
        ratio = angle_ratio(self.compiled, self.eager)
        return f"to fp32 {self.compiled:.5f} and {self.eager:.5f}: {ratio:.2f} times the angle"


@dataclass(frozen=True)
class Directions:
    """What the gate says of all of them."""

    wrong: tuple[Direction, ...]  # the matrices, by batch, that close it alone
    groups: dict[str, str]  # kinds ("q A") and layers ("layer 3") that do, with their figures
    by_reference: tuple[Direction, ...]  # below the least cosine, as near to fp32 as eager; the worst ratio first


def directions_by(gate: Gate, directions: Sequence[Direction]) -> Directions:
    """Judge them; without `direction_ratios`, which full precision has not, by the least cosine alone."""
    below = [one for one in directions if not one.cosine >= gate.cosine]
    ratios = gate.direction_ratios
    if ratios is None:
        return Directions(tuple(below), {}, ())
    wrong = [one for one in below if not _right(gate, one, ratios.matrix)]
    groups = _groups(gate, below, directions, lambda one: f"{one.kind} {one.matrix}", ratios.kind)
    groups |= _groups(gate, below, directions, lambda one: one.place, ratios.layer)
    right = [one for one in below if _right(gate, one, ratios.matrix)]
    right.sort(key=lambda one: -angle_ratio(one.compiled, one.eager))
    return Directions(tuple(wrong), groups, tuple(right))


def _right(gate: Gate, one: Direction, ratio: float | None) -> bool:
    return ratio is None or (trusted(gate, one.eager) and as_near(one.compiled, one.eager, ratio=ratio))


def as_near(cosine: float, eager: float, *, ratio: float) -> bool:
    """Whether the angle of which this is the cosine is at most `ratio` times eager's. False for NaN."""
    return 1 - cosine <= ratio**2 * (1 - eager)


def trusted(gate: Gate, eager: float) -> bool:
    """Whether eager is near enough to fp32 to be a measure: no farther than all its gradients together may be."""
    return 1 - eager <= gate.eager_error**2 / 2


def angle_ratio(cosine: float, eager: float) -> float:
    """Of two small angles, by their cosines: 1 - cos x is x^2 / 2."""
    far, eager_far = max(0.0, 1 - cosine), max(0.0, 1 - eager)
    return float("inf") if far and not eager_far else (far / eager_far) ** 0.5 if eager_far else 0.0


def _groups(
    gate: Gate,
    below: Iterable[Direction],
    directions: Sequence[Direction],
    name: Callable[[Direction], str],
    ratio: float,
) -> dict[str, str]:
    """The groups with a matrix in `below` that are on the average farther from fp32 than `ratio` allows."""
    wrong = {}
    for group in dict.fromkeys(map(name, below)):
        members = [one for one in directions if name(one) == group]
        compiled = sum(one.compiled for one in members) / len(members)
        eager = sum(one.eager for one in members) / len(members)
        if not (trusted(gate, eager) and as_near(compiled, eager, ratio=ratio)):
            figures = f"{compiled:.5f} and {eager:.5f}: {angle_ratio(compiled, eager):.2f} times the angle"
            wrong[group] = f"on the average to fp32 {figures}, at most {ratio:g}"
    return wrong

"""The curves of a run as charts: at most BUCKETS points a line, which keep the least and the greatest value of each."""

import math
from collections.abc import Iterator, Sequence

from launcher.records.run import EvalRecord, StepRecord
from launcher.report.pages.formatting import counted
from launcher.report.pages.page import Chart, Line, Point

BUCKETS = 480  # points of a line: one for each two pixels of a wide screen
DOTS = 60  # evaluations that are shown one by one
SMOOTHING = 0.05  # share of a line's points over which the smoothed line averages


def charts(steps: Sequence[StepRecord], evals: Sequence[EvalRecord], *, memory: str) -> list[Chart]:
    """Losses, learning rate, gradient norm, step time and memory over the steps. `memory`: what that figure is."""
    loss = Line("train", downsampled([(s.step, s.loss) for s in steps]))
    evaluated = Line("eval", downsampled([(e.step, e.eval_loss) for e in evals]), dots=len(evals) <= DOTS)
    found = [
        Chart("Loss", [loss, evaluated], note=_not_finite([s.loss for s in steps]), options=True),
        _chart("Learning rate", [(s.step, s.lr) for s in steps]),
        _chart("Gradient norm", [(s.step, s.grad_norm) for s in steps], options=True, note="before clipping"),
        _chart("Step time", [(s.step, s.step_s * 1000) for s in steps], "ms", options=True),
        _chart(memory, [(s.step, s.vram_mib) for s in steps], "MiB"),
    ]
    return [chart for chart in found if any(len(line.points) > 1 for line in chart.lines)]


def _chart(
    title: str, values: Sequence[tuple[int, float]], unit: str = "", *, options: bool = False, note: str = ""
) -> Chart:
    return Chart(title, [Line("", downsampled(values))], unit, note, options)


def _not_finite(values: Sequence[float]) -> str:
    count = sum(not math.isfinite(value) for value in values)
    return f"{counted(count, 'step')} not finite" if count else ""


def downsampled(values: Sequence[tuple[int, float]], buckets: int = BUCKETS) -> list[Point]:
    """The values as they are or, of more than `buckets`, those of equal parts of x together. Values that are not finite
    are left out of the figures; where there is no other, the line has a gap."""
    if len(values) <= buckets:
        return [(x, value, value, value) if math.isfinite(value) else (x, None, 0.0, 0.0) for x, value in values]
    return list(_parts(values, buckets))


def _parts(values: Sequence[tuple[int, float]], buckets: int) -> Iterator[Point]:
    for i in range(buckets):
        part = values[i * len(values) // buckets : (i + 1) * len(values) // buckets]
        finite, x = [value for _, value in part if math.isfinite(value)], part[len(part) // 2][0]
        x = (
            part[0][0] if i == 0 else part[-1][0] if i == buckets - 1 else x
        )  # the ends of the run are those of the line
        yield (x, math.fsum(finite) / len(finite), min(finite), max(finite)) if finite else (x, None, 0.0, 0.0)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The means as an exponential moving average, without the pull of its start; gaps stay."""
    keep, total, weight, result = 1 - 2 / (2 + SMOOTHING * len(points)), 0.0, 0.0, list[Point]()
    for x, mean, *_ in points:
        if mean is not None:
            total, weight = keep * total + (1 - keep) * mean, keep * weight + (1 - keep)
        average = total / weight if mean is not None and weight else mean
        result.append((x, average, average or 0.0, average or 0.0))
    return result

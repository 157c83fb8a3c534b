"""A chart as HTML. The lines are an SVG that stretches with the page, the labels text that does not; both scales are
drawn, and style sheets alone switch between them. A line has a band from the least to the greatest value of each point.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from launcher.report.pages.curves import smoothed
from launcher.report.pages.page import Chart, Line, Point

WIDTH, HEIGHT = 2000, 1000  # units of the drawing
MARGIN = 0.05  # share of the values' extent that is left free above and below them
LEAST_MARGIN = 0.02  # share of the greatest value: what hardly changes is to look so
X_TICKS, Y_TICKS = 5, 4  # about


@dataclass(frozen=True)
class Scale:
    """Values to 0-1."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self, count: int) -> list[float]:
        """Round values within the scale, about `count` of them."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1,), (1, 3), (1, 2, 5)):
                ticks = [digit * 10.0**power for power in powers for digit in digits]
                if len(inside := [tick for tick in ticks if self.low <= tick <= self.high]) >= count - 1:
                    return inside
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= 0.7 * rough)
        return [n * step for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def chart_html(chart: Chart, number: int) -> str:
    """The figure; `number` tells it from the page's other ones."""
    lines = [line for line in chart.lines if line.points]
    drawn = [point for line in lines for point in line.points if point[1] is not None]
    xs = [point[0] for line in lines for point in line.points]
    x = Scale(min(xs), max(max(xs), min(xs) + 1))
    least, greatest = min((p[2] for p in drawn), default=0.0), max((p[3] for p in drawn), default=1.0)
    logarithmic = chart.options and least > 0
    scales = {"linear": _linear(least, greatest)} | ({"log": _log(least, greatest)} if logarithmic else {})
    keys = "".join(f'<span class="key line{i}">{escape(line.name)}</span>' for i, line in enumerate(lines))
    labels = "".join(_label("x", "left", x.at(tick), tick) for tick in x.ticks(X_TICKS) if tick == int(tick))
    content = {"low": x.low, "high": x.high, "lines": [_data(line) for line in lines]}
    data = json.dumps(content).replace("<", "\\u003c")  # no text of it can end the element
    note = "".join(f"<small>{escape(text)}</small>" for text in (chart.unit, chart.note) if text)
    return (
        f'<figure class="chart{" wide" if len(chart.lines) > 1 else ""}"><figcaption>{escape(chart.title)}{note}'
        f"</figcaption>{_options(chart, number, logarithmic=logarithmic)}"
        f'<p class="keys">{keys if len(chart.lines) > 1 else ""}<output></output></p>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{escape(_summary(chart))}">'
        f"{''.join(_view(name, lines, x, y, smooth=chart.options) for name, y in scales.items())}"
        f'<i class="cursor" hidden></i></div><div class="below">{labels}</div>'
        f'<script type="application/json">{data}</script></figure>\n'
    )


def _linear(least: float, greatest: float) -> Scale:
    free = max((greatest - least) * MARGIN, abs(greatest) * LEAST_MARGIN) or 1.0
    return Scale(least if least >= 0 > least - free else least - free, greatest + free)


def _log(least: float, greatest: float) -> Scale:
    free = (greatest / least) ** MARGIN if greatest > least else 1 + MARGIN
    return Scale(least / free, greatest * free, log=True)


def _options(chart: Chart, number: int, *, logarithmic: bool) -> str:
    names = [*(["log"] if logarithmic else []), *(["smooth"] if chart.options else [])]
    words = {"log": "log scale", "smooth": "smoothed"}
    return "".join(
        f'<input type="checkbox" class="{name}" id="{name}{number}"><label for="{name}{number}">{words[name]}</label>'
        for name in names
    )


def _view(name: str, lines: Sequence[Line], x: Scale, y: Scale, *, smooth: bool) -> str:
    """Grid, lines and the labels of y at one scale."""
    ticks = [(y.at(tick), tick) for tick in y.ticks(Y_TICKS)]
    grid = "".join(f"M0,{_down(at)}H{WIDTH}" for at, _ in ticks)
    paths = "".join(_paths(line, i, x, y, smooth=smooth) for i, line in enumerate(lines))
    labels = "".join(_label("y", "bottom", at, tick) for at, tick in ticks)
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true"'
    return f'<div class="view {name}"><svg {box}><path class="grid" d="{grid}"/>{paths}</svg>{labels}</div>'


def _paths(line: Line, number: int, x: Scale, y: Scale, *, smooth: bool) -> str:
    path = _path(line.points, x, y)
    if line.dots:
        dots = "".join(f"M{_across(x, p[0])},{_down(y.at(p[1]))}h0" for p in line.points if p[1] is not None)
        return f'<g class="line{number}"><path d="{path}"/><path class="dots" d="{dots}"/></g>'
    runs = "".join(_band(run, x, y) for run in _runs(line.points) if any(p[2] < p[3] for p in run))
    band = f'<path class="band" d="{runs}"/>' if runs else ""
    kinds = {"raw": f'{band}<path d="{path}"/>'}
    kinds |= {"smoothed": f'<path d="{_path(smoothed(line.points), x, y)}"/>'} if smooth else {}
    return "".join(f'<g class="line{number} {kind}">{content}</g>' for kind, content in kinds.items())


def _runs(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The points between gaps."""
    run = list[Point]()
    for point in points:
        if point[1] is not None:
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    lines = ([f"{_across(x, at)},{_down(y.at(mean or 0.0))}" for at, mean, *_ in run] for run in _runs(points))
    return "".join(f"M{'L'.join(line)}" if len(line) > 1 else f"M{line[0]}h0" for line in lines)


def _band(run: Sequence[Point], x: Scale, y: Scale) -> str:
    edge = [(p[0], p[3]) for p in run] + [(p[0], p[2]) for p in reversed(run)]
    return f"M{'L'.join(f'{_across(x, at)},{_down(y.at(value))}' for at, value in edge)}Z"


def _across(x: Scale, value: float) -> int:
    return round(x.at(value) * WIDTH)


def _down(share: float) -> int:
    return round((1 - share) * HEIGHT)


def _label(axis: str, side: str, share: float, value: float) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if axis == "x" and share > 0.95:  # centred, it would stand beyond the chart
        return f'<span class="x end">{text}</span>'
    return f'<span class="{axis}" style="{side}:{100 * share:.2f}%">{text}</span>'


def _data(line: Line) -> dict[str, object]:
    points = [
        [x, *(None if mean is None else float(f"{v:.6g}") for v in (mean, *rest))] for x, mean, *rest in line.points
    ]
    return {"name": line.name, "points": points}


def _summary(chart: Chart) -> str:
    """What a screen reader says of it."""
    ends = [(line.name, [p[1] for p in line.points if p[1] is not None]) for line in chart.lines]
    return f"{chart.title}: " + "; ".join(f"{name} from {v[0]:.4g} to {v[-1]:.4g}".strip() for name, v in ends if v)

"""Charts: scales, ticks, gaps and bands, and what is kept of a long line."""

import json
import math
import re
from itertools import pairwise

import pytest

from launcher.report.chart import Scale, chart_html
from launcher.report.pages.curves import BUCKETS, charts, downsampled, smoothed
from launcher.report.pages.page import Chart, Line
from tests.support.records import step_record


def drawn(values: list[float], **changes: bool) -> str:
    points = downsampled(list(enumerate(values)))
    return chart_html(Chart("Loss", [Line("train", points)], **changes), 0)


def test_a_long_line_keeps_the_extremes_the_mean_and_both_ends() -> None:
    values = [(n, math.sin(n) + (50 if n == 4_321 else -50 if n == 9_000 else 0)) for n in range(1, 10_001)]
    points = downsampled(values)
    assert len(points) == BUCKETS and (points[0][0], points[-1][0]) == (1, 10_000)
    assert max(p[3] for p in points) == values[4_320][1] and min(p[2] for p in points) == values[8_999][1]
    assert all(a[0] < b[0] for a, b in pairwise(points))
    first = [value for _, value in values[: 10_000 // BUCKETS]]
    assert points[0][1] == pytest.approx(sum(first) / len(first))
    assert downsampled(values[:3]) == [(n, value, value, value) for n, value in values[:3]]


def test_values_that_are_not_finite_make_a_gap_and_are_counted() -> None:
    assert downsampled([(1, math.nan), (2, 1.0)])[0][1] is None
    many = downsampled([(n, math.inf if n < 3_000 else 1.0) for n in range(6_000)])
    assert many[0][1] is None and many[-1][1] == 1.0
    html = drawn([1.0, 2.0, math.nan, 4.0, 5.0])
    path = re.findall(r'<g class="line0 raw"><path d="([^"]+)"', html)[0]
    assert path.count("M") == 2 and "nan" not in html
    assert "null" in html and json.loads(html.split('json">')[1].split("</script>")[0])["low"] == 0
    losses = [step_record(n, loss=math.nan if n == 2 else 1.0) for n in range(1, 5)]
    assert charts(losses, (), memory="m")[0].note == "1 step not finite"


def test_a_smoothed_line_begins_at_its_first_value_and_follows_slowly() -> None:
    points = downsampled([(n, 1.0 if n < 200 else 2.0) for n in range(400)])
    means = [p[1] or 0.0 for p in smoothed(points)]
    assert means[0] == pytest.approx(1.0) and means[199] == pytest.approx(1.0)
    assert 1.05 < means[201] < 1.5 and means[-1] == pytest.approx(2.0, abs=1e-3)
    gap, after = smoothed([(1, None, 0.0, 0.0), (2, 3.0, 3.0, 3.0)])
    assert gap[1] is None and after == pytest.approx((2, 3.0, 3.0, 3.0))


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 100), [0, 20, 40, 60, 80, 100]),
        (Scale(-1.1, 3.2), [-1, 0, 1, 2, 3]),
        (Scale(0.0, 2e-4), [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (Scale(0.009, 1200, log=True), [0.01, 0.1, 1, 10, 100, 1000]),
        (Scale(0.9, 6, log=True), [1, 2, 5]),
        (Scale(1.01, 1.04, log=True), [1.01, 1.02, 1.03, 1.04]),
    ],
)
def test_ticks_are_round_values_within_the_scale(scale: Scale, ticks: list[float]) -> None:
    assert scale.ticks(4) == pytest.approx(ticks)


def test_the_largest_value_is_above_the_least_at_both_scales() -> None:
    for log in (False, True):
        scale = Scale(1.0, 100.0, log=log)
        assert scale.at(1.0) == 0 and scale.at(100.0) == pytest.approx(1) and 0 < scale.at(10.0) < 1


def test_a_logarithmic_scale_is_offered_only_where_every_value_has_a_logarithm() -> None:
    assert 'class="view log"' in drawn([1.0, 2.0], options=True)
    assert 'class="view log"' not in drawn([0.0, 2.0], options=True) and "smoothed" in drawn([0.0, 2.0], options=True)
    assert "checkbox" not in drawn([1.0, 2.0])


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 1.0], [-3.0, -3.0], [math.nan, math.nan], [1e-30, 1e30], [5.0]])
def test_any_values_are_drawn(values: list[float]) -> None:
    html = drawn(values, options=True)
    assert "<svg" in html and "nan" not in html.replace("finite", "") and "inf" not in html


def test_a_band_is_drawn_where_points_stand_for_several_values() -> None:
    assert 'class="band"' in drawn([float(n % 5) for n in range(5_000)])
    assert 'class="band"' not in drawn([1.0, 2.0])

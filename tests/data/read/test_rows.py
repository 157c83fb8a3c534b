"""How values of the data are shown in messages."""

import datetime
import decimal

import pytest

from launcher.data.read.rows import shown_under, shown_value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime.date(2020, 1, 1), "a value of type date"),
        (decimal.Decimal("1.5"), "a value of type Decimal"),
        (b"\xff", "a value of type bytes"),
        (10**5000, "a value of type int"),
        (("a", b""), "a list"),
        ({b"": object()}, "an object"),
        (float("nan"), "NaN"),
        ("\ud800\x1b", '"\\ud800\\u001b"'),
        ("é" * 500, '"' + "\\u00e9" * 12 + "\\u00..."),
    ],
    ids=lambda it: type(it).__name__,
)
def test_any_value_is_shown_short_and_in_ascii(value, text):
    assert shown_value(value) == text


def test_a_missing_key_differs_from_an_empty_one_and_names_the_keys_there_are():
    assert shown_under("a", {"a": None}) == "null"
    assert shown_under("a", {"b": None, "c\x1b": 1}) == 'no "a"; the keys are "b, c\\u001b"'
    assert shown_under("a", {}) == 'no "a"; it is empty'
    assert len(shown_under("a", {f"column {n}": n for n in range(100)})) < 120

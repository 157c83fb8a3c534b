"""How numbers and counts read on a page: thousands separators, counts with their noun."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


def whole(value: float) -> str:
    """A count, a rate or MiB: "75,312"; NaN and infinity by name."""
    return f"{value:,.0f}"


def loss(value: float) -> str:
    return f"{value:,.4f}"


def norm(value: float) -> str:
    """A gradient norm: three decimals, powers of ten when they would not fit a column."""
    return f"{value:.3f}" if value < 10_000 else f"{value:.2e}"


def rate(tokens: int, seconds: float) -> str:
    """Tokens per second, "-" when no time was measured."""
    return whole(tokens / seconds) if seconds > 0 else "-"


def counted(count: int, noun: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def counts(of: dict[str, int], noun: str) -> str:
    """ "assistant in 3,000 rows, all in 1 row"."""
    return ", ".join(f"{name} in {counted(count, noun)}" for name, count in of.items())


def extent(values: Sequence[int]) -> str:
    """One value, or the least and the greatest: "6", "6 to 9"."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def on_cpu(device: str) -> bool:
    """Whether a record's device is the CPU, where memory figures are the process's resident memory."""
    return device.lower().startswith("cpu")


def recipe_keys(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a resolved recipe by their dotted keys."""
    sections = {name: part if isinstance(part, dict) else {"": part} for name, part in recipe.items()}
    return {f"{name}.{key}".rstrip("."): value for name, part in sections.items() for key, value in part.items()}


def plain_text(value: Any) -> str:
    """A value of a recipe: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""How values read on the console: numbers with thousands separators, durations, and text that is not ours."""

import unicodedata
from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

# Controls, halves of surrogate pairs, line and paragraph separators, and format characters: those of direction reorder
# what stands beside them, those without width are not seen.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def literal(value: object, style: str | Style = "") -> Text:
    """Text of a user, a model or a library, as it is: no markup is read in it, and what a terminal would obey
    (control and format characters, lone surrogates) is shown as its escape. Line breaks and tabs stay."""
    return Text("".join(map(_visible, str(value))), style)


def _visible(char: str) -> str:
    if char in "\n\t" or unicodedata.category(char) not in _UNSEEN:
        return char
    return char.encode("unicode_escape").decode("ascii")


def whole(value: float) -> str:
    """A count, a rate or MiB: "75,312"; NaN and infinity by name."""
    return f"{value:,.0f}"


def loss(value: float) -> str:
    return f"{value:,.4f}"


def learning_rate(value: float) -> str:
    return f"{value:.2e}"


def norm(value: float) -> str:
    """A gradient norm: three decimals, powers of ten when they would not fit a column."""
    return f"{value:.3f}" if value < 10_000 else f"{value:.2e}"


def rate(tokens: int, seconds: float) -> str:
    """Tokens per second, "-" when no time was measured."""
    return whole(tokens / seconds) if seconds > 0 else "-"


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: "0:32", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def change(first: float, last: float) -> str:
    """From the first to the last value, with the relative change: "2.9134 → 1.4711 (-49.5 %)"."""
    relative = f" ({(last - first) / first:+.1%})".replace("%", " %") if first else ""
    return f"{loss(first)} → {loss(last)}{relative}"


def counted(count: int, noun: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def extent(values: Sequence[int]) -> str:
    """One value, or the least and the greatest: "6", "6 to 9"."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def on_cpu(device: str) -> bool:
    """Whether a record's device is the CPU, where memory figures are the process's resident memory."""
    return device.lower().startswith("cpu")

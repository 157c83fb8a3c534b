"""The page model: what a record says, as titles, tables, facts and lines. Data only.

A page builder makes a Page from a record; a renderer (report/render.py for the console) draws it.
Texts are plain: the renderer escapes whatever its medium would obey, and has a look of its own for each style.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from launcher.records.preview import TextPart

Style = Literal["", "strong", "dim", "label", "bar", "good", "warning", "bad", "alarm"]


@dataclass(frozen=True)
class Styled:
    """A text with a style."""

    text: str
    style: Style


Value: TypeAlias = str | Styled


def flagged(text: str, holds: bool) -> Value:
    """The text, styled as bad unless it is as it should be."""
    return text if holds else Styled(text, "bad")


@dataclass(frozen=True)
class Column:
    """One column: its header (a line break folds it), and a cell for each row; missing last cells are empty."""

    header: str
    cells: Sequence[Value]
    priority: int = 0  # 0 is always shown; where room is short, the highest numbers are left out first
    numeric: bool = True  # aligned to the right, and never wrapped


@dataclass(frozen=True)
class Table:
    """Columns side by side."""

    columns: Sequence[Column]
    footer_rows: int = 0  # number of last rows that are set apart


@dataclass(frozen=True)
class Facts:
    """Rows of a label and values, without a header. A label that has no style gets "label"."""

    rows: Sequence[tuple[Value, ...]]


@dataclass(frozen=True)
class Tokens:
    """The text of one document, with its supervised tokens, special tokens and line ends marked."""

    parts: Sequence[TextPart]


@dataclass(frozen=True)
class Figures:
    """Headline figures: what it is, the figure, and what to know of it."""

    rows: Sequence[tuple[str, Value, str]]


Point: TypeAlias = tuple[
    int, float | None, float, float
]  # x; mean, least and greatest of the values there (None: none)


@dataclass(frozen=True)
class Line:
    """A line of a chart, its points in the order of x."""

    name: str  # "" of a chart's only line
    points: Sequence[Point]
    dots: bool = False  # few measurements, each of which is shown


@dataclass(frozen=True)
class Chart:
    """Lines over the steps of a run. A medium that cannot draw leaves it out: its page has the figures in a table."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    note: str = ""
    options: bool = False  # whether a logarithmic scale and smoothing are offered


@dataclass(frozen=True)
class Section:
    """A title with a note, and the items under it; a Value is a line. A page does not show a section without items."""

    title: str
    items: Sequence["Item"] = ()
    note: str = ""
    style: Style = ""  # of the title
    folded: bool = False  # long: a medium that can shows it on request


Item: TypeAlias = Value | Table | Facts | Tokens | Figures | Chart | Section


@dataclass(frozen=True)
class Page:
    """Sections, under a head of title and facts where there is a title."""

    sections: Sequence[Section] = ()
    title: str = ""
    facts: Sequence[tuple[Value, ...]] = ()

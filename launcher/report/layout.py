"""The page: headings, and tables that leave columns out rather than squeeze them.

A table is given by its columns. Each has a priority: 0 is always shown; the others are taken in,
lowest number first, as far as the console is wide enough; what is left out is named under the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, JustifyMethod, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

PAGE_WIDTH = 120  # columns at most, however wide the terminal: lines longer than this are hard to follow
GAP = 2  # blanks between columns
INDENT = 2  # blanks before everything that stands under a heading
TABLE_BOX = box.HORIZONTALS
EVENT = "bold red"  # the style of what should not have happened


@dataclass(frozen=True)
class Column:
    """One column: a header (a line break folds it), and a cell for each row."""

    header: str
    cells: Sequence[Text]
    priority: int = 0
    numeric: bool = True

    @property
    def name(self) -> str:
        return self.header.replace("\n", " ").removesuffix(" MiB")

    @property
    def width(self) -> int:
        texts = [*self.header.split("\n"), *(line for cell in self.cells for line in cell.plain.split("\n"))]
        return max(map(cell_len, texts))


def page_width(console: Console) -> int:
    return min(console.width, PAGE_WIDTH)


def heading(console: Console, title: str, note: str = "") -> None:
    """A blank line, then "─ title  note ─────"."""
    text = Text.assemble((title, "bold cyan"), (f"  {note}" if note else "", "dim"))
    room = max(page_width(console) - cell_len(text.plain) - 4, 0)
    console.print()
    console.print(Text.assemble(("─ ", "dim"), text, (" " + "─" * room, "dim")), no_wrap=True, overflow="ellipsis")


def fitted(columns: Sequence[Column], width: int) -> tuple[list[Column], list[Column]]:
    """Split columns into those shown within `width` characters and those left out, both in their order."""
    room = width - INDENT + GAP
    shown: set[int] = set()
    for index, column in sorted(enumerate(columns), key=lambda item: item[1].priority):
        if column.priority == 0 or column.width + GAP <= room:
            shown.add(index)
            room -= column.width + GAP
    kept = [c for i, c in enumerate(columns) if i in shown]
    return kept, [c for i, c in enumerate(columns) if i not in shown]


def print_table(console: Console, columns: Sequence[Column], *, footer_rows: int = 0) -> None:
    """Print the columns side by side; the last `footer_rows` rows stand under a line of their own."""
    kept, left_out = fitted(columns, page_width(console))
    # The box puts one blank between columns and the padding another: together GAP.
    table = Table(box=TABLE_BOX, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0), border_style="dim")
    for column in kept:
        justify: JustifyMethod = "right" if column.numeric else "left"
        header = Text(column.header, "bold")
        table.add_column(header, justify=justify, no_wrap=column.numeric, vertical="bottom", overflow="fold")
    rows = list(zip(*(column.cells for column in kept), strict=True))
    for index, row in enumerate(rows):
        table.add_row(*row, end_section=footer_rows > 0 and index == len(rows) - footer_rows - 1)
    console.print(Padding(table, (0, 0, 0, INDENT), expand=False))
    if left_out:
        indented(console, Text("not shown at this width: " + ", ".join(c.name for c in left_out), "dim italic"))


def pairs(rows: Sequence[tuple[Text, RenderableType]], *, indent: int = INDENT) -> Padding:
    """Labels and values in two columns; the values wrap under themselves and a long word folds, never is cut."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in rows:
        grid.add_row(label, value)
    return Padding(grid, (0, 0, 0, indent), expand=False)


def indented(console: Console, text: Text) -> None:
    """Print a paragraph below a table, in line with its first column."""
    text.overflow = "fold"
    console.print(Padding(text, (0, 0, 0, INDENT), expand=False), width=page_width(console))

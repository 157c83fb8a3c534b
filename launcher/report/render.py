"""Draws a page on a console. Tables leave columns out rather than squeeze them, and say which."""

from collections.abc import Sequence
from itertools import zip_longest

from rich import box
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text

from launcher.credentials import masked_record
from launcher.report.console import literal, page_width
from launcher.report.pages import page_of
from launcher.report.pages.page import (
    Chart,
    Column,
    Facts,
    Figures,
    Page,
    Section,
    Style,
    Styled,
    Table,
    Tokens,
    Value,
)
from launcher.report.tokens import marks_of, tokens_text

GAP = 2  # blanks between columns
INDENT = 2  # blanks before everything that stands under a heading
STYLES: dict[Style, str] = {
    "": "", "strong": "bold", "dim": "dim", "label": "cyan", "bar": "blue", "good": "bold green", "warning": "yellow",
    "bad": "bold red", "alarm": "bold white on red",
}  # fmt: skip


def print_record(console: Console, record: object) -> None:
    """Print the page of a record that has one."""
    if page := page_of(masked_record(record)):
        print_page(console, page)


def print_page(console: Console, page: Page) -> None:
    """Print the head in a box, then each section after a blank line."""
    if page.title:
        panel = Panel(_grid(page.facts), title=literal(page.title, "bold"), title_align="left", border_style="dim cyan")
        console.print(panel, width=page_width(console))
    for section in page.sections:
        if section.items:
            console.print()
            _print_section(console, section)


def _print_section(console: Console, section: Section, *, nested: bool = False) -> None:
    if section.title:
        _print_heading(console, section, nested=nested)
    for item in section.items:
        match item:
            case Section():
                _print_section(console, item, nested=True)
            case Table():
                _print_table(console, item)
            case Facts() | Figures():
                _print_indented(console, _grid(item.rows))
            case Chart():
                pass
            case Tokens():
                _print_indented(console, tokens_text(item.parts, marks_of(console)))
            case _:
                _print_indented(console, _text(item))


def _print_heading(console: Console, section: Section, *, nested: bool) -> None:
    """ "─ title  note ─────" across the page; of a nested section "  ── title  note ─────"."""
    style = STYLES[section.style] or ("cyan" if nested else "bold cyan")
    line = Text.assemble(("  ── " if nested else "─ ", "dim"), literal(section.title, style))
    line.append_text(literal(f"  {section.note} " if section.note else " ", "dim"))
    line.append("─" * (page_width(console) - 1 - line.cell_len), "dim")
    console.print(line, no_wrap=True, overflow="ellipsis")


def _print_table(console: Console, table: Table) -> None:
    columns = _fitting(table.columns, page_width(console) - INDENT)
    # The box puts one blank between columns and the padding another: together GAP.
    grid = RichTable(box=box.HORIZONTALS, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    grid.border_style = "dim"
    for column in columns:
        grid.add_column(
            Text(column.header, "bold"), justify="right" if column.numeric else "left", no_wrap=column.numeric,
            vertical="bottom", overflow="fold",
        )  # fmt: skip
    rows = list(zip_longest(*(column.cells for column in columns), fillvalue=""))
    for index, row in enumerate(rows):
        grid.add_row(*map(_text, row), end_section=index == len(rows) - table.footer_rows - 1)
    _print_indented(console, grid)
    if left_out := [column.header.replace("\n", " ") for column in table.columns if column not in columns]:
        _print_indented(console, Text(f"not shown at this width: {', '.join(left_out)}", "dim italic"))


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns that fit into `width` characters, chosen by priority, in their order."""
    room, fitting = width + GAP, []
    for column in sorted(columns, key=lambda column: column.priority):
        lines = "\n".join([column.header, *(_text(cell).plain for cell in column.cells)]).split("\n")
        needed = max(map(cell_len, lines)) + GAP
        if column.priority == 0 or needed <= room:
            fitting.append(column)
            room -= needed
    return [column for column in columns if column in fitting]


def _grid(rows: Sequence[tuple[Value, ...]]) -> RichTable:
    """Rows of a label and values. Values wrap under themselves, and a word that is too long folds: nothing is cut."""
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    for _ in rows[0][1:]:
        grid.add_column(overflow="fold")
    for label, *values in rows:
        grid.add_row(_text(label, "label"), *map(_text, values))
    return grid


def _text(value: Value, default: Style = "") -> Text:
    text, style = (value.text, value.style) if isinstance(value, Styled) else (value, default)
    return literal(text, STYLES[style])


def _print_indented(console: Console, content: RenderableType) -> None:
    if isinstance(content, Text):
        content.overflow = "fold"
    console.print(Padding(content, (0, 0, 0, INDENT), expand=False), width=page_width(console))

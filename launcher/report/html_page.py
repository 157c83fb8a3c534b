"""Draws a page as one HTML file that needs nothing else: no request is made, and it is complete without JavaScript.

Every text is escaped; besides, the policy in the head lets no script run but the one that reads charts out.
"""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from itertools import count, zip_longest
from pathlib import Path

from launcher.credentials import masked_record
from launcher.records.past import UnfinishedRun
from launcher.records.run import RunRecord
from launcher.report.chart import chart_html
from launcher.report.console import visible
from launcher.report.pages.page import Chart, Column, Facts, Figures, Page, Section, Style, Styled, Table, Tokens, Value
from launcher.report.pages.sections import BAR_WIDTH
from launcher.report.pages.web import web_page

PAGE_BEGIN = '<!doctype html>\n<html lang="en" data-by="qlora-launcher">'


def html_of(run: RunRecord | UnfinishedRun) -> str:
    """The page of a run, credentials masked."""
    return document(web_page(masked_record(run)))


def document(page: Page) -> str:
    """The page as a whole file."""
    css, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    under = "".join(f"<p>{' · '.join(map(_text, row))}</p>" for row in page.facts)
    numbers = count()
    return (
        f'{PAGE_BEGIN}\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(page.title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"<header><h1>{_text(page.title)}</h1>{under}</header>\n<main>\n"
        f"{''.join(_section(section, numbers) for section in page.sections if section.items)}</main>\n"
        f"<footer>written by qlora-launcher</footer>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _section(section: Section, numbers: "count[int]", *, level: int = 2) -> str:
    note = f"<small>{_text(section.note)}</small>" if section.note else ""
    title = f'<h{level} class="{section.style}">{_text(section.title)}{note}</h{level}>' if section.title else ""
    name = "".join(char for char in section.title.lower() if "a" <= char <= "z")
    content = "".join(_item(item, numbers, level) for item in section.items)
    if section.folded:
        return f'<details class="section {name}"><summary>{title}</summary>{content}</details>\n'
    return f'<section class="{name}">{title}{content}</section>\n'


def _item(item: object, numbers: "count[int]", level: int) -> str:
    match item:
        case Section():
            return _section(item, numbers, level=level + 1)
        case Table():
            return _table(item)
        case Facts():
            return f'<div class="facts">{"".join(map(_fact, item.rows))}</div>\n'
        case Figures():
            return f'<div class="figures">{"".join(_figure(*row) for row in item.rows)}</div>\n'
        case Chart():
            return chart_html(item, next(numbers))
        case Tokens():
            return f"<pre>{_text(''.join(part.text for part in item.parts))}</pre>\n"
        case str() | Styled():
            return f"<p>{_value(item)}</p>\n"
    raise TypeError(f"a page holds no {type(item).__name__}")


def _table(table: Table) -> str:
    """A table that scrolls inside itself where it is wider than the page."""
    heads = "".join(f"<th{_kind(column)}>{_text(column.header)}</th>" for column in table.columns)
    rows = list(zip_longest(*(column.cells for column in table.columns), fillvalue=""))
    kinds = [_kind(column) for column in table.columns]
    lines = [
        f"<tr>{''.join(f'<td{kind}>{_value(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    ]
    body, foot = lines[: len(lines) - table.footer_rows], lines[len(lines) - table.footer_rows :]
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody>'
        f"<tfoot>{''.join(foot)}</tfoot></table></div>\n"
    )


def _kind(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _fact(row: Sequence[Value]) -> str:
    label, *values = row
    texts = "".join(f"<div>{_value(value)}</div>" for value in values)
    return f'<div class="fact of{len(values)}"><div>{_value(label, "label")}</div>{texts}</div>'


def _figure(name: str, figure: Value, note: str) -> str:
    return f"<div><p>{_text(name)}</p><b>{_value(figure)}</b><p>{_text(note)}</p></div>"


def _value(value: Value, default: Style = "") -> str:
    text, style = (value.text, value.style or default) if isinstance(value, Styled) else (value, default)
    if style == "bar":
        return f'<i class="bar" style="width:{100 * len(text) / BAR_WIDTH:.0f}%"></i>'
    return f'<span class="{style}">{_text(text)}</span>' if style else _text(text)


def _text(value: Value) -> str:
    return escape(visible(value.text if isinstance(value, Styled) else value))

"""Runs side by side: a column for each, headed by a letter that the head of the page explains."""

from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from launcher.records.past import ComparisonRecord
from launcher.report.pages import formatting
from launcher.report.pages.formatting import counted, plain_text, whole
from launcher.report.pages.page import Column, Page, Section, Styled, Table, Value, flagged
from launcher.report.pages.sections import notes, sampled

LOSS_ROWS = 12  # rows of each loss table
NO_CHANGE = ("steps", "tokens", "compilations", "planned graphs", "graph breaks", "recompiles")  # shown as they are
VERDICTS: dict[bool | None, Value] = {True: Styled("PASS", "good"), False: Styled("FAIL", "alarm"), None: ""}


def comparison_page(record: ComparisonRecord) -> Page:
    """What differs, losses at equal steps, what each run cost, which verdicts hold."""
    facts = list(zip(ascii_uppercase, record.runs, strict=False))
    return Page(list(_sections(record)), title=f"comparison of {counted(len(record.runs), 'run')}", facts=facts)


def _sections(record: ComparisonRecord) -> Iterator[Section]:
    differ = f"{len(record.recipe)} of {counted(record.keys, 'key')} differ"
    yield _side_by_side("Recipe", "key", _texts(record.recipe), note=differ if record.recipe else "no key differs")
    yield _side_by_side(
        "Chosen or found", "of the start", _texts(record.start), note="what differs" if record.start else ""
    )
    yield _side_by_side(
        "Versions", "package", {name: [v or "-" for v in versions] for name, versions in record.versions.items()}
    )
    for title, losses in (("Loss at equal steps", record.losses), ("Eval loss at equal steps", record.eval_losses)):
        rows = {f"{step:,}": [formatting.loss(v) for v in losses[step]] for step in sampled(list(losses), LOSS_ROWS)}
        yield _side_by_side(title, "step", rows, numeric=True)
        if not rows:
            yield Section(title, ["the runs have no step in common"])
    figures = {name: _figures(name, values) for name, values in record.figures.items()}
    yield _side_by_side("Figures", "", figures, numeric=True, note="in brackets the change from A")
    yield _side_by_side("Verdicts", "claim", {c: [VERDICTS[h] for h in holds] for c, holds in record.verdicts.items()})
    yield notes(record.notes)


def _side_by_side(
    title: str, head: str, rows: Mapping[str, Sequence[Value]], *, numeric: bool = False, note: str = ""
) -> Section:
    runs = len(next(iter(rows.values()), ()))
    columns = [Column(head, list(rows), numeric=False)]
    columns += [Column(ascii_uppercase[i], [cells[i] for cells in rows.values()], numeric=numeric) for i in range(runs)]
    items: list[Table | Value] = [Table(columns)] if rows else [Styled(note, "dim")] if note else []
    return Section(title, items, note if rows else "")


def _texts(rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Value]]:
    return {key: [plain_text(value) for value in values] for key, values in rows.items()}


def _figures(name: str, values: Sequence[float | None]) -> list[Value]:
    """A figure of each run; behind the first the relative change from it."""
    first, cells = values[0], list[Value]()
    for value in values:
        if value is None:
            cells.append("-")
            continue
        text = formatting.loss(value) if "loss" in name else f"{value:,.1f}" if name.endswith("s") else whole(value)
        text = whole(value) if name in NO_CHANGE or name.endswith("tokens/s") else text
        if name not in NO_CHANGE and first and value != first:
            text += f" ({100 * (value / first - 1):+.1f} %)"
        cells.append(flagged(text, not (name in ("graph breaks", "recompiles") and value)))
    return cells

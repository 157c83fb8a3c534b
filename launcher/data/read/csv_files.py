"""A .csv or .tsv file with a header as raw rows; every cell stays text.

What divides the cells is told from the header alone: of the usual marks the one that divides it.

Readers of whole tables are not used: they guess types ("007" becomes 7, "NA" becomes null), and shift or fill the cells
of rows that have too many or too few.
"""

import csv
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, islice
from pathlib import Path

from launcher.data.read.rows import RawRow, RowFault, shown_value, too_large
from launcher.data.read.tables import distinct
from launcher.data.read.text_files import lines
from launcher.errors import DataError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
MAX_HEADER_LINES, MAX_HEADER_BYTES = 100, 2**16  # of one with quoted line ends: each line has it divided anew
_UNFINISHED = "unexpected end of data"  # as csv says it
CSV_REMEDY = (
    "Close its quotes, cut it into several, or raise data.max_row_mib. "
    "Nothing tells where the next row begins, so data.bad_rows=skip does not help."
)


def read_csv(path: Path, name: str, max_bytes: int, *, delimiter: str | None = None) -> Iterator[RawRow | RowFault]:
    """`delimiter`: what divides the cells; None: told from the header.

    Raises DataError when the header cannot be read or divided, or a row is longer than `max_bytes`.
    """
    csv.field_size_limit(max_bytes)
    text_lines = _TextLines(path, name, max_bytes)
    header, delimiter = _header(text_lines, name, delimiter)
    columns = distinct(header, name)
    table = csv.reader(text_lines, strict=True, delimiter=delimiter)
    for number in count(1):
        where = f"{name} row {number}"
        text_lines.begin_row()
        faults, cells = text_lines.faults, list[str]()
        try:
            cells = next(filter(None, table), [])  # past blank lines
            if not cells:
                return
            if len(cells) != len(columns):
                rule = f"a row has as many cells as the header, {len(columns)}."
                faults.append(_fault(where, rule, f"{len(cells)} cells, on line {text_lines.line}"))
        except csv.Error as error:
            rule = f"cells are divided by {_named(delimiter)}, or quoted."
            faults.append(_fault(where, rule, f"{error}, line {text_lines.line}"))
        yield faults[0] if faults else RawRow(where, dict(zip(columns, cells, strict=True)))


class _TextLines(Iterator[str]):
    """The lines of the file. One that is not UTF-8 adds to the `faults` of its row, and does not end it.

    Raises RowFault for a row that is longer than `max_bytes`: it may have a quote that is never closed, so that nothing
    tells where the next row begins.
    """

    def __init__(self, path: Path, name: str, max_bytes: int) -> None:
        self._lines, self._max_bytes = lines(path, name, max_bytes), max_bytes
        self.begin_row()

    def begin_row(self) -> None:
        self.faults: list[RowFault] = []
        self._row_bytes = self._first = 0

    def __next__(self) -> str:
        line = next(self._lines)
        self.line = line.line
        self._first = self._first if self._row_bytes else line.line
        self._row_bytes += len(line.raw)
        if self._row_bytes > self._max_bytes:
            raise too_large(f"{line.name}:{self._first}", "a row of more", self._max_bytes, CSV_REMEDY)
        try:
            return line.decoded()
        except RowFault as fault:
            self.faults.append(fault)
            return line.raw.decode(errors="replace")


def told_delimiter(path: Path, max_bytes: int) -> str | None:
    """A mark that divides the cells of this file and that its name does not say; None where there is none, or the
    header cannot be read."""
    csv.field_size_limit(max_bytes)
    with suppress(DataError):
        _, delimiter = _header(_TextLines(path, str(path), max_bytes), str(path), None)
        return None if delimiter == _by_name(str(path)) else delimiter
    return None


def _by_name(name: str) -> str:
    return "\t" if name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".tsv") else ","


def _header(text_lines: _TextLines, name: str, delimiter: str | None) -> tuple[list[str], str]:
    """The columns, and what divides them. Raises DataError where no mark or several do, and none is given, or where a
    quote is not closed."""
    usual = delimiter or _by_name(name)
    lines = list(islice(filter(str.strip, text_lines), 1))
    parsed = {mark: _parsed_line(lines, mark) for mark in ([delimiter] if delimiter else DELIMITERS)}
    while _UNFINISHED in parsed.values() and len(lines) < MAX_HEADER_LINES and sum(map(len, lines)) < MAX_HEADER_BYTES:
        if (line := next(text_lines, None)) is None:
            break
        lines.append(line)  # after a quoted line end
        parsed = {mark: _parsed_line(lines, mark) for mark in parsed}
    if text_lines.faults:
        raise text_lines.faults[0]
    _check_quotes(name, lines, parsed)
    dividing = [mark for mark, cells in parsed.items() if isinstance(cells, list) and len(cells) > 1]
    if len(dividing) > 1 and not (usual == "\t" and usual in dividing):
        raise DataError(
            f"{name}: the header tells what divides the cells of a table.\n"
            f"Found: {shown_value(lines[0].strip())}, divided by {' and by '.join(map(_named, dividing))}.\n"
            f"Say which it is beside the source's path, such as delimiter: {shown_value(dividing[0])}."
        )
    chosen = usual if usual in dividing or not dividing else dividing[0]
    cells = parsed[chosen]
    if isinstance(cells, str):
        raise _fault(name, "the first line of a table is its header.", cells)
    return cells, chosen


def _check_quotes(name: str, lines: list[str], parsed: dict[str, list[str] | str]) -> None:
    """Raise DataError where a mark leaves a quote open: nothing tells where the header ends."""
    if unfinished := [mark for mark, cells in parsed.items() if cells == _UNFINISHED]:
        columns = {mark: len(cells) for mark, cells in parsed.items() if isinstance(cells, list)}
        mark = shown_value(max(columns, key=columns.__getitem__)) if columns else ""
        named = f", or say beside the path what divides the cells, such as delimiter: {mark}" if mark else ""
        raise DataError(
            f"{name}: a table begins with its header; a quote that opens in it is closed within {MAX_HEADER_LINES} "
            f"lines and {MAX_HEADER_BYTES // 1024} KiB.\n"
            f"Found: {shown_value(lines[0].strip())}, divided by {_named(unfinished[0])}, with a quote that is open "
            f"after {len(lines)} line(s).\n"
            f"Close the quote in the header, or remove it{named}."
        )


def _parsed_line(lines: list[str], delimiter: str) -> list[str] | str:
    """The cells of a line, or what is wrong with it."""
    try:
        return next(csv.reader(lines, strict=True, delimiter=delimiter), [])
    except csv.Error as error:
        return str(error)


def _named(delimiter: str) -> str:
    return DELIMITERS.get(delimiter, repr(delimiter))


def _fault(where: str, rule: str, found: str) -> RowFault:
    return RowFault("broken_csv", where=where, rule=rule, found=found)

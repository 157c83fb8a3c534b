"""Every row of docs/faults.md has a test, and every test of a fault has a row."""

import ast
import re
from pathlib import Path

from tests.conftest import ROOT

PAGE, FOLDER = ROOT / "docs" / "faults.md", ROOT / "tests" / "faults"
ROWS = 52


def rows_of(text: str) -> list[int]:
    """The numbers in the first column of the page's table."""
    return [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]


def fault_tests(folder: Path) -> dict[str, int]:
    """The test functions of the folder that are named after a fault, and the number of each."""
    return {
        node.name: int(match[1])
        for path in sorted(folder.rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (match := re.match(r"test_fault_(\d+)_", node.name))
    }


def table_faults(text: str, folder: Path, *, last: int) -> list[str]:
    """What page and tests lack of each other. Rows are numbered from 1 to `last`."""
    rows, tested = rows_of(text), fault_tests(folder)
    faults = [] if rows == [*range(1, last + 1)] else [f"the page's rows must be 1 to {last}; they are {rows}"]
    faults += [f"row {row} has no test" for row in sorted({*rows} - {*tested.values()})]
    return faults + [f"{name} names no row" for name, row in tested.items() if row not in rows]


def test_every_fault_of_the_page_is_tested_and_every_test_of_a_fault_has_its_row() -> None:
    assert table_faults(PAGE.read_text(encoding="utf-8"), FOLDER, last=ROWS) == []


def test_a_row_without_a_test_a_test_without_a_row_and_a_lost_row_are_found(tmp_path: Path) -> None:
    text = "| # | fault | how it ends |\n|---|---|---|\n| 1 | a | b |\n| 2 | c | 3 |\n"
    (tmp_path / "test_a.py").write_text("def test_fault_01_a(): ...\ndef test_other(): ...\n")
    assert table_faults(text, tmp_path, last=2) == ["row 2 has no test"]
    (tmp_path / "test_b.py").write_text("class TestB:\n    async def test_fault_02_b(self): ...\n")
    assert table_faults(text, tmp_path, last=2) == []
    (tmp_path / "test_c.py").write_text("def test_fault_03_c(): ...\n# def test_fault_04_d(): ...\n")
    assert table_faults(text, tmp_path, last=2) == ["test_fault_03_c names no row"]
    [lost, *_] = table_faults(text.replace("| 1 | a | b |\n", ""), tmp_path, last=2)
    assert lost == "the page's rows must be 1 to 2; they are [2]"

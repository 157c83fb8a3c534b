"""mode=check as a page."""

from launcher.records.check import Check, CheckRecord
from tests.support.records import HOSTILE, bad, section, shown

FAILED = Check("disk", False, "needs 5; 3 are free.", "Free space.", code=7)


def test_each_check_has_its_row_and_a_failure_its_remedy() -> None:
    record = CheckRecord("own", "base", (Check("packages", True, "fine"), FAILED))
    text = shown(record)
    lines = section(text, "Checks")
    assert lines[0].startswith("Checks 1 of 2 hold")
    assert lines[1:4] == ["✓ PASS packages fine", "✗ FAIL disk needs 5; 3 are free.", "Free space."]
    assert "check of recipe own" in text and bad(record) == []
    assert record.failures == (FAILED,) and not record.as_report()["holds"]


def test_a_hostile_text_stays_text() -> None:
    assert "\x1b" not in shown(CheckRecord(HOSTILE, HOSTILE, (Check(HOSTILE, False, HOSTILE, HOSTILE),)))

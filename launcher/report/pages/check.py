"""mode=check as a page: a row for each thing that a run needs."""

from launcher.records.check import Check, CheckRecord
from launcher.report.pages.page import Facts, Page, Section, Styled, Value


def check_page(record: CheckRecord) -> Page:
    """All checks, with the remedy of those that do not hold."""
    note = f"{len(record.checks) - len(record.failures)} of {len(record.checks)} hold"
    return Page(
        title=f"check of recipe {record.recipe}",
        facts=[("model", record.model)],
        sections=[Section("Checks", [Facts([_row(check) for check in record.checks])], note)],
    )


def _row(check: Check) -> tuple[Value, Value, Value]:
    if check.holds:
        return Styled("✓ PASS", "good"), check.name, Styled(check.found, "dim")
    return Styled("✗ FAIL", "alarm"), check.name, Styled("\n".join(filter(None, (check.found, check.remedy))), "strong")

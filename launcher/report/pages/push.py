"""mode=push as a page: where the model is now."""

from launcher.records.push import PushRecord
from launcher.report.pages.formatting import counted, whole
from launcher.report.pages.page import Facts, Page, Section, Styled, Value
from launcher.report.pages.sections import note_facts


def push_page(record: PushRecord) -> Page:
    """The facts, then the address, last."""
    size = sum(record.files.values()) / 2**20
    facts: list[tuple[Value, ...]] = [
        ("folder", record.folder),
        ("pushed", f"{counted(len(record.files), 'file')}, {whole(size)} MiB, in {record.elapsed_s:,.1f} s"),
        *([("left out", ", ".join(record.left_out))] if record.left_out else []),
        *note_facts(record.notes),
    ]
    seen: Value = "private" if record.private else Styled("public: everyone can read it", "warning")
    proved: list[tuple[Value, ...]] = [("verdicts", Styled("unproven; the card says so", "bad"))]
    where: list[tuple[Value, ...]] = [
        ("repository", record.url),
        ("visibility", seen),
        *(proved if record.unproven else []),
        ("commit", record.commit_url),
    ]
    return Page(title=f"push to {record.repository}", facts=facts, sections=[Section("", [Facts(where)])])

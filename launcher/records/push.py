"""What mode=push put on the hub: a plain frozen record. Shown by report/pages/push.py, written to report=PATH."""

from dataclasses import asdict, dataclass
from typing import Any

from launcher.records.run import REPORT_SCHEMA


@dataclass(frozen=True, kw_only=True)
class PushRecord:
    """A commit on the hub."""

    folder: str
    repository: str  # owner/name
    url: str
    commit: str
    commit_url: str
    private: bool
    unproven: bool  # a verdict does not hold; the card says which
    files: dict[str, int]  # bytes by path in the repository
    left_out: tuple[str, ...]  # of the folder
    elapsed_s: float
    notes: tuple[str, ...] = ()

    def as_report(self) -> dict[str, Any]:
        """The JSON of report=PATH (its keys are public: add, never rename)."""
        return {"schema": REPORT_SCHEMA, "mode": "push", **asdict(self)}

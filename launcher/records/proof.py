"""What records with verdicts have in common: of mode=parity, mode=bench and mode=export. Stdlib only."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from launcher.records.run import REPORT_SCHEMA, CompileRecord, StartRecord, Verdict


@dataclass(frozen=True, kw_only=True)
class JudgedRecord:
    """A comparison, and whether what it claims holds."""

    mode: ClassVar[str]
    rule: ClassVar[str]  # how the message about claims that do not hold begins
    remedy: ClassVar[str]  # and how it ends

    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)

    @property
    def failure(self) -> str:
        """The message of the error where a claim does not hold: rule, figures, remedy, in at most five lines."""
        broken = [f"{verdict.claim}: {verdict.evidence}"[:300] for verdict in self.verdicts if not verdict.holds]
        return "\n".join([self.rule, *broken[:3], self.remedy])

    def as_report(self) -> dict[str, Any]:
        """The JSON of report=PATH (its keys are public: add, never rename)."""
        return {"schema": REPORT_SCHEMA, "mode": self.mode, "holds": self.holds, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class ProofRecord(JudgedRecord):
    """A comparison of two ways to compute the same."""

    recipe: dict[str, Any]  # resolved
    start: StartRecord
    compile: CompileRecord

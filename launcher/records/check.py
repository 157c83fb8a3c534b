"""What mode=check shows: plain frozen records. Stdlib only."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """Something that a run needs, and whether it is there."""

    name: str
    holds: bool
    found: str  # where it does not hold: the rule and the value
    remedy: str = ""
    code: int = 0  # with which a run would end


@dataclass(frozen=True)
class CheckRecord:
    """All that a run needs: the record of mode=check."""

    recipe: str  # its name or path
    model: str  # hub id or folder
    checks: tuple[Check, ...]

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.holds)

    def as_report(self) -> dict[str, Any]:
        """The report of mode=check (its keys are public: add, never rename)."""
        return {"schema": 1, "holds": not self.failures, **asdict(self)}
